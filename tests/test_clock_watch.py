"""A clock that is set, and a machine that sleeps, are noticed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kbsync.daemon.clock import JUMP, ClockWatch


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(-1e7, 1e7)), max_size=8))
def test_only_jumps_of_the_time_of_day_are_told_and_each_of_them_once(steps: list[tuple[float, float]]) -> None:
    """However much time passes by both clocks."""
    now = {"wall": 1.8e9, "monotonic": 100.0}
    watch = ClockWatch(lambda: now["wall"], lambda: now["monotonic"])
    for passed, jump in steps:
        now["wall"] += passed + jump
        now["monotonic"] += passed
        told = watch.moved()
        assert (told == 0.0) == (abs(jump) < JUMP) or abs(abs(jump) - JUMP) < 0.01
        assert told == 0.0 or abs(told - jump) < 0.01
        assert watch.moved() == 0.0
