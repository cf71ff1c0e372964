"""The spacing plan of rechecks: when a fact is asked again, when it is given up, what is still answered at an age."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbsync.facts import Applied, EditRequest, FactKey
from kbsync.recheck import FactCheck, Recheck, Standing, misses

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)
KEY = FactKey("constellation", "stars:vega")


def check(
    answered: bool = True, *, stage: int = 1, due: datetime = NOW, served: datetime = NOW, **more: str
) -> FactCheck:
    """A check of Vega's fact."""
    values = {"request": "r"} | more
    return FactCheck(KEY, values["request"], 1, stage, answered, served, due, NOW)


def standing(name: str = "vega", *, served: datetime = NOW, last: FactCheck | None = None, misses: int = 0) -> Standing:
    """A fact in the weights."""
    request = EditRequest(FactKey("constellation", f"stars:{name}"), f"Where is {name}", name, "Lyra")
    return Standing(Applied(request, "stars:Lyra", "d" * 64, 0), served, last, misses)


settings = st.builds(
    Recheck,
    first=st.floats(1, 1e7),
    factor=st.floats(1, 1e9),
    longest=st.floats(1, 1e8),
    facts=st.integers(0, 5),
)


@given(settings, st.integers(0, 10_000))
def test_intervals_begin_with_first_grow_by_factor_and_end_at_longest(plan: Recheck, stage: int) -> None:
    now, then = plan.interval(stage).total_seconds(), plan.interval(stage + 1).total_seconds()
    assert plan.interval(0).total_seconds() == pytest.approx(min(plan.first, plan.longest), abs=1e-5)
    assert now <= then <= plan.longest + 1e-5
    assert then == pytest.approx(min(plan.factor * now, plan.longest), rel=1e-6, abs=1e-5)


def test_a_fact_that_is_always_answered_is_asked_after_one_two_four_days_and_then_every_sixty() -> None:
    plan, fact, days = Recheck(), standing(), []
    for _ in range(9):
        due = plan.due_at(fact)
        assert plan.due([fact], due - timedelta(seconds=1)) == []
        assert plan.due([fact], due) == [fact]
        days.append((due - NOW) / DAY)
        fact = standing(last=plan.checked(fact, answered=True, version=1, now=due))
    assert days == [1, 3, 7, 15, 31, 63, 123, 183, 243]


def test_a_miss_begins_the_spacing_anew() -> None:
    plan = Recheck()
    fact = standing(last=check(stage=5))
    missed = plan.checked(fact, answered=False, version=7, now=NOW)
    assert (missed.stage, missed.due_at, missed.version) == (0, NOW + DAY, 7)
    again = plan.checked(standing(last=missed), answered=True, version=8, now=NOW)
    assert (again.stage, again.due_at) == (1, NOW + 2 * DAY)


@given(st.lists(st.integers(0, 20), max_size=8), st.integers(0, 5))
def test_the_longest_overdue_are_asked_first_and_no_more_than_are_allowed(days: list[int], facts: int) -> None:
    plan = Recheck(facts=facts)
    all_ = [standing(f"s{index}", served=NOW - day * DAY) for index, day in enumerate(days)]
    due = plan.due(all_, NOW)
    overdue = sorted((fact for fact in all_ if fact.served <= NOW - DAY), key=lambda fact: fact.served)
    assert len(due) == min(facts, len(overdue))
    assert [fact.served for fact in due] == [fact.served for fact in overdue[:facts]]


def test_a_fact_is_given_up_after_as_many_edits_as_are_allowed() -> None:
    """The first miss is of the first edit; a second miss of the same column is no other edit."""
    plan = Recheck(edits=2)
    assert [plan.gives_up(standing(misses=count)) for count in range(4)] == [False, False, True, True]
    same = standing(misses=2, last=check(False))
    assert (same.faded, same.missed, plan.gives_up(same)) == (True, 2, False)
    assert not standing().faded
    assert not standing(last=check()).faded


def test_misses_are_counted_by_column_up_to_the_last_answer_of_the_same_request() -> None:
    later = NOW + DAY
    assert misses([], "r") == 0
    assert misses([check(False), check(False)], "r") == 1
    assert misses([check(False, served=later), check(False)], "r") == 2
    assert misses([check(False, served=later), check(True), check(False)], "r") == 1
    assert misses([check(False, served=later), check(False, request="other")], "r") == 1
    assert misses([check(True), check(False)], "r") == 0
