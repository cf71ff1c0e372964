"""Asking an endpoint for more than one answer can hold: by chunks of subjects, by pages, or by what has changed.

    chunks:       the subjects first, then the rows of `size` of them at a time (VALUES)
    page:         the rows in the order of a key, `size` at a time, each page beyond the last key of the one before
    incremental:  between two complete snapshots the rows of those subjects alone that have been changed meanwhile

All parts belong to one fetch: they share its deadline, its size cap and its hash, and one that fails fails it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo

from kbsync.connectors import Options, Place
from kbsync.connectors.endpoint import NOTHING, Answer, Endpoint
from kbsync.connectors.query import (
    MODIFIED,
    VARIABLES,
    check_select,
    listed,
    modified_subjects,
    page,
    restricted,
    subjects_of,
)
from kbsync.connectors.text import printable
from kbsync.errors import SourceUnavailable
from kbsync.policy import Seconds

__all__ = ["Chunks", "Incremental", "Pages", "Parts", "Said", "Subjects", "ask", "instants"]

_ITEM = re.compile(r"(?:wd:)?([QPL]\d+)")


@dataclass(frozen=True, slots=True)
class Subjects:
    """Whose rows a source asks for: the text of a query that gives ?subject, or a list of their IRIs."""

    query: str = ""
    iris: tuple[str, ...] = ()

    @classmethod
    def read(cls, value: object, info: ValidationInfo) -> object:
        """The subjects that a file beside the source file gives: a query (`.rq`), or an id or an IRI a line."""
        if not isinstance(value, str):
            return value
        text = Place.of(info).text(value)
        if value.endswith(".rq"):
            check_select(value, text, ("subject",))
            return cls(query=text)
        lines = [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]
        if not lines:
            raise ValueError(f"{value} names no subject")
        return cls(iris=tuple(dict.fromkeys(_item_iri(line) for line in lines)))

    def queries(self, size: int) -> list[str]:
        """Queries that give them all as ?subject."""
        return [self.query] if self.query else [listed(some) for some in _batches(self.iris, size)]


def _item_iri(line: str) -> str:
    """`Q42`, `wd:Q42` or `<IRI>` as an IRI."""
    if found := _ITEM.fullmatch(line):
        return f"http://www.wikidata.org/entity/{found[1]}"
    iri = line.removeprefix("<").removesuffix(">")
    listed([iri])  # raises ValueError for what is no IRI
    return iri


class Chunks(Options):
    """Ask for the rows of so many subjects at a time."""

    subjects: Annotated[Any, BeforeValidator(Subjects.read)]
    """A file beside the source file: a query that gives ?subject, or a list of ids; once validated, `Subjects`."""
    size: Annotated[int, Field(ge=1, le=10_000)] = 200


class Pages(Options):
    """Ask for so many rows at a time, in the order of a key."""

    key: Literal["?subject", "?statement"] = "?subject"
    size: Annotated[int, Field(ge=2, le=1_000_000)] = 5_000


class Incremental(Options):
    """Ask between two complete snapshots for the subjects that have been changed."""

    every: Annotated[Seconds, Field(gt=0)] = 7 * 86_400.0
    """How often everything is asked for: deletions, merged items and new labels of objects are found by that alone."""
    overlap: Seconds = 3_600.0
    """How much of the time before the cursor is asked for again: servers see changes late, and not in one order."""
    by: str = MODIFIED
    """IRI of the property that dates a subject's last change."""


@dataclass(frozen=True, slots=True)
class Parts:
    """How the rows of a query are asked for."""

    query: str
    chunks: Chunks | None = None
    page: Pages | None = None
    incremental: Incremental | None = None


@dataclass(frozen=True, slots=True)
class Said:
    """The rows of a fetch. `covers`: the subjects (IRIs) that were asked about, where it was not about all; `cursor`:
    where the next fetch goes on; `in_parts`: whether it took several requests."""

    rows: Answer
    covers: tuple[str, ...] | None = None
    cursor: str | None = None
    in_parts: bool = True


@dataclass(frozen=True, slots=True)
class _Cursor:
    """Changes up to `modified` are in the ledger; the last complete snapshot is of `complete`."""

    modified: datetime
    complete: datetime

    def __str__(self) -> str:
        return f"{self.modified.isoformat()} {self.complete.isoformat()}"

    @classmethod
    def read(cls, text: str | None) -> _Cursor | None:
        """The inverse of `str`; None for a text that is none."""
        try:
            modified, complete = map(datetime.fromisoformat, (text or "").split(" "))
        except ValueError:
            return None
        return cls(modified, complete)


