"""Whose turn it is to ask a host: one request in flight per host, over all jobs of this machine.

Public services count requests per address (https://wikitech.wikimedia.org/wiki/Robot_policy), so two processes have to
wait for each other, too. Each host has a lock file in the user's cache; the kernel releases it however a process ends.
"""

from __future__ import annotations

import fcntl
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kbsync.hub import cache_dir

__all__ = ["turn"]

POLL_SECONDS = 0.05
"""flock cannot wait for a limited time, so it is tried this often."""

_threads: dict[str, threading.Lock] = {}


@contextmanager
def turn(host: str, deadline: float) -> Iterator[None]:
    """Hold the turn of `host`, whatever the port. `deadline` is in `time.monotonic` seconds.

    Raises TimeoutError where others have had it until then. Where the cache cannot be written, only the threads of
    this process wait for each other.
    """
    lock = _threads.setdefault(host, threading.Lock())
    if not lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
        raise TimeoutError(host)
    try:
        handle = _open(host)
        try:
            if handle is not None:
                _wait(handle, host, deadline)
            yield
        finally:
            if handle is not None:
                os.close(handle)
    finally:
        lock.release()


def _open(host: str) -> int | None:
    folder = cache_dir() / "hosts"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / re.sub(r"[^\w.-]", "_", host), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return None


def _wait(handle: int, host: str, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TimeoutError(host) from None
            time.sleep(POLL_SECONDS)
