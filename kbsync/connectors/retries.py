"""How often what may work later is asked again, and how long is waited in between.

A wait ends early where the pass is cancelled: `pausing` says how a pass waits, for all that is asked in it.

    with pausing(pause):
        snapshot = retrying()(connector.fetch, previous)
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type
from tenacity.wait import wait_random_exponential

from kbsync.errors import SourceUnavailable

__all__ = ["ATTEMPTS", "LONGEST_WAIT_SECONDS", "jittered", "pausing", "retrying"]

ATTEMPTS = 3
SHORTEST_WAIT_SECONDS = 1.0
FIRST_WAIT_SECONDS = 2.0
LONGEST_WAIT_SECONDS = 60.0
"""A source that asks for a longer pause than this is left alone until then; the pass goes on without it."""
JITTER = 0.25
"""Every wait is longer by up to this share, so that those who were refused together do not come back together."""

_backoff = wait_random_exponential(multiplier=FIRST_WAIT_SECONDS, min=SHORTEST_WAIT_SECONDS, max=LONGEST_WAIT_SECONDS)
_pause: ContextVar[Callable[[float], None]] = ContextVar("pause", default=time.sleep)


@contextmanager
def pausing(pause: Callable[[float], None]) -> Iterator[None]:
    """Wait by `pause` (seconds), which may raise to end the wait and what is waited for."""
    before = _pause.set(pause)
    try:
        yield
    finally:
        _pause.reset(before)


def retrying(deadline: float | None = None) -> Retrying:
    """Up to 3 tries of what raises SourceUnavailable; no wait goes beyond `deadline` (`time.monotonic` seconds)."""

    def enough(state: RetryCallState) -> bool:
        late = deadline is not None and time.monotonic() + state.upcoming_sleep >= deadline
        return late or _enough(state)

    return Retrying(
        sleep=_pause.get(), stop=enough, wait=_wait, retry=retry_if_exception_type(SourceUnavailable), reraise=True
    )


def jittered(seconds: float) -> float:
    """`seconds`, and up to a quarter more."""
    return seconds * (1 + random.uniform(0, JITTER))  # noqa: S311 (no secret)


def _enough(state: RetryCallState) -> bool:
    """Tried often enough, here or further down, or asked to wait for longer than a pass should last."""
    error = _failure(state)
    asked = error.retry_after or 0.0 if error else 0.0
    return state.attempt_number >= ATTEMPTS or asked > LONGEST_WAIT_SECONDS or (error is not None and error.exhausted)


def _wait(state: RetryCallState) -> float:
    """Exponential backoff, or what the source asks for, doubled with every refusal, where that is longer."""
    error = _failure(state)
    asked = error.retry_after or 0.0 if error else 0.0
    wait = max(_backoff(state), jittered(asked * 2 ** (state.attempt_number - 1)))
    return min(wait, LONGEST_WAIT_SECONDS)


def _failure(state: RetryCallState) -> SourceUnavailable | None:
    error = state.outcome.exception() if state.outcome else None
    return error if isinstance(error, SourceUnavailable) else None
