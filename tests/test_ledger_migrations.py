"""Ledgers of every earlier schema, on both databases: upgraded whole or not at all, a file after a backup."""

from __future__ import annotations

import gzip
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import Boolean, Connection, MetaData, create_engine, inspect

from kbsync.errors import LedgerError
from kbsync.ledger import Ledger, migrate, schema, views
from kbsync.ledger.migrate import REVISION
from tests.ledgers import dump, on_postgresql, url
from tests.old_ledgers import FOLDER

pytestmark = pytest.mark.usefixtures("database")

OLD = sorted(FOLDER.glob("*.db.gz"))
every_old_ledger = pytest.mark.parametrize("file", OLD, ids=lambda file: file.name[:4])


def made(file: Path, folder: Path) -> list[tuple[str, str]]:
    """Lay an old ledger down as it was written: its file, or its rows in tables that Alembic made at its revision;
    subject and object of its live facts."""
    old = folder / "ledger.db" if not on_postgresql() else folder / "old.db"
    old.write_bytes(gzip.decompress(file.read_bytes()))
    with closing(sqlite3.connect(old)) as connection:
        if on_postgresql():
            _fill(connection, file.name[:4], url(folder))
        return connection.execute("SELECT subject_id, object_id FROM fact WHERE until IS NULL").fetchall()


def _fill(old: sqlite3.Connection, revision: str, address: str) -> None:
    engine = create_engine(address)
    with engine.begin() as connection:
        config = migrate._config()
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        tables = MetaData()
        tables.reflect(connection)
        for table in tables.sorted_tables:
            names = [column.name for column in table.c]
            quoted = ", ".join(f'"{name}"' for name in names)
            rows = old.execute(f'SELECT {quoted} FROM "{table.name}"').fetchall()  # noqa: S608  # our own tables
            flags = {column.name for column in table.c if isinstance(column.type, Boolean)}
            said = [{n: bool(v) if n in flags else v for n, v in zip(names, row, strict=True)} for row in rows]
            if said and table.name != "alembic_version":
                connection.execute(table.insert(), said)
    engine.dispose()


def test_there_is_a_ledger_of_every_earlier_schema() -> None:
    """Each revision but the newest has its file; `python -m tests.old_ledgers` writes the next one."""
    revisions = {script.revision for script in ScriptDirectory.from_config(migrate._config()).walk_revisions()}
    assert {file.name[:4] for file in OLD} >= revisions - {REVISION}


@every_old_ledger
def test_a_ledger_of_every_earlier_schema_is_upgraded(file: Path, tmp_path: Path) -> None:
    """It is sound, has the facts that it had, those of 0001 each with its claim, which 0002 brought, and the views; a
    file was copied before."""
    live = made(file, tmp_path)
    before = dump(tmp_path)
    with Ledger.open(url(tmp_path), create=False) as ledger:
        assert ledger.check() == []
        with ledger.read() as db:
            found = db.facts()
            assert sorted((key.subject, fact.object.id) for key, fact in found.items()) == sorted(live) != []
            assert all(fact.claim is not None for fact in found.values()) or file.name[:4] != "0001"
        names = inspect(ledger._engine)
        assert {*names.get_table_names()} == {*schema.metadata.tables, "alembic_version"}
        assert {*names.get_view_names()} == {view.name for view in views.VIEWS}
    copies = list(tmp_path.glob(f"ledger.db.{file.name[:4]}-*.backup"))
    assert len(copies) == (0 if on_postgresql() else 1)
    for copy in copies:
        with closing(sqlite3.connect(copy)) as connection:
            assert sorted(connection.iterdump()) == sorted(before)


@every_old_ledger
def test_an_upgrade_that_fails_leaves_the_old_schema(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault after the tables were altered undoes all of it; the next start upgrades."""
    made(file, tmp_path)
    before = dump(tmp_path)

    def fail(_connection: Connection) -> Any:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(views, "create_views", fail)
        with pytest.raises(OSError, match="no space"):
            Ledger.open(url(tmp_path))
    assert dump(tmp_path) == before
    Ledger.open(url(tmp_path)).close()


@every_old_ledger
def test_an_upgrade_that_the_database_refuses_is_one_line(file: Path, tmp_path: Path) -> None:
    """A table of that name, made by somebody else, stops the upgrade with a message and nothing else."""
    made(file, tmp_path)
    engine = create_engine(url(tmp_path))
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE promotion (note TEXT)")
    engine.dispose()
    before = dump(tmp_path)
    with pytest.raises(LedgerError, match="already exists") as caught:
        Ledger.open(url(tmp_path))
    assert "\n" not in caught.value.message
    assert dump(tmp_path) == before
