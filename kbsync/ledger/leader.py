"""The one process that runs passes on a server's ledger, from whatever machine: an advisory lock that lives as long as
a connection of its own. The lock file of the workspace does that for SQLite.

with leading(engine, place) as leader:
    leader.confirm()            # in each transaction that writes

A server that is restarted, or a network that forgets a connection, takes the lock away without a word. So every
transaction that writes, once it has the writer's lock, asks that connection: nobody else can write before it ends.
PostgreSQL: postgresql.org/docs, "Explicit Locking", 13.3.5 "Advisory Locks".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import structlog
from sqlalchemy import Connection, Engine, func, select
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from kbsync.errors import Busy

__all__ = ["Leader", "leading"]

_KEY = 0x6B62737A
"""Of the advisory lock."""

log = structlog.get_logger()


@contextmanager
def leading(engine: Engine, place: str) -> Iterator[Leader | None]:
    """Be that process for the time of the block; None for SQLite. Raises Busy where another one is."""
    if engine.dialect.name == "sqlite":
        yield None
        return
    leader = Leader(engine, place)
    leader.take()
    try:
        yield leader
    finally:
        leader.leave()


class Leader:
    """The lock. `place`: which ledger, for messages."""

    def __init__(self, engine: Engine, place: str) -> None:
        self._engine = engine
        self._place = place
        self._connection: Connection | None = None

    def take(self) -> None:
        """Take the lock. Raises Busy where another process has it."""
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        connection.detach()  # however this ends, the connection is closed, and its lock goes
        if not connection.scalar(select(func.pg_try_advisory_lock(_KEY))):
            connection.close()
            raise Busy(f"{self._place}: another daemon or command works on this ledger", hint="wait for it, or stop it")
        self._connection = connection

    def confirm(self) -> None:
        """Nothing where the lock is ours; where its connection was lost it is taken anew. Raises Busy where another
        process has taken it meanwhile: then nothing may be written here."""
        if self._connection is not None:
            try:
                self._connection.execute(select(1))
            except DBAPIError:
                self.leave()
            else:
                return
        self.take()
        log.warning("leader_lock_taken_again", ledger=self._place)

    def leave(self) -> None:
        """Give the lock back, if it is ours."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        with suppress(SQLAlchemyError):  # at once: the server notices a closed connection a little later
            connection.execute(select(func.pg_advisory_unlock(_KEY)))
        with suppress(SQLAlchemyError):
            connection.close()
