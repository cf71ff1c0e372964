"""The `csv` connector: a table with a header, from a file inside the allowed folders or from an https URL.

    source: star-catalog
    type: csv
    location: star-catalog.csv          # or https://…; If-None-Match and If-Modified-Since are used
    row_id: hip                         # the subject's id; default: how it is written
    columns: {subject: name, object: constellation}
    where: {kind: star}                 # only rows with this value

Everything but a `where` may be one column's name or a template over columns: "{first} {last}". Values stay strings.
A file that cannot be trusted as a whole (encoding, quoting, header) fails the run; a bad row goes to quarantine.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import httpx
from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from kbsync.connectors import Options, Place
from kbsync.connectors.http import HttpOptions, Reply, check_url, send
from kbsync.connectors.rows import Row, snapshot_of
from kbsync.connectors.table import BadTable, Table, check_cell, decode
from kbsync.connectors.text import printable
from kbsync.errors import SourceInvalid, SourceUnavailable
from kbsync.facts import Provenance, Snapshot, digest_of
from kbsync.policy import Name, Source

__all__ = ["CsvConnector", "CsvOptions"]

CONTENT_TYPES = (
    "",
    "application/csv",
    "application/octet-stream",
    "application/vnd.ms-excel",
    "binary/octet-stream",
    "text/csv",
    "text/plain",
    "text/tab-separated-values",
)
"""What servers call a CSV file. Anything else (a login page, an error in JSON) is not the feed."""
Cell = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(check_cell)]
"""One value of a row: a column's name, or a template over columns."""


class Columns(Options):
    """Which columns say what."""

    subject: Cell
    object: Cell
    object_id: Cell | None = None
    """The object's id within `object_ids`; default: how it is written."""
    start: Cell | None = None
    end: Cell | None = None
    rank: Cell | None = None


class CsvOptions(HttpOptions):
    """The keys of a `type: csv` source."""

    location: str
    """A path, relative to the source file and inside the allowed folders, or an https URL."""
    columns: Columns
    row_id: Cell | None = None
    """The subject's id within the source's `ids`; default: how it is written."""
    object_ids: Name | None = None
    """The id space of the objects; default: the source's own name."""
    delimiter: Annotated[str, Field(pattern=r"^([^\w\"\s]|\t)$")] | None = None
    """One character; default: found by the header."""
    where: Mapping[str, str] = Field(default_factory=dict)
    """Only rows in which these columns have these values."""

    @field_validator("location")
    @classmethod
    def _location(cls, value: str, info: ValidationInfo) -> str:
        if _is_url(value):
            return check_url(value, info.data)
        Place.of(info).path(value)
        return value

    def cells(self) -> dict[str, str]:
        """What each field of a row is read from, where it is declared."""
        columns = self.columns
        cells = {
            "subject": columns.subject,
            "object": columns.object,
            "subject_id": self.row_id,
            "object_id": columns.object_id,
            "start": columns.start,
            "end": columns.end,
            "rank": columns.rank,
        }
        return {field: cell for field, cell in cells.items() if cell is not None}


def _is_url(location: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location) is not None


