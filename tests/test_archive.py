"""Unpacking: what gzip and zip files can be, and how large they can become."""

from __future__ import annotations

import contextlib
import gzip
import io
import random
import zipfile
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbsync.connectors.archive import BadArchive, Compression, unpack

BODY = b"hip,name\n1,Vega\n"
CAP = 1_000_000


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w", method) as archive:
            for name, body in files.items():
                archive.writestr(name, body)
        return buffer.getvalue()


PACKERS: dict[Compression, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zip": lambda body: zipped({"a.csv": body}),
}


@pytest.mark.parametrize("compression", ["auto", "gzip"])
def test_gzip_is_unpacked(compression: Compression) -> None:
    """Also where it is several members, one after the other."""
    assert unpack(gzip.compress(BODY), compression, CAP) == BODY
    assert unpack(gzip.compress(BODY) + gzip.compress(BODY), compression, CAP) == BODY + BODY


@pytest.mark.parametrize("compression", ["auto", "zip"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_with_one_file_is_unpacked(compression: Compression, method: int) -> None:
    """The folders above the file do not count."""
    assert unpack(zipped({"feeds/": b"", "feeds/stars.csv": BODY}, method), compression, CAP) == BODY


@pytest.mark.parametrize("compression", ["auto", "none"])
def test_what_is_not_packed_stays(compression: Compression) -> None:
    assert unpack(BODY, compression, CAP) == BODY
    assert unpack(b"", compression, CAP) == b""


def test_none_unpacks_nothing() -> None:
    assert unpack(gzip.compress(BODY), "none", CAP)[:2] == b"\x1f\x8b"


@pytest.mark.parametrize("compression", ["gzip", "zip"])
def test_a_declared_packing_is_insisted_on(compression: Compression) -> None:
    """A feed that is no longer packed has changed without notice."""
    with pytest.raises(BadArchive, match=f"no {compression} archive"):
        unpack(BODY, compression, CAP)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "0 files"),
        ({"a.csv": BODY, "b.csv": BODY}, r"2 files, not with one: a\.csv, b\.csv"),
        ({f"{name}\n.csv": BODY for name in "abcd"}, r"4 files.*, …"),
    ],
)
def test_a_zip_without_exactly_one_file_is_refused(files: dict[str, bytes], said: str) -> None:
    """Which of them is the feed is not guessed; their names are in the error, on one line."""
    body = zipped({"folder/": b""} | files)
    with pytest.raises(BadArchive, match=said) as caught:
        unpack(body, "zip", CAP)
    assert "\n" not in str(caught.value)


def test_an_encrypted_zip_is_refused() -> None:
    """The flag in both headers is set, as a password would set it."""
    body = bytearray(zipped({"a.csv": BODY}))
    body[6] |= 1
    body[body.index(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(BadArchive, match="encrypted"):
        unpack(bytes(body), "auto", CAP)


def test_a_zip_of_another_method_is_refused() -> None:
    """bzip2 and LZMA are rare in feeds and dear to unpack."""
    with pytest.raises(BadArchive, match="deflate"):
        unpack(zipped({"a.csv": BODY}, zipfile.ZIP_BZIP2), "auto", CAP)


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
def test_what_becomes_too_large_is_refused(pack: Callable[[bytes], bytes]) -> None:
    """A hundred megabytes of zeros in a hundred kilobytes stop at the cap, whatever the archive says its size is."""
    bomb = pack(bytes(100_000_000))
    assert len(bomb) < 200_000
    with pytest.raises(BadArchive, match="`max_bytes`"):
        unpack(bomb, "auto", CAP)
    assert unpack(pack(bytes(CAP)), "auto", CAP) == bytes(CAP)


def test_a_zip_that_lies_about_its_size_is_refused() -> None:
    """The headers say 16 bytes, the data says otherwise."""
    body = zipped({"a.csv": bytes(CAP * 2)})
    lying = body.replace((CAP * 2).to_bytes(4, "little"), (16).to_bytes(4, "little"))
    assert lying != body
    with pytest.raises(BadArchive):
        unpack(lying, "auto", CAP)


@pytest.mark.parametrize("kind", PACKERS)
def test_a_cut_or_damaged_archive_is_refused(kind: Compression) -> None:
    """Each place where it can be cut; and a byte that is another in the middle of the data."""
    whole = PACKERS[kind](random.Random(1).randbytes(300))
    for length in range(3, len(whole)):
        with pytest.raises(BadArchive):
            unpack(whole[:length], kind, CAP)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    with pytest.raises(BadArchive, match="damaged"):
        unpack(bytes(damaged), "auto", CAP)


@given(st.sampled_from([gzip.compress(BODY, mtime=0), zipped({"a.csv": BODY})]), st.binary(max_size=60), st.data())
def test_any_bytes_are_unpacked_or_refused(archive: bytes, junk: bytes, data: st.DataObject) -> None:
    """Nothing but BadArchive comes out, and never more than the cap."""
    at = data.draw(st.integers(0, len(archive)))
    with contextlib.suppress(BadArchive):
        assert len(unpack(archive[:at] + junk + archive[at + len(junk) :], "auto", CAP)) <= CAP


def test_a_zip_of_very_many_files_is_refused_before_they_are_listed() -> None:
    """By the length of its list, whatever number of files it says; in ZIP64's form, too."""
    many = zipped({f"{n}.csv": b"" for n in range(10_000)})
    end = many.rindex(b"PK\x05\x06")
    lying = many[: end + 8] + b"\1\0\1\0" + many[end + 12 :]
    wide = zipped({"a.csv": BODY})
    end = wide.rindex(b"PK\x05\x06")
    for body in (many, lying, wide[:end] + b"PK\x06\x07".ljust(20, b"\0") + wide[end:]):
        with pytest.raises(BadArchive, match="a list of many files"):
            unpack(body, "auto", 10_000_000)
