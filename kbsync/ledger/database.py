"""The database under the ledger: connections, transactions, and every line that is different in SQLite and PostgreSQL.

SQLite: sqlite.org/wal.html, /pragma.html; transaction control as SQLAlchemy's pysqlite page describes it
("Serializable isolation / Savepoints / Transactional DDL"): the driver's own is off, BEGIN is emitted here.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Executable,
    Result,
    Select,
    SelectBase,
    Table,
    create_engine,
    event,
    func,
    make_url,
    select,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, StatementError
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import CreateTable, DropTable

from kbsync.errors import Busy, KbsyncError, LedgerError, UsageError
from kbsync.facts import FactKey
from kbsync.versions.files import make_folder

__all__ = [
    "BATCH",
    "BUSY_TIMEOUT",
    "Session",
    "analyze",
    "append_only",
    "application_id",
    "batches",
    "bulk_insert",
    "database_file",
    "engine_for",
    "insert_from",
    "insert_new",
    "insert_row",
    "integrity_problems",
    "journal_mode",
    "mark_as_ledger",
    "note_growth",
    "pages",
    "parsed",
    "place_of",
    "reading",
    "restart_sequences",
    "temporary",
    "translated",
    "upsert",
    "writing",
]

APPLICATION_ID = 0x6B627379
"""`kbsy`: what `PRAGMA application_id` says of a kbsync ledger, and of nothing else."""

ValueT = TypeVar("ValueT", str, int)

BUSY_TIMEOUT = 5000
"""Milliseconds that a writer waits for another one."""

CACHE = 64 * 1024
"""KiB of a SQLite file that a connection keeps: a pass writes all over the indexes of a large ledger."""

PATIENCE = {
    "connect_timeout": 10,  # seconds that a server may take to answer
    "tcp_user_timeout": 30_000,  # milliseconds that what was sent may stay unacknowledged
    "keepalives_idle": 15,  # seconds, twice, and times: a machine that is gone is noticed within half a minute
    "keepalives_interval": 5,
    "keepalives_count": 3,
}
"""What libpq does about a server that is gone; what the ledger's URL says wins
(postgresql.org/docs, 34.1.2 "Parameter Key Words")."""

STATEMENT_TIMEOUT = 1_800_000
"""Milliseconds after which PostgreSQL ends a statement, where neither URL, role nor server set a limit: half an hour,
while the longest ones, which take in a million rows, need minutes."""

BATCH = 10_000
"""Rows per executemany: large enough for the rate to be flat, small enough not to hold a feed twice in memory."""

_REFUSED_BY_DISK = frozenset(
    {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM}
)
"""SQLite's result codes for a disk that is full, broken, or not to be written (sqlite.org/rescode.html)."""

_LOCK_NOT_AVAILABLE = "55P03"
"""PostgreSQL's code for a lock that was not had within `lock_timeout` (postgresql.org/docs, Appendix A)."""

_WRITER_LOCK = 0x6B627379
"""Key of PostgreSQL's advisory lock that makes writers take turns, as SQLite's BEGIN IMMEDIATE does."""


def engine_for(url: str, *, create: bool) -> Engine:
    """An engine whose connections are safe to use: every pragma set, every transaction ours.

    A new SQLite file gets mode 0600. No transaction goes on with a file that an earlier one had open: SQLite holds it
    read-only where its disk was, and pages whose fsync has failed may only seem to be there. Raises LedgerError where
    there is no ledger and `create` is false, UsageError where the URL means nothing to SQLAlchemy.
    """
    address = parsed(url)
    file = database_file(address)
    if file is not None:
        _ensure_file(file, create=create)
    engine = create_engine(address, poolclass=NullPool) if file is not None else _server_engine(address)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin)
    return engine


_EXAMPLE = "for instance sqlite:///data/ledger.db or postgresql+psycopg://user@host/database"