class CsvConnector:
    """Reads a CSV source whole, each time."""

    Options = CsvOptions

    def __init__(self, source: Source, options: CsvOptions, place: Place) -> None:
        self._source = source
        self._options = options
        self._place = place
        self._file = f"sources/{source.source}.yaml"
        self._declaration = digest_of(source.model_dump(mode="json"))

    @property
    def warnings(self) -> Sequence[str]:
        """A file that is not there (yet)."""
        location = self._options.location
        if _is_url(location) or self._place.path(location).exists():
            return ()
        return (f"location: {location} does not exist",)

    def fetch(self, previous: Provenance | None) -> Snapshot:
        """All rows of the feed; `not_modified` where the server vouches for the rows of `previous`.

        Raises SourceUnavailable, SourceBlocked, SourceInvalid (encoding, quoting, header; see `http.send` for URLs).
        """
        if _is_url(self._options.location):
            reply = self._ask(previous)
            provenance = self._reply_provenance(reply, previous)
            if reply.status == 304:
                return Snapshot(self._source.source, self._source.relation, provenance, not_modified=True)
            body = reply.body
        else:
            path, body = self._read()
            provenance = self._provenance(str(path), hashlib.sha256(body).hexdigest())
        try:
            table = self._table(body)
        except BadTable as error:
            hint = "nothing was changed; correct the feed and run `kbsync sync`"
            raise SourceInvalid(self._source.source, f"{self._options.location}: {error}", hint=hint) from error
        return snapshot_of(self._source, lambda: self._rows(table), provenance)

    def _table(self, body: bytes) -> Table:
        """The table that the body is, read once to its end. Raises BadTable where it is none."""
        options = self._options
        table = Table(decode(body), cells=(*options.cells().values(), *options.where), delimiter=options.delimiter)
        for _ in table.records():
            pass
        return table

    def _rows(self, table: Table) -> Iterator[Row]:
        """The rows that `where` lets through, and those that are no rows of the table, with their lines."""
        options = self._options
        cells = options.cells()
        fields = {field: table.reader(cell) for field, cell in cells.items()}
        wanted = [(table.reader(column), value.strip()) for column, value in options.where.items()]
        space = options.object_ids or self._source.source
        for line, record in table.records():
            origin = f"line {line}"
            if len(record) != table.width:
                problem = f"has {len(record)} fields, the header has {table.width}"
                yield Row(origin, record, problem=problem)
            elif all(read(record) == value for read, value in wanted):
                values: dict[str, Any] = {field: read(record) for field, read in fields.items()}
                row = Row(origin, record, object_space=space, **values)
                if row.object_id:
                    row.object_id = f"{space}:{row.object_id}"
                yield row

    # -- getting the body

    def _ask(self, previous: Provenance | None) -> Reply:
        headers = {"Accept": "text/csv, text/plain;q=0.9, */*;q=0.1"}
        location = self._options.location
        if previous and (previous.location, previous.declaration) == (location, self._declaration):
            if previous.etag:
                headers["If-None-Match"] = previous.etag
            if previous.last_modified:
                headers["If-Modified-Since"] = previous.last_modified
        reply = send(self._source.source, httpx.Request("GET", location, headers=headers), self._options)
        if reply.status == 200 and reply.content_type not in CONTENT_TYPES:
            problem = f"{location}: the answer is {printable(reply.content_type, 60)}, not a CSV file"
            raise SourceInvalid(self._source.source, problem, hint=f"see `location` in {self._file}")
        return reply

    def _reply_provenance(self, reply: Reply, previous: Provenance | None) -> Provenance:
        known = previous if reply.status == 304 else None
        return self._provenance(
            self._options.location,
            known.body_sha256 if known else reply.sha256,
            status=reply.status,
            etag=reply.validator("etag") or (known.etag if known else None),
            last_modified=reply.validator("last-modified") or (known.last_modified if known else None),
        )

    def _provenance(
        self,
        location: str,
        sha256: str,
        *,
        status: int = 200,
        etag: str | None = None,
        last_modified: str | None = None,
    ) -> Provenance:
        return Provenance(
            location=location,
            fetched_at=datetime.now(UTC),
            status=status,
            body_sha256=sha256,
            etag=etag,
            last_modified=last_modified,
            declaration=self._declaration,
        )

    def _read(self) -> tuple[Path, bytes]:
        """The file's real path and its bytes, where it is a regular file that nobody is writing to."""
        name, location = self._source.source, self._options.location
        try:
            path = self._place.path(location)
            # The path is resolved: a link at its end was put there since. Non-blocking: opening a FIFO would wait.
            with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                before = os.fstat(file.fileno())
                if not stat.S_ISREG(before.st_mode):
                    raise SourceInvalid(name, f"{location}: is not a regular file")
                body = file.read(self._options.max_bytes + 1)
                after = os.fstat(file.fileno())
        except ValueError as error:
            raise SourceInvalid(name, str(error)) from error
        except OSError as error:
            hint = f"see `location` in {self._file}, then run `kbsync check`"
            raise SourceUnavailable(name, f"{path}: {error.strerror}", hint=hint) from error
        if len(body) > self._options.max_bytes:
            limit = self._options.max_bytes.human_readable(decimal=True)
            raise SourceInvalid(name, f"{location}: is larger than {limit}", hint=f"`max_bytes` in {self._file}")
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise SourceUnavailable(name, f"{location}: was written to while it was read", hint="run `kbsync sync`")
        return path, body
