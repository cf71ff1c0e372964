"""The ledger as a database, on SQLite and PostgreSQL alike: opened, locked, rolled back, killed, checked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import insert
from sqlalchemy.exc import DBAPIError

from kbsync.errors import Busy, LedgerError, UsageError
from kbsync.ledger import Ledger, database, schema
from kbsync.ledger.migrate import REVISION
from tests.ledgers import (
    NOON,
    Clock,
    claims,
    decide,
    dump,
    facts,
    key,
    on_postgresql,
    opened,
    register,
    snapshot,
    sync,
    tampered,
    url,
)

pytestmark = pytest.mark.usefixtures("database")


@pytest.mark.parametrize("address", ["sqlite://", "sqlite:///:memory:", "nonsense", "nosuch://host/db"])
def test_a_url_that_means_nothing_is_a_usage_error(address: str) -> None:
    """Memory databases and unknown databases are refused in one line."""
    with pytest.raises(UsageError):
        Ledger.open(address)


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    """A database with tables that are not ours is refused and unchanged."""
    tampered(tmp_path, "CREATE TABLE recipe (name TEXT)")
    before = dump(tmp_path)
    with pytest.raises(LedgerError, match="no kbsync ledger"):
        Ledger.open(url(tmp_path))
    assert dump(tmp_path) == before


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    """A revision that this kbsync does not know stays untouched."""
    with opened(tmp_path):
        pass
    tampered(tmp_path, "UPDATE alembic_version SET version_num = '9999'")
    before = dump(tmp_path)
    with pytest.raises(LedgerError, match="has schema 9999") as caught:
        Ledger.open(url(tmp_path))
    assert caught.value.hint == "upgrade kbsync"
    assert dump(tmp_path) == before


def test_the_migrations_make_what_the_tables_declare(tmp_path: Path) -> None:
    """Alembic finds no difference between the migrated database and the SQLModel tables."""
    with Ledger.open(url(tmp_path)) as ledger, ledger._engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []


def test_every_test_of_the_ledger_runs_on_both_databases() -> None:
    """Every module `test_ledger…` asks for both, but that about SQLite's own ways."""
    modules = sorted(Path(__file__).parent.glob("test_ledger*.py"))
    without = [module.name for module in modules if 'usefixtures("database")' not in module.read_text("utf-8")]
    assert without == ["test_ledger_sqlite.py"]


def test_the_newest_revision_is_the_one_that_opening_asks_for() -> None:
    """`REVISION` spares loading Alembic; it must not fall behind."""
    scripts = Path(database.__file__).parent / "migrations"
    assert ScriptDirectory(str(scripts)).get_current_head() == REVISION


def test_naive_times_are_refused(tmp_path: Path) -> None:
    """A datetime without a timezone cannot be written."""
    naive = datetime(2026, 7, 1)  # noqa: DTZ001  # what must be refused
    row = {"at": naive, "who": "me", "action": "x", "detail": {}}
    with opened(tmp_path) as ledger, pytest.raises(LedgerError, match="has no timezone"), ledger.write() as db:
        db._connection.execute(insert(schema.audit).values(row))


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
    """What is committed while a reader is at work does not show in its answers; only SQLite's rollback journal lets the
    writer wait for the reader."""
    with opened(tmp_path) as ledger, ledger.read() as db:
        assert db.runs() == []
        thread = threading.Thread(target=_try_to_start_run, args=(url(tmp_path),))
        thread.start()
        time.sleep(0.3)
        assert db.runs() == []
        assert thread.is_alive() == (not on_postgresql() and database.journal_mode() == "truncate")
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
from tests.ledgers import claims, facts, snapshot
from kbsync.ledger import Ledger
with Ledger.open(sys.argv[1]) as ledger, ledger.write() as db:
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
    ended = subprocess.run([sys.executable, "-c", KILLED, url(tmp_path), moment], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    if not on_postgresql():
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
        with pytest.raises(LedgerError, match=r"(?i)unique"), ledger.write() as db:
            db._connection.execute(insert(schema.fact).values(row | {"object_id": "feed:Draco"}))
        with ledger.read() as db:
            assert db.facts()[key("Vega")].object.label == "Lyra"


def test_the_audit_log_only_grows(tmp_path: Path) -> None:
    """Neither UPDATE nor DELETE changes the audit log or the moves of HEAD, from whatever program."""
    with opened(tmp_path) as ledger:
        register(ledger)
        with ledger.write() as db:
            db.audit("me", "approve", {"run": 7})
    for statement in ("UPDATE audit SET who = 'you'", "DELETE FROM audit", "UPDATE head SET version = 1"):
        with pytest.raises(DBAPIError, match="append-only"):
            tampered(tmp_path, statement)


def test_references_must_exist(tmp_path: Path) -> None:
    """A fact of a run that never was is refused."""
    with opened(tmp_path) as ledger, pytest.raises(LedgerError, match=r"(?i)foreign key"), ledger.write() as db:
        db.apply(99, facts(Vega="Lyra"), [], ["constellation"])


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
    """The SQL of docs/ledger.md works on a ledger opened with any tool, and answers what it says."""
    page = (Path(__file__).parents[1] / "docs" / "ledger.md").read_text(encoding="utf-8")
    as_of, changed, conflicts = page.split("```sql")[1].split("```")[0].split(";")[:3]
    clock = Clock()
    with opened(tmp_path, clock) as ledger:
        decide(ledger, facts(Vega="Lyra"))
        clock.turn(hours=1)
        decide(ledger, facts(Vega="Draco"))
    assert tampered(tmp_path, as_of) == [("constellation", "Vega", "Lyra", "feed", "line 2")]
    assert [row[2:5] for row in tampered(tmp_path, changed)] == [("Vega", "Lyra", "Draco")]
    assert tampered(tmp_path, conflicts) == []


def test_utc_is_what_comes_out(tmp_path: Path) -> None:
    """Every time that the ledger answers is timezone-aware UTC."""
    with Ledger.open(url(tmp_path)) as ledger:
        decide(ledger, facts(Vega="Lyra"))
        with ledger.read() as db:
            (row,) = db.fact_rows()
            assert row.since.tzinfo is UTC
            assert abs(datetime.now(UTC) - row.since) < timedelta(minutes=1)


def test_check_finds_contradictions(tmp_path: Path) -> None:
    """A sound ledger has no problems; two live objects of a key and a lost HEAD are each named."""
    with opened(tmp_path) as ledger:
        register(ledger)
        decide(ledger, facts(Vega="Lyra"))
        assert (ledger.check(), ledger.check(quick=True)) == ([], [])
    trigger = "head_append_only ON head" if on_postgresql() else "head_no_delete"
    tampered(
        tmp_path,
        "DROP INDEX fact_one_live_object",
        f"DROP TRIGGER {trigger}",
        "DELETE FROM head",
        "INSERT INTO fact SELECT 77, relation, subject_id, subject_label, 'feed:Draco', 'Draco', source, origin,"
        " status, since, until, since_run, NULL, NULL, rule FROM fact",
    )
    with opened(tmp_path) as ledger:
        problems = "\n".join(ledger.check())
    for expected in ("constellation of feed:Vega: 2 live objects", "has no HEAD"):
        assert expected in problems
