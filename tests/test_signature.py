"""Checksums and minisign signatures: fixed ones made by minisign 0.11, and what the binary itself says of ours."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbsync.connectors.signature import BadSignature, PublicKey, check_sha256, expected_sha256

# Made by minisign 0.11: `minisign -G -W`, then `minisign -S -t 'trusted text'` and `minisign -S -l` of "hello\n".
BODY = b"hello\n"
KEY = "RWQavhWmkNJi4sk6HUF9knOe9qYge1oydaqQFUkgrVRO1qhxte0bpg4g"
PREHASHED = b"""untrusted comment: signature from minisign secret key
RUQavhWmkNJi4g/ERSC2Dr03+g7U68PkRZGezOOab9Pq6YczaSZQCekgnoFqResiBMWBhAFCrjk/22whiE3KvCuNh+cjAT1C2gE=
trusted comment: trusted text
tGcTJxbkovJeH9pJ9Xvv6a8zaCVu6gAl4J56E4828pDZAozb3UFuq0b3hs6oiywACG9nBtqPwU+lvn6sIXrxCg==
"""
LEGACY = b"""untrusted comment: signature from minisign secret key
RWQavhWmkNJi4g+v5Ul2tjVfpq3239bbtFO5O8XF1Tf3NzuM+diZjTGEBvomjk1zRNSsx4c9wqlcQoDpfVdV/7k52ZTVFVhSGQg=
trusted comment: timestamp:1795567092\tfile:f.txt
1+cFsc4K50/jQvLxrK0Gg2/HLI4+rzjCw9pfJggwZ5kpof4CVTJMrvMO34ferm6d0GQo48IGpymanN+D1CTKAg==
"""
OTHER_KEY = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3"  # minisign's own, from its web page

SUM = hashlib.sha256(BODY).hexdigest()


@pytest.mark.parametrize(
    ("signature", "comment"), [(PREHASHED, "trusted text"), (LEGACY, "timestamp:1795567092\tfile:f.txt")]
)
def test_a_signature_of_minisign_is_good(signature: bytes, comment: str) -> None:
    """Both of its forms, also with the line ends of another system; the trusted comment comes back."""
    key = PublicKey.parse(KEY)
    assert key.name == "E262D290A615BE1A"
    assert key.verify(BODY, signature) == comment
    assert key.verify(BODY, signature.replace(b"\n", b"\r\n")) == comment


@pytest.mark.parametrize("signature", [PREHASHED, LEGACY])
def test_another_body_is_refused(signature: bytes) -> None:
    """One byte more or other is another body."""
    for body in (b"hello", b"hellO\n", BODY + b"\n", b""):
        with pytest.raises(BadSignature, match="key E262D290A615BE1A is of another body"):
            PublicKey.parse(KEY).verify(body, signature)


def test_another_key_is_refused_by_its_id() -> None:
    """Both ids are named, so that a rotated key is recognised as such."""
    with pytest.raises(BadSignature, match="by key E262D290A615BE1A, not by E7620F1842B4E81F"):
        PublicKey.parse(OTHER_KEY).verify(BODY, PREHASHED)


def test_another_key_under_the_same_id_is_refused() -> None:
    """The id is only a name: the key decides."""
    forged = base64.b64decode(KEY)[:10] + base64.b64decode(OTHER_KEY)[10:]
    with pytest.raises(BadSignature, match="of another body"):
        PublicKey.parse(base64.b64encode(forged).decode()).verify(BODY, PREHASHED)


def test_a_changed_trusted_comment_is_refused() -> None:
    """It may carry the name and the time of the file; the untrusted one may say anything."""
    key = PublicKey.parse(KEY)
    with pytest.raises(BadSignature, match="trusted comment is not the one"):
        key.verify(BODY, PREHASHED.replace(b"trusted text", b"another text"))
    assert key.verify(BODY, PREHASHED.replace(b"signature from", b"written over")) == "trusted text"


def test_a_signature_is_not_taken_for_the_other_form() -> None:
    """The form is no part of what is signed: a legacy signature as a prehashed one is of another body."""
    for one, other in ((b"RUQ", b"RWQ"), (b"RWQ", b"RUQ")):
        signature = PREHASHED if one == b"RUQ" else LEGACY
        with pytest.raises(BadSignature, match="another body"):
            PublicKey.parse(KEY).verify(BODY, signature.replace(one, other, 1))


@pytest.mark.parametrize(
    ("signature", "problem"),
    [
        (b"", "four lines"),
        (b"<html>\nnot\nfound\n</html>", "two comments"),
        (b"\xff\n\n\n\n", "four lines"),
        (PREHASHED + b"more\n", "four lines"),
        (PREHASHED.replace(b"RUQ", b"!!!"), "the signature is not base64"),
        (PREHASHED.replace(b"tGc", b"\xc3\xa9!"), "the global signature is not base64"),
        (PREHASHED.replace(b"RUQ", b"AUQ"), "no signature that minisign makes"),
        (PREHASHED.replace(b"T1C2gE=", b""), "base64|no signature"),
        (b"untrusted comment: x\n\ntrusted comment: y\n\n", "four lines"),
    ],
)
def test_what_is_no_signature_file_is_refused(signature: bytes, problem: str) -> None:
    """An error page in its place is no signature."""
    with pytest.raises(BadSignature, match=problem):
        PublicKey.parse(KEY).verify(BODY, signature)


@pytest.mark.parametrize("text", ["", "RWQ", KEY[:-4], KEY + "AAAA", "RUQ" + KEY[3:], "ssh-ed25519 AAAA"])
def test_what_is_no_public_key_is_refused(text: str) -> None:
    """Before anything is fetched."""
    with pytest.raises(ValueError, match="public key"):
        PublicKey.parse(text)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_bad_signature(signature: bytes) -> None:
    """Nothing but BadSignature comes out of a file that anyone may have put there."""
    with pytest.raises(BadSignature):
        PublicKey.parse(KEY).verify(BODY, signature)


@given(st.integers(0, len(PREHASHED) - 1), st.integers(0, 7))
def test_no_bit_of_what_is_signed_can_be_changed(at: int, bit: int) -> None:
    """A flipped bit is refused, or in a part that is not signed: the untrusted comment, base64's spare bits."""
    changed = bytearray(PREHASHED)
    changed[at] ^= 1 << bit
    first = PREHASHED.index(b"\n") + 1
    try:
        assert PublicKey.parse(KEY).verify(BODY, bytes(changed)) == "trusted text"
    except BadSignature:
        return
    assert at < first or _meaning(bytes(changed)) == _meaning(PREHASHED)


