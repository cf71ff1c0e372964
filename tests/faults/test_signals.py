"""SIGTERM in every stage of a daemon's pass."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults.aftermath import aftermath, committed
from tests.faults.amount import points
from tests.faults.world import CHANGED, Child, Nursery, World

STAGES = ("fetch", "record", "edit", "probe", "publish")


def held(nursery: Nursery, folder: Path, stage: str, grace: str) -> tuple[World, Child]:
    """A world, and its daemon, whose first pass waits in the stage."""
    world = nursery.world(folder)
    config = world.root / "kbsync.yaml"
    config.write_text(f"{config.read_text()}grace: {grace}\n")
    overdue(world)
    world.feed(CHANGED)
    nursery.hold(stage)
    daemon = nursery.daemon(world)
    daemon.until(lambda: nursery.control.get("held"))
    return world, daemon


def overdue(world: World) -> None:
    """The policy's pass is due at the next start."""
    policy = world.root / "policies" / "sky.yaml"
    policy.write_text(policy.read_text().replace("policy: sky", "policy: sky2"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_lets_the_work_end_within_the_grace_time(nursery: Nursery, tmp_path: Path, stage: str) -> None:
    """What was being made is published, and the daemon ends with 0."""
    world, daemon = held(nursery, tmp_path, stage, "20s")
    before = committed(world)
    daemon.signal(signal.SIGTERM)
    nursery.go_on()
    assert daemon.wait() == 0
    assert [event["status"] for event in daemon.said("run_finished")] == ["done"]
    assert aftermath(world, before, fault="SIGTERM, work ends", stage=stage) == "new"


@pytest.mark.parametrize("stage", ["fetch", "edit"])
def test_work_that_takes_longer_than_half_the_grace_time_is_put_back(
    nursery: Nursery, tmp_path: Path, stage: str
) -> None:
    """The daemon ends with 0 all the same; the next one begins the pass again at once."""
    world, daemon = held(nursery, tmp_path, stage, "2s")
    before = committed(world)
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    nursery.go_on()
    assert [event["status"] for event in daemon.said("run_finished")] == ["cancelled"]
    again = nursery.daemon(world)
    again.until(lambda: again.said("run_finished"))
    assert again.said("version_published")[0]["version"] == 4
    again.signal(signal.SIGTERM)
    assert again.wait() == 0
    assert aftermath(world, before, fault="SIGTERM, put back", stage=stage) == "new"


@pytest.mark.parametrize("stage", STAGES[: points(2, len(STAGES))])
def test_a_second_signal_ends_the_daemon_at_once(nursery: Nursery, tmp_path: Path, stage: str) -> None:
    """As a kill would: the status says which signal, nothing is published."""
    world, daemon = held(nursery, tmp_path, stage, "60s")
    before = committed(world)
    daemon.signal(signal.SIGTERM)
    while daemon.wait_a_little():
        daemon.signal(signal.SIGINT)
    assert daemon.wait() == 128 + signal.SIGINT
    nursery.go_on()
    assert aftermath(world, before, fault="second signal", stage=stage) == "old"
