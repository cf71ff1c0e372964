"""What Content-Encoding did to a body, undone piece by piece (RFC 9110, 8.4).

httpx's own decoders do not mind where a compressed body ends too early, unpack it several times over if the header says
so, and give a whole chunk at once, however much comes out of it. Here a body is packed once or not at all, no piece is
larger than `PIECE_BYTES`, and the end must be there.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

from kbsync.connectors.text import printable

__all__ = ["ACCEPTED", "BadCoding", "decoded", "is_packed"]

ACCEPTED = "gzip, deflate"
"""The Accept-Encoding header: what `decoded` can undo."""
PIECE_BYTES = 65_536
"""Most bytes that come out at once."""

_PLAIN = ("", "identity")
_GZIP = ("gzip", "x-gzip")
_GZIP_BITS = zlib.MAX_WBITS | 16


class BadCoding(ValueError):
    """The body is not compressed as its header says, or not whole."""


def is_packed(coding: str) -> bool:
    """Whether a Content-Encoding header says that the body is compressed, and so shows by itself where it ends."""
    return coding.strip().lower() not in _PLAIN


def decoded(chunks: Iterable[bytes], coding: str) -> Iterator[bytes]:
    """The body that comes in `chunks`, without its `coding` (the Content-Encoding header). Raises BadCoding."""
    if not is_packed(coding):
        yield from chunks
        return
    unpacking = None
    for chunk in chunks:
        if unpacking is None and chunk:
            unpacking = _decompressor(coding, chunk)
        if unpacking is not None:
            yield from _pieces(unpacking, chunk)
    if unpacking is None or not unpacking.eof:
        raise BadCoding("its end is missing")


def _pieces(unpacking: zlib._Decompress, chunk: bytes) -> Iterator[bytes]:
    try:
        while piece := unpacking.decompress(chunk, PIECE_BYTES):
            yield piece
            chunk = unpacking.unconsumed_tail
    except zlib.error as error:
        raise BadCoding(str(error)) from error
    if unpacking.unused_data:
        raise BadCoding("something comes after its end")


def _decompressor(coding: str, start: bytes) -> zlib._Decompress:
    """What undoes `coding`; `start` tells the two kinds of deflate apart: with a zlib header, and, from servers that
    read RFC 9110 otherwise, without."""
    kind = coding.strip().lower()
    if kind in _GZIP:
        return zlib.decompressobj(_GZIP_BITS)
    if kind == "deflate":
        wrapped = start[0] & 0x0F == zlib.DEFLATED and (len(start) < 2 or int.from_bytes(start[:2]) % 31 == 0)
        return zlib.decompressobj(zlib.MAX_WBITS if wrapped else -zlib.MAX_WBITS)
    raise BadCoding(f"it says {printable(coding, 60)!r}, which was not asked for")
