"""The `sql` connector: the answer of one SELECT query of a database that SQLAlchemy can reach.

    source: offices
    type: sql
    url: "postgresql+psycopg://reader:${CRM_PASSWORD}@db.example.org/crm"     # or file:PATH of a file with the URL
    query: offices.sql            # or the query itself
    row_id: office_id
    columns: {subject: office, object: holder, start: {column: since, optional: true}}

One statement, in a transaction that is read only where the database has such (SQLite, PostgreSQL, MySQL, MariaDB), by
a deadline and within caps. It is read whole before anything is decided, and kept as JSON Lines: that is the body whose
hash the provenance has. What is no text becomes the one text that is exactly it; bytes have none, and wait.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, date, datetime
from datetime import time as clock_time
from decimal import Decimal
from functools import partial
from ipaddress import ip_address
from typing import Annotated, Any
from urllib.parse import quote
from uuid import UUID

from pydantic import ByteSize, Field, SecretStr, ValidationInfo, field_validator
from sqlalchemy import Connection, Engine, NullPool, create_engine, event, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, InterfaceError, NoSuchModuleError, OperationalError, SQLAlchemyError

from kbsync.connectors import Place
from kbsync.connectors.columns import Reader
from kbsync.connectors.feed import Mapped, RowOptions
from kbsync.connectors.network import is_allowed
from kbsync.connectors.rows import snapshot_of
from kbsync.connectors.table import BadTable, missing_columns
from kbsync.connectors.text import printable
from kbsync.errors import SourceError, SourceInvalid, SourceUnavailable
from kbsync.facts import Provenance, Snapshot, digest_of
from kbsync.policy import Seconds, Source
from kbsync.references import FILE, filled, holds_password

__all__ = ["Answer", "SqlConnector", "SqlOptions", "as_text"]

BATCH = 250
"""Rows that a server is asked for at a time; of a SQLite file, one by one."""
CONNECT_SECONDS = 10
"""How long a connection may take, where the deadline is not shorter."""
BUSY_SECONDS = 5.0
"""How long a SQLite file that another program writes is waited for."""
GRACE_SECONDS = 0.5
"""The database may end a statement itself first, so that it does not go on there."""
SECRET_LENGTH = 6
"""A shorter option of a URL is no secret, but may be part of any text."""
PROGRESS_STEPS = 10_000
"""SQLite looks at the deadline after so many steps of its virtual machine, some 0.1 ms."""

_LIBPQ, _MYSQL = ("psycopg", "psycopg2"), ("pymysql", "mysqldb")
"""Drivers, by the arguments that they know."""
_KEEPALIVE: Mapping[str, int] = {"keepalives_idle": 15, "keepalives_interval": 5, "keepalives_count": 3}
"""Seconds and times: a server that is gone is noticed within half a minute
(https://www.postgresql.org/docs/current/libpq-connect.html)."""
_FORM = re.compile(r"(?:\s|--[^\n]*(?:\n|$)|/\*.*?\*/|\()*+(select|with)\b", re.IGNORECASE | re.DOTALL)
_OTHERWISE_READ = re.compile(r"[\\$#`\[]|/\*|\r(?!\n)")
"""What makes databases differ about where a string ends."""
_QUOTED = re.compile(r"""'[^']*'|"[^"]*"|--\s[^\n]*""")
_SQLITE_READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_SQLITE_MAY_END = ("locked", "busy", "interrupted", "unable to open", "disk i/o")
_READ_ONLY: Mapping[str, Sequence[str]] = {
    "postgresql": ("SET TRANSACTION READ ONLY", "SET LOCAL statement_timeout = {ms}"),
    "mysql": ("SET SESSION TRANSACTION READ ONLY", "SET SESSION max_execution_time = {ms}"),
    "mariadb": ("SET SESSION TRANSACTION READ ONLY", "SET SESSION max_statement_time = {s}"),
}
"""What makes a transaction read only and bounded, by dialect."""


class SqlOptions(RowOptions):
    """The keys of a `type: sql` source."""

    url: SecretStr
    """Database URL, with `${NAME}` for secrets, or `file:PATH` of a file that holds it; a SQLite file must lie in the
    allowed folders."""
    query: str
    """One SELECT statement, or the file beside the source that has it; once validated, the statement itself."""
    deadline: Annotated[Seconds, Field(gt=0)] = 300.0
    max_bytes: Annotated[ByteSize, Field(gt=0)] = ByteSize(256_000_000)
    max_rows: Annotated[int, Field(gt=0)] = 5_000_000

    @field_validator("query")
    @classmethod
    def _query(cls, value: str, info: ValidationInfo) -> str:
        statement = (value if _FORM.match(value) else Place.of(info).text(value)).strip()
        while statement.endswith(";"):
            statement = statement[:-1].rstrip()
        if not _FORM.match(statement):
            raise ValueError("is not a SELECT statement")
        if ";" in (statement if _OTHERWISE_READ.search(statement) else _QUOTED.sub("", statement)):
            raise ValueError("has a semicolon inside: exactly one statement is sent")
        return statement

    def digest(self, source: Source) -> str:
        """The declaration that rows are read with: the query and the columns, not where they are asked."""
        read_with = self.model_dump(mode="json", include={"columns", "row_id", "object_ids", "where", "query"})
        return digest_of([source.source, source.relation, source.space, source.snapshot, read_with])


class Answer:
    """The rows of an answer: a line of JSON each, below a line with the names of the columns.

    Raises BadTable where the answer repeats or lacks a column.
    """

    def __init__(self, body: bytes, wanted: Mapping[str, str]) -> None:
        self._body = body
        self.names: list[str] = json.loads(body.partition(b"\n")[0])
        if repeated := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise BadTable(f"the answer repeats the column {printable(repeated[0], 60)!r}: name it otherwise by AS")
        if found := missing_columns(wanted, self.names, place="the answer"):
            raise found

    def column(self, name: str, *, many: bool = False) -> Reader[Sequence[Any]]:  # noqa: ARG002 (a value is one text)
        """What reads a column; NULL is empty. The reader raises ValueError for a value that is no text."""
        if name not in self.names:
            return lambda _: ""
        index = self.names.index(name)

        def read(record: Sequence[Any]) -> str:
            value = record[index]
            if isinstance(value, str):
                return value.strip()
            if value is None:
                return ""
            raise ValueError(f"{name} is {value['type']}, which is no text")

        return read

    def raw(self, record: Sequence[Any]) -> Sequence[str]:
        """All values."""
        return [str(value["type"]) if isinstance(value, dict) else value or "" for value in record]

    def __iter__(self) -> Iterator[tuple[int, Sequence[Any], str]]:
        """Each row with its number in the answer, from 1."""
        lines = iter(io.BytesIO(self._body))
        next(lines)
        for number, line in enumerate(lines, 1):
            yield number, json.loads(line), ""


class SqlConnector:
    """Asks a database its one query, each time anew."""

    Options = SqlOptions

    def __init__(self, source: Source, options: SqlOptions, place: Place) -> None:
        self._source = source
        self._options = options
        self._place = place

    @property
    def warnings(self) -> Sequence[str]:
        """What is unwise in the URL, or makes asking impossible."""
        found = []
        if holds_password(self._options.url.get_secret_value()):
            found.append("url: holds a password; write ${NAME} or file:PATH instead")
        try:
            dialect = self._url().get_backend_name()
        except ValueError as error:
            return [*found, f"url: {error}"]
        if dialect not in (*_READ_ONLY, "sqlite"):
            found.append(f"url: kbsync cannot make {dialect} read only: use a user who may only read")
        return found

    def fetch(self, previous: Provenance | None) -> Snapshot:  # noqa: ARG002 (databases have no validators)
        """All rows of the answer.

        Raises SourceUnavailable (no connection, no answer by the deadline) and SourceInvalid (the query or the URL is
        refused, a column is missing, a cap is reached).
        """
        try:
            url = self._url()
            for host in _hosts(url):
                _refuse_address(host)
            body = self._ask(url)
            rows = Mapped(self._source, self._options, Answer(body, self._options.wanted()), place="row")
        except ValueError as error:
            hint = getattr(error, "hint", "") or f"nothing was changed; see sources/{self._source.source}.yaml"
            raise SourceInvalid(self._source.source, str(error), hint=hint) from None
        provenance = Provenance(
            location=url.set(password=None, query={}).render_as_string(),
            fetched_at=datetime.now(UTC),
            status=200,
            body_sha256=hashlib.sha256(body).hexdigest(),
            declaration=self._options.digest(self._source),
        )
        return snapshot_of(self._source, lambda: rows, provenance)

    def _url(self) -> URL:
        """The URL with its secrets filled in. Raises ValueError, which never has them in it."""
        text = self._options.url.get_secret_value()
        if text.startswith(FILE):
            text = self._place.text(text.removeprefix(FILE)).strip()
        text = filled(text)
        try:
            url = make_url(text)
        except (ArgumentError, ValueError):
            raise ValueError("is no database URL, such as postgresql+psycopg://user:${PASSWORD}@host/name") from None
        if "@" in (url.host or ""):
            raise ValueError("has an @ in its password: write it as %40")
        if url.get_backend_name() != "sqlite":
            if not (url.host or url.query.get("host")):
                raise ValueError("names no host: of databases that are files, only SQLite's can be read")
            return url
        if not url.database or url.database.startswith((":", "file:")):
            raise ValueError("must name a SQLite file")
        try:
            path = self._place.path(url.database)
        except ValueError:
            raise ValueError("names a file outside the folders that sources may read (allowed_dirs)") from None
        if path.exists() and not path.is_file():  # opening a pipe would wait
            raise ValueError("names something that is not a regular file")
        return url.set(database=str(path), query={})

    def _ask(self, url: URL) -> bytes:
        """The answer as JSON Lines. Raises SourceError."""
        seconds = self._options.deadline
        deadline = time.monotonic() + seconds
        with (
            self._translated(url, deadline),
            _engine(url, seconds) as engine,
            _ended(engine, deadline),
            engine.connect() as connection,
        ):
            _bind(connection, self._options, deadline)
            result = connection.execution_options(
                stream_results=True, no_parameters=True, max_row_buffer=BATCH
            ).exec_driver_sql(self._options.query)
            with closing(result):
                return self._written(result.keys(), result, deadline)

    def _written(self, names: Any, answer: Iterable[Sequence[Any]], deadline: float) -> bytes:
        options, file = self._options, io.BytesIO()
        name, where = self._source.source, f"sources/{self._source.source}.yaml"
        file.write(_line(list(names)))
        for number, row in enumerate(answer, 1):
            if number > options.max_rows:
                raise SourceInvalid(
                    name, f"the answer has more than {options.max_rows:,} rows", hint=f"`max_rows` in {where}"
                )
            file.write(_line([_value(value) for value in row]))
            if file.tell() > options.max_bytes:
                limit = options.max_bytes.human_readable(decimal=True)
                raise SourceInvalid(name, f"the answer is larger than {limit}", hint=f"`max_bytes` in {where}")
            if time.monotonic() > deadline:
                raise self._too_late()
        return file.getvalue()

    def _too_late(self) -> SourceError:
        name = self._source.source
        hint = f"`deadline` in sources/{name}.yaml allows more time"
        return SourceUnavailable(name, f"no whole answer in {self._options.deadline:g} s", hint=hint)

    @contextmanager
    def _translated(self, url: URL, deadline: float) -> Iterator[None]:
        """The database's errors as ours, without the URL, the statement or the password."""
        name, dialect = self._source.source, url.get_backend_name()
        place = url.host or url.database or dialect
        try:
            yield
        except (NoSuchModuleError, ImportError) as error:
            detail = f"no driver for {url.drivername} is installed ({printable(error, 100)})"
            hint = "for PostgreSQL: pip install 'kbsync[postgres]'"
            raise SourceInvalid(name, detail, hint=hint) from None
        except (SQLAlchemyError, sqlite3.Error, TypeError, ValueError) as error:
            detail = _scrubbed(error, url)
            if time.monotonic() > deadline or (dialect == "sqlite" and "interrupted" in detail):
                raise self._too_late() from None
            hint = f"see `url` and `query` in sources/{name}.yaml"
            kind = SourceUnavailable if _may_end(error, dialect, detail) else SourceInvalid
            raise kind(name, f"{place}: {detail}", hint=hint) from None


def _hosts(url: URL) -> Iterator[str]:
    """The hosts that a URL leads to; a path is a socket of this machine."""
    named = [url.host or "", *(value for key in ("host", "hostaddr") for value in url.normalized_query.get(key, ()))]
    for host in (part for text in named for part in text.split(",")):
        if host and not host.startswith(("/", "@")):
            yield host.strip("[]")


def _refuse_address(host: str) -> None:
    """Raise ValueError where a host is at an address at which no database is: a link-local one, or a cloud's metadata
    service. Private networks are where databases are, and this machine, too."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return  # the driver says so, in its words
    for address in found:
        if not (ip_address(address).is_loopback or is_allowed(address, private_network=True)):
            raise ValueError(f"{host}: its address {address} is no database's")


@contextmanager
def _engine(url: URL, seconds: float) -> Iterator[Engine]:
    """An engine for one connection. A SQLite file is opened read only, and must be there."""
    if url.get_backend_name() == "sqlite":
        uri = f"file:{quote(url.database or '')}?mode=ro"  # SQLite decodes it once more
        busy = min(BUSY_SECONDS, seconds)
        connect: Callable[[], Any] = partial(sqlite3.connect, uri, uri=True, timeout=busy)
        engine = create_engine("sqlite://", creator=connect, poolclass=NullPool)
    else:
        arguments = _timeouts(url.get_driver_name(), seconds)
        engine = create_engine(url, connect_args=arguments, poolclass=NullPool)
    try:
        yield engine
    finally:
        engine.dispose()


def _timeouts(driver: str, seconds: float) -> dict[str, int]:
    """What a driver itself can do about a server that says nothing."""
    connect, whole = (max(1, math.ceil(limit)) for limit in (min(CONNECT_SECONDS, seconds), seconds))
    if driver in _LIBPQ:
        return {"connect_timeout": connect, "tcp_user_timeout": whole * 1000, **_KEEPALIVE}
    if driver in _MYSQL:
        return {"connect_timeout": connect, "read_timeout": whole, "write_timeout": whole}
    return {}


@contextmanager
def _ended(engine: Engine, deadline: float) -> Iterator[None]:
    """The connection is cut after the deadline: a server that went silent may never end what it was asked."""
    made: list[Any] = []
    event.listen(engine, "connect", lambda raw, _: made.append(raw), insert=True)  # before SQLAlchemy's own questions
    wait = max(0.0, deadline - time.monotonic()) + GRACE_SECONDS
    watchdog = threading.Timer(wait, _cut, [made])
    watchdog.daemon = True
    if engine.dialect.name != "sqlite":  # ends by itself, see `_bind`
        watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()


def _cut(made: Sequence[Any]) -> None:
    """End a driver's connections from another thread, by their sockets where it shows them."""
    for raw in made:
        with suppress(Exception):  # whatever the driver raises: the thread that waits for it says what is wrong
            if hasattr(raw, "fileno"):
                with socket.socket(fileno=os.dup(raw.fileno())) as found:
                    found.shutdown(socket.SHUT_RDWR)
            elif hasattr(raw, "cancel"):
                raw.cancel()


def _bind(connection: Connection, options: SqlOptions, deadline: float) -> None:
    """Make the transaction read only and end it at the deadline, as far as the dialect can."""
    seconds = options.deadline
    if connection.dialect.name == "sqlite":
        raw = connection.connection.driver_connection
        if isinstance(raw, sqlite3.Connection):
            raw.set_authorizer(_authorized)
            raw.set_progress_handler(lambda: time.monotonic() > deadline, PROGRESS_STEPS)
            raw.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, min(options.max_bytes, raw.getlimit(sqlite3.SQLITE_LIMIT_LENGTH)))
        return
    dialect = "mariadb" if getattr(connection.dialect, "is_mariadb", False) else connection.dialect.name
    for statement in _READ_ONLY.get(dialect, ()):
        connection.exec_driver_sql(statement.format(ms=max(1, int(seconds * 1000)), s=max(1, int(seconds))))


