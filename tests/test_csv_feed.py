"""CSV sources: real files, a real HTTP server, and everything that a feed can be instead of a table."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kbsync.connectors import Connector, known_types, make_connector
from kbsync.connectors.table import DELIMITERS, BadTable, Table
from kbsync.errors import SourceBlocked, SourceError, SourceInvalid, SourceUnavailable
from kbsync.facts import Snapshot
from kbsync.policy import Source
from tests.conftest import shared_data
from tests.faultserver import FaultServer, answer, cut, drip

STARS = "hip,name,constellation\n91262,Vega,Lyra\n102098,Deneb,Cygnus\n"


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with FaultServer() as running:
        yield running


def connector(folder: Path, *, allowed_dirs: tuple[Path, ...] = (), **keys: Any) -> Connector:
    declared = {
        "source": "stars",
        "type": "csv",
        "relation": "constellation",
        "ids": "hip",
        "location": "stars.csv",
        "row_id": "hip",
        "columns": {"subject": "name", "object": "constellation"},
        **keys,
    }
    return make_connector(Source.model_validate(declared), folder=folder, allowed_dirs=allowed_dirs)


def read(folder: Path, text: str | bytes = STARS, **keys: Any) -> Snapshot:
    (folder / "stars.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return connector(folder, **keys).fetch(None)


def pairs(snapshot: Snapshot) -> dict[str, str]:
    return {claim.subject.label: claim.object.label for claim in snapshot.claims}


def test_a_file_becomes_claims(tmp_path: Path) -> None:
    """Each row is a claim with its line; the provenance names the file and what was in it."""
    snapshot = read(tmp_path)
    assert [(claim.subject.id, claim.object.id, claim.origin) for claim in snapshot.claims] == [
        ("hip:91262", "stars:Lyra", "line 2"),
        ("hip:102098", "stars:Cygnus", "line 3"),
    ]
    assert snapshot.complete
    assert snapshot.provenance.location == str(tmp_path / "stars.csv")
    assert snapshot.provenance.status == 200
    assert len(snapshot.provenance.body_sha256) == 64
    assert snapshot.provenance.fetched_at.tzinfo is not None


@pytest.mark.parametrize("delimiter", DELIMITERS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_dialects_are_recognised(tmp_path: Path, delimiter: str, end: str, mark: bytes) -> None:
    """Delimiter and line ends are found, a byte order mark is no part of the header, quotes may hold the delimiter."""
    name = 'Alpha, "A"; b | c'
    lines = ["hip,name,constellation", '91262,"Vega",Lyra', "1,@,Cetus"]
    text = end.join(lines).replace(",", delimiter).replace("@", '"Alpha, ""A""; b | c"')
    snapshot = read(tmp_path, mark + text.encode())
    assert pairs(snapshot) == {"Vega": "Lyra", name: "Cetus"}


def test_a_declared_delimiter_is_the_only_one(tmp_path: Path) -> None:
    """A feed that changed its delimiter is not guessed at."""
    with pytest.raises(SourceInvalid, match=r"no column 'hip' \(row_id\); 'constellation' \(columns\.object\)"):
        read(tmp_path, delimiter=";")


def test_values_stay_strings(tmp_path: Path) -> None:
    """NO is Norway's code and 007 keeps its zeros."""
    snapshot = read(tmp_path, "hip,name,constellation\n007,Norway,NO\n1e3,1.10,12:30\n")
    assert pairs(snapshot) == {"Norway": "NO", "1.10": "12:30"}
    assert [claim.subject.id for claim in snapshot.claims] == ["hip:007", "hip:1e3"]


def test_templates_join_columns(tmp_path: Path) -> None:
    """Missing parts leave no gaps; a row without any of the parts has no value."""
    text = "first,middle,last,state,district\nJohn,Q,Adams,MA,2\nCher,,,CA,7\n,,,NY,1\n"
    snapshot = read(
        tmp_path,
        text,
        row_id="{state}-{district}",
        columns={"subject": "{first} {middle} {last}", "object": "{state} {district}"},
    )
    assert pairs(snapshot) == {"John Q Adams": "MA 2", "Cher": "CA 7"}
    assert snapshot.quarantined[0].reason == "the label of the subject is empty"
    assert snapshot.quarantined[0].subject_id == "hip:NY-1"


def test_where_takes_a_part_of_the_table(tmp_path: Path) -> None:
    """Rows with other values are no part of the source."""
    text = "hip,name,constellation,kind\n1,Vega,Lyra,star\n2,M31,Andromeda,galaxy\n"
    assert pairs(read(tmp_path, text, where={"kind": "star"})) == {"Vega": "Lyra"}


