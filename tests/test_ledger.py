"""The ledger as a database: opened, migrated, locked, rolled back, killed, checked, backed up."""

from __future__ import annotations

import gzip
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, insert, text
from sqlalchemy.schema import CreateTable

from kbsync.errors import Busy, LedgerError, UsageError
from kbsync.ledger import Ledger, database, schema
from kbsync.ledger.columns import UtcTime
from kbsync.ledger.migrate import REVISION
from tests.ledgers import NOON, Clock, claims, decide, dump, facts, key, opened, register, snapshot, sync, url

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


@pytest.mark.parametrize("address", ["sqlite://", "sqlite:///:memory:", "nonsense", "nosuch://host/db"])
def test_a_url_that_means_nothing_is_a_usage_error(address: str) -> None:
    """Memory databases and unknown databases are refused in one line."""
    with pytest.raises(UsageError):
        Ledger.open(address)


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    """A database with tables that are not ours is refused and unchanged."""
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        connection.execute("CREATE TABLE recipe (name TEXT)")
    before = dump(tmp_path)
    with pytest.raises(LedgerError, match="no kbsync ledger"):
        Ledger.open(url(tmp_path))
    assert dump(tmp_path) == before


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    """Garbage is a LedgerError, not a traceback."""
    (tmp_path / "ledger.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(LedgerError, match="not a database"):
        Ledger.open(url(tmp_path))


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    """A revision that this kbsync does not know stays untouched."""
    with opened(tmp_path):
        pass
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    before = dump(tmp_path)
    with pytest.raises(LedgerError, match="has schema 9999") as caught:
        Ledger.open(url(tmp_path))
    assert caught.value.hint == "upgrade kbsync"
    assert dump(tmp_path) == before


def test_the_migrations_make_what_the_tables_declare(tmp_path: Path) -> None:
    """Alembic finds no difference between the migrated database and the SQLModel tables, and neither does a comparison
    of the statements, which Alembic's of constraints is not as strict as."""
    with Ledger.open(url(tmp_path)) as ledger, ledger._engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
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


def test_the_newest_revision_is_the_one_that_opening_asks_for() -> None:
    """`REVISION` spares loading Alembic; it must not fall behind."""
    scripts = Path(database.__file__).parent / "migrations"
    assert ScriptDirectory(str(scripts)).get_current_head() == REVISION


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


def test_naive_times_are_refused(tmp_path: Path) -> None:
    """A datetime without a timezone cannot be written."""
    naive = datetime(2026, 7, 1)  # noqa: DTZ001  # what must be refused
    row = {"at": naive, "who": "me", "action": "x", "detail": {}}
    with opened(tmp_path) as ledger, pytest.raises(LedgerError, match="has no timezone"), ledger.write() as db:
        db._connection.execute(insert(schema.audit).values(row))


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


def test_an_exception_undoes_the_whole_block(tmp_path: Path) -> None:
    """Nothing of a write block that fails is left, and the exception is the caller's own."""
    with opened(tmp_path) as ledger:
        before = dump(tmp_path)
        with pytest.raises(ZeroDivisionError):
            _fail_after_writing(ledger)
        assert dump(tmp_path) == before


def _fail_after_writing(ledger: Ledger) -> None:
    with ledger.write() as db:
        run = db.start_run("astronomy", model=None, trigger="sync", user="me")
        db.record(run, snapshot(*claims(Vega="Lyra")))
        raise ZeroDivisionError


def test_a_dry_run_leaves_no_trace(tmp_path: Path) -> None:
    """After `rollback` the database is byte for byte what it was, whatever the block did before and does after."""
    with opened(tmp_path) as ledger:
        sync(ledger, snapshot(*claims(Vega="Lyra", Deneb="Cygnus")))
        decide(ledger, facts(Vega="Lyra", Deneb="Cygnus"))
        before = dump(tmp_path)
        with ledger.write() as db:
            run = db.start_run("astronomy", model=None, trigger="plan", user="me")
            db.record(run, snapshot(*claims(Vega="Draco", Altair="Aquila")))
            changes = db.apply(run, facts(Vega="Draco", Altair="Aquila"), [], ["constellation"])
            db.rollback()
            db.audit("me", "too late", {})
        assert [change.kind for change in changes] == ["added", "removed", "changed"]
        assert dump(tmp_path) == before


def test_a_reader_sees_one_state(tmp_path: Path) -> None:
    """What is committed while a reader is at work does not show in its answers."""
    with opened(tmp_path) as ledger, ledger.read() as db:
        assert db.runs() == []
        thread = threading.Thread(target=_try_to_start_run, args=(url(tmp_path),))
        thread.start()
        time.sleep(0.3)
        assert db.runs() == []
        assert thread.is_alive() == (database.journal_mode() == "truncate")
    thread.join()
    with opened(tmp_path) as ledger, ledger.read() as db:
        assert len(db.runs()) == 1


def _try_to_start_run(address: str) -> None:
    with Ledger.open(address) as ledger, ledger.write() as db:
        db.start_run(None, model=None, trigger="test", user="me")


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    """Threads with ledgers of their own read, wait and write the same counter; every increment counts."""
    with opened(tmp_path) as ledger, ledger.write() as db:
        run = db.start_run(None, model=None, trigger="count", user="me")
    errors: list[Exception] = []

    def count() -> None:
        try:
            with opened(tmp_path) as mine:
                for _ in range(10):
                    with mine.write() as db:
                        done = db.run(run).counts.get("done", 0)
                        time.sleep(0.001)
                        db.finish_run(run, "held", counts={"done": done + 1})
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=count) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with opened(tmp_path) as ledger, ledger.read() as db:
        assert (errors, db.run(run).counts["done"]) == ([], 20)


