"""A table in a text file: RFC 4180 (https://www.rfc-editor.org/rfc/rfc4180) with a header, in UTF-8, read strictly.

    table = Table(decode(body), cells=["name", "{first} {last}"])
    name = table.reader("name")
    for line, record in table.records(): print(line, name(record))

What spoils the whole file raises BadTable with the line; how many fields a record has is left to the caller.
"""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from kbsync.connectors.text import printable

__all__ = ["DELIMITERS", "BadTable", "Table", "check_cell", "decode"]

DELIMITERS = (",", ";", "\t", "|")
"""Tried in this order where none is declared; the first under which the header has every column needed is taken."""

_COLUMN = re.compile(r"\{([^{}]+)\}")
_HEADER_CHARACTERS = 65_536  # how far the header may reach


class BadTable(ValueError):
    """The file as a whole is not the table that was declared; says on which line."""


def decode(body: bytes) -> str:
    """The text of a UTF-8 file, without its byte order mark. Raises BadTable for other encodings and for NUL."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = body.count(b"\n", 0, error.start) + 1
        raise BadTable(f"line {line}: byte 0x{body[error.start]:02x} is not UTF-8") from error
    at = text.find("\0")
    if at >= 0:
        line = text.count("\n", 0, at) + 1
        raise BadTable(f"line {line}: has a NUL character")
    return text


def check_cell(cell: str) -> str:
    """`cell`, a column's name or a template over columns such as "{first} {last}". Raises ValueError for odd braces."""
    if re.search(r"[{}]", _COLUMN.sub("", cell)):
        raise ValueError("must be the name of a column or a template such as '{first} {last}'")
    return cell


class Table:
    """A header and the records below it. `cells` are what the readers will be asked for.

    Raises BadTable where the text is empty, or its header repeats or lacks a column.
    """

    def __init__(self, text: str, *, cells: Sequence[str], delimiter: str | None = None) -> None:
        self._text = text
        needed = list(dict.fromkeys(chain.from_iterable(_columns(cell) for cell in cells)))
        headers = {mark: _header(text, mark) for mark in ([delimiter] if delimiter else DELIMITERS)}
        fitting = [mark for mark, header in headers.items() if set(needed) <= set(header)]
        self.delimiter = fitting[0] if fitting else max(headers, key=lambda mark: len(headers[mark]))
        self.header = headers[self.delimiter]
        _check_header(self.header, needed)

    @property
    def width(self) -> int:
        """Fields that a record should have."""
        return len(self.header)

    def reader(self, cell: str) -> Callable[[Sequence[str]], str]:
        """What reads `cell` from a record of the table's width, stripped; empty where all of its columns are empty."""
        if not _COLUMN.search(cell):
            index = self.header.index(cell)
            return lambda record: record[index].strip()
        columns = {name: self.header.index(name) for name in _columns(cell)}

        def fill(record: Sequence[str]) -> str:
            values = {name: record[index].strip() for name, index in columns.items()}
            return _COLUMN.sub(lambda found: values[found[1]], cell).strip() if any(values.values()) else ""

        return fill

    def records(self) -> Iterator[tuple[int, list[str]]]:
        """Each record below the header with the line that it begins on (from 1), blank ones left out.

        Raises BadTable where the quoting is broken or a field is longer than `csv.field_size_limit()` characters:
        what follows could be read as anything.
        """
        reader = csv.reader(io.StringIO(self._text, newline=""), delimiter=self.delimiter, strict=True)
        line = 1
        seen_header = False
        try:
            for record in reader:
                if any(map(str.strip, record)):
                    if seen_header:
                        yield line, record
                    seen_header = True
                line = reader.line_num + 1
        except csv.Error as error:
            raise BadTable(f"line {line}: {error}") from error


def _columns(cell: str) -> list[str]:
    return _COLUMN.findall(cell) or [cell]


def _header(text: str, delimiter: str) -> list[str]:
    """The first record that is not blank, its names stripped; empty where it cannot be read so."""
    reader = csv.reader(io.StringIO(text[:_HEADER_CHARACTERS], newline=""), delimiter=delimiter, strict=True)
    try:
        for record in reader:
            names = [name.strip() for name in record]
            if any(names):
                return names
    except csv.Error:
        pass  # not with this delimiter; no header at all is reported below
    return []


def _check_header(header: Sequence[str], needed: Sequence[str]) -> None:
    if not header:
        raise BadTable("line 1: there is no header")
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise BadTable(f"line 1: the header repeats {_listed(repeated)}")
    for name in needed:
        if name not in header:
            near = difflib.get_close_matches(name, header, n=2) or header[:10]
            raise BadTable(f"line 1: the header has no column {name}; it has {_listed(near)}")


def _listed(names: Sequence[str]) -> str:
    return printable(", ".join(repr(name) for name in names), 200)