def parsed(url: str) -> URL:
    """The URL in its parts; PostgreSQL means psycopg 3. Raises UsageError where it is none, without repeating it, as a
    password may be anywhere in it."""
    try:
        address = make_url(url)
    except (ArgumentError, ValueError):
        raise UsageError("ledger URL is not usable: it is no SQLAlchemy URL", hint=_EXAMPLE) from None
    return address.set(drivername="postgresql+psycopg") if address.drivername == "postgresql" else address


def _server_engine(address: URL) -> Engine:
    """An engine that notices when the server was restarted, or is gone. Raises UsageError for any but PostgreSQL by
    psycopg."""
    if address.drivername != "postgresql+psycopg":
        raise UsageError(f"ledger URL is not usable: {address.drivername} is not supported", hint=_EXAMPLE)
    patience = {name: value for name, value in PATIENCE.items() if name not in address.query}
    try:
        engine = create_engine(address, pool_pre_ping=True, connect_args=patience)
    except ImportError as error:
        raise UsageError(f"ledger URL is not usable: {error}", hint="pip install 'kbsync[postgres]'") from error
    event.listen(engine, "connect", _prepare_server)
    return engine


def place_of(url: URL) -> str:
    """How a ledger is named in messages: its URL without password and options, which may hold secrets, too."""
    shown = {name: value for name, value in url.query.items() if name in ("host", "port")}
    return url.set(query=shown).render_as_string(hide_password=True)


def database_file(url: URL) -> Path | None:
    """The file of a SQLite URL; None for a server. Raises UsageError for SQLite in memory, which nothing outlives."""
    if url.get_backend_name() != "sqlite":
        return None
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise UsageError("the ledger needs a file", hint="for instance sqlite:///data/ledger.db")
    return Path(url.database)


def _ensure_file(file: Path, *, create: bool) -> None:
    if file.exists():
        return
    if not create:
        raise LedgerError(f"{file}: no ledger here", hint="kbsync init")
    try:
        make_folder(file.parent)
        os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
    except OSError as error:
        raise LedgerError(f"{file}: {error.strerror}", hint="choose a folder that can be written to") from error


def journal_mode(version: tuple[int, ...] = sqlite3.sqlite_version_info) -> str:
    """The journal mode that this SQLite can be trusted with.

    WAL can be corrupted by one connection writing while another checkpoints, from 3.7.0 to 3.51.2 and but for the
    backport 3.50.7 (sqlite.org/wal.html, "WAL-reset bug"); there the rollback journal is used.
    """
    fixed = version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51)
    return "wal" if fixed else "truncate"


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # BEGIN is `_begin`'s: the driver's own would not roll DDL back
    cursor = connection.cursor()
    try:
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT}")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute(f"PRAGMA cache_size = {-CACHE}")  # negative: KiB, not pages
        wanted = journal_mode()
        (found,) = cursor.execute(f"PRAGMA journal_mode = {wanted}").fetchone()
        if found != wanted:
            raise LedgerError(
                f"the ledger is in journal mode {found}, which SQLite {sqlite3.sqlite_version} must not write in",
                hint="close every other program that has it open, then try again",
            )
    finally:
        cursor.close()


def _prepare_server(connection: Any, _record: object) -> None:
    limit = f"set_config('statement_timeout', '{STATEMENT_TIMEOUT}', false)"
    connection.execute(f"SELECT {limit} WHERE current_setting('statement_timeout') = '0'")
    connection.commit()


def _begin(connection: Connection) -> None:
    """BEGIN. A writer takes the lock at once: a reader that turns writer after another commit fails without waiting."""
    writing = connection.get_execution_options().get("writing", False)
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")
    elif writing:
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {BUSY_TIMEOUT}")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITER_LOCK})")


@contextmanager
def translated(place: str) -> Iterator[None]:
    """What the database refuses, as one line: Busy where another holds it, else LedgerError. `place`: which ledger."""
    try:
        yield
    except KbsyncError:
        raise
    except (StatementError, sqlite3.Error) as error:
        origin = getattr(error, "orig", None) or error
        cause = " ".join(str(origin).split())  # PostgreSQL explains itself in several lines
        if "locked" in cause or getattr(origin, "sqlstate", None) == _LOCK_NOT_AVAILABLE:
            seconds = BUSY_TIMEOUT // 1000
            raise Busy(f"{place}: another process has been writing for {seconds} s", hint="try again") from error
        raise LedgerError(f"{place}: {cause}", hint=_hint(error)) from error


