"""What all feeds share: packing, proof, columns, drift; each for CSV and for JSON Lines where the body matters."""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kbsync.errors import SourceError, SourceInvalid, SourceUnavailable
from kbsync.facts import Provenance, Snapshot
from kbsync.observe import observe
from tests.faultserver import FaultServer, answer, endless
from tests.feeds import BODIES, CSV, connector, pairs, read, reasons
from tests.ledgers import opened, settled, sync
from tests.test_signature import BODY, KEY, LEGACY, PREHASHED

STARS = {"Vega": "Lyr", "Deneb": "Cyg"}
# Made by minisign 0.11 with the key of test_signature.py: `minisign -S -t 'stars of today'` of CSV.
SIGNED_CSV = b"""untrusted comment: signature from minisign secret key
RUQavhWmkNJi4pBvEOeaxU52eUyKgiAoWOcMr7LRTPrBzZg4Ax3HgadUETuqr3GTeQ23kgjtZ/xqFnWQJmOgtgdfF/uwusiG3wk=
trusted comment: stars of today
jC0pBPZbTa3R8XKb02mIDeXgKR7XZeqTDZuqy2YDrolRsOSgt2aEN1sLl8stxIPPWXEg4z29l+bm/QMox4E5Cw==
"""


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with FaultServer() as running:
        yield running


def zipped(body: bytes) -> bytes:
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("feed", body)
        return buffer.getvalue()


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zipped])
def test_a_packed_feed_says_what_the_plain_one_says(tmp_path: Path, kind: str, pack: Any) -> None:
    """The provenance has the hash of the body as it lay there."""
    body = pack(BODIES[kind].encode())
    snapshot = read(tmp_path, body, kind)
    assert pairs(snapshot) == STARS
    assert [claim.subject.id for claim in snapshot.claims] == ["hip:91262", "hip:102098"]
    assert snapshot.provenance.body_sha256 == hashlib.sha256(body).hexdigest()
    assert snapshot.complete


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("media", ["application/gzip", "application/octet-stream", "text/plain"])
def test_a_packed_feed_comes_from_an_address_too(tmp_path: Path, server: FaultServer, kind: str, media: str) -> None:
    """Whatever the server calls it, and packed once more for the way."""
    url = server.on("/stars.gz", answer(gzip.compress(BODIES[kind].encode()), kind=media, zipped=True))
    assert pairs(connector(tmp_path, kind, location=url).fetch(None)) == STARS


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("snapshot", ["complete", "partial"])
def test_a_feed_whose_end_nothing_proves_is_refused(
    tmp_path: Path, server: FaultServer, kind: str, snapshot: str
) -> None:
    """Without length, compression, sum or signature a cut feed looks like a shorter one, or has half a value."""
    body = BODIES[kind].encode()
    url = server.on("/stars", endless(body, kind="text/plain"))
    with pytest.raises(SourceInvalid, match="nothing says where the answer ends") as caught:
        connector(tmp_path, kind, location=url, snapshot=snapshot).fetch(None)
    assert "Content-Length" in caught.value.hint
    assert "sha256" in caught.value.hint
    assert pairs(connector(tmp_path, kind, location=url, sha256=hashlib.sha256(body).hexdigest()).fetch(None)) == STARS
    packed = server.on("/stars.gz", endless(gzip.compress(body), kind="application/gzip"))
    assert pairs(connector(tmp_path, kind, location=packed).fetch(None)) == STARS


@pytest.mark.parametrize("kind", BODIES)
def test_a_feed_that_is_something_else_is_refused(tmp_path: Path, server: FaultServer, kind: str) -> None:
    """A login page, under its own name or another's."""
    for media in ("text/html", "text/plain"):
        url = server.on("/page", answer(b"<html>\nlog in\n</html>\n", kind=media))
        with pytest.raises(SourceInvalid, match=r"not such a feed|no column|no line is a JSON object"):
            connector(tmp_path, kind, location=url).fetch(None)


def test_what_is_unpacked_is_capped(tmp_path: Path) -> None:
    """`max_bytes` is about the rows, too, not only about what is fetched."""
    with pytest.raises(SourceInvalid, match=r"stars\.csv: is larger than `max_bytes` when it is unpacked"):
        read(tmp_path, gzip.compress(CSV.encode() + b"\n" * 100_000), max_bytes=50_000)