def test_a_ledger_in_use_is_busy_not_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer who waits too long is told so, and may try again."""
    monkeypatch.setattr(database, "BUSY_TIMEOUT", 50)
    with opened(tmp_path) as one, opened(tmp_path) as other:
        with one.write(), pytest.raises(Busy, match="another process"), other.write():
            pass
        with other.write() as db:
            db.audit("me", "try again", {})


def test_time_never_goes_back(tmp_path: Path) -> None:
    """Where the machine's clock is turned back, what is written later still counts as later."""
    clock = Clock()
    with opened(tmp_path, clock) as ledger:
        decide(ledger, facts(Vega="Lyra"))
        clock.turn(hours=-1)
        decide(ledger, facts(Vega="Draco"))
        with ledger.read() as db:
            first, second = db.history("Vega")
    assert first.since == NOON
    assert first.until == second.since > NOON


KILLED = """
import os, signal, sys
from tests.ledgers import claims, facts, opened, snapshot, url
from kbsync.ledger import Ledger
from pathlib import Path
with Ledger.open(url(Path(sys.argv[1]))) as ledger, ledger.write() as db:
    run = db.start_run("astronomy", model=None, trigger="sync", user="me")
    many = {f"Star{n}": "Lyra" for n in range(30_000)}
    db.record(run, snapshot(*claims(**many)))
    if sys.argv[2] == "applied":
        db.apply(run, facts(**many), [], ["constellation"])
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["recorded", "applied"])
def test_kill_leaves_the_previous_state(tmp_path: Path, moment: str) -> None:
    """SIGKILL in the middle of a large write (more pages than the cache holds, so the file was written to) leaves the
    ledger as it was, sound and writable."""
    with opened(tmp_path) as ledger:
        sync(ledger, snapshot(*claims(Vega="Lyra")))
    before = dump(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), moment], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    journal = tmp_path / ("ledger.db-journal" if database.journal_mode() == "truncate" else "ledger.db-wal")
    assert journal.stat().st_size > 0
    with opened(tmp_path) as ledger:
        assert ledger.check() == []
        assert dump(tmp_path) == before
        sync(ledger, snapshot(*claims(Vega="Lyra", Deneb="Cygnus")))


def test_two_live_objects_are_impossible(tmp_path: Path) -> None:
    """The UNIQUE index refuses a second live fact of a key, also to who writes past the code; an ended one is fine."""
    row = {
        "relation": "constellation",
        "subject_id": "feed:Vega",
        "subject_label": "Vega",
        "object_label": "x",
        "source": "feed",
        "origin": "line 2",
        "status": "live",
        "since": NOON,
        "since_run": 1,
    }
    with opened(tmp_path) as ledger:
        decide(ledger, facts(Vega="Lyra"))
        with ledger.write() as db:
            ended = row | {
                "object_id": "feed:Old",
                "since": NOON - timedelta(days=2),
                "until": NOON - timedelta(days=1),
            }
            db._connection.execute(insert(schema.fact).values(ended))
        with pytest.raises(LedgerError, match="UNIQUE"), ledger.write() as db:
            db._connection.execute(insert(schema.fact).values(row | {"object_id": "feed:Draco"}))
        with ledger.read() as db:
            assert db.facts()[key("Vega")].object.label == "Lyra"


def test_the_audit_log_only_grows(tmp_path: Path) -> None:
    """Neither UPDATE nor DELETE changes the audit log or the moves of HEAD, from whatever program."""
    with opened(tmp_path) as ledger:
        register(ledger)
        with ledger.write() as db:
            db.audit("me", "approve", {"run": 7})
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        for statement in ("UPDATE audit SET who = 'you'", "DELETE FROM audit", "UPDATE head SET version = 1"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                connection.execute(statement)


def test_references_must_exist(tmp_path: Path) -> None:
    """A fact of a run that never was is refused."""
    with opened(tmp_path) as ledger, pytest.raises(LedgerError, match="FOREIGN KEY"), ledger.write() as db:
        db.apply(99, facts(Vega="Lyra"), [], ["constellation"])


def test_check_finds_what_is_wrong(tmp_path: Path) -> None:
    """A sound ledger has no problems; two live objects, a lost HEAD and a dangling reference are each named."""
    with opened(tmp_path) as ledger:
        register(ledger)
        decide(ledger, facts(Vega="Lyra"))
        assert ledger.check() == []
        assert ledger.check(quick=True) == []
        with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
            connection.executescript(
                "DROP INDEX fact_one_live_object; DROP TRIGGER head_no_delete; DELETE FROM head;"
                "INSERT INTO fact SELECT 77, relation, subject_id, subject_label, 'feed:Draco', 'Draco', source,"
                " origin, status, since, until, 99, NULL, NULL, rule FROM fact"
            )
        problems = "\n".join(ledger.check())
    for expected in ("constellation of feed:Vega: 2 live objects", "has no HEAD", "table fact, row 77"):
        assert expected in problems


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


@pytest.mark.parametrize("file", sorted((Path(__file__).parent / "data" / "ledgers").glob("*.db.gz")), ids=str)
def test_a_ledger_of_every_earlier_schema_is_upgraded_after_a_backup(file: Path, tmp_path: Path) -> None:
    """A ledger that an earlier kbsync wrote is copied, then upgraded: sound, and with the facts that it had."""
    (tmp_path / "ledger.db").write_bytes(gzip.decompress(file.read_bytes()))
    before = dump(tmp_path)
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        live = connection.execute("SELECT subject_id, object_id FROM fact WHERE until IS NULL").fetchall()
    with opened(tmp_path) as ledger:
        assert ledger.check() == []
        with ledger.read() as db:
            found = db.facts()
            assert sorted((key.subject, fact.object.id) for key, fact in found.items()) == sorted(live)
            assert all(fact.claim is not None for fact in found.values())
    (copy,) = tmp_path.glob(f"ledger.db.{file.name[:4]}-*.backup")
    (tmp_path / "old").mkdir()
    copy.rename(tmp_path / "old" / "ledger.db")
    assert sorted(dump(tmp_path / "old")) == sorted(before)


def test_opening_and_asking_loads_no_torch(tmp_path: Path) -> None:
    """Ledger queries load neither torch nor transformers, and Alembic only where there is something to migrate."""
    with opened(tmp_path):
        pass
    program = (
        "import sys\nfrom kbsync.ledger import Ledger\n"
        "with Ledger.open(sys.argv[1]) as ledger, ledger.read() as db:\n    db.facts()\n"
        "print([name for name in ('torch', 'transformers', 'alembic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, url(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_queries_of_the_documentation_run(tmp_path: Path) -> None:
    """The SQL of docs/ledger.md works on a ledger opened with any SQLite tool, and answers what it says."""
    page = (Path(__file__).parents[1] / "docs" / "ledger.md").read_text(encoding="utf-8")
    as_of, changed, conflicts = page.split("```sql")[1].split("```")[0].split(";")[:3]
    clock = Clock()
    with opened(tmp_path, clock) as ledger:
        decide(ledger, facts(Vega="Lyra"))
        clock.turn(hours=1)
        decide(ledger, facts(Vega="Draco"))
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        assert connection.execute(as_of).fetchall() == [("constellation", "Vega", "Lyra", "feed", "line 2")]
        assert [row[2:5] for row in connection.execute(changed)] == [("Vega", "Lyra", "Draco")]
        assert connection.execute(conflicts).fetchall() == []


def test_utc_is_what_comes_out(tmp_path: Path) -> None:
    """Every time that the ledger answers is timezone-aware UTC."""
    with Ledger.open(url(tmp_path)) as ledger:
        decide(ledger, facts(Vega="Lyra"))
        with ledger.read() as db:
            (row,) = db.fact_rows()
            assert row.since.tzinfo is UTC
            assert abs(datetime.now(UTC) - row.since) < timedelta(minutes=1)
