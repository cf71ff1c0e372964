"""Others who want to write: a second daemon, many commands at once, a process that keeps the ledger to itself."""

from __future__ import annotations

import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from kbsync.reconcile import open_workspace
from tests.faults.aftermath import aftermath, committed
from tests.faults.amount import points
from tests.faults.test_clock import ending, passes, schedule
from tests.faults.test_disk import living, problem_of_a_pass
from tests.faults.test_signals import STAGES, overdue
from tests.faults.world import CHANGED, Command, Nursery, World, ask

WRITERS = points(6, 24)
KEPT = "another process has been writing for 5 s"


@contextmanager
def kept(world: World) -> Iterator[None]:
    """Another process (this one) has the ledger's write lock for the time of the block."""
    with closing(sqlite3.connect(world.workspace.data / "ledger.db", isolation_level=None, timeout=20)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def contents(world: World) -> list[str]:
    """All that is in the ledger."""
    with closing(sqlite3.connect(world.workspace.data / "ledger.db")) as connection:
        return list(connection.iterdump())


@pytest.mark.parametrize("stage", STAGES[: points(2, len(STAGES))])
def test_a_second_daemon_is_refused_and_the_first_is_unharmed(nursery: Nursery, tmp_path: Path, stage: str) -> None:
    """While the first one is in a stage of a pass: the second ends with 1 and one line that names the process, the
    first publishes and takes commands."""
    world = nursery.world(tmp_path)
    before = committed(world)
    overdue(world)
    world.feed(CHANGED)
    nursery.hold(stage)
    with ending(nursery.daemon(world)) as first:
        first.until(lambda: nursery.control.get("held"))
        second = nursery.start_daemon(world)
        assert second.wait() == 1
        [refused] = second.said("error")
        assert f"in use by process {first.pid}" in refused["error"]["message"]
        nursery.go_on()
        first.until(lambda: passes(first) == 1)
        assert ask(world, "promote", version=2, alias="canary")["version"] == 2
    assert aftermath(world, before, fault="second daemon", stage=stage) == "new"


def test_many_commands_at_once_take_effect_once_each_while_passes_run(nursery: Nursery, tmp_path: Path) -> None:
    """Through the control socket, each from a process of its own; what the feed said is one version."""
    world = nursery.world(tmp_path)
    before = committed(world)
    schedule(world, "{every: 1s}")
    with ending(nursery.daemon(world)) as daemon:
        world.feed(CHANGED)
        writers = [nursery.start(world, *commands(number)) for number in range(WRITERS)]
        statuses = [writer.wait() for writer in writers]
        assert statuses == [0] * WRITERS, [writer.said("error") for writer in writers]
        ran = passes(daemon)
        daemon.until(lambda: passes(daemon) > ran)
        assert [event["version"] for event in daemon.said("version_published")] == [4]
    with open_workspace(world.root, user="test") as reconciler, reconciler.ledger.read() as db:
        said = Counter((row.action, row.detail.get("reason")) for row in db.audit_log(None))
    for number in range(WRITERS):
        assert [said[action, f"writer {number}"] for action in ("rule", "promote", "demote")] == [1, 1, 1]
    assert aftermath(world, before, fault="many commands at once", stage="passes every second") == "new"


def commands(number: int) -> list[Command]:
    """What one writer does."""
    alias, reason = f"writer-{number}", f"writer {number}"
    return [
        ("rule", {"subject": "Betelgeuse", "relation": "constellation", "object": "Orion", "reason": reason}),
        ("promote", {"version": number % 3 + 1, "alias": alias, "reason": reason}),
        ("sync", {}),
        ("demote", {"alias": alias, "reason": reason}),
    ]


def test_a_command_waits_three_seconds_for_whoever_writes(nursery: Nursery, tmp_path: Path) -> None:
    world = nursery.world(tmp_path)
    before = committed(world)
    world.feed(CHANGED)
    with kept(world):
        child = nursery.start(world, ("sync", {}))
        assert child.wait_a_little(3.0)
    assert child.wait() == 0
    assert aftermath(world, before, fault="ledger kept for 3 s", stage="start") == "new"


@pytest.mark.parametrize("command", [("rollback", {"to": 2}), ("sync", {})][: points(1, 2)], ids=lambda one: one[0])
def test_a_command_gives_up_after_five_seconds_and_changes_nothing(
    nursery: Nursery, tmp_path: Path, command: Command
) -> None:
    """One line, also where a daemon that was killed has left its socket; given again, it works."""
    world = nursery.world(tmp_path)
    before = committed(world)
    killed = nursery.daemon(world)
    killed.signal(signal.SIGKILL)
    killed.wait()
    world.feed(CHANGED)
    was = contents(world)
    with kept(world):
        refused = nursery.start(world, command)
        assert refused.wait() == 1
        assert contents(world) == was
    [error] = refused.said("error")
    assert KEPT in error["error"]["message"]
    assert error["error"]["hint"] == "try again"
    assert nursery.start(world, command).wait() == 0
    assert aftermath(world, before, fault="ledger kept for more than 5 s", stage=f"start of {command[0]}") == "new"


@pytest.mark.parametrize("stage", ("publish", "record", "edit", "probe")[: points(1, 4)])
def test_a_ledger_that_is_kept_for_longer_fails_the_daemons_pass(nursery: Nursery, tmp_path: Path, stage: str) -> None:
    """From a stage on: the pass has failed in one line, nothing is half-applied, and the same daemon does it again."""
    world = nursery.world(tmp_path)
    before = committed(world)
    with living(nursery, world) as daemon:
        nursery.hold(stage)
        asking = nursery.start(world, ("sync", {}))
        daemon.until(lambda: nursery.control.get("held"))
        with kept(world):
            nursery.go_on()
            began = time.monotonic()
            asking.wait()
        assert time.monotonic() - began >= 5
        said = asking.log.read_text()
        assert KEPT in said
        assert problem_of_a_pass(world) == ""
    assert aftermath(world, before, fault="ledger kept for more than 5 s", stage=stage) == "new"