def test_a_damaged_archive_changes_nothing(tmp_path: Path) -> None:
    """One line that names the file."""
    with pytest.raises(SourceInvalid, match=r"stars\.csv: is a damaged gzip archive"):
        read(tmp_path, gzip.compress(CSV.encode())[:-9], compression="gzip")


# -- proof


def test_a_pinned_sum_is_checked_before_anything_is_read(tmp_path: Path) -> None:
    """The right one is recorded; a wrong one names both, and no row is looked at."""
    assert read(tmp_path, CSV, sha256=hashlib.sha256(CSV.encode()).hexdigest()).provenance.verified == "sha256"
    with pytest.raises(SourceInvalid, match=f"stars.csv: its sha256 is .*, not {'0' * 64}"):
        read(tmp_path, "not a table", sha256="0" * 64)


def test_a_sum_may_lie_beside_the_feed(tmp_path: Path, server: FaultServer) -> None:
    """As a file or at an address, relative to the feed's own; it is asked for with every fetch."""
    digest = hashlib.sha256(CSV.encode()).hexdigest()
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  other.csv\n{digest}  stars.csv\n")
    assert read(tmp_path, CSV, sha256="SHA256SUMS").provenance.verified == "sha256"
    url = server.on("/feeds/stars.csv", answer(CSV.encode()))
    server.on("/feeds/stars.csv.sha256", answer(f"{digest}  stars.csv\n".encode(), kind="text/plain"))
    found = connector(tmp_path, location=url, sha256="stars.csv.sha256")
    assert found.fetch(None).provenance.verified == "sha256"
    server.on("/feeds/stars.csv.sha256", answer(f"{'1' * 64}\n".encode(), kind="text/plain"))
    with pytest.raises(SourceInvalid, match="its sha256 is"):
        found.fetch(None)


def test_a_signature_is_checked(tmp_path: Path) -> None:
    """The key and the trusted comment are recorded; the signature lies beside the feed by default."""
    (tmp_path / "stars.csv.minisig").write_bytes(SIGNED_CSV)
    provenance = read(tmp_path, CSV, minisign={"public_key": KEY}).provenance
    assert provenance.verified == "minisign E262D290A615BE1A (stars of today)"
    (tmp_path / "elsewhere").write_bytes(SIGNED_CSV)
    both = {"minisign": {"public_key": KEY, "signature": "elsewhere"}, "sha256": provenance.body_sha256}
    assert read(tmp_path, CSV, **both).provenance.verified == f"sha256; {provenance.verified}"


def test_a_signature_comes_from_an_address(tmp_path: Path, server: FaultServer) -> None:
    """Of the feed's own path, its query string kept; and a signed archive is proven as it was published."""
    url = server.on("/signed.csv", answer(CSV.encode()))
    server.on("/signed.csv.minisig", answer(SIGNED_CSV, kind="application/octet-stream"))
    found = connector(tmp_path, location=f"{url}?key=1", minisign={"public_key": KEY})
    assert (found.fetch(None).provenance.verified or "").startswith("minisign E262D290A615BE1A")
    assert [request.path for request in server.requests[-2:]] == ["/signed.csv?key=1", "/signed.csv.minisig?key=1"]


@pytest.mark.parametrize("signature", [PREHASHED, LEGACY, b"", b"<html>not found</html>"])
def test_a_wrong_signature_refuses_the_feed(tmp_path: Path, signature: bytes) -> None:
    """Good signatures of another body among them."""
    (tmp_path / "stars.csv.minisig").write_bytes(signature)
    assert CSV.encode() != BODY
    with pytest.raises(SourceInvalid, match=r"source stars: stars\.csv: the signature"):
        read(tmp_path, CSV, minisign={"public_key": KEY})


def test_a_missing_signature_refuses_the_feed(tmp_path: Path, server: FaultServer) -> None:
    """A file may still come; an address that has none is wrong."""
    with pytest.raises(SourceUnavailable, match=r"stars\.csv\.minisig: No such file"):
        read(tmp_path, CSV, minisign={"public_key": KEY})
    url = server.on("/unsigned.csv", answer(CSV.encode()))
    with pytest.raises(SourceInvalid, match="status 404"):
        connector(tmp_path, location=url, minisign={"public_key": KEY}).fetch(None)


