"""The `jsonl` connector: a feed (see `feed.py`) of JSON Lines (https://jsonlines.org), one object a line.

    type: jsonl
    location: members.jsonl.gz
    columns: {subject: name.official_full, object: "{state} {district}"}

A column is a key, or a path of keys with dots into the objects within. Numbers, true and false are the text that was
written; null and a key that is absent mean, not given. A line that is no JSON object goes to quarantine.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from kbsync.connectors.columns import Reader
from kbsync.connectors.feed import FeedConnector, FeedOptions
from kbsync.connectors.table import BadTable, missing_columns
from kbsync.connectors.text import printable

__all__ = ["JsonLines", "JsonLinesConnector", "JsonLinesOptions"]

Object = Mapping[str, Any]
LONGEST = csv.field_size_limit()
"""Characters of the longest text, the same as of a field of a CSV feed."""
KEYS_NAMED = 100
"""How many of the keys that a feed has an error can be about."""


class JsonLinesOptions(FeedOptions):
    """The keys of a `type: jsonl` source."""


class JsonLines:
    """The objects of a body, one a line. `wanted`: the columns that some line must have, each with the key that names
    it: an object may leave one out, but what no line has was renamed.

    Raises BadTable where no line is an object, or a column is in none.
    """

    def __init__(self, body: bytes, wanted: Mapping[str, str]) -> None:
        self._body = body.removeprefix(b"\xef\xbb\xbf")
        missing, present = dict(wanted), dict[str, None]()
        lines = 0
        for _, (_, record), problem in self:
            lines += 1
            if not problem:
                missing = {name: key for name, key in missing.items() if not _has(record, name)}
                if len(present) < KEYS_NAMED:
                    present |= dict.fromkeys(_keys(record))
            if not missing and present:
                return
        if lines and not present:
            raise BadTable("no line is a JSON object with a key")
        if lines and (found := missing_columns(wanted, [*present, *(wanted.keys() - missing)], place="the feed")):
            raise found

    def column(self, name: str, *, many: bool = False) -> Reader[tuple[bytes, Object]]:
        """What reads a column from a record; empty where it is null or absent. `many`: a list is lines of text.

        The reader raises ValueError for a list or an object where a text is wanted.
        """

        def read(record: tuple[bytes, Object]) -> str:
            value = _get(record[1], name)
            if isinstance(value, list) and many:
                return "\n".join(_text(name, item) for item in value)
            return _text(name, value)

        return read

    def raw(self, record: tuple[bytes, Object]) -> Sequence[str]:
        """The line as it is."""
        return (record[0].decode("utf-8", "replace").strip(),)

    def __iter__(self) -> Iterator[tuple[int, tuple[bytes, Object], str]]:
        """Each line that is not blank with its number (from 1), its object, and why it is none."""
        for number, line in enumerate(io.BytesIO(self._body), 1):
            if line.strip():
                try:
                    yield number, (line, _parsed(line)), ""
                except (ValueError, RecursionError) as error:
                    yield number, (line, {}), f"is no JSON object: {_reason(error)}"


def _parsed(line: bytes) -> Object:
    value = _DECODER.decode(line.decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError("it does not begin with {")
    return value


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    if isinstance(error, UnicodeDecodeError):
        return f"byte 0x{error.object[error.start]:02x} is not UTF-8"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen = set[str]()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"it has the key {printable(repr(twice), 100)} twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_float=str, parse_int=str, parse_constant=_no_number, strict=True
)
"""RFC 8259, but numbers stay the text that was written, and a key may not come twice."""


def _get(record: Object, name: str) -> Any:
    """The value of a key, or at the end of a path of keys; None where there is none."""
    if name in record:
        return record[name]
    value: Any = record
    for key in name.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def _has(record: Object, name: str) -> bool:
    """Whether a key or a path is there, if only with null."""
    if name in record:
        return True
    parent, _, key = name.rpartition(".")
    inner = _get(record, parent) if parent else None
    return isinstance(inner, dict) and key in inner


def _keys(record: Object, prefix: str = "") -> Iterator[str]:
    """The paths to all values that are no objects."""
    for key, value in record.items():
        if isinstance(value, dict) and value:
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _text(name: str, value: Any) -> str:
    if isinstance(value, str):
        if len(value) > LONGEST:
            raise ValueError(f"{name} has {len(value):,} characters, more than {LONGEST:,}")
        return value.strip()
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    raise ValueError(f"{name} is {'a list' if isinstance(value, list) else 'an object'}, not a text")


class JsonLinesConnector(FeedConnector):
    """Reads a JSON Lines feed."""

    Options = JsonLinesOptions
    accept = "application/jsonl, application/x-ndjson, text/plain;q=0.9, */*;q=0.1"
    content_types = (
        "application/json",
        "application/json-lines",
        "application/jsonl",
        "application/jsonlines",
        "application/ndjson",
        "application/x-jsonlines",
        "application/x-ndjson",
        "text/plain",
        "text/x-ndjson",
    )

    def records(self, body: bytes) -> JsonLines:
        """The lines of the body. Raises BadTable where none is an object, or a column is in none."""
        return JsonLines(body, self.options.wanted())
