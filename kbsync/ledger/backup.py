"""Copies of a ledger in SQLite, whole and checked; a server's operator makes those of a server."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from sqlalchemy import Engine

from kbsync.errors import LedgerError

__all__ = ["backup"]


def backup(engine: Engine, target: Path) -> None:
    """A copy of the ledger as of now, by VACUUM INTO (synced by SQLite), checked, mode 0600; the ledger stays usable.

    Raises LedgerError where `target` exists, the copy is not sound, or the ledger is on a server.
    """
    if engine.dialect.name != "sqlite":
        raise LedgerError("the ledger is on a server", hint="pg_dump makes the backup")
    try:
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError as error:
        raise LedgerError(f"{target}: {error.strerror}", hint="name a file that does not exist") from error
    try:
        _vacuum_into(engine, target)
        verdict = _verdict(target)
    except BaseException:
        target.unlink()
        raise
    if verdict != "ok":
        raise LedgerError(f"{target}: the copy is damaged: {verdict}", hint="kbsync verify")


def _vacuum_into(engine: Engine, target: Path) -> None:
    raw = engine.raw_connection()
    try:
        raw.cursor().execute("VACUUM INTO ?", (str(target),))  # outside any transaction, as VACUUM must be
    finally:
        raw.close()


def _verdict(file: Path) -> str:
    with closing(sqlite3.connect(file)) as copy:
        return str(copy.execute("PRAGMA integrity_check").fetchone()[0])
