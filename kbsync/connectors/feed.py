"""A feed: a file of rows, fetched, proven, unpacked and read by the columns that the source file declares.

All that `type: csv` and `type: jsonl` share; what is their own is how a body is parted into records (`Records`).

    source: star-names
    type: csv
    location: https://example.org/stars.csv.gz     # or a path; gzip and zip are unpacked
    minisign: {public_key: RWQf6LRC…}              # and / or sha256: what the body must be
    row_id: hip                                    # the subject's id; default: how it is written
    columns: {subject: name, object: {column: Con, lookup: constellations.csv}}
    where: {kind: star}                            # only rows with this value

A file that cannot be trusted as a whole fails the run; a bad row goes to quarantine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import AfterValidator, Field, SecretStr, ValidationInfo, field_validator

import kbsync
from kbsync.connectors import STALE_RETRY_SECONDS, Options, Place
from kbsync.connectors.archive import BadArchive, Compression, unpack
from kbsync.connectors.columns import Cell, Columns, Reader, reader
from kbsync.connectors.http import HttpOptions, check_url
from kbsync.connectors.location import Fetched, Location, check_location, is_url
from kbsync.connectors.rows import Row, snapshot_of
from kbsync.connectors.signature import (
    HEX,
    BadSignature,
    PublicKey,
    check_comment,
    check_sha256,
    expected_sha256,
    is_replay,
)
from kbsync.connectors.table import BadTable
from kbsync.connectors.text import printable
from kbsync.errors import SourceInvalid, SourceUnavailable
from kbsync.facts import Provenance, Snapshot, digest_of
from kbsync.policy import Name, Source
from kbsync.references import holds_password, is_reference, names_secret, redacted

__all__ = ["FeedConnector", "FeedOptions", "Mapped", "Minisign", "Records", "RowOptions"]

RecordT = TypeVar("RecordT")

_ARCHIVES = (
    "",
    "application/gzip",
    "application/octet-stream",
    "application/x-gzip",
    "application/x-zip-compressed",
    "application/zip",
    "binary/octet-stream",
)
"""What servers call an archive, or a file that they do not know."""
_FRAMING = ("connection", "content-length", "host", "transfer-encoding")
_ENDLESS = "let the server send Content-Length or the file as .gz, or declare `sha256` or `minisign`"


def _header_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9-]{1,100}", value) or value.lower() in _FRAMING:
        raise ValueError("is no header that a source file may send")
    return value


HeaderName = Annotated[str, AfterValidator(_header_name)]


class Minisign(Options):
    """Who signed the feed (https://jedisct1.github.io/minisign/)."""

    public_key: str
    """As minisign prints it: 56 characters that begin with RW."""
    signature: str | None = None
    """Path or URL of the signature; default: the location with `.minisig` at its end."""
    file: str | None = None
    """The name that the signature's trusted comment must have, where it has one; default: the location's."""

    @field_validator("public_key")
    @classmethod
    def _key(cls, value: str) -> str:
        PublicKey.parse(value)
        return value


class RowOptions(Options):
    """Keys of every source whose rows have columns."""

    columns: Columns
    row_id: Cell | None = None
    """The subject's id within the source's `ids`; default: how it is written."""
    object_ids: Name | None = None
    """The id space of the objects; default: the source's own name."""
    where: Mapping[str, str] = Field(default_factory=dict)
    """Only rows in which these columns have these values."""

    def wanted(self) -> dict[str, str]:
        """The columns that the feed must have, each with the key that names it."""
        cells = [(f"columns.{name}", cell) for name, cell in self.columns.cells()]
        if self.row_id is not None:
            cells.append(("row_id", self.row_id))
        found = {column: key for key, cell in reversed(cells) for column in cell.columns()}
        return found | {column: "where" for column in self.where if column not in found}

    def digest(self, source: Source) -> str:
        """The declaration that rows are read with, lookup tables and all, by this kbsync: another one may read
        differently."""
        declared = source.model_dump(mode="json")
        return digest_of([kbsync.__version__, declared, self.model_dump(mode="json", include={"columns", "row_id"})])


class FeedOptions(HttpOptions, RowOptions):
    """Keys of every feed."""

    location: str
    """A path, relative to the source file and inside the allowed folders, or an https URL, with `${NAME}` for secrets
    in its path or query."""
    headers: Mapping[HeaderName, SecretStr] = Field(default_factory=dict)
    """Sent to the server of `location` and to no other: `{Authorization: "Bearer ${TOKEN}"}`, or file:PATH."""
    compression: Compression = "auto"
    sha256: str | None = None
    """64 hex digits that the body must have, or path or URL of a file with them, as sha256sum writes it."""
    minisign: Minisign | None = None

    @field_validator("location")
    @classmethod
    def _location(cls, value: str, info: ValidationInfo) -> str:
        return check_location(value, info)

    @field_validator("sha256", "minisign")
    @classmethod
    def _proof(cls, value: str | Minisign | None, info: ValidationInfo) -> str | Minisign | None:
        beside = value.signature if isinstance(value, Minisign) else value
        if beside is not None and is_url(beside):
            check_url(beside, info.data)
        return value


class Records(Protocol[RecordT]):
    """A body parted into records."""

    def column(self, name: str, *, many: bool = False) -> Reader[RecordT]:
        """What reads a column, stripped; of a feed without it, empty. `many`: a list is taken, a line an item."""

    def raw(self, record: RecordT) -> Sequence[str]:
        """All that a record says, for a person to read."""

    def __iter__(self) -> Iterator[tuple[int, RecordT, str]]:
        """Each record, always the same: the number of its line, the record, and what is wrong with it."""


class Mapped(Generic[RecordT]):
    """The rows that records come to under a declaration, as often as they are asked for. `place`: what a number is."""

    def __init__(self, source: Source, options: RowOptions, records: Records[RecordT], place: str = "line") -> None:
        self._records = records
        self._place = place
        self._space = options.object_ids or source.source
        columns, column = options.columns, records.column
        cells = {name: cell for name, cell in columns.cells() if name != "aliases" and "." not in name}
        if options.row_id is not None:
            cells["subject_id"] = options.row_id
        self._fields = {name: reader(cell, column) for name, cell in cells.items()}
        self._qualifiers = {name: reader(cell, column) for name, cell in columns.qualifiers.items()}
        self._wanted = [(column(name), value.strip()) for name, value in options.where.items()]
        self._aliases = columns.aliases and reader(columns.aliases, lambda name: column(name, many=True))
        self._split = columns.aliases.split if columns.aliases else ""

    def __iter__(self) -> Iterator[Row]:
        for number, record, problem in self._records:
            origin = f"{self._place} {number}"
            try:
                if not problem and not all(read(record) == value for read, value in self._wanted):
                    continue
            except ValueError as error:
                problem = str(error)
            yield Row(origin, self._records.raw(record), problem=problem) if problem else self._row(origin, record)

    def _row(self, origin: str, record: RecordT) -> Row:
        problem = ""
        try:
            values: dict[str, Any] = {name: read(record) for name, read in self._fields.items()}
        except ValueError as error:
            problem, values = str(error), self._readable(record)
        row = Row(origin, self._records.raw(record), object_space=self._space, problem=problem, **values)
        if row.object_id:
            row.object_id = f"{self._space}:{row.object_id}"
        try:
            if self._qualifiers:
                row.qualifiers = {name: text for name, read in self._qualifiers.items() if (text := read(record))}
            if self._aliases:
                parts = (part.strip() for part in self._aliases(record).split(self._split))
                row.aliases = [part for part in parts if part and part != row.subject]
        except ValueError as error:
            row.problem = row.problem or str(error)
        return row

    def _readable(self, record: RecordT) -> dict[str, str]:
        """The fields of a bad row that can be read; its label is no name for it where its id cannot."""
        found = {}
        for name, read in self._fields.items():
            with suppress(ValueError):
                found[name] = read(record)
        if "subject_id" in self._fields and "subject_id" not in found:
            found.pop("subject", None)
        return found


class FeedConnector:
    """Reads a feed whole, each time."""

    Options: ClassVar[type[FeedOptions]]
    accept: ClassVar[str]
    """The Accept header of its request."""
    content_types: ClassVar[Sequence[str]]
    """What servers call such a file. Anything else (a login page, an error in JSON) is not the feed."""

    def __init__(self, source: Source, options: FeedOptions, place: Place) -> None:
        self.source = source
        self.options = options
        declaration = options.digest(source)
        self._location = Location(source.source, options.location, options, place, declaration, options.headers)

    @property
    def host(self) -> str | None:
        """The host that is asked, if any (see `Location.host`)."""
        return self._location.host

    @property
    def warnings(self) -> Sequence[str]:
        """A file that is not there (yet), and secrets that are written out."""
        absent = () if self._location.exists() else (f"location: {self.options.location} does not exist",)
        written = (f"{key}: holds a secret; write ${{NAME}} or file:PATH instead" for key in self._written_out())
        return (*absent, *written)

    def _written_out(self) -> Iterator[str]:
        options = self.options
        beside = options.minisign.signature if options.minisign else None
        urls = {"location": options.location, "sha256": options.sha256, "minisign.signature": beside}
        yield from (key for key, url in urls.items() if url and is_url(url) and holds_password(url))
        for name, value in options.headers.items():
            if names_secret(name) and not is_reference(value.get_secret_value()):
                yield f"headers.{name}"

    def records(self, body: bytes) -> Records[Any]:
        """The records of an unpacked body. Raises BadTable where it is none, or lacks a column."""
        raise NotImplementedError

    def fetch(self, previous: Provenance | None) -> Snapshot:
        """All rows of the feed; `not_modified` where the server vouches for the rows of `previous`, or the body is the
        same: reading it again would come to what it came to.

        Raises SourceUnavailable, SourceBlocked, and SourceInvalid for a body that is not what was signed, cannot be
        unpacked or read, or lacks a column (see `http.send` for URLs).
        """
        types = (*self.content_types, *_ARCHIVES)
        fetched = self._location.read(previous, accept=self.accept, content_types=types)
        if fetched.body is None:
            return self._unchanged(fetched.provenance)
        try:
            provenance = replace(fetched.provenance, verified=self._verified(fetched.body))
            self._refuse_replay(provenance.verified, previous)
            if fetched.repeats(previous):
                return self._unchanged(provenance)
            content = unpack(fetched.body, self.options.compression, self.options.max_bytes)
            if not (fetched.framed or provenance.verified or content is not fetched.body):
                # Rows that are missing at the end, and half a value, look like a shorter feed.
                raise BadTable("nothing says where the answer ends, so it may be cut", hint=_ENDLESS)
            rows = Mapped(self.source, self.options, self.records(content))
        except (BadArchive, BadSignature, BadTable) as error:
            hint = getattr(error, "hint", "") or "nothing was changed; correct the feed and run `kbsync sync`"
            raise SourceInvalid(self.source.source, f"{redacted(self.options.location)}: {error}", hint=hint) from error
        return snapshot_of(self.source, lambda: rows, provenance)

    def _refuse_replay(self, verified: str | None, previous: Provenance | None) -> None:
        if verified and previous and is_replay(verified, previous.verified):
            problem = f"{self._location.shown}: it was signed earlier than the feed that was accepted last"
            hint = "a cache may be behind, or somebody shows an old feed; it is asked again later"
            raise SourceUnavailable(self.source.source, problem, retry_after=STALE_RETRY_SECONDS, hint=hint)

    def _unchanged(self, provenance: Provenance) -> Snapshot:
        return Snapshot(self.source.source, self.source.relation, provenance, not_modified=True)

    def _verified(self, body: bytes) -> str | None:
        """What the body was proven by. Raises BadSignature; SourceError where the proof cannot be had."""
        options, passed = self.options, []
        if options.sha256 is not None:
            check_sha256(body, self._expected_sha256(options.sha256))
            passed.append("sha256")
        if options.minisign is not None:
            beside = options.minisign.signature
            where = self._location.with_suffix(".minisig") if beside is None else self._location.beside(beside)
            key = PublicKey.parse(options.minisign.public_key)
            comment = key.verify(body, _content(where.read()))
            check_comment(comment, options.minisign.file or self._location.name)
            passed.append(f"minisign {key.name} ({printable(comment, 200)})")
        return "; ".join(passed) or None

    def _expected_sha256(self, declared: str) -> str:
        if re.fullmatch(HEX, declared):
            return declared
        return expected_sha256(_content(self._location.beside(declared).read()), self._location.name)


def _content(fetched: Fetched) -> bytes:
    return fetched.body or b""
