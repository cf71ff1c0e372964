"""When a policy's pass runs: its schedule as an APScheduler 3.11 trigger, and whether a pass is overdue.

Cron expressions mean what crontab(5) says: five fields, day of the week 0 and 7 are Sunday. (APScheduler's own reading
of numbers begins on Monday.) Times are UTC unless the schedule names another zone.
"""

from __future__ import annotations

import re
from datetime import datetime

from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger

from kbsync.config import time_zone
from kbsync.policy import Schedule

__all__ = ["overdue", "trigger"]

_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
"""Days of the week in the order of crontab(5)."""


def trigger(schedule: Schedule) -> CronTrigger | IntervalTrigger:
    """When a policy's pass runs, as APScheduler has it. Raises ValueError where the schedule can never be meant."""
    zone, jitter = time_zone(schedule.timezone), int(schedule.jitter) or None
    if schedule.every is not None:
        if schedule.every < 1:
            raise ValueError("every must be 1s or more")
        return IntervalTrigger(seconds=int(schedule.every), jitter=jitter, timezone=zone)
    fields = (schedule.cron or "").lower().split()
    if len(fields) != 5:
        raise ValueError("cron needs five fields: minute hour day month day-of-week")
    minute, hour, day, month, weekday = fields
    if "*" not in (day, weekday):
        raise ValueError("cron cannot restrict both the day of the month and the day of the week")
    found = CronTrigger(
        minute=minute, hour=hour, day=day, month=month, day_of_week=_weekdays(weekday), jitter=jitter, timezone=zone
    )
    if found.get_next_fire_time(None, datetime.now(zone)) is None:
        raise ValueError(f"cron never comes: {schedule.cron}")
    return found


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


def overdue(schedule: Schedule, last_started: datetime | None, now: datetime) -> bool:
    """Whether a pass should have begun between the last one (None: there was none) and `now`, both timezone-aware."""
    if last_started is None:
        return True
    due = trigger(schedule.model_copy(update={"jitter": 0.0})).get_next_fire_time(last_started, last_started)
    return due is not None and due <= now