def test_a_signature_of_the_feed_as_published(tmp_path: Path) -> None:
    """What was signed unpacked is not what is there packed."""
    (tmp_path / "stars.csv.minisig").write_bytes(SIGNED_CSV)
    with pytest.raises(SourceInvalid, match="another body"):
        read(tmp_path, gzip.compress(CSV.encode()), minisign={"public_key": KEY})


def test_what_vouches_for_a_feed_lives_on(tmp_path: Path, server: FaultServer) -> None:
    """304 says that the body is the one that was proven; under another key it is fetched and proven again."""
    url = server.on("/etag.csv", answer(CSV.encode(), headers={"ETag": '"1"'}))
    server.on("/etag.csv.minisig", answer(SIGNED_CSV))
    first = connector(tmp_path, location=url, minisign={"public_key": KEY}).fetch(None).provenance
    again = connector(tmp_path, location=url, minisign={"public_key": KEY}).fetch(first)
    server.on("/etag.csv", answer(status=304))
    again = connector(tmp_path, location=url, minisign={"public_key": KEY}).fetch(first)
    assert (again.not_modified, again.provenance.verified) == (True, first.verified)
    server.on("/etag.csv", answer(CSV.encode(), headers={"ETag": '"1"'}))
    unsigned = connector(tmp_path, location=url).fetch(first)
    assert "if-none-match" not in server.requests[-1].headers
    assert unsigned.provenance.verified is None


@pytest.mark.parametrize("beside", ["../secret", "/etc/passwd"])
def test_what_proves_a_feed_lies_inside_the_allowed_folders(tmp_path: Path, beside: str) -> None:
    """A signature's path is no way out."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(SIGNED_CSV)
    for keys in ({"sha256": beside}, {"minisign": {"public_key": KEY, "signature": beside}}):
        with pytest.raises((ValidationError, SourceError), match="outside the folders"):
            read(folder, CSV, **keys)


@pytest.mark.parametrize(
    "body",
    [CSV.replace("Lyr", "Cet"), CSV.replace("con", "kon"), gzip.compress(CSV.encode())[:-1], b"\xff"],
    ids=["another value", "another column", "cut", "no text"],
)
def test_a_refused_feed_leaves_the_ledger_as_it_was(tmp_path: Path, body: str | bytes) -> None:
    """A wrong signature, a changed header, half an archive, no text: only the source's own failure is noted."""
    (tmp_path / "stars.csv.minisig").write_bytes(SIGNED_CSV)
    keys: dict[str, Any] = {"minisign": {"public_key": KEY}} if "Cet" in str(body) else {}
    with opened(tmp_path) as ledger:
        sync(ledger, read(tmp_path, CSV, **keys))
        before = settled(tmp_path)
        (tmp_path / "stars.csv").write_bytes(body.encode() if isinstance(body, str) else body)
        snapshots, errors = observe({"stars": connector(tmp_path, **keys)}, ledger)
        assert snapshots == []
        assert [type(error) for error in errors] == [SourceInvalid]
        assert settled(tmp_path) == before


# -- columns


@pytest.mark.parametrize("kind", BODIES)
def test_a_lookup_that_misses_sends_the_row_to_quarantine(tmp_path: Path, kind: str) -> None:
    """Its subject is known, so nothing is withdrawn; the nearest known value is named."""
    columns = {"subject": "name", "object": {"column": "con", "lookup": {"Lyr": "Lyra", "cyg": "Cygnus"}}}
    snapshot = read(tmp_path, BODIES[kind], kind, columns=columns)
    assert pairs(snapshot) == {"Vega": "Lyra"}
    line = "line 3" if kind == "csv" else "line 2"
    reason = "con: 'Cyg' is not in its lookup table; near: cyg"
    assert reasons(snapshot) == [(line, reason, "hip:102098")]
    assert snapshot.complete


def test_a_row_whose_id_cannot_be_read_names_no_subject(tmp_path: Path) -> None:
    """Then nothing of the source is withdrawn."""
    snapshot = read(tmp_path, CSV + "x,Mira,Cet\n", row_id={"column": "hip", "match": r"^\d+$"})
    assert reasons(snapshot) == [("line 4", r"hip: 'x' does not match ^\d+$", None)]
    assert pairs(snapshot) == STARS
    assert not snapshot.complete


