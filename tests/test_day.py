"""A simulated day: what is measured is never less than what is true, and too much by one interval at most."""

from __future__ import annotations

from datetime import datetime
from itertools import pairwise

import pytest

from tests.day import EVERY, Answered, Day, simulate

HOUR = 3600.0


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> Day:
    """The day of seed 1."""
    return simulate(tmp_path_factory.mktemp("day"))


def interval(day: Day, one: Answered) -> float:
    """Seconds between the two accepted answers of the source that the change happened between."""
    asked: list[datetime] = day.asked[one.happening.source]
    [length] = [
        (after - before).total_seconds() for before, after in pairwise(asked) if before <= one.happening.at < after
    ]
    return length


def test_the_day_has_all_that_delays_a_change(day: Day) -> None:
    """An outage of four polls, a held run, changes that others overtake; most arrive."""
    assert (day.failed, day.held) == (4, True)
    assert len(day.answered) > 80
    assert 0 < day.overtaken < 20
    assert all(row.waiting == 0 for row in day.rows)


def test_each_change_is_measured_as_old_as_it_is_or_older_by_one_interval_of_accepted_answers_at_most(day: Day) -> None:
    for one in day.answered:
        assert one.true <= one.measured <= one.true + interval(day, one)


@pytest.mark.parametrize("source", EVERY)
def test_quantiles_are_upper_bounds_of_the_true_ones_that_are_not_wide_of_the_mark(day: Day, source: str) -> None:
    row, (p50, p95) = day.row(source), day.quantiles(source)
    assert row.p50 is not None
    assert row.p95 is not None
    assert len(row.seconds) == len(day.of(source))
    widest = max(interval(day, one) for one in day.of(source))
    assert p50 <= row.p50 <= p50 + widest
    assert p95 <= row.p95 <= p95 + widest


def test_confirmation_outage_and_approval_are_in_the_measure(day: Day) -> None:
    stars, capitals = day.row("stars"), day.row("capitals")
    assert stars.seconds[0] >= HOUR, "said twice, an hour apart"
    assert stars.seconds[-1] >= 5 * HOUR, "down from 10 to 13"
    assert capitals.seconds[-1] >= 7.5 * HOUR, "changed after 6, held at noon, approved at half past one"
