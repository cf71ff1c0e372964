"""Means, intervals and paired differences, against numbers that are known or computed plainly."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbsync.editor.intervals import Interval, differences, intervals

shares = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def value(interval: Interval | None) -> float:
    """The value of an interval that must be there."""
    assert interval is not None
    return interval.value


@given(shares)
def test_the_value_is_the_mean_in_per_cent_and_lies_inside_its_interval(values: list[float]) -> None:
    found = intervals({"x": values}, resamples=100)["x"]
    assert found is not None
    assert found.value == pytest.approx(100 * statistics.fmean(values), abs=1e-9)
    assert 100 * min(values) - 1e-9 <= found.low <= found.high <= 100 * max(values) + 1e-9


def test_the_score_is_the_harmonic_mean_of_the_means() -> None:
    run = {"a": [1.0, 0.0], "b": [0.25, 0.25], "c": [1.0, 1.0]}
    assert value(intervals(run, harmonic=("a", "b"))["score"]) == pytest.approx(statistics.harmonic_mean([50, 25]))


def test_a_score_with_a_part_of_zero_is_zero_and_without_a_part_is_none() -> None:
    assert intervals({"a": [0.0], "b": [1.0]}, harmonic=("a", "b"))["score"] == Interval(0, 0, 0)
    assert intervals({"a": [math.nan], "b": [1.0]}, harmonic=("a", "b"))["score"] is None


def test_a_record_without_a_number_does_not_count() -> None:
    assert value(intervals({"a": [1.0, math.nan, 0.0, math.nan]})["a"]) == pytest.approx(50)


def test_no_records_have_no_numbers() -> None:
    assert intervals({"a": [], "b": []}, harmonic=("a", "b")) == {"a": None, "b": None, "score": None}


def test_the_difference_of_a_run_from_itself_is_nothing() -> None:
    run = {"a": [0.0, 1.0, 1.0], "b": [0.5, 0.0, 1.0]}
    nothing = Interval(0, 0, 0)
    assert differences(run, run, harmonic=("a", "b")) == {"a": nothing, "b": nothing, "score": nothing}


def test_a_difference_is_that_of_the_values_and_turns_its_sign_with_the_runs() -> None:
    before, after = {"a": [0.0, 1.0, 0.0, 0.0]}, {"a": [1.0, 1.0, 1.0, 0.0]}
    up, down = differences(before, after)["a"], differences(after, before)["a"]
    assert up is not None
    assert down is not None
    assert (up.value, down.value) == (50, -50)
    assert (up.low, up.high) == (-down.high, -down.low)


def test_pairing_takes_out_what_is_hard_for_both_runs() -> None:
    """400 records, half of them hard for both; the second run is better on 20: the paired interval is that of 5 %
    (2.9 to 7.1), where two separate runs would leave about ± 7."""
    before = [float(at % 2) for at in range(400)]
    after = [1.0 if at % 20 == 0 else one for at, one in enumerate(before)]
    found = differences({"a": before}, {"a": after})["a"]
    assert found is not None
    assert found.value == pytest.approx(5)
    assert found.low == pytest.approx(2.9, abs=0.5)
    assert found.high == pytest.approx(7.1, abs=0.5)


def test_the_interval_agrees_with_a_bootstrap_written_plainly() -> None:
    random.seed(3)
    values = [random.random() for _ in range(60)]
    plain = sorted(statistics.fmean(random.choices(values, k=60)) for _ in range(4000))
    found = intervals({"a": values}, resamples=4000)["a"]
    assert found is not None
    assert found.low == pytest.approx(100 * plain[100], abs=0.7)
    assert found.high == pytest.approx(100 * plain[3900], abs=0.7)


def test_a_difference_is_of_the_metrics_that_both_runs_have() -> None:
    assert differences({"a": [1.0], "b": [1.0]}, {"a": [1.0]}).keys() == {"a"}


def test_runs_over_different_records_are_refused() -> None:
    with pytest.raises(ValueError, match=r"different records: \[1, 2\]"):
        differences({"a": [1.0]}, {"a": [1.0, 0.0]})
