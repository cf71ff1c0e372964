"""The time of day jumps, the machine sleeps, a night has 23 or 25 hours: one catch-up pass, no version twice, and
passes go on coming."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from kbsync.policy import Schedule
from kbsync.schedule import next_due
from tests.faults.aftermath import aftermath, committed
from tests.faults.amount import points
from tests.faults.test_signals import STAGES, overdue
from tests.faults.world import CHANGED, Child, Nursery, World

HOUR, HALF = timedelta(hours=1), timedelta(minutes=30)
JUMPS = {
    "asleep for 3 periods": 3 * HOUR,
    "1 h back": -HOUR,
    "a year ahead": timedelta(days=365),
    "1 h ahead": HOUR,
    "a year back": -timedelta(days=365),
}
PLACES = ("idle", *STAGES)
CASES = [(jump, PLACES[(turn + n) % len(PLACES)]) for turn in range(len(PLACES)) for n, jump in enumerate(JUMPS)]
"""Each jump in each place; the first few have each jump once."""
QUIET = 1.0
"""Seconds in which a daemon that has nothing to do shows it: five rounds of its main loop."""


@contextmanager
def ending(daemon: Child) -> Iterator[Child]:
    """A daemon that lives until the end of the block, and then ends with 0."""
    yield daemon
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert not daemon.said("job_error"), daemon.log.read_text()


def passes(daemon: Child) -> int:
    """How many passes it has finished; all of them went well."""
    ended = [event["status"] for event in daemon.said("run_finished")]
    assert set(ended) <= {"done"}, daemon.log.read_text()
    return len(ended)


def settled(daemon: Child) -> int:
    """How many they are once no more come."""
    while True:
        before = passes(daemon)
        time.sleep(QUIET)
        if passes(daemon) == before:
            return before


def schedule(world: World, text: str) -> None:
    """When the policy of the world is due."""
    policy = world.root / "policies" / "sky.yaml"
    policy.write_text(policy.read_text().replace("{every: 1h}", text))


def turn(nursery: Nursery, daemon: Child, by: timedelta) -> None:
    """Set the clock, and wait until the daemon has noticed."""
    noticed = len(daemon.said("clock_moved"))
    nursery.control.turn(seconds=by.total_seconds())
    daemon.until(lambda: len(daemon.said("clock_moved")) > noticed)


@pytest.mark.parametrize(("jump", "place"), CASES[: points(3, len(CASES))])
def test_a_clock_that_jumps_costs_one_catch_up_pass_at_most(
    nursery: Nursery, tmp_path: Path, jump: str, place: str
) -> None:
    """However far it jumps ahead, and not one where it is put back; what the feed said is published once. Later the
    next pass comes. The daemon is idle, or in a stage of a pass."""
    world = nursery.world(tmp_path)
    before = committed(world)
    if place != "idle":
        overdue(world)
        world.feed(CHANGED)
        nursery.hold(place)
    with ending(nursery.daemon(world)) as daemon:
        if place == "idle":
            world.feed(CHANGED)
        else:
            daemon.until(lambda: nursery.control.get("held"))
        turn(nursery, daemon, JUMPS[jump])
        nursery.go_on()
        ahead = JUMPS[jump] > timedelta(0)
        daemon.until(lambda: passes(daemon) >= (ahead or place != "idle"))
        caught_up = settled(daemon)
        assert caught_up in ({int(ahead)} if place == "idle" else {1, 1 + ahead})
        turn(nursery, daemon, 2 * HOUR)  # a clock that was put back by one hour is then an hour on
        daemon.until(lambda: passes(daemon) > caught_up)
        assert settled(daemon) == caught_up + 1
        assert [event["version"] for event in daemon.said("version_published")] == [4]
    assert aftermath(world, before, fault=f"clock {jump}", stage=place) == "new"


def test_passes_go_on_coming_however_the_clock_wanders(nursery: Nursery, tmp_path: Path) -> None:
    """Every two seconds by the clock that nobody sets, and one more for each jump ahead."""
    world = nursery.world(tmp_path)
    before = committed(world)
    schedule(world, "{every: 2s}")
    with ending(nursery.daemon(world)) as daemon:
        began = time.monotonic()
        for jump in list(JUMPS.values())[::-1][: points(2, len(JUMPS))]:
            turn(nursery, daemon, jump)
            due = passes(daemon) + 2
            daemon.until(lambda due=due: passes(daemon) >= due)
        most = (time.monotonic() - began) / 2 + len(daemon.said("clock_moved")) + 1
        assert passes(daemon) <= most
    assert aftermath(world, before, fault="clock wanders", stage="idle") == "old"


NIGHTS = {
    "Europe/Berlin": ["2026-03-29", "2026-10-25"],
    "America/New_York": ["2026-03-08", "2026-11-01"],
    "America/Santiago": ["2026-09-06", "2026-04-05"],  # at midnight
}
CRONS = {"30 2 * * *": ([30], [2]), "0 * * * *": ([0], range(24)), "*/15 1-3 * * *": ([0, 15, 30, 45], [1, 2, 3])}
"""Cron expression -> its minutes and its hours."""


@pytest.mark.parametrize(
    ("zone", "night", "cron"),
    [(zone, night, cron) for zone, nights in NIGHTS.items() for night, cron in product(nights, CRONS)],
)
def test_each_due_time_of_a_night_that_changes_the_clock_comes_once(zone: str, night: str, cron: str) -> None:
    """A time that the night has twice is two times; one that it skips comes as much later as the clock is put ahead.
    Minute by minute, another implementation."""
    place, start = ZoneInfo(zone), datetime.fromisoformat(night) - timedelta(hours=12)
    minutes, hours = CRONS[cron]
    expected: set[datetime] = set()
    for minute in range(36 * 60):
        wall = start + timedelta(minutes=minute)
        if wall.minute in minutes and wall.hour in hours:
            both = {wall.replace(tzinfo=place, fold=fold).astimezone(UTC) for fold in (0, 1)}
            there = {at for at in both if at.astimezone(place).replace(tzinfo=None, fold=0) == wall}
            expected |= there or {wall.replace(tzinfo=place).astimezone(UTC)}
    found: list[datetime] = []
    at, end = (start - timedelta(minutes=1)).replace(tzinfo=place).astimezone(UTC), max(expected)
    while at < end:
        at = next_due(Schedule(cron=cron, timezone=zone), at, at)
        found.append(at)
    assert found == sorted(expected)


@pytest.mark.parametrize(
    ("season", "night", "due"),
    [
        ("spring", datetime(2027, 3, 28, tzinfo=UTC), ["01:30"]),
        ("autumn", datetime(2027, 10, 31, tzinfo=UTC), ["00:30", "01:30"]),
    ],
)
def test_a_daemon_goes_through_the_night_that_changes_the_clock(
    nursery: Nursery, tmp_path: Path, season: str, night: datetime, due: list[str]
) -> None:
    """02:30 in Berlin: in spring it comes an hour later, in autumn twice; what changed is published once."""
    world = nursery.world(tmp_path)
    before = committed(world)
    schedule(world, '{cron: "30 2 * * *", timezone: Europe/Berlin}')
    nursery.control.turn(seconds=(night - timedelta(hours=3) - nursery.control.now).total_seconds())
    with ending(nursery.daemon(world)) as daemon:
        daemon.until(lambda: passes(daemon) == 1)  # of the months before
        world.feed(CHANGED)
        came: list[str] = []
        for _ in range(14):
            known = passes(daemon)
            turn(nursery, daemon, HALF)
            now = nursery.control.now
            step = f"{now - (now - night) % HALF:%H:%M}"
            if step in due:
                daemon.until(lambda known=known: passes(daemon) > known)
            came += [step] * (passes(daemon) - known)
        time.sleep(QUIET)
        assert came == due
        assert passes(daemon) == 1 + len(due)
        assert [event["version"] for event in daemon.said("version_published")] == [4]
    assert aftermath(world, before, fault="night that changes the clock", stage=season) == "new"
