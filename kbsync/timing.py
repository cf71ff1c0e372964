"""Wall-clock seconds by phase: what an edit and a benchmark report of themselves. Torch-free.

seconds: dict[str, float] = {}
with timed(seconds, "insert"): ...
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["timed"]


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the block's wall-clock seconds to `phase` of `seconds`, whatever ends the block."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start
