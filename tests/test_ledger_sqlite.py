"""The ledger in SQLite: its file, pragmas, journal mode, damaged pages, backups, migrations."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.schema import CreateTable

from kbsync.errors import LedgerError
from kbsync.ledger import Ledger, database, schema
from kbsync.ledger.columns import UtcTime
from tests.ledgers import NOON, claims, decide, dump, facts, opened, snapshot, sync, url

SETTINGS = {"busy_timeout": 5000, "foreign_keys": 1, "synchronous": 2, "journal_mode": database.journal_mode()}


def test_a_new_ledger_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    """The file is created with mode 0600, in a folder made for it, whatever the umask."""
    with Ledger.open(url(tmp_path / "data")):
        assert (tmp_path / "data" / "ledger.db").stat().st_mode & 0o777 == 0o600


def test_a_ledger_that_is_not_there_is_not_made_on_the_quiet(tmp_path: Path) -> None:
    """Without `create` an absent ledger is an error that names `kbsync init`, and no file appears."""
    with pytest.raises(LedgerError, match="no ledger here") as caught:
        Ledger.open(url(tmp_path), create=False)
    assert caught.value.hint == "kbsync init"
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    """Garbage is a LedgerError, not a traceback."""
    (tmp_path / "ledger.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(LedgerError, match="not a database"):
        Ledger.open(url(tmp_path))


def test_the_migrations_make_the_tables_as_they_are_declared(tmp_path: Path) -> None:
    """The migrated CREATE TABLE statements are those of the SQLModel tables, to the last constraint: Alembic's own
    comparison is not as strict."""
    with Ledger.open(url(tmp_path)) as ledger, ledger._engine.connect() as connection:
        tables = text("SELECT name, sql FROM sqlite_master WHERE type = 'table' AND name != 'alembic_version'")
        found = {name: _words(sql) for name, sql in connection.execute(tables)}
        declared = {
            table.name: _words(str(CreateTable(table).compile(connection))) for table in schema.metadata.sorted_tables
        }
        assert found == declared


def _words(statement: str) -> list[str]:
    """A CREATE TABLE as its parts, whose order does not matter. A column that was added later has its foreign key
    beside it, which is written as the others are."""
    head, _, body = " ".join(statement.split()).partition("(")
    body, _, tail = body.rpartition(")")
    beside = re.compile(r"(\w+) (\w+) CONSTRAINT (\w+) REFERENCES (.+)")
    parts = [beside.sub(r"\1 \2, CONSTRAINT \3 FOREIGN KEY(\1) REFERENCES \4", part) for part in _split(body)]
    return sorted([head.strip(), tail.strip(), *(word for part in parts for word in _split(part))])


def _split(text: str) -> list[str]:
    """The parts between the commas that are in no parentheses."""
    return [part.strip() for part in re.split(r",(?![^(]*\))", text)]


def test_every_table_is_strict(tmp_path: Path) -> None:
    """Text does not get into a number column."""
    with opened(tmp_path), closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        ours = {table.name for table in schema.metadata.sorted_tables}
        strict = {row[1]: row[5] for row in connection.execute("PRAGMA table_list") if row[1] in ours}
        assert strict == dict.fromkeys(ours, 1)


def test_every_connection_is_set_up(tmp_path: Path) -> None:
    """The pragmas read back as set on several connections of the pool at once."""
    with opened(tmp_path) as ledger:
        connections = [ledger._engine.connect() for _ in range(3)]
        for connection in connections:
            found = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in SETTINGS}
            assert found == SETTINGS
            connection.close()


@pytest.mark.parametrize(
    ("version", "mode"),
    [
        ((3, 40, 1), "truncate"),
        ((3, 50, 6), "truncate"),
        ((3, 50, 7), "wal"),
        ((3, 51, 0), "truncate"),
        ((3, 51, 2), "truncate"),
        ((3, 51, 3), "wal"),
        ((3, 52, 0), "wal"),
    ],
)
def test_wal_is_used_only_where_it_is_safe(version: tuple[int, ...], mode: str) -> None:
    """The versions with the WAL-reset bug use the rollback journal."""
    assert database.journal_mode(version) == mode


def test_times_keep_their_instant_and_sort(tmp_path: Path) -> None:
    """Any timezone goes in, the same instant comes out in UTC, and the text in SQLite sorts as the instants do."""
    engine = create_engine("sqlite://")
    kolkata = datetime(2026, 7, 1, 17, 30, 0, 5, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    column = UtcTime()
    written = column.process_bind_param(kolkata, engine.dialect)
    assert written == "2026-07-01T12:00:00.000005Z"
    assert column.process_result_value(written, engine.dialect) == kolkata
    assert column.process_bind_param(NOON, engine.dialect) < written
    engine.dispose()


def test_check_finds_a_dangling_reference(tmp_path: Path) -> None:
    """A fact of a run that is not there is named by its row."""
    with opened(tmp_path) as ledger:
        decide(ledger, facts(Vega="Lyra"))
        with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
            connection.execute("UPDATE fact SET since_run = 99")
            connection.commit()
        assert ledger.check() == ["table fact, row 1: refers to a row that run does not have"]


def test_check_finds_a_damaged_page(tmp_path: Path) -> None:
    """Overwritten pages are a problem that is named, or a LedgerError, never a wrong answer."""
    with opened(tmp_path) as ledger:
        sync(ledger, snapshot(*claims(**{f"Star{n}": "Lyra" for n in range(500)})))
    file = tmp_path / "ledger.db"
    content = bytearray(file.read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    content[middle : middle + 4096] = b"\xff" * 4096
    file.write_bytes(content)
    with opened(tmp_path) as ledger:
        try:
            problems = ledger.check()
        except LedgerError as error:
            problems = [error.message]
    assert problems


def test_a_backup_is_whole_private_and_never_overwrites(tmp_path: Path) -> None:
    """The copy opens as a ledger with the same contents, mode 0600; a file that is there is not touched."""
    with opened(tmp_path) as ledger:
        decide(ledger, facts(Vega="Lyra"))
        copy = tmp_path / "copy" / "ledger.db"
        copy.parent.mkdir()
        ledger.backup(copy)
        with pytest.raises(LedgerError, match="File exists"):
            ledger.backup(copy)
    assert copy.stat().st_mode & 0o777 == 0o600
    assert sorted(dump(copy.parent)) == sorted(dump(tmp_path))
    with opened(copy.parent) as ledger, ledger.read() as db:
        assert db.facts() == facts(Vega="Lyra")


def test_a_full_disk_fails_the_run_and_leaves_the_ledger_as_it_was(tmp_path: Path) -> None:
    """SQLite gets no more pages in the middle of a write: one line, nothing of it is left, and once there is room the
    same ledger goes on."""
    with opened(tmp_path) as ledger:
        sync(ledger, snapshot(*claims(Vega="Lyra")))
        before = dump(tmp_path)
        with ledger._engine.connect() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()

        def limit(connection: sqlite3.Connection, _record: object) -> None:
            connection.execute(f"PRAGMA max_page_count = {pages + 3}")

        many = snapshot(*claims(**{f"Star{n}": "Lyra" for n in range(5000)}))
        ledger._engine.dispose()
        event.listen(ledger._engine, "connect", limit)
        with pytest.raises(LedgerError, match="disk is full") as caught:
            sync(ledger, many)
        assert "\n" not in caught.value.message
        assert dump(tmp_path) == before
        event.remove(ledger._engine, "connect", limit)
        ledger._engine.dispose()
        sync(ledger, many)
        assert ledger.check() == []


@pytest.mark.parametrize("place", ["/proc/kbsync/ledger.db", "/dev/null/ledger.db"])
def test_a_folder_that_cannot_be_written_is_named(place: str) -> None:
    """One line with the path, also for root, and a hint."""
    with pytest.raises(LedgerError, match=re.escape(place)) as caught:
        Ledger.open(f"sqlite:///{place}")
    assert caught.value.hint == "choose a folder that can be written to"


def test_a_ledger_that_turned_read_only_is_read_but_not_written(tmp_path: Path) -> None:
    """Where the file system lets nothing be written, a write is refused in one line and reading goes on."""
    with opened(tmp_path) as ledger:
        decide(ledger, facts(Vega="Lyra"))
        event.listen(ledger._engine, "connect", _turn_read_only)
        ledger._engine.dispose()
        with pytest.raises(LedgerError, match="readonly database"):
            decide(ledger, facts(Vega="Draco"))
        with ledger.read() as db:
            assert db.facts() == facts(Vega="Lyra")


def _turn_read_only(connection: sqlite3.Connection, _record: object) -> None:
    connection.execute("PRAGMA query_only = ON")
