"""What the daemon is doing, and when it last came forward. Thread-safe.

work = Work()
work.begin("pass of sky")
work.progress("targets", 12, 40)
work.words()                     # "pass of sky: targets 12 of 40"
work.silent_for()                # seconds since then; None while nothing is going on
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from kbsync.progress import Progress

__all__ = ["Work"]


class Work:
    """One piece of work at a time, as the daemon does it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._what: str | None = None
        self._phase = ""
        self._last = 0.0

    def begin(self, what: str) -> None:
        """`what` goes on from now."""
        with self._lock:
            self._what, self._phase, self._last = what, "", self._clock()

    def end(self) -> None:
        """It is over."""
        with self._lock:
            self._what = None

    def progress(self, phase: str, done: int, total: int) -> None:
        """It came forward: what work calls as it goes."""
        with self._lock:
            self._phase, self._last = f"{phase} {done} of {total}", self._clock()

    def watching(self, progress: Progress) -> Progress:
        """`progress` for work that somebody else follows, too."""

        def both(phase: str, done: int, total: int) -> None:
            self.progress(phase, done, total)
            progress(phase, done, total)

        return both

    def silent_for(self) -> float | None:
        """Seconds since it began or last came forward; None while nothing is going on."""
        with self._lock:
            return None if self._what is None else self._clock() - self._last

    def words(self) -> str:
        """What is going on and how far it is; empty while nothing is."""
        with self._lock:
            if self._what is None:
                return ""
            return f"{self._what}: {self._phase}" if self._phase else self._what