def test_optional_columns_are_read(tmp_path: Path) -> None:
    """Object ids, dates and ranks come from the columns that are declared for them."""
    text = (
        "hip,name,constellation,con,since,until,rank\n1,Vega,Lyra,Lyr,1930,,preferred\n2,Deneb,Cygnus,,,2020-01-01,\n"
    )
    columns = {
        "subject": "name",
        "object": "constellation",
        "object_id": "con",
        "start": "since",
        "end": "until",
        "rank": "rank",
    }
    vega, deneb = read(tmp_path, text, columns=columns, object_ids="iau").claims
    assert (vega.object.id, vega.start, vega.end, vega.rank) == ("iau:Lyr", "1930", None, "preferred")
    assert (deneb.object.id, deneb.start, deneb.end, deneb.rank) == ("iau:Cygnus", None, "2020-01-01", "normal")


def test_bad_rows_wait_with_their_line(tmp_path: Path) -> None:
    """Each bad row is named by line and reason; the good ones are read."""
    text = (
        STARS + "1,Mira\n2,Rigel,Orion,extra\n3,   ,Orion\n4,Al\tgol,Perseus\n\n5,\n6,Same,Same\n,,\n" + "7,{x},Ara\n"
    )
    snapshot = read(tmp_path, text)
    assert pairs(snapshot) == {"Vega": "Lyra", "Deneb": "Cygnus"}
    assert [(bad.origin, bad.reason.partition(";")[0]) for bad in snapshot.quarantined] == [
        ("line 4", "has 2 fields, the header has 3"),
        ("line 5", "has 4 fields, the header has 3"),
        ("line 6", "the label of the subject is empty"),
        ("line 7", "the label of the subject has the control character U+0009"),
        ("line 9", "has 2 fields, the header has 3"),
        ("line 10", "the object is the subject itself: Same"),
        ("line 12", "the label of the subject has braces, like a template that was never filled: {x}"),
    ]
    assert snapshot.quarantined[0].raw == "1 | Mira"
    assert not snapshot.complete


def test_a_line_number_is_where_the_row_begins(tmp_path: Path) -> None:
    """Quoted line breaks in other columns are counted, not confused."""
    text = 'hip,name,constellation,note\n1,Vega,Lyra,"two\nlines"\n2,Deneb,Cygnus,\n'
    assert [claim.origin for claim in read(tmp_path, text).claims] == ["line 2", "line 4"]


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "line 1: there is no header"),
        (b"\n\n", "line 1: there is no header"),
        (b"hip,nane,constellation\n1,Vega,Lyra\n", "line 1: the header has no column 'name' (columns.subject)"),
        (b"hip,name,name,constellation\n", "line 1: the header repeats 'name'"),
        (STARS.encode() + b"3,V\xe9ga,Lyra\n", "line 4: byte 0xe9 is not UTF-8"),
        (STARS.encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
        (STARS.encode() + b"3,Ve\0ga,Lyra\n", "line 4: has a NUL character"),
        (STARS.encode() + b'3,"Vega,Lyra\n4,Mira,Cetus\n', "line 4: unexpected end of data"),
        (STARS.encode() + b'3,"Vega"x,Lyra\n', "line 4: ',' expected after '\"'"),
        (STARS.encode() + b"3," + b"x" * 10_000_000 + b",Lyra\n", "line 4: field larger than field limit"),
    ],
)
def test_a_file_that_is_no_table_fails_the_run(tmp_path: Path, body: bytes, problem: str) -> None:
    """What makes every row doubtful stops the run with file and line, and says what to do."""
    with pytest.raises(SourceInvalid) as caught:
        read(tmp_path, body)
    assert f"source stars: stars.csv: {problem}" in caught.value.message
    assert "kbsync sync" in caught.value.hint


def test_only_a_header_is_an_empty_snapshot(tmp_path: Path) -> None:
    """That the source has become empty is for the guard to judge."""
    snapshot = read(tmp_path, "hip,name,constellation\n")
    assert (snapshot.rows, snapshot.complete) == (0, True)


def test_a_missing_file_is_unavailable(tmp_path: Path) -> None:
    """It may come later; `check` already warns."""
    absent = connector(tmp_path)
    assert absent.warnings == ("location: stars.csv does not exist",)
    with pytest.raises(SourceUnavailable, match=r"stars\.csv: No such file") as caught:
        absent.fetch(None)
    assert "sources/stars.yaml" in caught.value.hint


@pytest.mark.parametrize("location", ["../secret.csv", "/etc/passwd", "sub/../../secret.csv", "/proc/self/environ"])
def test_a_path_outside_the_allowed_folders_is_refused(tmp_path: Path, location: str) -> None:
    """`..` and absolute paths are refused when the source is declared."""
    with pytest.raises(ValidationError, match="outside the folders") as caught:
        connector(tmp_path, location=location)
    assert caught.value.errors()[0]["loc"] == ("location",)


