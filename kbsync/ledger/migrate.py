"""Brings a database to this kbsync's schema, in one transaction, with a backup of what was there before."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from sqlalchemy import Connection, Engine, column, inspect, select, table

from kbsync.errors import LedgerError
from kbsync.ledger import database, views
from kbsync.ledger.backup import backup

if TYPE_CHECKING:
    from alembic.config import Config

__all__ = ["REVISION", "create_tables", "migrate"]

REVISION = "0003"
"""The newest revision in `migrations/versions`. Named here so that opening a current ledger need not load Alembic."""


log = structlog.get_logger()


def migrate(engine: Engine, place: str) -> Path | None:
    """Create or upgrade the tables; the backup's path, where one was made.

    Raises LedgerError where the database is another program's, or was written by a newer kbsync.
    """
    with engine.connect() as connection:
        found = _revision(connection)
        _refuse_foreign(connection, found, place)
    if found == REVISION:
        return None
    config = _config()
    _refuse_newer(config, found, place)
    copy = _backup(engine, found) if found is not None else None
    with database.writing(engine) as connection:
        _upgrade(config, connection)
        connection.commit()
    if found is not None:
        kept = str(copy) if copy is not None else "none of its own: the server's backups count"
        log.warning("ledger_upgraded", ledger=place, schema=f"{found} -> {REVISION}", backup=kept)
    return copy


def create_tables(connection: Connection) -> None:
    """This kbsync's tables in an empty database, in the caller's transaction."""
    _upgrade(_config(), connection)


def _revision(connection: Connection) -> str | None:
    """The schema's revision; None where there is no table yet."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.scalar(select(column("version_num")).select_from(table("alembic_version")))


def _refuse_foreign(connection: Connection, revision: str | None, place: str) -> None:
    if revision is None:
        foreign = bool(inspect(connection).get_table_names())
    else:
        foreign = database.application_id(connection) != database.APPLICATION_ID
    if foreign:
        raise LedgerError(f"{place}: is a database, but no kbsync ledger", hint="name another file in kbsync.yaml")


def _backup(engine: Engine, revision: str) -> Path | None:
    file = database.database_file(engine.url)
    if file is None:
        return None  # a server's operator makes the backups
    target = file.with_name(f"{file.name}.{revision}-{datetime.now(UTC):%Y%m%dT%H%M%S%fZ}.backup")
    backup(engine, target)
    return target


def _config() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "kbsync.ledger:migrations")
    config.set_main_option("path_separator", "os")
    return config


def _refuse_newer(config: Config, revision: str | None, place: str) -> None:
    from alembic.script import ScriptDirectory

    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if revision is not None and revision not in known:
        raise LedgerError(f"{place}: has schema {revision}, this kbsync knows {REVISION}", hint="upgrade kbsync")


def _upgrade(config: Config, connection: Connection) -> None:
    from alembic import command

    views.drop_views(connection)
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    views.create_views(connection)
