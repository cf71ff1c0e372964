"""The ledger as a whole: opened, read, written, checked, backed up.

with Ledger.open("sqlite:///data/ledger.db") as ledger:
    with ledger.write() as db:                     # BEGIN IMMEDIATE; committed at the end, or nothing
        run = db.start_run("astronomy", model=None, trigger="sync", user="me")
        db.record(run, snapshot)
    with ledger.read() as db:                      # one consistent state
        db.facts(["constellation"], as_of=yesterday)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import Connection, Engine, func, select

from kbsync.ledger import database, schema
from kbsync.ledger.backup import backup
from kbsync.ledger.leader import Leader, leading
from kbsync.ledger.migrate import migrate
from kbsync.ledger.reader import Reader
from kbsync.ledger.writer import Writer

__all__ = ["Ledger"]

Clock = Callable[[], datetime]


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Ledger:
    """An open ledger. Safe to share between threads: every block of `read` and `write` has its own connection."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock
        self._place = database.place_of(engine.url)
        self._leader: Leader | None = None

    @classmethod
    def open(cls, url: str, *, create: bool = True, clock: Clock = _utc_now) -> Ledger:
        """Open the ledger at a SQLAlchemy URL, with this kbsync's schema; an older one is upgraded, after a backup.

        `create`: make it where it is not there. Raises LedgerError where it is not there (and `create` is false), is no
        ledger, is damaged, or was written by a newer kbsync; UsageError for a URL that means nothing.
        """
        engine = database.engine_for(url, create=create)
        ledger = cls(engine, clock)
        try:
            with database.translated(ledger._place):
                migrate(engine, ledger._place)
        except BaseException:
            ledger.close()
            raise
        return ledger

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def now(self) -> datetime:
        """The time by the ledger's clock, timezone-aware."""
        return self._clock()

    @contextmanager
    def read(self) -> Iterator[Reader]:
        """One consistent state. Keep the block short: SQLite's rollback journal lets a writer commit only when nobody
        reads. Raises LedgerError where the database fails, Busy where a writer keeps it for too long."""
        with database.translated(self._place), database.reading(self._engine) as connection:
            yield Reader(connection)

    @contextmanager
    def write(self) -> Iterator[Writer]:
        """One transaction that takes the writer's lock at once; committed at the end, undone by an exception or by
        `Writer.rollback`. Raises Busy where another writer keeps the lock for 5 s, or where this process was the one
        that runs passes and another one is now; LedgerError where the database refuses what was written."""
        with database.translated(self._place), database.writing(self._engine) as connection:
            if self._leader is not None:
                self._leader.confirm()
            writer = Writer(connection, self._next_moment(connection))
            yield writer
            if writer.kept:
                connection.commit()

    def _next_moment(self, connection: Connection) -> datetime:
        """Now, or just after the newest entry where the clock says less. Of the times that order history, those
        that an index finds: what has none is written beside one of these."""
        entries = ((schema.audit, "at"), (schema.fetch, "recorded_at"), (schema.run, "started_at"), (schema.head, "at"))
        marks = ((schema.fact, "since"), (schema.fact, "until"), (schema.policy_state, "at"))
        newest: list[datetime | None] = [
            *(connection.scalar(select(table.c[at]).order_by(table.c.id.desc()).limit(1)) for table, at in entries),
            *(connection.scalar(select(func.max(table.c[at]))) for table, at in marks),
        ]
        return max([self._clock(), *(moment + timedelta(microseconds=1) for moment in newest if moment is not None)])

    def check(self, *, quick: bool = False) -> list[str]:
        """What is wrong, one line each; empty for a sound ledger. `quick`: without reading every index."""
        with database.translated(self._place), database.reading(self._engine) as connection:
            problems = database.integrity_problems(connection, quick=quick)
            return problems + _contradictions(connection) + _lost_heads(connection)

    @contextmanager
    def led(self) -> Iterator[None]:
        """Be the one process that runs passes on this ledger, from whatever machine: each `write` makes sure of it.
        Raises Busy where another is."""
        with database.translated(self._place), leading(self._engine, self._place) as self._leader:
            try:
                yield
            finally:
                self._leader = None

    def backup(self, path: Path) -> None:
        """A checked copy as of now; the ledger stays in use. Raises LedgerError where `path` exists or that fails."""
        with database.translated(self._place):
            backup(self._engine, path)


def _contradictions(connection: Connection) -> list[str]:
    """Eqn 5 without the index's help: keys with more than one live object."""
    table = schema.fact
    query = (
        select(table.c.relation, table.c.subject_id, func.count())
        .where(table.c.until.is_(None))
        .group_by(table.c.relation, table.c.subject_id)
        .having(func.count() > 1)
    )
    return [
        f"{relation} of {subject}: {number} live objects" for relation, subject, number in connection.execute(query)
    ]


def _lost_heads(connection: Connection) -> list[str]:
    """Models without a HEAD."""
    moved = select(schema.head.c.model)
    query = select(schema.model.c.id).where(schema.model.c.id.not_in(moved))
    return [f"model {model}: has no HEAD" for model in connection.scalars(query)]
