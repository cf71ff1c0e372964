"""Signs of life of the parts of a daemon, in memory: what /livez says, and what a watchdog is to be told.

pulse = Pulse()
pulse.beat("scheduler")
pulse.stuck()                    # {} while every part that ever beat goes on doing so
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal

__all__ = ["BEAT", "NOTED", "Phase", "Pulse"]

BEAT = 5.0
"""Seconds between two beats of a part that is well."""
NOTED = 30.0
"""Seconds after which the beats are written down again."""
PATIENCE = 60.0
"""Seconds without a beat after which a part counts as stuck: a loaded machine misses one, or a few, not twelve."""

Phase = Literal["starting", "running", "stopping"]


class Pulse:
    """Which parts beat last when, and whether the daemon as a whole is starting, running or stopping. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.phase: Phase = "starting"
        self._clock = clock
        self._lock = threading.Lock()
        self._last: dict[str, float] = {}

    def beat(self, part: str) -> None:
        """`part` is alive now."""
        with self._lock:
            self._last[part] = self._clock()

    def since(self) -> dict[str, float]:
        """Seconds since the last beat, by part."""
        with self._lock:
            return {part: self._clock() - last for part, last in sorted(self._last.items())}

    def stuck(self, patience: float = PATIENCE) -> dict[str, float]:
        """The parts that have been silent for longer than `patience`, and for how many seconds."""
        return {part: seconds for part, seconds in self.since().items() if seconds > patience}
