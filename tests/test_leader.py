"""The one process that runs passes on a server's ledger, and what becomes of it when its connection is lost."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kbsync.errors import Busy
from kbsync.ledger import Ledger
from tests import ledgers
from tests.daemons import PATIENCE
from tests.ledgers import opened, tampered
from tests.postgres import Server
from tests.workspaces import workspace

CUT = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted AND objid = 1801614202"


@pytest.fixture(autouse=True)
def _on_a_server(_postgresql: Server | str) -> Iterator[None]:
    if isinstance(_postgresql, str):
        pytest.skip(_postgresql)
    with ledgers.served_by(_postgresql):
        yield


def begin(ledger: Ledger) -> None:
    """Write something."""
    with ledger.write() as db:
        db.start_run(None, model=None, trigger="sync", user="me")


def lose(folder: Path) -> None:
    """The server ends the connection that the lock lives on."""
    assert tampered(folder, CUT) == [(True,)]


def test_a_lock_whose_connection_was_lost_is_taken_again_before_anything_is_written(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger, opened(tmp_path) as other, ledger.led():
        begin(ledger)
        lose(tmp_path)
        begin(ledger)
        with pytest.raises(Busy, match="another daemon or command works on this ledger"), other.led():
            pass


def test_who_lost_the_lock_to_another_process_writes_nothing_until_that_one_has_ended(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger, opened(tmp_path) as other, ledger.led():
        lose(tmp_path)
        with other.led():
            begin(other)
            for _ in range(2):
                with pytest.raises(Busy, match="another daemon or command works on this ledger"):
                    begin(ledger)
        begin(ledger)
        with ledger.read() as db:
            assert len(db.runs()) == 2


def test_a_lost_lock_hinders_nobody_at_the_end(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger, opened(tmp_path) as other:
        with ledger.led():
            lose(tmp_path)
        with other.led():
            begin(other)
        begin(ledger)  # without the block, it is a command among others


def test_a_second_daemon_says_who_has_the_ledger_and_ends(tmp_path: Path) -> None:
    """A real one, of another workspace: it does not wait, and is tried again only by what restarts it."""
    made = workspace(tmp_path, {"Vega": "Orion"})
    with opened(made.root) as ledger, ledger.led():
        done = subprocess.run(
            [sys.executable, "-m", "kbsync", "daemon", "--workspace", str(made.root)],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    assert done.returncode == 1
    assert "another daemon or command works on this ledger" in done.stderr
