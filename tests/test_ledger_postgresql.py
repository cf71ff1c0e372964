"""The ledger on a PostgreSQL server: lost connections, secrets in its address, drivers that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import make_url
from sqlalchemy.exc import DBAPIError

from kbsync.commands import perform
from kbsync.daemon import run_daemon
from kbsync.errors import Busy, KbsyncError, LedgerError, UsageError
from kbsync.ledger import Ledger, database
from tests.ledgers import claims, decide, dump, facts, opened, snapshot, sync, tampered, url
from tests.workspaces import workspace

pytestmark = [
    pytest.mark.usefixtures("database"),
    pytest.mark.parametrize("database", ["postgresql"], indirect=True),
]

CANARY = "c4n4ry-s3cr3t"
END_ALL_OTHERS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
    " AND pid != pg_backend_pid()"
)


def test_a_lost_connection_undoes_the_whole_block_in_one_line(tmp_path: Path) -> None:
    """The server ends the session in the middle of a write: one line that says so, nothing of the block is left, and
    the same ledger goes on by itself."""
    with opened(tmp_path) as ledger:
        sync(ledger, snapshot(*claims(Vega="Lyra")))
        before = dump(tmp_path)
        with pytest.raises(LedgerError) as caught:
            _lose_the_connection(ledger, tmp_path)
        assert "\n" not in caught.value.message
        assert caught.value.hint == "see that the server runs, then try again"
        assert dump(tmp_path) == before
        decide(ledger, facts(Vega="Lyra"))


def _lose_the_connection(ledger: Ledger, folder: Path) -> None:
    with ledger.write() as db:
        run = db.start_run("astronomy", model=None, trigger="sync", user="me")
        db.record(run, snapshot(*claims(Vega="Draco", Deneb="Cygnus")))
        tampered(folder, END_ALL_OTHERS)
        db.apply(run, facts(Vega="Draco"), [], ["constellation"])


def test_idle_connections_that_the_server_closed_are_replaced(tmp_path: Path) -> None:
    """A ledger that was open while the server restarted notices nothing."""
    with opened(tmp_path) as ledger:
        decide(ledger, facts(Vega="Lyra"))
        tampered(tmp_path, END_ALL_OTHERS)
        with ledger.read() as db:
            assert db.facts() == facts(Vega="Lyra")


def test_readers_cannot_write(tmp_path: Path) -> None:
    """The server itself refuses a write in a reading block."""
    with opened(tmp_path) as ledger, pytest.raises(LedgerError, match="read-only transaction"), ledger.read() as db:
        db._connection.exec_driver_sql("DELETE FROM run")


@pytest.mark.parametrize(
    "address",
    [
        f"postgresql+psycopg://tester:{CANARY}@/nosuch?host=/nonexistent",
        f"postgresql+psycopg://tester@/nosuch?host=/nonexistent&password={CANARY}",
        f"postgresql+psycopg://tester:{CANARY}@127.0.0.1:1/nosuch",
        f"postgresql+psycopg://tester:{CANARY}@host:port/nosuch",
        f"postgresql+psycopg://tester@/nosuch?host=/nonexistent&sslpassword={CANARY}&nonsense={CANARY}",
        f"postgresql+nosuch://tester:{CANARY}@host/db",
        f"mysql://tester:{CANARY}@host/db",
        f"nosuch+{CANARY}",
    ],
)
def test_no_message_holds_the_password(address: str) -> None:
    """A URL that does not work is refused in one line, without the secrets that it holds."""
    with pytest.raises(KbsyncError) as caught:
        Ledger.open(address)
    assert CANARY not in caught.value.message + caught.value.hint
    assert "\n" not in caught.value.message


def test_a_running_ledgers_errors_hold_no_password(tmp_path: Path) -> None:
    """What the server refuses is said with the address, but for its password."""
    address = make_url(url(tmp_path)).set(password=CANARY).render_as_string(hide_password=False)
    with Ledger.open(address) as ledger:
        with pytest.raises(LedgerError, match=r":\*\*\*@/kbsync_") as caught, ledger.write() as db:
            db.apply(99, facts(Vega="Lyra"), [], ["constellation"])
        assert CANARY not in caught.value.message
        with pytest.raises(LedgerError) as caught:
            ledger.backup(tmp_path / "copy")
        assert caught.value.hint == "pg_dump makes the backup"


def test_the_driver_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without psycopg the hint names what to install."""

    def absent(*_args: object, **_options: object) -> None:
        raise ImportError("No module named 'psycopg'", name="psycopg")

    monkeypatch.setattr(database, "create_engine", absent)
    with pytest.raises(UsageError, match="psycopg") as caught:
        Ledger.open("postgresql+psycopg://tester@/ledger")
    assert caught.value.hint == "pip install 'kbsync[postgres]'"


def test_a_bulk_insert_that_the_server_refuses_is_undone(tmp_path: Path) -> None:
    """COPY's errors are one line, too, and the block leaves nothing."""
    with opened(tmp_path) as ledger:
        before = dump(tmp_path)
        nul = [*claims(Vega="Lyra"), *claims(**{"De\0neb": "Cygnus"})]
        with pytest.raises(LedgerError, match="NUL"):
            sync(ledger, snapshot(*nul))
        assert dump(tmp_path) == before


def test_other_programs_cannot_rewrite_the_audit_log(tmp_path: Path) -> None:
    """TRUNCATE, which SQLite does not have, is refused as UPDATE and DELETE are."""
    with opened(tmp_path), pytest.raises(DBAPIError, match="append-only"):
        tampered(tmp_path, "TRUNCATE audit")


def test_one_process_runs_passes_on_a_ledger(tmp_path: Path) -> None:
    """A second workspace with the same ledger is refused, daemon and command alike; readers and, once the first is
    gone, everybody goes on."""
    with opened(tmp_path) as ledger, opened(tmp_path) as other:
        with ledger.led():
            with pytest.raises(Busy, match="another daemon or command works on this ledger"), other.led():
                pass
            with other.read() as db:
                assert db.runs() == []
            made = workspace(tmp_path, {"Vega": "Lyra"})
            with pytest.raises(Busy, match="another daemon"):
                perform(made.root, "sync", {}, user="me")
            with pytest.raises(Busy, match="another daemon"):
                run_daemon(made.root)
        with other.led():
            pass


def test_a_server_that_is_gone_or_does_not_end_a_statement_is_noticed(tmp_path: Path) -> None:
    """The sockets have limits, and statements one that is far beyond what any takes; what the URL says wins."""
    engine = database.engine_for(url(tmp_path), create=False)
    other = make_url(url(tmp_path)).update_query_dict({"keepalives_idle": "7", "options": "-c statement_timeout=5000"})
    chosen = database.engine_for(other.render_as_string(hide_password=False), create=False)
    found = []
    for one in (engine, chosen):
        with one.connect() as connection:
            options = connection.connection.driver_connection.info.get_parameters()  # type: ignore[union-attr]
            limit = connection.exec_driver_sql("SHOW statement_timeout").scalar_one()
            found.append((options["tcp_user_timeout"], options["keepalives_idle"], limit))
        one.dispose()
    assert found == [("30000", "15", "30min"), ("30000", "7", "5s")]