def _authorized(action: int, _one: str | None, function: str | None, _database: str | None, _by: str | None) -> int:
    """Reading only: no other file (ATTACH), no PRAGMA, no extension (sqlite.org/c3ref/set_authorizer.html)."""
    allowed = action in _SQLITE_READS and function != "load_extension"
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def _may_end(error: Exception, dialect: str, detail: str) -> bool:
    """Whether the same question may be answered later."""
    if dialect == "sqlite":  # it calls nearly everything an operational error
        return any(word in detail.lower() for word in _SQLITE_MAY_END)
    return isinstance(error, OperationalError | InterfaceError) or getattr(error, "connection_invalidated", False)


def _scrubbed(error: Exception, url: URL) -> str:
    """The first line of what the database said; no password of ours in it."""
    text = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
    parts = [value for values in url.normalized_query.values() for value in values if len(value) >= SECRET_LENGTH]
    for secret in {url.render_as_string(hide_password=False), url.password, *parts} - {None, ""}:
        text = text.replace(str(secret), "***")
    return printable(text, 200)


def _line(value: list[Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass") + b"\n"


def _value(value: Any) -> Any:
    """A value as a line has it: its text, null, or the name of a type that has no text."""
    text = as_text(value)
    return text if text is not None or value is None else {"type": type(value).__name__}


def as_text(value: Any) -> str | None:
    """The one text that is exactly a database's value; None for NULL and for what has none (bytes, lists)."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, int | UUID):
        return str(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, date | clock_time):  # a datetime is a date, too
        return value.isoformat()
    return None
