"""The daemon as a real process: schedule, control socket, signals, one writer."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from kbsync.catalog import load_catalog
from kbsync.commands import perform
from kbsync.config import Workspace
from kbsync.control import call
from kbsync.daemon import Daemon
from kbsync.daemon.chores import Chore
from kbsync.errors import Cancelled, KbsyncError, UsageError
from kbsync.ledger import Ledger
from tests.daemons import PATIENCE, Running, children
from tests.faultserver import FaultServer, answer
from tests.workspaces import TestWorkspace, workspace

STARS = {"Vega": "Orion", "Betelgeuse": "Lyra", "Deneb": "Paris"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The statistics of the tiny model are collected once for all tests here."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def made(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> TestWorkspace:
    """A workspace that was never synced."""
    monkeypatch.setenv("KBSYNC_CACHE", str(cache))
    return workspace(tmp_path, STARS)


@pytest.fixture
def start(made: TestWorkspace) -> Iterator[Callable[[], Running]]:
    """Starts daemons on the workspace; none outlives the test."""
    running: list[Running] = []

    def begin() -> Running:
        running.append(Running(made.root))
        return running[-1]

    yield begin
    for one in running:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def test_an_overdue_policy_runs_once_at_start_and_sigterm_ends_with_0(
    made: TestWorkspace, start: Callable[[], Running]
) -> None:
    daemon = start()
    daemon.wait_for(lambda: daemon.events("run_finished"))
    assert daemon.events("run_finished")[0]["status"] == "done"
    assert [event["version"] for event in daemon.events("version_published")] == [1]
    assert daemon.end() == 0
    again = start()
    again.wait_for(lambda: again.events("daemon_started"))
    time.sleep(1)
    assert again.events("run_finished") == []  # the next pass is due in an hour
    assert again.end(signal.SIGINT) == 0


def test_a_second_daemon_is_refused_and_commands_go_through_the_first(
    made: TestWorkspace, start: Callable[[], Running]
) -> None:
    daemon = start()
    daemon.wait_for(lambda: daemon.events("version_published"))
    daemon.wait_for(lambda: daemon.events("run_finished"))
    second = subprocess.run(
        [sys.executable, "-m", "kbsync", "daemon", "-w", str(made.root)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert second.returncode == 1
    assert f"in use by process {daemon.process.pid}" in second.stderr
    assert perform(made.root, "rollback", {"to": 0}, user="ada")["version"] == 0
    with pytest.raises(UsageError, match="no such version"):
        perform(made.root, "rollback", {"to": 7}, user="ada")
    made.feed(STARS | {"Sirius": "Rome"})
    [report] = perform(made.root, "sync", {}, user="ada")["reports"]
    assert (report["versions"], report["counts"]["held"]) == ([2], 3)
    assert perform(made.root, "rebase", {"dry": True}, user="ada")["facts"] == 1
    assert perform(made.root, "revert", {"key": ["constellation", "stars:siriu"], "exact": True}, user="ada")["rebase"]
    ledger = Ledger.open(Workspace.load(made.root).ledger_url)
    with ledger.read() as db:
        assert db.runs()[0].user == "ada"
    ledger.close()
    assert daemon.end() == 0
    assert not Workspace.load(made.root).socket.exists()


def test_sighup_reads_the_policies_again_and_a_broken_file_leaves_the_old_ones(
    made: TestWorkspace, start: Callable[[], Running]
) -> None:
    daemon = start()
    daemon.wait_for(lambda: daemon.events("run_finished"))
    policy = made.root / "policies" / "sky.yaml"
    text = policy.read_text()
    policy.write_text(text.replace("schedule:", "shedule:"))
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for(lambda: daemon.events("reload_failed"))
    assert "sky.yaml" in daemon.events("reload_failed")[0]["problem"]
    policy.write_text(text.replace("policy: sky", "policy: heaven"))
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for(lambda: daemon.events("reloaded"))
    daemon.wait_for(lambda: len(daemon.events("run_finished")) == 2)  # a new policy was never run
    assert daemon.end() == 0


def test_sighup_takes_what_kbsync_yaml_says_now_and_names_what_waits_for_a_restart(
    made: TestWorkspace, start: Callable[[], Running]
) -> None:
    """A new channel is used at once, another model is not, and the ledger knows what is due when."""
    daemon = start()
    daemon.wait_for(lambda: daemon.events("run_finished"))
    config, policy = made.root / "kbsync.yaml", made.root / "policies" / "sky.yaml"
    text = config.read_text()
    model = next(line for line in text.splitlines() if line.startswith("model:"))
    channels = "notify:\n  channels:\n    - {name: ops, type: command, run: cat >> told}\n"
    config.write_text(text.replace(model, "model: other") + channels)
    policy.write_text(policy.read_text().replace("every: 1h", "every: 7d"))
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for(lambda: daemon.events("restart_needed"))
    assert daemon.events("restart_needed")[0]["keys"] == ["model"]
    assert daemon.events("reloaded")[0]["changed"] == ["notify"]
    assert perform(made.root, "test_channel", {"channel": "ops"}, user="ada")["delivered"]
    assert "a test of this channel" in (made.root / "told").read_text()
    ledger = Ledger.open(Workspace.load(made.root).ledger_url)
    with ledger.read() as db:
        state = db.schedule_state("sky")
    ledger.close()
    assert state.last_started is not None
    assert state.next_due is not None
    assert timedelta(days=6.9) < state.next_due - state.last_started < timedelta(days=7.1)
    made.feed(STARS | {"Sirius": "Rome"})
    [report] = perform(made.root, "sync", {}, user="ada")["reports"]
    assert report["status"] == "done"
    config.write_text("model: [")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for(lambda: daemon.events("reload_failed"))
    assert "kbsync.yaml" in daemon.events("reload_failed")[0]["problem"]
    assert daemon.end() == 0


def test_a_daemon_that_is_killed_leaves_a_workspace_that_the_next_one_takes_over(
    made: TestWorkspace, start: Callable[[], Running]
) -> None:
    daemon = start()
    daemon.wait_for(lambda: daemon.events("daemon_started"))
    daemon.wait_for(lambda: any((made.root / "data" / "targets").glob("*.safetensors")))
    daemon.process.kill()
    daemon.process.wait()
    after = start()
    after.wait_for(lambda: [event for event in after.events("run_finished") if event["status"] == "done"])
    ledger = Ledger.open(Workspace.load(made.root).ledger_url)
    with ledger.read() as db:
        statuses = [run.status for run in db.runs()]
    ledger.close()
    assert statuses[0] == "done"
    assert "running" not in statuses
    assert after.end() == 0


def test_a_rollback_cancels_the_running_edit_and_goes_first(made: TestWorkspace, start: Callable[[], Running]) -> None:
    daemon = start()
    daemon.wait_for(lambda: daemon.events("run_finished"))
    made.feed(STARS | {"Sirius": "Rome"})
    ended: list[BaseException | dict[str, Any]] = []

    def edit() -> None:
        try:
            ended.append(perform(made.root, "sync", {}, user="ada"))
        except KbsyncError as error:
            ended.append(error)

    editing = threading.Thread(target=edit)
    editing.start()
    daemon.wait_for(lambda: len(children(daemon.process.pid)) == 1)
    assert perform(made.root, "rollback", {"to": 0}, user="ada")["version"] == 0
    editing.join(PATIENCE)
    assert isinstance(ended[0], Cancelled)
    assert children(daemon.process.pid) == []
    [report] = perform(made.root, "sync", {}, user="ada")["reports"]
    assert (report["status"], report["versions"]) == ("done", [2])  # what was cancelled is planned again
    assert daemon.end() == 0


def test_a_sources_pause_keeps_neither_a_rollback_nor_the_end_waiting(
    made: TestWorkspace, start: Callable[[], Running]
) -> None:
    """Both end the wait at once; the run is finished as cancelled, and the pass begins again after the rollback."""
    with FaultServer() as server:
        server.on("/stars.csv", answer(status=429, headers={"Retry-After": "55"}))
        file = made.root / "sources" / "stars.yaml"
        file.write_text(file.read_text().replace("location: stars.csv", f"location: {server.url('/stars.csv')}"))
        config = made.root / "kbsync.yaml"
        config.write_text(config.read_text() + "grace: 20s\n")
        daemon = start()
        daemon.wait_for(lambda: server.requests)
        with pytest.raises(UsageError, match="no such version"):
            perform(made.root, "rollback", {"to": 7}, user="ada")
        assert len(server.requests) == 1
        daemon.wait_for(lambda: len(server.requests) == 2)
        assert daemon.end() == 0
        assert daemon.events("work_abandoned") == []
    ledger = Ledger.open(Workspace.load(made.root).ledger_url)
    with ledger.read() as db:
        assert [run.status for run in db.runs()] == ["cancelled", "cancelled"]
    ledger.close()


def test_passes_that_wait_for_each_other_hold_up_no_chore(made: TestWorkspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Notices go out while more policies wait for a long edit than there are threads for passes."""
    for number in range(5):
        names = ("sources/stars.yaml", "source: stars"), ("policies/sky.yaml", "policy: sky")
        for file, name in names:
            text = (made.root / file).read_text().replace(name, f"{name}{number}")
            text = text.replace("sources: [stars]", f"sources: [stars{number}]").replace("constellation", f"c{number}")
            text = text.replace(f"name, object: c{number}", "name, object: constellation")
            (made.root / file.replace(".yaml", f"{number}.yaml")).write_text(text)
    editing, may_end, told = threading.Event(), threading.Event(), threading.Event()

    def edit(*_args: object, **_options: object) -> None:
        editing.set()
        may_end.wait(PATIENCE)
        raise Cancelled("the test is over")

    chores = (Chore("short", timedelta(seconds=0.2), lambda _reconciler: told.set()),)
    monkeypatch.setattr("kbsync.daemon.daemon.CHORES", chores)
    monkeypatch.setattr("kbsync.reconcile.run_edit", edit)
    workspace_, ledger = Workspace.load(made.root), Ledger.open(Workspace.load(made.root).ledger_url)
    daemon = Daemon(load_catalog(workspace_), ledger)
    thread = threading.Thread(target=daemon.run)
    thread.start()
    try:
        assert editing.wait(PATIENCE)
        time.sleep(1)  # the other passes take their threads
        told.clear()
        assert told.wait(PATIENCE)
    finally:
        daemon.stop()
        may_end.set()
        thread.join(PATIENCE)
        ledger.close()


