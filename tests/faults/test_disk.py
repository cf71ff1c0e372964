"""A disk that is full, breaks, or cannot be written: the pass fails in one line, nothing is published, the daemon lives
on, and the next pass does it."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kbsync.errors import KbsyncError
from tests.faults.aftermath import aftermath, committed
from tests.faults.amount import points
from tests.faults.disks import disk, full, read_only
from tests.faults.shim import CHANGES, SYNC, WRITE
from tests.faults.world import CHANGED, Child, Nursery, World, ask

FOREVER = 1 << 40
NOBODY = 65534
LEFT = (0, 4096, 12288, 32768, 65536, 98304, 131072, 196608)
"""Bytes that are left on the disk: for nothing, for a part of what a pass writes, for nearly all of it."""
_CALLS: dict[int, int] = {}
"""Kinds of calls -> how many of them a pass makes."""


@contextmanager
def living(nursery: Nursery, world: World) -> Iterator[Child]:
    """A daemon with nothing to do, whose feed then changes; in the end it has to be alive and to end with 0."""
    daemon = nursery.daemon(world)
    world.feed(CHANGED)
    yield daemon
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert not [line for line in daemon.log.read_text().splitlines() if line.startswith("Traceback")]


def problem_of_a_pass(world: World) -> str:
    """What is wrong with a pass that the daemon is asked for, in one line; empty where it went well."""
    try:
        [report] = ask(world, "sync")["reports"]
    except KbsyncError as error:
        found = error.message
    else:
        found = report["problems"][0]["message"] if report["problems"] else ""
        assert bool(found) == (report["status"] == "failed"), report
    assert len(found.splitlines()) <= 1
    return found


def goes_on(world: World) -> None:
    """The trouble is over: the same daemon does what is left."""
    assert problem_of_a_pass(world) == ""


def calls(nursery: Nursery, folder: Path, kinds: int) -> int:
    """How many calls of these kinds a pass of a daemon makes."""
    if kinds not in _CALLS:
        folder.mkdir()
        world = nursery.world(folder)
        with living(nursery, world):
            nursery.control.watch(world.root, kinds)
            assert problem_of_a_pass(world) == ""
            _CALLS[kinds] = nursery.control.get("count")
    return _CALLS[kinds]


@pytest.mark.parametrize("point", range(points(5)))
@pytest.mark.parametrize(
    ("name", "kinds", "error"),
    [("EIO on fsync", SYNC, errno.EIO), ("ENOSPC on write", WRITE, errno.ENOSPC), ("EROFS", CHANGES, errno.EROFS)],
    ids=["fsync", "write", "any"],
)
def test_a_call_that_fails_fails_the_pass_and_the_next_one_is_fine(
    nursery: Nursery, tmp_path: Path, name: str, kinds: int, error: int, point: int
) -> None:
    """Drawn over all such calls of a pass; every second time all calls after it fail, too. No file is synced again
    after a sync of it has failed."""
    draw = random.Random(f"{name} {point}")
    at, hits = calls(nursery, tmp_path / "whole", kinds) + 1, 0
    while not hits:  # what else the daemon did meanwhile was counted, too: a pass may end before that point
        at = draw.randint(1, at - 1)
        folder = tmp_path / str(at)
        folder.mkdir()
        world = nursery.world(folder)
        before = committed(world)
        with living(nursery, world):
            nursery.control.watch(world.root)
            nursery.control.fail(at, error, kinds=kinds, times=FOREVER if point % 2 else 1)
            problem_of_a_pass(world)
            hit, again, hits = nursery.control.hit, nursery.control.get("again"), nursery.control.get("hits")
            nursery.control.stop()
            goes_on(world)
    stayed = " (it stays so)" if point % 2 else ""
    aftermath(world, before, fault=f"{name}{stayed}", stage=hit.split()[0])
    assert again == 0, hit


@pytest.mark.parametrize("left", LEFT[: points(3, len(LEFT))])
def test_a_disk_that_is_full_fails_the_pass_in_one_line(nursery: Nursery, tmp_path: Path, left: int) -> None:
    """Ledger, deltas and manifests lie on a real disk of 8 MiB."""
    world = nursery.world(tmp_path)
    before = committed(world)
    with disk(world.root / "data", mebibytes=8):
        with living(nursery, world) as daemon:
            with full(world.root / "data", leaving=left):
                said = problem_of_a_pass(world)
            goes_on(world)
        assert "full" in said or "No space left" in said or daemon.said("version_published")
        aftermath(world, before, fault="disk full", stage=f"{left // 1024} KiB left")


@pytest.mark.parametrize("left", LEFT[: points(2, len(LEFT))])
def test_a_full_disk_of_the_ledger_alone_fails_the_pass(nursery: Nursery, tmp_path: Path, left: int) -> None:
    """Deltas and manifests could be written: nothing is published all the same."""
    world = nursery.world(tmp_path)
    (world.root / "ledger").mkdir()
    (world.root / "data" / "ledger.db").rename(world.root / "ledger" / "ledger.db")
    config = world.root / "kbsync.yaml"
    config.write_text(f"{config.read_text()}ledger: sqlite:///{world.root}/ledger/ledger.db\n")
    before = committed(world)
    with disk(world.root / "ledger", mebibytes=8):
        with living(nursery, world) as daemon:
            with full(world.root / "ledger", leaving=left):
                said = problem_of_a_pass(world)
            goes_on(world)
        assert "full" in said or daemon.said("version_published")
        aftermath(world, before, fault="disk of the ledger full", stage=f"{left // 1024} KiB left")


@pytest.mark.parametrize("folder", ["deltas/sha256", "versions", "data"])
def test_a_folder_that_turned_read_only_is_named(nursery: Nursery, tmp_path: Path, folder: str) -> None:
    world = nursery.world(tmp_path)
    place = world.root / "data" if folder == "data" else world.root / "data" / folder
    before = committed(world)
    with living(nursery, world) as daemon:
        with read_only(place):
            said = problem_of_a_pass(world)
        goes_on(world)
    assert said, daemon.log.read_text()
    assert str(place) in said
    aftermath(world, before, fault="read-only folder", stage=folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may run kbsync as another user; ends in a run as root")
@pytest.mark.parametrize("folder", ["deltas/sha256", "versions/{model}", "ledger.db"])
def test_what_belongs_to_somebody_else_is_named(nursery: Nursery, open_folder: Path, folder: str) -> None:
    """kbsync runs as a user who may read the workspace and write all of it but one place."""
    world = nursery.world(open_folder)
    before = committed(world)
    world.feed(CHANGED)
    for path in (world.root, *world.root.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    place = world.root / "data" / folder.format(model=next((world.root / "data" / "versions").iterdir()).name)
    os.chown(place, 0, 0)
    place.chmod(0o755 if place.is_dir() else 0o644)
    refused = nursery.start(world, ("sync", {}), user=NOBODY)
    refused.wait()
    said = json.dumps([*refused.said("error"), *refused.said("result")])
    assert str(place) in said, refused.log.read_text()
    assert "Permission denied" in said or "readonly" in said or "unable to open" in said
    os.chown(place, NOBODY, NOBODY)
    assert nursery.start(world, ("sync", {}), user=NOBODY).wait() == 0
    aftermath(world, before, fault="no permission", stage=folder)
