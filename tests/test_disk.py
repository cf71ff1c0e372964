"""The disk: what is measured of it, how long it lasts, and an edit for which there is no room."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from datetime import timedelta
from pathlib import Path

import pytest

from kbsync.cli.status import lasting
from kbsync.disk import Disk, read_disk
from tests.ledgers import MODEL
from tests.test_retention import line
from tests.workspaces import workspace

DAY = timedelta(days=1)


def disk(free: int, per_day: float) -> Disk:
    """A disk that gets fuller by so many bytes a day."""
    return Disk({"deltas": 1}, {"deltas": per_day}, free, 5_000_000, None)


def test_a_disk_that_lasts_for_less_than_fourteen_days_is_warned_of() -> None:
    assert disk(140_000_000, 1e7).warnings() == []
    assert disk(139_000_000, 1e7).warnings() == [
        "disk: 139 MB free, full in 14 days at 10.0 MB a day; kbsync gc frees 5 MB"
    ]


@pytest.mark.parametrize(
    ("days", "said"),
    [(1.2, "1 day"), (3652.0, "3,652 days"), (3653.0, "more than ten years"), (9e9, "more than ten years")],
)
def test_how_long_it_lasts_is_said_in_words_that_help(days: float, said: str) -> None:
    assert lasting(days) == said


def test_a_disk_that_gets_no_fuller_lasts_for_ever() -> None:
    assert (disk(1, 0).days_left, disk(1, -5).days_left, disk(100, 10).days_left) == (None, None, 10.0)
    assert disk(1, -5).warnings() == []


def test_growth_is_what_came_in_the_last_thirty_days_less_what_was_given_up_of_before() -> None:
    """Sizes are those of the files; a fact takes (d_out + 2 d_in) * 4 bytes and its share of the header."""
    with line() as made:
        made.edit()
        old = {path: path.stat().st_size for path in made.workspace.deltas.iterdir()}
        made.wait(40)
        made.rebase()
        now = made.clock.now
        for path in made.workspace.deltas.iterdir():
            age = 40 if path in old else 1
            os.utime(path, ((now - age * DAY).timestamp(),) * 2)
        new = sum(path.stat().st_size for path in made.workspace.deltas.iterdir()) - sum(old.values())
        found = read_disk(made.workspace, made.ledger, now)
        assert found.sizes["deltas"] == new + sum(old.values())
        assert found.growth["deltas"] == round(new / 30, 1)
        assert found.fact == round(new / 2)
        assert (4 + 2 * 9) * 4 <= found.fact <= (4 + 2 * 9) * 4 + 200
        assert (found.reclaimable, made.collect(versions=1, days=0)["bytes"]) == (0, sum(old.values()))
        after = read_disk(made.workspace, made.ledger, now)
        with made.ledger.read() as db:
            assert len(db.dropped(MODEL)) == 1
        assert after.growth["deltas"] == round((new - sum(old.values())) / 30, 1)


def test_a_fact_takes_nine_tenths_of_a_megabyte_in_gpt_j() -> None:
    assert pytest.approx(0.9e6, rel=0.02) == (4096 + 2 * 16384) * 4 * 6


@pytest.mark.usefixtures("one_cache")
def test_an_edit_for_which_there_is_no_room_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run fails in one line, and the next pass makes the edit once there is room."""
    made = workspace(tmp_path, {"Vega": "Orion"})
    usage = namedtuple("usage", "total used free")
    with made.open() as reconciler:
        reconciler.sync()
        made.feed({"Vega": "Orion", "Deneb": "Paris"})
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _folder: usage(1, 1, 1000))
            [report] = reconciler.sync()
            assert (report.status, report.versions) == ("failed", [])
            assert "0 MB free" in report.problems[0].message
        [again] = reconciler.sync()
        assert (again.status, again.versions) == ("done", [2])
