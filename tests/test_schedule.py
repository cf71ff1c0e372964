"""When a pass runs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbsync.policy import Schedule
from kbsync.schedule import next_due, trigger

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)  # a Wednesday


def fires(cron: str, count: int = 3, zone: str = "UTC") -> list[str]:
    """The next times as `Sun 05:00`."""
    found, at = [], NOW
    made = trigger(Schedule(cron=cron, timezone=zone))
    for _ in range(count):
        at = made.get_next_fire_time(None, at)
        found.append(f"{at:%a %H:%M}")
        at += timedelta(minutes=1)
    return found


@pytest.mark.parametrize("day", ["0", "7", "sun"])
def test_day_zero_seven_and_sun_are_sunday(day: str) -> None:
    assert fires(f"0 5 * * {day}", 1) == ["Sun 05:00"]


def test_ranges_of_days_are_read_as_crontab_does() -> None:
    assert fires("30 6 * * 1-5", 4) == ["Thu 06:30", "Fri 06:30", "Mon 06:30", "Tue 06:30"]
    assert fires("0 0 * * fri-sun", 3) == ["Fri 00:00", "Sat 00:00", "Sun 00:00"]


@pytest.mark.parametrize("cron", ["0 5 * *", "0 5 * * 8", "0 5 * * someday", "0 5 1 * 1", "0 0 31 2 *"])
def test_a_cron_expression_that_cannot_be_meant_is_refused(cron: str) -> None:
    with pytest.raises(ValueError, match="cron"):
        trigger(Schedule(cron=cron))


def test_a_policy_that_never_ran_is_due_now() -> None:
    assert next_due(Schedule(every=3600, jitter=60), None, NOW) == NOW


@given(st.integers(60, 10**6), st.integers(0, 2 * 10**6))
def test_a_pass_is_due_an_interval_after_the_last_one_however_many_were_missed(every: int, ago: int) -> None:
    last = NOW - timedelta(seconds=ago)
    assert next_due(Schedule(every=every), last, NOW) == max(NOW, last + timedelta(seconds=every))


def test_a_cron_pass_is_due_now_where_a_time_lies_between() -> None:
    schedule = Schedule(cron="0 5 * * *")
    assert next_due(schedule, NOW - timedelta(hours=8), NOW) == NOW
    assert next_due(schedule, NOW - timedelta(days=30), NOW) == NOW
    assert next_due(schedule, NOW - timedelta(hours=6), NOW) == NOW + timedelta(hours=17)


@given(st.integers(1, 3600), st.integers(0, 5000))
def test_jitter_delays_the_next_pass_by_no_more_than_itself(jitter: int, ago: int) -> None:
    plain, late = (
        next_due(Schedule(every=3600, jitter=seconds), NOW - timedelta(seconds=ago), NOW) for seconds in (0, jitter)
    )
    assert plain <= late <= plain + timedelta(seconds=jitter)


@pytest.mark.parametrize("schedule", [Schedule(every=3600), Schedule(cron="0 * * * *")], ids=["every", "cron"])
def test_a_clock_that_was_put_back_stops_no_schedule(schedule: Schedule) -> None:
    last = NOW + timedelta(days=400)
    assert next_due(schedule, last, NOW) == NOW + timedelta(hours=1)


def test_what_was_planned_since_the_clock_was_put_back_is_not_put_off_again() -> None:
    """Neither by a second jump nor by a new start; what was planned by the clock that was ahead means nothing."""
    schedule, last, soon = Schedule(every=3600), NOW + timedelta(days=400), NOW + timedelta(minutes=10)
    assert next_due(schedule, last, NOW, soon) == soon
    assert next_due(schedule, last, NOW, NOW - timedelta(hours=1)) == NOW
    assert next_due(schedule, last, NOW, last + timedelta(hours=1)) == NOW + timedelta(hours=1)
    assert next_due(schedule, NOW, NOW, soon) == NOW + timedelta(hours=1)


def test_a_time_that_a_night_skips_or_repeats_comes_all_the_same() -> None:
    schedule = Schedule(cron="30 2 * * *", timezone="Europe/Berlin")
    spring, autumn = datetime(2026, 3, 28, 12, tzinfo=UTC), datetime(2026, 10, 24, 12, tzinfo=UTC)
    assert next_due(schedule, spring, spring) == datetime(2026, 3, 29, 1, 30, tzinfo=UTC)
    first = next_due(schedule, autumn, autumn)
    assert first == datetime(2026, 10, 25, 0, 30, tzinfo=UTC)
    assert next_due(schedule, first, first) == datetime(2026, 10, 25, 1, 30, tzinfo=UTC)
    assert next_due(schedule, first + timedelta(hours=2), first + timedelta(hours=2)) == datetime(
        2026, 10, 26, 1, 30, tzinfo=UTC
    )


@pytest.mark.parametrize("schedule", [Schedule(every=1), Schedule(cron="* * * * *")], ids=["every", "cron"])
@given(missed=st.floats(0, 1e10))
def test_the_next_time_is_after_now_however_many_were_missed(schedule: Schedule, missed: float) -> None:
    """In one step: whoever counts them second by second has no time left after centuries."""
    last = NOW.replace(second=0)
    now = last + timedelta(seconds=missed)
    found = trigger(schedule).get_next_fire_time(last, now)
    assert found is not None
    assert last < found
    assert now <= found <= now + timedelta(seconds=schedule.every or 60)
