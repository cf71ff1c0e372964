"""What a real daemon tells its service manager, on a socket of the test's own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from kbsync.daemon.systemd import Manager
from kbsync.daemon.work import Work
from kbsync.ledger import Ledger
from tests import postgres
from tests.daemons import PATIENCE, Running, children
from tests.workspaces import TestWorkspace, workspace

ROOT = Path(__file__).parents[1]
SOON = 30.0
"""Seconds for the end of a daemon with a grace time of one second, on a busy machine."""
QUIET = 2.0
"""Seconds, five times the watchdog's interval of a hung daemon here."""


class Listener:
    """The service manager's side: every message, as its fields, in order."""

    def __init__(self, address: str) -> None:
        self.messages: list[dict[str, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)

    def close(self) -> None:
        self._socket.close()

    def read(self, seconds: float) -> bool:
        """Take in the next message; False where none comes within `seconds`."""
        self._socket.settimeout(seconds)
        try:
            text = self._socket.recv(65536).decode()
        except TimeoutError:
            return False
        self.messages.append(dict(line.split("=", 1) for line in text.splitlines()))
        return True

    def until(self, name: str, value: str = "", *, times: int = 1) -> dict[str, str]:
        """Read until the field has begun with `value` in so many messages; the last of them."""
        end = time.monotonic() + PATIENCE
        while len(found := self.having(name, value)) < times:
            assert time.monotonic() < end, self.messages
            self.read(1.0)
        return found[times - 1]

    def having(self, name: str, value: str = "") -> list[dict[str, str]]:
        """The messages so far whose field begins so."""
        return [message for message in self.messages if name in message and message[name].startswith(value)]


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    """At `notify` in the test's folder."""
    found = Listener(str(tmp_path / "notify"))
    yield found
    found.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts a daemon that speaks to the listener; it does not outlive the test."""
    running: list[Running] = []

    def begin(*command: str, **environment: str) -> Running:
        told = {"NOTIFY_SOCKET": str(tmp_path / "notify"), **environment}
        running.append(Running(tmp_path, *command, **told))
        return running[-1]

    yield begin
    for one in running:
        one.process.kill()
        one.process.wait()


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TestWorkspace:
    """A workspace that was never synced."""
    monkeypatch.setenv("KBSYNC_CACHE", str(tmp_path / "cache"))
    return workspace(tmp_path, {"Vega": "Orion"})


def test_a_daemon_says_ready_what_it_does_reloading_and_stopping_in_this_order(
    made: TestWorkspace, listener: Listener, start: Callable[..., Running]
) -> None:
    daemon = start(WATCHDOG_USEC="60000000")
    ready = listener.until("READY")
    assert made.root.joinpath("data", "control.sock").exists()
    assert "STATUS" in ready
    listener.until("STATUS", "pass of sky")
    listener.until("STATUS", "idle, next pass 20")
    daemon.process.send_signal(signal.SIGHUP)
    listener.until("READY", times=2)
    listener.until("WATCHDOG", "1")
    assert daemon.end() == 0
    while listener.read(0.1):
        pass
    order = [name for message in listener.messages for name in message if name in ("READY", "RELOADING", "STOPPING")]
    assert order == ["READY", "RELOADING", "READY", "STOPPING"]
    assert listener.messages[0] == {"STATUS": "starting"}
    assert 0 < int(listener.having("RELOADING")[0]["MONOTONIC_USEC"]) < time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    assert listener.having("STOPPING")[0]["EXTEND_TIMEOUT_USEC"] == "45000000"
    assert "STOPPING" in listener.messages[-1]


BREAKING = """
plan, planned = table.Timetable.plan, []
def breaking(self, policies):
    planned.append(policies)
    if len(planned) > 1:
        raise {error}("no ledger")
    return plan(self, policies)
table.Timetable.plan = breaking
"""


@pytest.mark.parametrize("error", ["it.KbsyncError", "ValueError"])
def test_a_reload_that_fails_half_way_changes_nothing_and_the_daemon_says_ready(
    error: str, made: TestWorkspace, listener: Listener, start: Callable[..., Running]
) -> None:
    """A policy was renamed and a channel added, then the ledger cannot be read: the old policy's passes go on."""
    policy, config = made.root / "policies" / "sky.yaml", made.root / "kbsync.yaml"
    policy.write_text(policy.read_text().replace("every: 1h", "every: 1s"))
    daemon = hanging(made, start, BREAKING.format(error=error), "")
    listener.until("STATUS", "idle")
    policy.write_text(policy.read_text().replace("policy: sky", "policy: heaven"))
    config.write_text(config.read_text() + "notify:\n  channels:\n    - {name: ops, type: command, run: cat}\n")
    daemon.process.send_signal(signal.SIGHUP)
    listener.until("RELOADING")
    listener.until("READY", times=2)
    assert len(daemon.events("reload_failed")) == 1
    before = len(daemon.events("run_finished"))
    daemon.wait_for(lambda: len(daemon.events("run_finished")) > before + 1)
    with Ledger.open(f"sqlite:///{made.root / 'data' / 'ledger.db'}") as ledger, ledger.read() as db:
        assert db.channels() == {}
        assert {run.policy for run in db.runs()} == {"sky"}
    assert daemon.end() == 0


HANG = """\
import sys, threading, kbsync.daemon.daemon as it, kbsync.daemon.timetable as table
from kbsync.cli import main
it.Pulse.stuck.__defaults__ = (0.5,)
it.BEAT = table.BEAT = 0.1
def forever(*_, **__): threading.Event().wait()
def stubborn(self, *_, **__): forever()
def patient(self, *_, **__):
    self.cancelled.wait()
    raise it.Cancelled("cancelled")
{how}
sys.argv = ["kbsync", "daemon", "--workspace", sys.argv[1]]
main()
"""
WATCHED = {"WATCHDOG_USEC": "400000"}


def hanging(
    made: TestWorkspace, start: Callable[..., Running], how: str, limits: str = "stall: 1s\ngrace: 1s\n"
) -> Running:
    """A daemon with short limits whose work or scheduler hangs as `how` says."""
    config = made.root / "kbsync.yaml"
    config.write_text(config.read_text() + limits)
    return start("-c", HANG.format(how=how), str(made.root), **WATCHED)


def test_a_daemon_whose_work_cannot_be_ended_stops_feeding_the_watchdog(
    made: TestWorkspace, listener: Listener, start: Callable[..., Running]
) -> None:
    """Only after it was cancelled, which did not help."""
    hanging(made, start, "it.Reconciler.sync = stubborn")
    listener.until("WATCHDOG", times=3)
    listener.until("STATUS", "stuck: work")
    _hears_nothing_more(listener)
    assert [entry for entry in _problems(made) if entry.startswith("work_stalled")]


def test_a_daemon_whose_scheduler_hangs_stops_feeding_the_watchdog(
    made: TestWorkspace, listener: Listener, start: Callable[..., Running]
) -> None:
    """A dead scheduler thread starts no pass, though the main loop goes on."""
    hanging(made, start, "table.DebugExecutor._do_submit_job = forever")
    listener.until("STATUS", "stuck: scheduler")
    _hears_nothing_more(listener)


def test_work_that_stalls_is_cancelled_and_the_daemon_goes_on(
    made: TestWorkspace, listener: Listener, start: Callable[..., Running]
) -> None:
    """It waits for its next time instead of stalling again at once, and the next work is not cancelled."""
    daemon = hanging(made, start, "it.Reconciler.sync = patient")
    listener.until("STATUS", "pass of sky")
    before = len(listener.messages)
    while not any(message.get("STATUS", "").startswith("idle") for message in listener.messages[before:]):
        assert listener.read(PATIENCE), daemon.log.read_text()
    fed = len(listener.having("WATCHDOG"))
    listener.until("WATCHDOG", times=fed + 5)
    assert len(daemon.events("pass_put_back")) == 1
    assert listener.having("STATUS", "stuck") == []
    assert daemon.end() == 0


def test_work_that_cannot_be_ended_does_not_outlive_the_daemon(
    made: TestWorkspace, listener: Listener, start: Callable[..., Running]
) -> None:
    """The process ends with it, instead of giving its lock back and going on."""
    daemon = hanging(made, start, "it.Reconciler.sync = stubborn")
    listener.until("STATUS", "pass of sky")
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(SOON) == 0
    [abandoned] = daemon.events("work_abandoned")
    assert abandoned["reason"].startswith("pass of sky: ")


RUNNING = """
from datetime import timedelta
from kbsync import hook
def tell(reconciler):
    folder = reconciler.workspace.root
    print(hook.run("echo $$ > pid; sleep 300", folder=folder, variables={}, keep=(), seconds=300), flush=True)
it.CHORES = (it.Chore("telling", timedelta(seconds=0.2), tell),)
"""


def test_a_command_that_does_not_end_keeps_no_daemon_from_ending(
    made: TestWorkspace, start: Callable[..., Running]
) -> None:
    """It is killed once the grace time is over, and what ran it ends in order."""
    daemon = hanging(made, start, RUNNING)
    daemon.wait_for(lambda: (made.root / "pid").exists() and (made.root / "pid").read_text())
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(SOON) == 0
    assert not Path(f"/proc/{(made.root / 'pid').read_text().strip()}").exists()
    assert "ended, because kbsync is ending" in daemon.log.read_text()
    assert daemon.events("work_abandoned") == []


PUBLISHING = """
from kbsync import hook
def publish(self, *_, **__):
    self.cancelled.wait()
    print("problem:", hook.run("echo told > told", folder=self.workspace.root, variables={}, keep=(), seconds=300))
    return []
it.Reconciler.sync = publish
"""


def test_what_is_published_in_the_second_half_of_the_grace_time_is_announced(
    made: TestWorkspace, listener: Listener, start: Callable[..., Running]
) -> None:
    """Whatever serves the model would otherwise keep the old version: nobody announces it again."""
    daemon = hanging(made, start, PUBLISHING, "grace: 6s\n")
    listener.until("STATUS", "pass of sky")
    assert daemon.end() == 0
    assert "problem: None" in daemon.log.read_text()
    assert (made.root / "told").read_text() == "told\n"


def test_a_database_that_hangs_keeps_neither_the_main_loop_nor_the_end_of_the_daemon(
    made: TestWorkspace, listener: Listener, start: Callable[..., Running]
) -> None:
    """A server that is stopped as it stands: it takes what is sent and answers nothing."""
    try:
        with postgres.restartable() as (server, _):
            server.create("ledger")
            config = made.root / "kbsync.yaml"
            config.write_text(f"{config.read_text()}ledger: {server.url('ledger')}\n")
            daemon = hanging(made, start, "it.NOTED = 0.2")
            listener.until("STATUS", "pass of sky")
            listener.until("STATUS", "idle")
            with _stopped(server):
                time.sleep(1)  # some beats would have been noted
                fed = len(listener.having("WATCHDOG"))
                listener.until("WATCHDOG", times=fed + 10)
                daemon.process.send_signal(signal.SIGHUP)
                listener.until("RELOADING")
                fed = len(listener.having("WATCHDOG"))
                listener.until("WATCHDOG", times=fed + 10)
                daemon.process.send_signal(signal.SIGTERM)
                assert daemon.process.wait(SOON) == 0
    except postgres.Unavailable as error:
        pytest.skip(str(error))


@contextmanager
def _stopped(server: postgres.Server) -> Iterator[None]:
    folder = Path(str(server.admin.query["host"]))
    first = int((folder / "data" / "postmaster.pid").read_text().split()[0])
    processes = [first, *children(first)]
    _signal(processes, signal.SIGSTOP)
    try:
        yield
    finally:
        _signal(processes, signal.SIGCONT)


def _signal(processes: Iterable[int], number: int) -> None:
    for process in processes:
        with suppress(ProcessLookupError):  # a backend may have ended by itself
            os.kill(process, number)


def _hears_nothing_more(listener: Listener) -> None:
    fed = len(listener.having("WATCHDOG"))
    end = time.monotonic() + QUIET
    while time.monotonic() < end:
        listener.read(0.1)
    assert len(listener.having("WATCHDOG")) == fed


def _problems(made: TestWorkspace) -> list[str]:
    with Ledger.open(f"sqlite:///{made.root / 'data' / 'ledger.db'}") as ledger, ledger.read() as db:
        return [entry.action for entry in db.audit_log()]


# Its parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_a_message_is_one_datagram_of_lines(tmp_path: Path, kind: str) -> None:
    name = f"kbsync-{os.getpid()}"
    bound, address = (f"\0{name}", f"@{name}") if kind == "abstract" else (str(tmp_path / name), str(tmp_path / name))
    listener = Listener(bound)
    Manager(address).say(READY="1", STATUS="two\nlines")
    assert listener.read(PATIENCE)
    assert listener.messages == [{"READY": "1", "STATUS": "two lines"}]
    listener.close()


def test_nobody_is_told_where_there_is_no_manager_or_it_does_not_listen(tmp_path: Path) -> None:
    Manager().say(READY="1")
    Manager(str(tmp_path / "nobody")).say(READY="1")


@pytest.mark.parametrize(
    ("environment", "watchdog"),
    [
        ({"WATCHDOG_USEC": "180000000"}, 180.0),
        ({"WATCHDOG_USEC": "180000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_environment_says_whether_anyone_watches_and_is_not_handed_on(
    environment: dict[str, str], watchdog: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NOTIFY_SOCKET": "/run/notify", **environment}.items():
        monkeypatch.setenv(name, value)
    assert Manager.from_environment() == Manager("/run/notify", watchdog)
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & os.environ.keys()


def test_work_says_what_it_does_and_for_how_long_it_was_silent() -> None:
    now = [0.0]
    work = Work(lambda: now[0])
    assert (work.words(), work.silent_for()) == ("", None)
    work.begin("pass of sky")
    now[0] = 5.0
    assert (work.words(), work.silent_for()) == ("pass of sky", 5.0)
    heard: list[tuple[str, int, int]] = []
    work.watching(lambda *said: heard.append(said))("targets", 12, 40)
    assert (work.words(), work.silent_for(), heard) == ("pass of sky: targets 12 of 40", 0.0, [("targets", 12, 40)])
    work.end()
    assert (work.words(), work.silent_for()) == ("", None)


# The unit file ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze (Debian package systemd) to check the unit"
)
def test_the_unit_file_is_one_that_systemd_understands(tmp_path: Path) -> None:
    """Verified as it is, with a program that exists in the place of the installed one."""
    program = tmp_path / "kbsync"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / "kbsync.service"
    unit.write_text((ROOT / "deploy" / "kbsync.service").read_text().replace("/opt/kbsync/bin/kbsync", str(program)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=PATIENCE
    )
    assert [line for line in done.stderr.splitlines() if "kbsync.service" in line] == []