def ask(endpoint: Endpoint, parts: Parts, cursor: str | None, now: datetime) -> Said:
    """All rows, or with `incremental` those of the subjects that have been changed since `cursor` (None: all).

    Raises what `Endpoint.ask` raises, and SourceUnavailable where the rows have moved while they were read.
    """
    if parts.page is not None:
        return Said([row for rows in _pages(endpoint, parts.query, parts.page) for row in rows])
    if parts.chunks is None:
        return Said(endpoint.ask(parts.query, VARIABLES), in_parts=False)
    if parts.incremental is None:
        subjects = parts.chunks.subjects.iris or _subjects(endpoint, [parts.chunks.subjects.query])
        return Said(_rows_of(endpoint, parts, tuple(subjects)))
    return _changed(endpoint, parts, parts.chunks, parts.incremental, _Cursor.read(cursor), now)


def instants(endpoint: Endpoint, rows: Answer) -> list[datetime]:
    """The values of ?modified. Raises SourceInvalid for one that is no time (ISO 8601; UTC where it says no zone)."""
    found = []
    for row in rows:
        if text := row.get("modified", NOTHING).value:
            try:
                moment = datetime.fromisoformat(text)
            except ValueError as error:
                raise endpoint.invalid(f"a date of change is no time: {printable(text, 60)}") from error
            found.append(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    return found


def _changed(
    endpoint: Endpoint, parts: Parts, chunks: Chunks, by: Incremental, since: _Cursor | None, now: datetime
) -> Said:
    """The rows of the changed subjects; of all where the last complete snapshot is too old, or there is none."""
    whole = since is None or now - since.complete >= timedelta(seconds=by.every)
    queries = chunks.subjects.queries(chunks.size)
    if since is None or whole:
        dated = [endpoint.ask(subjects_of(query, by.by), ("subject", "modified")) for query in queries]
    else:
        start = since.modified - timedelta(seconds=by.overlap)
        dated = [endpoint.ask(modified_subjects(query, by.by, start), ("subject", "modified")) for query in queries]
    rows = [row for answer in dated for row in answer]
    times = instants(endpoint, rows)
    if since is None and rows and not times:
        raise endpoint.invalid(f"no subject has <{by.by}>, by which `incremental` goes")
    subjects = _iris(endpoint, rows)
    known = [] if since is None or whole else [since.modified]
    # Never later than what the servers have shown: their clock and their lag are theirs. A date in the future would
    # hide all changes until then. Where they have shown nothing, the next fetch is whole, too.
    newest = max([*times, *known], default=None)
    complete = now if since is None or whole else since.complete
    cursor = None if newest is None else str(_Cursor(min(newest, now), complete))
    return Said(_rows_of(endpoint, parts, subjects), None if whole else subjects, cursor)


def _subjects(endpoint: Endpoint, queries: Sequence[str]) -> tuple[str, ...]:
    return _iris(endpoint, [row for query in queries for row in endpoint.ask(query, ("subject",))])


def _iris(endpoint: Endpoint, rows: Answer) -> tuple[str, ...]:
    """The subjects of some rows, each once."""
    terms = dict.fromkeys(row.get("subject", NOTHING) for row in rows)
    if strays := [term.value for term in terms if term.kind != "uri"]:
        raise endpoint.invalid(f"a subject of `chunks.subjects` is no IRI: {printable(strays[0], 60)!r}")
    return tuple(term.value for term in terms)


def _rows_of(endpoint: Endpoint, parts: Parts, subjects: Sequence[str]) -> Answer:
    """The rows of these subjects, chunk by chunk."""
    size = parts.chunks.size if parts.chunks else len(subjects)
    found: Answer = []
    for some in _batches(subjects, size):
        rows = endpoint.ask(restricted(parts.query, some), VARIABLES)
        asked = set(some)
        strays = (value for row in rows if (value := row.get("subject", NOTHING).value) not in asked)
        if (stray := next(strays, None)) is not None:
            raise endpoint.invalid(f"the rows of a chunk are about another subject: {printable(stray, 100)!r}")
        found += rows
    return found


def _pages(endpoint: Endpoint, query: str, pages: Pages) -> Iterator[Answer]:
    """The pages, each without the key at which it may be cut. An empty one after the last proves that it was the last:
    an endpoint may have a limit of its own."""
    name, after, last = pages.key[1:], None, False
    while rows := endpoint.ask(page(query, key=pages.key, after=after, size=pages.size), (*VARIABLES, name)):
        if last:
            problem = f"{endpoint.host}: rows came after the last page: it gives less than `page.size`, or they are new"
            raise SourceUnavailable(endpoint.source, problem, hint="run `kbsync sync` later, or with smaller pages")
        keys = [row.get(name, NOTHING).value for row in rows]
        if keys != sorted(keys) or (after is not None and keys[0] <= after):
            raise endpoint.invalid(f"a page is not in the order of {pages.key}")
        last = len(rows) < pages.size
        whole = rows if last else [row for row, key in zip(rows, keys, strict=True) if key != keys[-1]]
        if not whole:
            raise endpoint.invalid(f"{keys[0]} alone has as many rows as a page; make `page.size` larger")
        after = keys[len(whole) - 1]
        yield whole


def _batches(values: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (values[start : start + size] for start in range(0, len(values), size))