def _hint(error: Exception) -> str:
    if getattr(getattr(error, "orig", error), "sqlite_errorcode", 0) & 0xFF in _REFUSED_BY_DISK:
        return "see to space and permissions of that folder, then give the command again"
    lost = isinstance(error, DBAPIError) and error.connection_invalidated
    unreachable = isinstance(error, OperationalError) and not isinstance(error.orig, sqlite3.Error)
    return "see that the server runs, then try again" if lost or unreachable else "kbsync verify"


def bulk_insert(connection: Connection, table: Table, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> int:
    """Insert rows of values in the order of `columns`; their number.

    Goes past SQLAlchemy's parameter dictionaries, which halve the rate: executemany in SQLite, COPY in PostgreSQL.
    """
    dialect = connection.dialect
    quote = dialect.identifier_preparer.quote
    target = f"{quote(table.name)} ({', '.join(quote(name) for name in columns)})"
    processors = [table.c[name].type.dialect_impl(dialect).bind_processor(dialect) for name in columns]
    put = _insert_batch if dialect.name == "sqlite" else _copy_batch
    plain = not any(processors)
    done, source = 0, iter(rows)
    while batch := [tuple(row) for row in islice(source, BATCH)]:
        if not plain:
            batch = [tuple(p(v) if p else v for p, v in zip(processors, row, strict=True)) for row in batch]
        put(connection, target, batch)
        done += len(batch)
    return done


def _insert_batch(connection: Connection, target: str, batch: list[tuple[Any, ...]]) -> None:
    values = ", ".join("?" for _ in batch[0])
    connection.exec_driver_sql(f"INSERT INTO {target} VALUES ({values})", batch)  # noqa: S608  # our own schema's names


def _copy_batch(connection: Connection, target: str, batch: list[tuple[Any, ...]]) -> None:
    statement = f"COPY {target} FROM STDIN"
    driver = connection.dialect.loaded_dbapi
    try:
        with closing(connection.connection.cursor()) as cursor, cursor.copy(statement) as copy:
            for row in batch:
                copy.write_row(row)
    except driver.Error as error:
        raise DBAPIError.instance(statement, None, error, driver.Error, dialect=connection.dialect) from error


def batches(values: Iterable[ValueT], size: int = 800) -> Iterator[list[ValueT]]:
    """Sorted values in lists that one query can take: old builds of SQLite allow 999 parameters."""
    listed = sorted(values)
    return (listed[start : start + size] for start in range(0, len(listed), size))


def pages(table: Any, keys: Collection[FactKey] | None) -> list[list[ColumnElement[bool]]]:
    """WHERE clauses that together cover the keys; one without a condition for all keys."""
    if keys is None:
        return [[]]
    by_relation: dict[str, list[str]] = {}
    for relation, subject in keys:
        by_relation.setdefault(relation, []).append(subject)
    # Relation by relation, as SQLite finds no row by an index on (relation, subject) where it is asked for pairs.
    return [
        [table.c.relation == relation, table.c.subject_id.in_(page)]
        for relation, subjects in sorted(by_relation.items())
        for page in batches(subjects)
    ]


class Session:
    """One transaction, as the readers and writers use it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def execute(self, query: Executable) -> Result[Any]:
        """Ask something that no method does. For the modules of this package."""
        return self._connection.execute(query)


def reading(engine: Engine) -> Connection:
    """A connection whose statements all see one state."""
    connection = engine.connect()
    if engine.dialect.name == "sqlite":
        return connection  # a deferred BEGIN does that
    return connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def writing(engine: Engine) -> Connection:
    """A connection in a transaction that has the writer's lock."""
    connection = engine.connect().execution_options(writing=True)
    try:
        connection.begin()
    except BaseException:
        connection.close()
        raise
    return connection


def insert_row(connection: Connection, table: Table, values: Mapping[str, Any]) -> int:
    """Insert one row; its id."""
    return int(connection.execute(table.insert().values(values).returning(table.c.id)).scalar_one())


def insert_from(connection: Connection, table: Table, columns: Sequence[str], rows: SelectBase) -> int:
    """INSERT ... SELECT; how many rows that were. Without the option only SQLite's driver happens to say so."""
    statement = table.insert().from_select(columns, rows)
    return connection.execute(statement, execution_options={"preserve_rowcount": True}).rowcount


def insert_new(connection: Connection, table: Table, columns: Sequence[str], rows: Select[Any]) -> int:
    """INSERT ... SELECT, but for rows whose primary key is there already (the first one stays); how many that were."""
    make = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    statement = make(table).from_select(columns, rows).on_conflict_do_nothing()
    return connection.execute(statement, execution_options={"preserve_rowcount": True}).rowcount


def upsert(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows, or update those whose primary key is there."""
    if not rows:
        return
    make = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    statement = make(table)
    keys = [column.name for column in table.primary_key]
    others = {column.name: statement.excluded[column.name] for column in table.c if column.name not in keys}
    connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=others), list(rows))


def restart_sequences(connection: Connection, tables: Iterable[Table]) -> None:
    """After rows that brought their ids, PostgreSQL counts on after the highest one, as SQLite does by itself."""
    if connection.dialect.name == "sqlite":
        return
    for table in tables:
        counted = table.autoincrement_column
        if counted is not None and connection.scalar(func.pg_get_serial_sequence(table.name, counted.name)) is not None:
            sequence = func.pg_get_serial_sequence(table.name, counted.name)
            connection.execute(select(func.setval(sequence, func.coalesce(func.max(counted), 0) + 1, False)))


@contextmanager
def temporary(connection: Connection, *tables: Table) -> Iterator[None]:
    """TEMP tables, for the time of the block; they go with the transaction where the block fails."""
    for table in tables:
        connection.execute(CreateTable(table))
    yield
    for table in tables:
        connection.execute(DropTable(table))


def analyze(connection: Connection, *tables: Table) -> None:
    """Tell the database how large staging tables have become: it takes them for large otherwise, or for empty."""
    for table in tables:
        connection.execute(text(f"ANALYZE {table.name}"))


def note_growth(connection: Connection, *tables: Table) -> None:
    """Tell PostgreSQL that tables have grown out of all proportion: its autovacuum looks at them after the transaction.
    SQLite plans by its indexes alone."""
    if connection.dialect.name != "sqlite":
        analyze(connection, *tables)


def append_only(connection: Connection, table: str) -> None:
    """Triggers that refuse UPDATE and DELETE on `table`."""
    if connection.dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            connection.exec_driver_sql(
                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            )
        return
    connection.exec_driver_sql(
        f"CREATE FUNCTION {table}_append_only() RETURNS trigger LANGUAGE plpgsql "
        f"AS $$ BEGIN RAISE EXCEPTION '{table} is append-only'; END $$"
    )
    connection.exec_driver_sql(
        f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
        f"FOR EACH STATEMENT EXECUTE FUNCTION {table}_append_only()"
    )


def application_id(connection: Connection) -> int:
    """Whose database this is; 0 where the file does not say, ours for a server, which has no such mark."""
    if connection.dialect.name != "sqlite":
        return APPLICATION_ID
    return int(connection.exec_driver_sql("PRAGMA application_id").scalar_one())


def mark_as_ledger(connection: Connection) -> None:
    """Write kbsync's application id."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")


def integrity_problems(connection: Connection, *, quick: bool) -> list[str]:
    """What the database itself finds wrong, foreign keys included; `quick` skips the indexes' contents."""
    if connection.dialect.name != "sqlite":
        return []
    pragma = "quick_check" if quick else "integrity_check"
    lines = [str(row[0]) for row in connection.exec_driver_sql(f"PRAGMA {pragma}")]
    problems = [f"{pragma}: {line}" for line in lines if line != "ok"]
    for table, row, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check"):
        problems.append(f"table {table}, row {row}: refers to a row that {parent} does not have")
    return problems