def _meaning(signature: bytes) -> list[bytes]:
    _, one, comment, two = signature.decode().split("\n")[:4]
    return [base64.b64decode(one), comment.encode(), base64.b64decode(two)]


@pytest.fixture
def minisign(tmp_path: Path) -> str:
    """The binary, with a key pair in the test's folder."""
    found = shutil.which("minisign")
    if found is None:
        pytest.skip("minisign is not installed; ends with: apt-get install minisign")
    subprocess.run([found, "-G", "-W", "-p", "k.pub", "-s", "k.sec"], cwd=tmp_path, check=True, capture_output=True)
    return found


@pytest.mark.parametrize("form", [[], ["-l"]])
@pytest.mark.parametrize("body", [b"", b"x", bytes(range(256)) * 300])
def test_what_the_binary_signs_is_good(minisign: str, tmp_path: Path, form: list[str], body: bytes) -> None:
    """Any body, both forms; and what it refuses, so do we."""
    (tmp_path / "body").write_bytes(body)
    subprocess.run(
        [minisign, "-S", *form, "-s", "k.sec", "-m", "body", "-t", "às signed"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    key = PublicKey.parse((tmp_path / "k.pub").read_text().splitlines()[1])
    signature = (tmp_path / "body.minisig").read_bytes()
    assert key.verify(body, signature) == "às signed"
    (tmp_path / "body").write_bytes(body + b"!")
    refused = subprocess.run([minisign, "-V", "-p", "k.pub", "-m", "body"], cwd=tmp_path, capture_output=True)
    assert refused.returncode != 0
    with pytest.raises(BadSignature):
        key.verify(body + b"!", signature)


def test_the_binary_agrees_with_the_fixed_signatures(minisign: str, tmp_path: Path) -> None:
    """The vectors above are what it calls good, too."""
    (tmp_path / "f").write_bytes(BODY)
    for signature in (PREHASHED, LEGACY):
        (tmp_path / "f.minisig").write_bytes(signature)
        subprocess.run([minisign, "-V", "-P", KEY, "-m", "f"], cwd=tmp_path, check=True, capture_output=True)


@pytest.mark.parametrize(
    "checksums",
    [
        f"{SUM}\n",
        f"{SUM.upper()}\n",
        f"{SUM}  stars.csv\n",
        f"{SUM} *stars.csv\n",
        f"{SUM}  ./dist/stars.csv\n",
        f"SHA256 (stars.csv) = {SUM}\n",
        f"{'0' * 64}  other.csv\n{SUM}  stars.csv\n",
        f"\ufeff# sums\r\n{SUM}  stars.csv\r\n",
    ],
)
def test_checksum_files_of_the_usual_tools_are_read(checksums: str) -> None:
    """sha256sum in text and binary mode, with --tag, a bare hash, and files about many files."""
    check_sha256(BODY, expected_sha256(checksums.encode(), "stars.csv"))


@pytest.mark.parametrize(
    ("checksums", "found"),
    [
        (b"", "no sha256 of"),
        (b"not a sum\n", "no sha256 of"),
        (f"{SUM}  other.csv\n".encode(), "no sha256 of"),
        (f"{SUM}\n{SUM}\n".encode(), "no sha256 of"),
        (f"{SUM}  stars.csv\n{SUM}  stars.csv\n".encode(), "2 sha256 of"),
        (b"\xff\xfe", "is no text"),
    ],
)
def test_a_checksum_file_without_the_one_sum_is_refused(checksums: bytes, found: str) -> None:
    """A sum of another file proves nothing."""
    with pytest.raises(BadSignature, match=found):
        expected_sha256(checksums, "stars.csv")


def test_another_sum_is_refused() -> None:
    """Both are named: a publisher that changed the file is told by the new sum."""
    with pytest.raises(BadSignature, match=f"its sha256 is {SUM}, not {'a' * 64}"):
        check_sha256(BODY, "A" * 64)