def test_an_allowed_folder_may_be_named(tmp_path: Path) -> None:
    """Feeds may lie in a folder that kbsync.yaml allows."""
    feeds, sources = tmp_path / "feeds", tmp_path / "sources"
    feeds.mkdir()
    sources.mkdir()
    (feeds / "stars.csv").write_text(STARS)
    found = connector(sources, location=str(feeds / "stars.csv"), allowed_dirs=(feeds,)).fetch(None)
    assert len(found.claims) == 2


def test_a_link_that_leaves_the_folder_is_refused_when_read(tmp_path: Path) -> None:
    """A link put there after `check` is followed only to where the source may read."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (tmp_path / "secret.csv").write_text(STARS)
    (folder / "stars.csv").write_text(STARS)
    (folder / "current.csv").symlink_to("stars.csv")
    found = connector(folder, location="current.csv")
    assert len(found.fetch(None).claims) == 2
    (folder / "current.csv").unlink()
    (folder / "current.csv").symlink_to("../secret.csv")
    with pytest.raises(SourceInvalid, match="outside the folders"):
        found.fetch(None)
    (folder / "current.csv").unlink()
    (folder / "current.csv").symlink_to("current.csv")
    with pytest.raises(SourceInvalid, match="a link to itself"):
        found.fetch(None)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    """A FIFO would hang the run, a folder is no table."""
    os.mkfifo(tmp_path / "stars.csv")
    (tmp_path / "folder").mkdir()
    for location in ("stars.csv", "folder"):
        with pytest.raises(SourceError, match=r"regular file|[Dd]irectory"):
            connector(tmp_path, location=location).fetch(None)


def test_a_file_may_not_be_larger_than_the_cap(tmp_path: Path) -> None:
    """The cap holds for files as for answers."""
    with pytest.raises(SourceInvalid, match="larger than 20B"):
        read(tmp_path, max_bytes=20)


@pytest.mark.parametrize(
    ("keys", "loc"),
    [
        ({"columns": {"subject": "name"}}, ("columns", "object")),
        ({"columns": {"subject": "{name", "object": "x"}}, ("columns", "subject")),
        ({"columns": {"subject": "name", "object": "x", "colour": "y"}}, ("columns", "colour")),
        ({"delimiter": "ab"}, ("delimiter",)),
        ({"delimiter": "x"}, ("delimiter",)),
        ({"locatoin": "stars.csv"}, ("locatoin",)),
        ({"location": "http://example.org/stars.csv"}, ("location",)),
        ({"location": "ftp://example.org/stars.csv"}, ("location",)),
        ({"where": {"kind": 1}}, ("where", "kind")),
        ({"deadline": 0}, ("deadline",)),
        ({"type": "excel"}, ("type",)),
    ],
)
def test_a_wrong_declaration_names_its_key(tmp_path: Path, keys: dict[str, Any], loc: tuple[str, ...]) -> None:
    """Each wrong or unknown key is refused before anything is read."""
    with pytest.raises(ValidationError) as caught:
        connector(tmp_path, **keys)
    assert caught.value.errors()[0]["loc"] == loc


def test_connectors_are_found_by_their_entry_points(tmp_path: Path) -> None:
    """An unknown type names the known ones."""
    assert {"csv", "sparql"} <= set(known_types())
    with pytest.raises(ValidationError, match="csv, jsonl, sparql, sql"):
        connector(tmp_path, type="excel")


def test_a_url_is_read_like_a_file(tmp_path: Path, server: FaultServer) -> None:
    """The provenance keeps the validators that the server gave."""
    url = server.on(
        "/stars.csv", answer(STARS.encode(), headers={"ETag": '"7"', "Last-Modified": "yesterday"}, zipped=True)
    )
    snapshot = connector(tmp_path, location=url).fetch(None)
    assert pairs(snapshot) == {"Vega": "Lyra", "Deneb": "Cygnus"}
    assert (snapshot.provenance.location, snapshot.provenance.etag, snapshot.provenance.last_modified) == (
        url,
        '"7"',
        "yesterday",
    )
    assert connector(tmp_path, location=url).warnings == ()


def test_an_unchanged_feed_is_not_read_again(tmp_path: Path, server: FaultServer) -> None:
    """304 vouches for the rows of the last snapshot; its provenance lives on under a new time."""
    url = server.on("/etag.csv", answer(STARS.encode(), headers={"ETag": '"7"', "Last-Modified": "yesterday"}))
    first = connector(tmp_path, location=url).fetch(None).provenance
    server.on("/etag.csv", answer(status=304))
    second = connector(tmp_path, location=url).fetch(first)
    assert server.requests[-1].headers["if-none-match"] == '"7"'
    assert server.requests[-1].headers["if-modified-since"] == "yesterday"
    assert (second.not_modified, second.rows, second.provenance.status) == (True, 0, 304)
    assert replace(second.provenance, status=200, fetched_at=first.fetched_at) == first


def test_a_validator_that_cannot_be_sent_back_is_dropped(tmp_path: Path, server: FaultServer) -> None:
    """An odd ETag must not break the next request."""
    url = server.on("/odd.csv", answer(STARS.encode(), headers={"ETag": '"\xe9"'}))
    source = connector(tmp_path, location=url)
    first = source.fetch(None).provenance
    assert first.etag is None
    again = source.fetch(first).provenance
    assert (again.status, again.etag) == (200, None)


def test_another_declaration_reads_the_feed_again(tmp_path: Path, server: FaultServer) -> None:
    """304 says nothing about columns that were not read last time."""
    url = server.on("/mapped.csv", answer(STARS.encode(), headers={"ETag": '"7"'}))
    first = connector(tmp_path, location=url).fetch(None).provenance
    other = connector(tmp_path, location=url, columns={"subject": "constellation", "object": "name"}).fetch(first)
    assert "if-none-match" not in server.requests[-1].headers
    assert pairs(other) == {"Lyra": "Vega", "Cygnus": "Deneb"}


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        (answer(b"<html>Please log in</html>", kind="text/html"), SourceInvalid),
        (answer(b'{"error": 1}', kind="application/json"), SourceInvalid),
        (answer(b"<html>Please log in</html>", kind="text/plain"), SourceInvalid),
        (answer(status=404), SourceInvalid),
        (answer(status=500), SourceUnavailable),
        (answer(status=403), SourceBlocked),
        (cut(STARS.encode(), promised=9_999), SourceInvalid),
        (drip(0.05), SourceUnavailable),
    ],
)
def test_a_feed_that_fails_gives_no_snapshot(
    tmp_path: Path, server: FaultServer, behaviour: Any, error: type[SourceError]
) -> None:
    """Half a feed is no feed."""
    with pytest.raises(error):
        connector(tmp_path, location=server.on("/bad.csv", behaviour), deadline=0.3).fetch(None)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_table_or_an_error(body: bytes) -> None:
    """No file can raise anything but BadTable, and each record has a line."""
    with contextlib.suppress(BadTable):
        table = Table(b"name,constellation\n" + body, {"name": "columns.subject", "constellation": "columns.object"})
        lines = [line for line, _, _ in table]
        assert lines == sorted(set(lines))
        assert all(line > 1 for line in lines)


def test_a_real_election_file_is_read(tmp_path: Path) -> None:
    """The winners of November 2022, with names made of columns as real files need it."""
    folder = shared_data("elections")
    snapshot = connector(
        tmp_path,
        location=str(folder / "election_results_2022.csv"),
        allowed_dirs=(folder,),
        row_id="Wikidata ID",
        ids="wikidata",
        columns={"subject": "{First Name} {Last Name} {Suffix}", "object": "Race"},
        where={"Incumbent Win? Y/N": "N"},
    ).fetch(None)
    assert pairs(snapshot)["Katie Britt"] == "AL"
    assert snapshot.claims[0].subject.id == "wikidata:Q111285444"


def test_real_stars_are_read(tmp_path: Path) -> None:
    """All 921 rows of a public star list."""
    folder = shared_data("stars")
    (header, *_) = (folder / "star_constellation.csv").read_text(encoding="utf-8").splitlines()
    subject, thing = header.split(",")[0], header.split(",")[1]
    snapshot = connector(
        tmp_path,
        location=str(folder / "star_constellation.csv"),
        allowed_dirs=(folder,),
        row_id=None,
        columns={"subject": subject, "object": thing},
    ).fetch(None)
    assert snapshot.rows == 921
    assert snapshot.complete


def test_a_header_has_one_spelling(tmp_path: Path) -> None:
    """Its names are compared in Unicode NFC, as a person sees them, and so is what the source file calls them."""
    body = "hip,pre\u0301nom,con\n1,Vega,Lyra\n"
    for name in ("pr\u00e9nom", "pre\u0301nom"):
        assert pairs(read(tmp_path, body, columns={"subject": name, "object": "con"})) == {"Vega": "Lyra"}


def test_a_header_of_many_columns_is_judged_at_once(tmp_path: Path) -> None:
    """What it repeats is found in one go over them (a slower look would take minutes)."""
    with pytest.raises(SourceInvalid, match="repeats 'x'"):
        read(tmp_path, "hip,name,con" + ",x" * 30_000 + "\n")