def test_constants_qualifiers_and_aliases_are_read(tmp_path: Path) -> None:
    """What tells subjects apart, and how else they are written; an empty one is none, the subject itself no alias."""
    text = "name,state,also,office\nJohn Smith,OH,Jack Smith; J. Smith;John Smith;,\nJane Roe,,,\n"
    snapshot = read(
        tmp_path,
        text,
        row_id=None,
        columns={
            "subject": "name",
            "object": {"value": "Member of Congress"},
            "qualifiers": {"state": {"column": "state", "lookup": {"OH": "Ohio"}}},
            "aliases": {"column": "also", "split": ";"},
        },
    )
    smith, roe = snapshot.claims
    assert (smith.qualifiers, roe.qualifiers) == ((("state", "Ohio"),), ())
    assert smith.object.label == roe.object.label == "Member of Congress"
    assert snapshot.aliases == {"hip:John Smith": ("Jack Smith", "J. Smith")}


def test_a_condition_that_cannot_be_read_is_a_bad_row(tmp_path: Path) -> None:
    """A list where a text is compared: nobody can say whether the row counts."""
    lines = BODIES["jsonl"] + '{"hip": 3, "name": "Mira", "con": ["Cet"]}\n'
    snapshot = read(tmp_path, lines, "jsonl", where={"con": "Lyr"})
    assert pairs(snapshot) == {"Vega": "Lyr"}
    assert reasons(snapshot) == [("line 3", "con is a list, not a text", None)]
    assert not snapshot.complete


def test_a_bad_qualifier_is_a_bad_row(tmp_path: Path) -> None:
    """Without it the row might be about someone else."""
    columns = {"subject": "name", "object": "con", "qualifiers": {"state": {"column": "hip", "match": "^9"}}}
    assert reasons(read(tmp_path, CSV, columns=columns)) == [
        ("line 3", "hip: '102098' does not match ^9", "hip:102098")
    ]


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)


@given(st.lists(st.tuples(TEXT, TEXT, TEXT).filter(lambda row: any(map(str.strip, row))), max_size=6), st.booleans())
def test_a_feed_says_the_same_in_either_form(rows: list[tuple[str, str, str]], packed: bool) -> None:
    """CSV and JSON Lines of the same texts are the same claims and the same quarantine, packed or not."""
    with TemporaryDirectory() as name, io.StringIO(newline="") as table:
        writer = csv.writer(table)
        writer.writerows([("hip", "name", "con"), *rows])
        lines = "".join(json.dumps(dict(zip(("hip", "name", "con"), row, strict=True))) + "\n" for row in rows)
        pack = gzip.compress if packed else bytes
        one = read(Path(name), pack(table.getvalue().encode()), "csv")
        two = read(Path(name), pack(lines.encode()), "jsonl")
        assert [replace(claim, origin="") for claim in one.claims] == [
            replace(claim, origin="") for claim in two.claims
        ]
        assert [reason[1:] for reason in reasons(one)] == [reason[1:] for reason in reasons(two)]
        assert one.complete == two.complete


# -- drift


@pytest.mark.parametrize("kind", BODIES)
def test_a_renamed_column_is_named_with_what_it_may_be_now(tmp_path: Path, kind: str) -> None:
    """The key that names it, the nearest name, what else is new, and what to do."""
    body = BODIES[kind].replace("con", "constell", 1 if kind == "csv" else -1).replace("hip", "HIP")
    with pytest.raises(SourceInvalid) as caught:
        read(tmp_path, body, kind, columns={"subject": "name", "object": "constel"})
    message = caught.value.message
    assert "no column 'hip' (row_id); 'constel' (columns.object), near: 'constell'" in message
    assert "columns that no key names: 'HIP', 'constell'" in message
    assert "put it into row_id, columns.object" in caught.value.hint


def test_columns_that_moved_or_came_new_change_nothing(tmp_path: Path) -> None:
    """The same claims under the same ids."""
    moved = "new,con,name,hip\n?,Lyr,Vega,91262\n?,Cyg,Deneb,102098\n"
    assert read(tmp_path, moved).claims == read(tmp_path, CSV).claims


@pytest.mark.parametrize("kind", BODIES)
def test_an_optional_column_may_be_gone(tmp_path: Path, kind: str) -> None:
    """Then its value is not given."""
    columns = {"subject": "name", "object": "con", "end": {"column": "until", "optional": True}}
    snapshot = read(tmp_path, BODIES[kind], kind, columns=columns)
    assert {claim.end for claim in snapshot.claims} == {None}
    assert pairs(snapshot) == STARS


