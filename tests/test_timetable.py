"""The daemon's timetable, with passes that last as long as a test wants."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from kbsync.catalog import Catalog, load_catalog
from kbsync.config import Workspace
from kbsync.daemon.timetable import Planned, Timetable
from kbsync.ledger import Ledger
from tests.daemons import PATIENCE
from tests.workspaces import workspace


class Passes:
    """A timetable of the policy sky, hourly, whose passes get their turn and end when they are told to."""

    def __init__(self, catalog: Catalog, ledger: Ledger) -> None:
        self.catalog, self.ledger = catalog, ledger
        self.told: list[str] = []
        self.began, self.ended = 0, 0
        self._one = threading.Lock()
        self.turn, self.may_end = threading.Event(), threading.Event()
        self.timetable = Timetable(
            ledger, self._pass, lambda _chore: None, lambda: None, lambda kind, *_: self.told.append(kind)
        )

    def _pass(self, name: str) -> None:
        self.began += 1
        self.turn.wait(PATIENCE)
        with self._one:
            self.timetable.begun(name)
            self.may_end.wait(PATIENCE)
            self.ended += 1

    def due(self) -> None:
        """The next pass is due now, and the scheduler has found that."""
        self.timetable.look_ahead("sky")
        planned, now = self.timetable.plan(self.catalog.policies)["sky"], datetime.now(UTC)
        self.timetable.set_passes({"sky": Planned(planned.times, now, noted=True)})
        until(lambda: self._due() > now)
        time.sleep(0.3)  # it tells after it has looked for the next time

    def _due(self) -> datetime:
        self.timetable.look_ahead("sky")
        return self.timetable.due["sky"]


@pytest.fixture
def passes(tmp_path: Path) -> Iterator[Passes]:
    """The first one waits for its turn."""
    workspace_ = Workspace.load(workspace(tmp_path, {"Vega": "Orion"}).root)
    with Ledger.open(workspace_.ledger_url) as ledger:
        found = Passes(load_catalog(workspace_), ledger)
        found.timetable.set_passes(found.timetable.plan(found.catalog.policies))
        found.timetable.start()
        until(lambda: found.began == 1)
        yield found
        found.turn.set()
        found.may_end.set()
        found.timetable.stop()
        until(lambda: found.ended == found.began)


def until(condition: object) -> None:
    """Wait for it."""
    assert callable(condition)
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_pass_that_is_due_while_the_last_one_runs_follows_it_at_once(passes: Passes) -> None:
    """It does not wait for the next hour, and no error is told."""
    passes.turn.set()
    until(lambda: not passes.timetable._waiting)
    passes.due()
    until(lambda: passes.began == 2)
    passes.due()
    passes.due()
    assert passes.ended == 0
    passes.may_end.set()
    until(lambda: passes.ended >= 2)
    time.sleep(1.5)
    assert (passes.began, passes.told) == (2, [])


def test_a_pass_that_is_due_while_it_waits_for_its_turn_is_one_pass(passes: Passes) -> None:
    passes.due()
    passes.turn.set()
    passes.may_end.set()
    until(lambda: passes.ended == 1)
    time.sleep(1.5)
    assert (passes.began, passes.told) == (1, [])


def test_a_pass_that_was_begun_since_the_passes_were_planned_is_not_begun_twice(passes: Passes) -> None:
    """The scheduler has given it to a thread, which has done nothing yet."""
    planned = passes.timetable.plan(passes.catalog.policies)["sky"]
    passes.timetable.set_passes({"sky": Planned(planned.times, datetime.now(UTC), noted=True)})
    passes.turn.set()
    passes.may_end.set()
    until(lambda: passes.ended == 1)
    time.sleep(1.5)
    assert (passes.began, passes.told) == (1, [])
    assert passes.timetable.due["sky"] > datetime.now(UTC) + timedelta(minutes=50)


def test_a_clock_that_jumps_does_not_begin_a_pass_again_that_has_failed(passes: Passes) -> None:
    """As a start and SIGHUP do."""
    passes.turn.set()
    passes.may_end.set()
    until(lambda: passes.ended == 1)
    with passes.ledger.write() as db:
        run = db.start_run("sky", model=None, trigger="schedule", user="daemon")
        db.set_schedule_state(replace(db.schedule_state("sky"), last_started=db.now))
        db.finish_run(run, "failed", "the source is away")
    hence = {
        anew: passes.timetable.plan(passes.catalog.policies, anew=anew)["sky"].first - datetime.now(UTC)
        for anew in (True, False)
    }
    assert hence[True] <= timedelta(0)
    assert hence[False] > timedelta(minutes=50)


def test_a_policy_whose_pass_is_under_way_is_not_due(passes: Passes) -> None:
    """As a clock that jumps, or SIGHUP, finds it, before the ledger knows of that pass."""
    first = passes.timetable.plan(passes.catalog.policies)["sky"].first
    assert first > datetime.now(UTC) + timedelta(minutes=50)
