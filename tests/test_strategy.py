"""When a version is to be a rebase, and what is said before a limit is reached: pure decisions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kbsync.strategy import Capacity, Odometer, Strategy, facts_left, over, rebase_due, warnings

shares = st.floats(0, 1)
strategies = st.builds(
    Strategy,
    mode=st.sampled_from(["auto", "incremental", "rebase"]),
    rebase_every=st.integers(1, 5),
    max_relative_norm=st.floats(0.01, 1),
    min_retention=shares,
)
capacities = st.builds(
    Capacity,
    norms=st.dictionaries(st.sampled_from("ab"), st.floats(0, 2), max_size=2),
    facts=st.integers(0, 1000),
    retention=st.none() | shares,
    drift=st.none() | shares,
)
odometers = st.builds(
    Odometer,
    anchor=st.integers(0, 9),
    since=st.integers(0, 9),
    now=st.none() | capacities,
    then=st.none() | capacities,
    refused=st.none() | st.integers(0, 9),
)


def measured(norm: float, facts: int = 100, retention: float | None = None) -> Capacity:
    """What a version measured."""
    return Capacity({"layer": norm, "smaller": norm / 2}, facts, retention, 0.0)


@given(strategies, odometers)
def test_a_rebase_is_never_due_where_nothing_is_held(strategy: Strategy, odometer: Odometer) -> None:
    assert rebase_due(strategy, odometer, live=0, whole=True) is None


@given(strategies, odometers)
def test_a_delta_stored_whole_asks_for_a_rebase_in_every_mode(strategy: Strategy, odometer: Odometer) -> None:
    assert rebase_due(strategy, odometer, live=1, whole=True) is not None


@given(strategies, odometers)
def test_the_two_fixed_modes_look_at_nothing_else(strategy: Strategy, odometer: Odometer) -> None:
    if strategy.mode != "auto":
        due = rebase_due(strategy, odometer, live=1, grown=True)
        assert (due is not None) == (strategy.mode == "rebase")


@given(strategies, odometers)
def test_auto_is_due_by_count_or_by_a_limit_that_the_last_rebase_had_not_reached(
    strategy: Strategy, odometer: Odometer
) -> None:
    strategy = strategy.model_copy(update={"mode": "auto"})
    by_count = odometer.since >= strategy.rebase_every
    by_limit = odometer.since > 0 and bool(over(strategy, odometer.now).keys() - over(strategy, odometer.then).keys())
    waits = odometer.refused is not None and odometer.refused < strategy.rebase_every
    assert (rebase_due(strategy, odometer, live=1) is not None) == ((by_count or by_limit) and not waits)
    assert (rebase_due(strategy, odometer, live=1, grown=True) is not None) == (not waits)


@given(strategies, capacities)
def test_right_after_a_rebase_none_is_due_whatever_it_measured(strategy: Strategy, capacity: Capacity) -> None:
    strategy = strategy.model_copy(update={"mode": "auto"})
    assert rebase_due(strategy, Odometer(7, 0, capacity, capacity), live=1) is None


@given(strategies, capacities)
def test_every_limit_that_is_reached_is_warned_of(strategy: Strategy, capacity: Capacity) -> None:
    assert set(over(strategy, capacity).values()) <= set(warnings(strategy, capacity))


@given(st.floats(0.001, 0.499), st.integers(1, 10_000))
def test_the_forecast_is_linear_in_the_square_of_the_norm(norm: float, facts: int) -> None:
    left = facts_left(Strategy(max_relative_norm=0.5), measured(norm, facts))
    assert left is not None
    growth = norm**2 / facts
    assert (facts + left) * growth <= 0.25 + 1e-9
    assert (facts + left + 1) * growth >= 0.25 - 1e-9


def test_the_limits_are_warned_of_from_four_fifths_of_the_way_on() -> None:
    strategy = Strategy(max_relative_norm=0.5, min_retention=0.5)
    assert warnings(strategy, measured(0.39, retention=0.61)) == []
    [near] = warnings(strategy, measured(0.4))
    assert "0.400 of the weights" in near
    assert "about 56 more facts" in near
    assert len(warnings(strategy, measured(0.1, retention=0.59))) == 1
    assert [text.split(",")[1].split()[0] for text in warnings(strategy, measured(0.5, retention=0.4))] == [
        "max_relative_norm",
        "min_retention",
    ]
    assert warnings(strategy, None) == []
    assert facts_left(strategy, None) is None
    assert facts_left(strategy, measured(0.0)) is None


def test_a_capacity_is_read_as_the_manifest_has_it() -> None:
    value = {"norms": {"a": 0.1, "b": 0.2}, "facts": 3, "retention": {"facts": 0, "share": None}, "drift": 0.5}
    found = Capacity.from_json(value)
    assert (found.norm, found.facts, found.retention, found.drift) == (0.2, 3, None, 0.5)


@pytest.mark.parametrize(
    "wrong", [{"mode": "never"}, {"rebase_every": 0}, {"max_relative_norm": 0}, {"min_retention": 1.5}, {"every": 2}]
)
def test_a_strategy_that_means_nothing_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Strategy.model_validate(wrong)
