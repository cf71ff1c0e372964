"""When a policy's pass runs: its schedule as an APScheduler 3.11 trigger, and when it is due next.

    scheduler.add_job(..., trigger(policy.schedule), next_run_time=next_due(policy.schedule, last_started, now))

Cron expressions mean what crontab(5) says: five fields, day of the week 0 and 7 are Sunday. (APScheduler's own reading
of numbers begins on Monday.) Times are UTC unless the schedule names another zone; where a clock is put back an hour, a
time within it comes twice, which a pass does not mind.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger

from kbsync.config import time_zone
from kbsync.policy import Schedule

__all__ = ["Cron", "Every", "next_due", "trigger"]

_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
"""Days of the week in the order of crontab(5)."""


class Every(IntervalTrigger):  # type: ignore[misc]  # APScheduler has no types
    """Every so often. However long the clock jumped ahead or the machine slept, one time was missed: APScheduler's own
    trigger lists every single one while nothing else can be scheduled, of a beat in 5 s 6 million a year."""

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime | None:
        """The time after the previous one that is after now, too; without a previous one, the first."""
        last = previous_fire_time
        if last is not None:
            last = last.astimezone(UTC)
            last += max(0, (now.astimezone(UTC) - last) // self.interval) * self.interval
        found: datetime | None = super().get_next_fire_time(last, now)
        return found


class Cron(CronTrigger):  # type: ignore[misc]  # APScheduler has no types
    """At times of a calendar; of those that were missed, one counts, as with Every."""

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime | None:
        """The time after the previous one that is not before now; without a previous one, the first."""
        last = previous_fire_time
        if last is not None:
            last = max(last.astimezone(UTC), now.astimezone(UTC) - timedelta(microseconds=1))
        found: datetime | None = super().get_next_fire_time(last, now)
        return found


def trigger(schedule: Schedule) -> Cron | Every:
    """When a policy's pass runs, as APScheduler has it. Raises ValueError where the schedule can never be meant."""
    zone, jitter = time_zone(schedule.timezone), int(schedule.jitter) or None
    if schedule.every is not None:
        if schedule.every < 1:
            raise ValueError("every must be 1s or more")
        return Every(seconds=int(schedule.every), jitter=jitter, timezone=zone)
    fields = (schedule.cron or "").lower().split()
    if len(fields) != 5:
        raise ValueError("cron needs five fields: minute hour day month day-of-week")
    minute, hour, day, month, weekday = fields
    if "*" not in (day, weekday):
        raise ValueError("cron cannot restrict both the day of the month and the day of the week")
    found = Cron(
        minute=minute, hour=hour, day=day, month=month, day_of_week=_weekdays(weekday), jitter=jitter, timezone=zone
    )
    if found.get_next_fire_time(None, datetime.now(zone)) is None:
        raise ValueError(f"cron never comes: {schedule.cron}")
    return found


def next_due(
    schedule: Schedule, last_started: datetime | None, now: datetime, planned: datetime | None = None
) -> datetime:
    """When the next pass is due after the one that began at `last_started` (None: there was none); never before `now`.

    All times are timezone-aware, the result is in UTC. However many passes were missed, one is due now. The schedule
    goes on from the last pass and not from the start of the daemon, or frequent restarts would put a pass off for ever.
    A last pass that lies in the future, because the clock was put back since, counts as begun now; but an earlier time
    that was `planned` since then stays.
    """
    if last_started is None:
        return now
    begun = min(last_started, now)
    due = trigger(schedule).get_next_fire_time(begun, begun + timedelta(microseconds=1))
    if due is None:
        raise ValueError(f"schedule never comes again: {schedule.cron}")
    if planned is not None and last_started > now:
        due = min(due, planned)
    return max(now, due.astimezone(UTC))


def _weekdays(field: str) -> str:
    """The day-of-week field of crontab(5) as a list of names: `5-7` -> `fri,sat,sun`."""
    if field == "*":
        return field
    days: set[int] = set()
    for part in field.split(","):
        match = re.fullmatch(r"(?:\*|(\w+)(?:-(\w+))?)(?:/([1-9]\d*))?", part)
        if match is None:
            raise ValueError(f"cron has no day of the week {part}")
        first, last, step = match.groups()
        low = _day(first) if first else 0
        high = _day(last) if last else (low if first and not step else 6)
        days.update(day % 7 for day in range(low, high + 7 * (high < low) + 1, int(step or 1)))
    return ",".join(_DAYS[day] for day in sorted(days))


def _day(text: str) -> int:
    if text.isdecimal() and int(text) <= 7:
        return int(text)
    if text in _DAYS:
        return _DAYS.index(text)
    raise ValueError(f"cron has no day of the week {text}")
