"""Notices that the time of day has moved by itself: it was set, or the machine has slept.

watch = ClockWatch()
watch.moved()          # 0.0, or by how many seconds since the last look

The scheduler computes its next times in advance. After a clock that was far ahead is put right they lie where nobody
will be for months; after a night's sleep they have passed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["JUMP", "ClockWatch"]

JUMP = 60.0
"""Seconds that the time of day has to move against the monotonic clock, which is never set and sleeps along, between
two looks: servers of time correct a clock by milliseconds."""


class ClockWatch:
    """Compares the time of day with the monotonic clock at every look."""

    def __init__(self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._ahead = wall() - monotonic()

    def moved(self) -> float:
        """By how many seconds the time of day has jumped since the last look (negative: back); 0.0 for less than
        JUMP."""
        before, self._ahead = self._ahead, self._wall() - self._monotonic()
        jump = self._ahead - before
        return jump if abs(jump) >= JUMP else 0.0
