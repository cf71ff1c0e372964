"""kill -9 anywhere: at the n-th call that opens or changes a file, in every command that writes."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from tests.faults.aftermath import aftermath, committed
from tests.faults.amount import points
from tests.faults.world import CHANGED, Command, Nursery, World

COMMANDS: dict[str, Command] = {
    "sync": ("sync", {}),
    "rollback": ("rollback", {"to": 2}),
    "revert": ("revert", {"key": ["constellation", "stars:rigel"]}),
    "gc": ("gc", {"older_than": 0.0}),
}
_CALLS: dict[tuple[str, str], list[int]] = {}
"""(command, stage) -> the numbers of the calls of that stage, by a run in which nothing goes wrong."""


@pytest.fixture
def calls(nursery: Nursery, tmp_path: Path) -> dict[tuple[str, str], list[int]]:
    """The calls that each command makes."""
    for name, command in COMMANDS.items():
        if any(known == name for known, _ in _CALLS):
            continue
        world = ready(nursery, tmp_path / f"whole-{name}", name)
        assert nursery.start(world, command).wait() == 0
        _CALLS.update({(name, stage): numbers for stage, numbers in nursery.stages().items()})
    return _CALLS


def ready(nursery: Nursery, folder: Path, command: str) -> World:
    """A world in which the command has something to do."""
    folder.mkdir(exist_ok=True)
    world = nursery.world(folder)
    world.feed(CHANGED | {"Rigel": "Orion"})
    if command == "gc":
        (world.workspace.deltas / f"{'0' * 64}.safetensors").write_bytes(b"nobody's")
    return world


@pytest.mark.parametrize("point", range(points(8)))
def test_kill_9_at_any_point_loses_nothing_that_was_committed(
    nursery: Nursery, calls: dict[tuple[str, str], list[int]], tmp_path: Path, point: int
) -> None:
    """The points go round the stages of the commands; within a stage they are drawn, the same ones each time."""
    places = sorted(calls)
    command, stage = places[point % len(places)]
    at = random.Random(point).choice(calls[command, stage])
    world = ready(nursery, tmp_path, command)
    before = committed(world)
    nursery.control.watch(world.root)
    nursery.control.kill(at)
    assert nursery.start(world, COMMANDS[command]).wait() == -signal.SIGKILL, f"{command}, {stage}, call {at}"
    nursery.control.stop()
    aftermath(world, before, fault=f"kill -9 in {command}", stage=stage)
