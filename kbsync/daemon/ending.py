"""The end of a daemon some of whose work does not end: a database that hangs, a notice that is being sent.

The process then ends at once, its locks still held: the kernel frees them as the last thread is gone, so that at no
moment two processes write. Returning would give the locks back and then wait for threads that still write.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import structlog

from kbsync import hook

__all__ = ["CLOSING", "forced", "leave"]

CLOSING = 10.0
"""Seconds after the grace time for closing what is open."""

log = structlog.get_logger()


def leave() -> NoReturn:
    """End this process now, with status 0: it was asked to end."""
    sys.stderr.flush()
    os._exit(0)


@contextmanager
def forced(stopping: threading.Event, grace: Callable[[], float]) -> Iterator[None]:
    """Once `stopping` is set, the block has to be over within `grace()` and CLOSING; else the process ends."""
    over = threading.Event()

    def watch() -> None:
        stopping.wait()
        if not over.wait(grace() + CLOSING):
            log.error("end_forced", reason="something that was to be closed hangs")
            hook.ENDING.set()
            over.wait(5 * hook.LOOK)  # commands are ended
            leave()

    threading.Thread(target=watch, name="ending", daemon=True).start()
    try:
        yield
    finally:
        over.set()
