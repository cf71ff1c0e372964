"""A table in a text file: RFC 4180 (https://www.rfc-editor.org/rfc/rfc4180) with a header, in UTF-8, read strictly.

    table = Table(body, {"name": "columns.subject", "con": "columns.object"})
    name = table.column("name")
    for line, record, problem in table: print(line, problem or name(record))

What spoils the whole file raises BadTable with the line; a record of the wrong width comes with its problem.
"""

from __future__ import annotations

import csv
import difflib
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from kbsync.connectors.columns import Reader
from kbsync.connectors.text import composed, printable

__all__ = ["DELIMITERS", "BadTable", "Table", "missing_columns"]

DELIMITERS = (",", ";", "\t", "|")
"""Tried in this order where none is declared; the first under which the header has every column needed is taken."""

COMPARED = 1_000
"""So many columns are looked through for one like a missing column."""
_HEADER_BYTES = 65_536  # how far the header may reach
_MARK = b"\xef\xbb\xbf"


class BadTable(ValueError):
    """The file as a whole is not what was declared; says on which line, and in `hint` what to do."""

    def __init__(self, problem: str, *, hint: str = "") -> None:
        super().__init__(problem)
        self.hint = hint


def missing_columns(wanted: Mapping[str, str], present: Sequence[str], *, place: str) -> BadTable | None:
    """What to say where columns are missing: which, what is like them, what else is there. `wanted`: the key of the
    source file that names each."""
    missing = [name for name in wanted if name not in present]
    if not missing:
        return None
    spare = [name for name in present if name not in wanted]
    parts = []
    for name in missing:
        near = difflib.get_close_matches(name, spare[:COMPARED], n=2, cutoff=0.5)
        parts.append(f"{name!r} ({wanted[name]})" + (f", near: {_listed(near)}" if near else ""))
    unused = f"; columns that no key names: {_listed(spare)}" if spare else ""
    keys = ", ".join(dict.fromkeys(wanted[name] for name in missing))
    return BadTable(
        f"{place} has no column {printable('; '.join(parts), 300)}{unused}",
        hint=f"nothing was changed; if a column has a new name, put it into {keys}, then `kbsync sync`",
    )


class Table:
    """A header and the records below it. `wanted`: the columns that there must be, each with the key that names it.

    Raises BadTable where the text is empty or no UTF-8, or its header repeats or lacks a column.
    """

    def __init__(self, body: bytes, wanted: Mapping[str, str], *, delimiter: str | None = None) -> None:
        self._body = body
        wanted = {composed(name): key for name, key in wanted.items()}
        if b"\0" in body:
            raise BadTable(_undecodable(body) or f"line {_line(body, body.index(0))}: has a NUL character")
        headers = {mark: _header(body, mark) for mark in ([delimiter] if delimiter else DELIMITERS)}
        fitting = [mark for mark, header in headers.items() if wanted.keys() <= set(header)]
        self.delimiter = fitting[0] if fitting else max(headers, key=lambda mark: len(headers[mark]))
        self.header = headers[self.delimiter]
        _check_header(self.header, wanted)

    def column(self, name: str, *, many: bool = False) -> Reader[Sequence[str]]:  # noqa: ARG002 (a field is one text)
        """What reads a column from a record, stripped; of a table without it, empty."""
        name = composed(name)
        if name not in self.header:
            return lambda _: ""
        index = self.header.index(name)
        return lambda record: record[index].strip()

    def raw(self, record: Sequence[str]) -> Sequence[str]:
        """All fields."""
        return record

    def __iter__(self) -> Iterator[tuple[int, Sequence[str], str]]:
        """Each record below the header with the line that it begins on (from 1), blank ones left out.

        Raises BadTable where the text is no UTF-8, the quoting is broken or a field is longer than
        `csv.field_size_limit()` characters: what follows could be read as anything.
        """
        width = len(self.header)
        reader = csv.reader(_text(self._body), delimiter=self.delimiter, strict=True)
        line = 1
        seen_header = False
        try:
            for record in reader:
                if any(map(str.strip, record)):
                    if seen_header:
                        right = len(record) == width
                        yield line, record, "" if right else f"has {len(record)} fields, the header has {width}"
                    seen_header = True
                line = reader.line_num + 1
        except csv.Error as error:
            raise BadTable(f"line {line}: {error}") from error
        except UnicodeDecodeError as error:
            raise BadTable(_undecodable(self._body)) from error


def _text(body: bytes) -> io.TextIOWrapper:
    """The lines of a body as text, decoded as they are read: no second copy of a large feed."""
    return io.TextIOWrapper(io.BytesIO(body), encoding="utf-8-sig", newline="")


def _line(body: bytes, at: int) -> int:
    return body.count(b"\n", 0, at) + 1


def _undecodable(body: bytes) -> str:
    """The first byte that is not UTF-8, with its line; empty where there is none."""
    try:
        body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start + (len(_MARK) if body.startswith(_MARK) else 0)
        return f"line {_line(body, at)}: byte 0x{body[at]:02x} is not UTF-8"
    return ""


def _header(body: bytes, delimiter: str) -> list[str]:
    """The first record that is not blank, its names stripped; empty where it cannot be read so."""
    text = body[:_HEADER_BYTES].decode("utf-8-sig", "replace")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for record in reader:
            names = [composed(name.strip()) for name in record]
            if any(names):
                return names
    except csv.Error:
        pass  # not with this delimiter; no header at all is reported below
    return []


def _check_header(header: Sequence[str], wanted: Mapping[str, str]) -> None:
    if not header:
        raise BadTable("line 1: there is no header")
    repeated = sorted(name for name, times in Counter(header).items() if times > 1)
    if repeated:
        raise BadTable(f"line 1: the header repeats {_listed(repeated)}")
    if found := missing_columns(wanted, header, place="line 1: the header"):
        raise found


def _listed(names: Sequence[str]) -> str:
    return printable(", ".join(repr(name) for name in names), 200)
