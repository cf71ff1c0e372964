"""Copies a whole ledger to another database, SQLite or PostgreSQL, in one transaction, and proves it before it commits.

    copy_ledger("sqlite:///data/ledger.db", "postgresql+psycopg://kbsync@db/kbsync")

The proof is the number of rows of each table and a hash over their contents that both databases agree on: the sum
(mod 2^256) of the SHA-256 of every row's canonical JSON, so that the order in which rows come does not matter. It finds
what was lost, doubled or changed on the way; it is no signature.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, Table, func, inspect, select

from kbsync.errors import LedgerError, UsageError
from kbsync.ledger import database, schema
from kbsync.ledger.ledger import Ledger
from kbsync.ledger.migrate import create_tables
from kbsync.progress import Progress, silent

__all__ = ["TableContent", "content_of", "copy_ledger"]


@dataclass(frozen=True, slots=True)
class TableContent:
    """What a table holds: how many rows, and the hash of them all."""

    name: str
    rows: int
    sha256: str


def copy_ledger(source: str, target: str, progress: Progress = silent) -> list[TableContent]:
    """Copy every table of the ledger at URL `source` into the empty database at URL `target`; what both now hold.

    The source is read in one consistent state. Raises UsageError where the target is not empty, LedgerError where the
    source is no ledger, a database fails, or the copy is not the same; then the target is as it was.
    """
    Ledger.open(source, create=False).close()  # it is a ledger, and of this schema
    with _engine(source) as old, _target(target) as new:
        place = database.place_of(new.url)
        with database.translated(place), database.writing(new) as there:
            if inspect(there).get_table_names():
                raise UsageError(f"{place}: is not empty", hint="copy into a new file, or a database without tables")
            create_tables(there)
            with database.reading(old) as here:
                said = _copy_tables(here, there, progress)
            database.restart_sequences(there, _tables())
            _compare(said, content_of(there, progress), place)
            there.commit()
    return said


def content_of(connection: Connection, progress: Progress = silent) -> list[TableContent]:
    """What every table holds, in the same words for every database."""
    found = []
    done, total = 0, _count(connection)
    for table in _tables():
        content = _Content(table)
        for row in _rows(connection, table):
            content.add(row)
        found.append(content.sum())
        done += found[-1].rows
        progress("verify", done, total)
    return found


class _Content:
    """Counts and hashes a table's rows as they go by."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._rows = 0
        self._sum = 0

    def add(self, row: Sequence[Any]) -> None:
        said = json.dumps([_plain(value) for value in row], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        self._rows += 1
        self._sum += int.from_bytes(hashlib.sha256(said.encode()).digest())

    def sum(self) -> TableContent:
        return TableContent(self._table.name, self._rows, f"{self._sum % (1 << 256):064x}")


def _plain(value: Any) -> Any:
    return value.isoformat(timespec="microseconds") if isinstance(value, datetime) else value


def _copy_tables(here: Connection, there: Connection, progress: Progress) -> list[TableContent]:
    """Copy in the order of the foreign keys; what was read."""
    found = []
    done, total = 0, _count(here)

    def passing(table: Table, content: _Content) -> Iterator[Sequence[Any]]:
        nonlocal done
        for row in _rows(here, table):
            content.add(row)
            yield row
            done += 1
            if done % database.BATCH == 0:
                progress("copy", done, total)

    for table in _tables():
        content = _Content(table)
        database.bulk_insert(there, table, [column.name for column in table.c], passing(table, content))
        found.append(content.sum())
        progress("copy", done, total)
    return found


def _compare(said: list[TableContent], found: list[TableContent], place: str) -> None:
    wrong = [one.name for one, other in zip(said, found, strict=True) if one != other]
    if wrong:
        raise LedgerError(
            f"{place}: table {wrong[0]} is not what the source holds", hint="nothing was copied; try again"
        )


def _tables() -> list[Table]:
    return schema.metadata.sorted_tables


def _count(connection: Connection) -> int:
    return sum(connection.scalar(select(func.count()).select_from(table)) or 0 for table in _tables())


def _rows(connection: Connection, table: Table) -> Iterator[Sequence[Any]]:
    """By primary key, so that a version comes after its parent; a batch at a time."""
    return iter(
        connection.execution_options(yield_per=database.BATCH).execute(select(table).order_by(*table.primary_key))
    )


@contextmanager
def _engine(url: str, *, create: bool = False) -> Iterator[Engine]:
    engine = database.engine_for(url, create=create)
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def _target(url: str) -> Iterator[Engine]:
    """The engine of the copy; a file that was not there goes again where the block fails."""
    file = database.database_file(database.parsed(url))
    made = file is not None and not file.exists()
    with _engine(url, create=True) as engine:
        try:
            yield engine
        except BaseException:
            engine.dispose()
            if made and file is not None:
                file.unlink(missing_ok=True)
            raise