def test_commands_whose_clients_hung_up_are_dropped_during_an_edit_and_a_rollback_is_taken_past_those_that_wait(
    made: TestWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`timeout 60 kbsync sync` from cron, again and again during a long edit, and a person who wants it undone."""
    monkeypatch.setattr("kbsync.control.CLIENTS", 2)
    editing, undone = threading.Event(), threading.Event()

    def edit(*_args: object, cancelled: threading.Event, **_options: object) -> None:
        editing.set()
        assert cancelled.wait(PATIENCE)
        undone.set()
        raise Cancelled("rolled back")

    monkeypatch.setattr("kbsync.reconcile.run_edit", edit)
    workspace_, ledger = Workspace.load(made.root), Ledger.open(Workspace.load(made.root).ledger_url)
    daemon = Daemon(load_catalog(workspace_), ledger)
    thread = threading.Thread(target=daemon.run)
    with capture_logs() as logged, ExitStack() as stack:
        stack.callback(ledger.close)
        stack.callback(thread.join, PATIENCE)
        stack.callback(daemon.stop)
        thread.start()
        assert editing.wait(PATIENCE)
        for _ in range(2):
            _asking_to_sync(workspace_).close()
        end = time.monotonic() + PATIENCE
        while len([event for event in logged if event["event"] == "command_dropped"]) < 2:
            assert time.monotonic() < end, logged
            time.sleep(0.05)
        for _ in range(2):
            stack.callback(_asking_to_sync(workspace_).close)
        time.sleep(0.5)  # both wait
        assert not undone.is_set()
        with suppress(UsageError):  # there may be nothing yet to go back from
            call(workspace_.socket, "rollback", {"to": 0}, user="ada")
        assert undone.is_set()


def _asking_to_sync(place: Workspace) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(place.socket))
    client.sendall(b'{"command": "sync", "arguments": {}, "user": "cron"}\n')
    return client