# -- declarations


@pytest.mark.parametrize(
    ("keys", "loc"),
    [
        ({"compression": "rar"}, ("compression",)),
        ({"minisign": {}}, ("minisign", "public_key")),
        ({"minisign": {"public_key": "RWQ"}}, ("minisign", "public_key")),
        ({"minisign": {"public_key": KEY, "signature": "http://example.org/x"}}, ("minisign",)),
        ({"sha256": "http://example.org/SHA256SUMS"}, ("sha256",)),
        ({"sha256": "https://user:password@example.org/SHA256SUMS"}, ("sha256",)),
        ({"columns": {"subject": "name", "object": {"column": "con", "match": "("}}}, ("columns", "object", "match")),
        (
            {"columns": {"subject": "name", "object": "con", "qualifiers": {"A b": "x"}}},
            ("columns", "qualifiers", "A b"),
        ),
        (
            {"columns": {"subject": "name", "object": "con", "aliases": {"column": "x", "split": ""}}},
            ("columns", "aliases"),
        ),
    ],
)
@pytest.mark.parametrize("kind", BODIES)
def test_a_wrong_declaration_names_its_key(
    tmp_path: Path, kind: str, keys: dict[str, Any], loc: tuple[str, ...]
) -> None:
    """Before anything is read."""
    with pytest.raises(ValidationError) as caught:
        connector(tmp_path, kind, **keys)
    assert caught.value.errors()[0]["loc"][: len(loc)] == loc


def test_a_changed_lookup_table_is_another_declaration(tmp_path: Path, server: FaultServer) -> None:
    """A server's 304 says nothing about what the rows mean now."""
    url = server.on("/lookup.csv", answer(CSV.encode(), headers={"ETag": '"1"'}))
    columns = {"subject": "name", "object": {"column": "con", "lookup": "names.csv"}}
    (tmp_path / "names.csv").write_text("con,name\nLyr,Lyra\nCyg,Cygnus\n")
    first = connector(tmp_path, location=url, columns=columns).fetch(None)
    assert pairs(first) == {"Vega": "Lyra", "Deneb": "Cygnus"}
    (tmp_path / "names.csv").write_text("con,name\nLyr,the Lyre\nCyg,the Swan\n")
    second = connector(tmp_path, location=url, columns=columns).fetch(first.provenance)
    assert "if-none-match" not in server.requests[-1].headers
    assert pairs(second) == {"Vega": "the Lyre", "Deneb": "the Swan"}


def signed(body: bytes, comment: str, key: Ed25519PrivateKey) -> bytes:
    """A signature file as minisign makes it."""
    first = key.sign(hashlib.blake2b(body, digest_size=64).digest())
    lines = (base64.b64encode(b"ED" + b"kbsync00" + first), base64.b64encode(key.sign(first + comment.encode())))
    return b"untrusted comment: x\n%b\ntrusted comment: %b\n%b\n" % (lines[0], comment.encode(), lines[1])


def test_a_signature_of_another_file_or_of_an_earlier_time_is_refused(tmp_path: Path) -> None:
    """What the publisher signed under another name is not this feed; what is older than the accepted, a replay."""
    key = Ed25519PrivateKey.generate()
    public = base64.b64encode(b"Ed" + b"kbsync00" + key.public_key().public_bytes_raw()).decode()

    def fetch(comment: str, previous: Provenance | None = None, **keys: str) -> Snapshot:
        (tmp_path / "stars.csv").write_text(CSV)
        (tmp_path / "stars.csv.minisig").write_bytes(signed(CSV.encode(), comment, key))
        return connector(tmp_path, minisign={"public_key": public, **keys}).fetch(previous)

    with pytest.raises(SourceInvalid, match=r"is of a file 'planets\.csv', not of 'stars\.csv'"):
        fetch("timestamp:200\tfile:planets.csv")
    assert fetch("timestamp:200\tfile:planets.csv", file="planets.csv").rows == 2
    accepted = fetch("timestamp:200\tfile:stars.csv").provenance
    assert fetch("timestamp:200\tfile:stars.csv", accepted).not_modified
    with pytest.raises(SourceUnavailable, match="signed earlier"):
        fetch("timestamp:199\tfile:stars.csv\thashed", accepted)
    assert fetch("timestamp:1000", accepted).provenance.verified != accepted.verified
