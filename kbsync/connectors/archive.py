"""Unpacking a feed: gzip (RFC 1952), or a zip with exactly one file, never to more bytes than allowed.

What a body is, its first bytes say: neither format can be mistaken for UTF-8 text with a header. The size counts
bytes as they come out, so what an archive says of itself is believed in nothing.
"""

from __future__ import annotations

import gzip
import io
import re
import struct
import zipfile
import zlib
from typing import Literal

from kbsync.connectors.text import printable

__all__ = ["BadArchive", "Compression", "unpack"]

Compression = Literal["auto", "none", "gzip", "zip"]
"""How a feed is packed; `auto`: as its first bytes say."""

_MAGIC: dict[str, bytes] = {"gzip": b"\x1f\x8b", "zip": b"PK\x03\x04"}
_ENCRYPTED = 0x1
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_LISTED = 3
END_BYTES = 65_557
"""So far from its end the end record of a zip can stand."""
LISTING_BYTES = 262_144
"""Longest list of files: one file's entry can have three fields of 64 KiB."""


class BadArchive(ValueError):
    """The body is not packed as declared, is damaged, or would be too large."""


def unpack(body: bytes, compression: Compression, max_bytes: int) -> bytes:
    """What is packed in `body`, at most `max_bytes` of it. Raises BadArchive."""
    kind = next((kind for kind, magic in _MAGIC.items() if body.startswith(magic)), "none")
    if compression in _MAGIC and kind != compression:
        raise BadArchive(f"is no {compression} archive, which `compression` says it is")
    if compression == "none" or kind == "none":
        return body
    try:
        content = _gunzip(body, max_bytes + 1) if kind == "gzip" else _unzip(body, max_bytes + 1)
    except BadArchive:
        raise
    except (EOFError, OSError, RuntimeError, ValueError, struct.error, zlib.error, zipfile.BadZipFile) as error:
        raise BadArchive(f"is a damaged {kind} archive ({printable(error, 100)})") from error
    if len(content) > max_bytes:
        raise BadArchive("is larger than `max_bytes` when it is unpacked")
    return content


def _gunzip(body: bytes, limit: int) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(body)) as file:
        return file.read(limit)


def _unzip(body: bytes, limit: int) -> bytes:
    _check_listing(body)
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        member = _only_member(archive)
        with archive.open(member) as file:
            return file.read(limit)


def _check_listing(body: bytes) -> None:
    """Raises BadArchive for a zip whose list of files is too long to be of one file, before anything reads it (APPNOTE
    4.3.16; a zip of ZIP64's form is one of many files or of a large one)."""
    tail = body[-END_BYTES:]
    for found in re.finditer(rb"PK\x05\x06", tail):
        record = tail[found.start() : found.start() + 20]
        listing = int.from_bytes(record[12:16], "little")
        if listing > LISTING_BYTES or tail[max(0, found.start() - 20) :].startswith(b"PK\x06\x07"):
            raise BadArchive("is a zip with a list of many files, not with one")


def _only_member(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    members = [member for member in archive.infolist() if not member.is_dir()]
    if len(members) != 1:
        names = ", ".join(member.filename for member in members[:_LISTED]) or "none"
        more = ", …" if len(members) > _LISTED else ""
        raise BadArchive(f"is a zip with {len(members)} files, not with one: {printable(names, 200)}{more}")
    if members[0].flag_bits & _ENCRYPTED:
        raise BadArchive("is an encrypted zip; publish it unencrypted, or signed with minisign")
    if members[0].compress_type not in _METHODS:
        raise BadArchive("is a zip that is packed by another method than deflate")
    return members[0]
