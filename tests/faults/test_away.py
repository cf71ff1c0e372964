"""A source is away for a day: nothing changes, people are told once, and one pass catches up when it is back."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from kbsync.reconcile import open_workspace
from tests.faults.aftermath import aftermath, committed
from tests.faults.amount import points
from tests.faults.test_clock import ending, turn
from tests.faults.test_writers import contents
from tests.faults.world import CHANGED, Child, Nursery, World, ask

STEPS = max(3, points(3, 24))
"""Passes in that day; three that fail are told of."""
STAYS = ("claim", "fact", "version", "applied", "head", "delta_fact")
"""Tables that a source which says nothing changes nothing in."""


def test_a_source_that_is_away_for_a_day_changes_nothing_and_is_told_of_once(nursery: Nursery, tmp_path: Path) -> None:
    """Every pass fails; that they do and that the facts are stale is one notice each, and `status` says it, too. When
    the source is back, one pass publishes what it says now, and the failures are told to be over; the p95 of a week has
    the day in it until that week is over, too."""
    world = nursery.world(tmp_path)
    before, was = committed(world), stays(world)
    policy = world.root / "policies" / "sky.yaml"
    policy.write_text(f"{policy.read_text()}freshness: {{target: 2h}}\n")
    feed = world.root / "sources" / "stars.csv"
    feed.unlink()
    with ending(nursery.daemon(world)) as daemon:
        for step in range(1, STEPS + 1):
            turn(nursery, daemon, timedelta(days=1) / STEPS)
            daemon.until(lambda step=step: len(daemon.said("run_finished")) >= step)
            ask(
                world, "gc", older_than=0, dry=True
            )  # in its turn, once the pass has ended: one that is due before is left out
            daemon.wait_a_little(0.5)
        assert {event["status"] for event in daemon.said("run_finished")} == {"failed"}
        assert stays(world) == was
        look(nursery, daemon)
        daemon.until(lambda: told(world) == ["failed", "stale"])
        found = status(nursery, world)
        assert [source["failures"] for source in found["sources"]] == [STEPS]
        [row] = found["freshness"]
        assert any("the source was last seen as it was 1d" in reason for reason in row["missed"]), row
        world.feed(CHANGED)
        turn(nursery, daemon, timedelta(hours=1))
        daemon.until(lambda: len(daemon.said("run_finished")) > STEPS)
        look(nursery, daemon)
        assert [event["status"] for event in daemon.said("run_finished")[STEPS:]] == ["done"]
        assert [event["version"] for event in daemon.said("version_published")] == [4]
        assert told(world) == ["failed", "recovered", "stale"]
        found = status(nursery, world)
        assert found["sources"] == []
        [[reason]] = [row["missed"] for row in found["freshness"]]
        assert reason.startswith("p95 of the last 7d is 1d")
        turn(nursery, daemon, timedelta(days=7))
        daemon.until(lambda: len(daemon.said("run_finished")) > STEPS + 1)
        look(nursery, daemon)
        daemon.until(lambda: told(world) == ["failed", "recovered", "recovered", "stale"])
        assert len(daemon.said("run_finished")) == STEPS + 2
    assert aftermath(world, before, fault="source away for a day", stage="idle") == "new"


def stays(world: World) -> list[str]:
    """What is in those tables."""
    return [line for line in contents(world) if line.startswith(tuple(f'INSERT INTO "{name}"' for name in STAYS))]


def told(world: World) -> list[str]:
    """The kind of every notice so far."""
    with open_workspace(world.root, user="test") as reconciler, reconciler.ledger.read() as db:
        return sorted(notice.kind for notice in db.notices(None))


def look(nursery: Nursery, daemon: Child) -> None:
    """A little more than a minute passes, without a jump: the daemon looks at freshness."""
    for _ in range(2):
        nursery.control.turn(seconds=40)
        daemon.wait_a_little(0.6)


def status(nursery: Nursery, world: World) -> dict[str, Any]:
    """`kbsync status` at the daemon's time."""
    command = [sys.executable, "-m", "kbsync", "status", "--json", "--workspace", str(world.root)]
    done = subprocess.run(command, env=nursery.control.environment(), capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found
