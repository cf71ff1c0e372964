"""Who may work now: one piece of work at a time, an undo before the others, and some beside it.

turns = Turns()
with turns.one(gone=gone):                  # passes, commands, and what else writes versions or loads a model
    ...
with turns.beside("chore notify"):          # what waits for no edit, and no edit for it
    ...
turns.stopping.set()
turns.left(30.0)                            # what goes on after half a minute; [] where nothing does

Nobody waits without end: who hangs up before its turn is dropped, and once the daemon stops there are no more turns.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kbsync.errors import Busy, Cancelled

__all__ = ["Turns"]

LOOK = 0.5
"""Seconds between two looks at whether somebody who waits has hung up."""


class Turns:
    """`cancelled`: the work is to end; set by an undo as it comes, and clear as each piece of work begins.
    `stopping`: no more turns. Thread-safe."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.stopping = threading.Event()
        self._changed = threading.Condition()
        self._busy = False
        self._undoing = 0
        self._going: Counter[str] = Counter()

    @contextmanager
    def one(self, what: str, *, undo: bool = False, gone: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """The one piece of work that goes on, once what went on before has ended.

        Raises Cancelled where `gone` says so before its turn comes, Busy where the daemon stops.
        """
        self._wait(what, undo, gone)
        try:
            yield
        finally:
            with self._changed:
                self._busy = False
                self._over(what)

    @contextmanager
    def beside(self, what: str) -> Iterator[None]:
        """Work that waits for nobody. Raises Busy where the daemon stops."""
        with self._changed:
            self._heed(lambda: False)
            self._going[what] += 1
        try:
            yield
        finally:
            with self._changed:
                self._over(what)

    def left(self, seconds: float) -> list[str]:
        """What still goes on after so many seconds, or when nothing does: then an empty list."""
        end = time.monotonic() + seconds
        with self._changed:
            while self._going and (rest := end - time.monotonic()) > 0:
                self._changed.wait(rest)
            return sorted(self._going)

    def _wait(self, what: str, undo: bool, gone: Callable[[], bool]) -> None:
        with self._changed:
            self._undoing += undo
            if undo:
                self.cancelled.set()
            try:
                while self._busy or (self._undoing and not undo):
                    self._heed(gone)
                    self._changed.wait(LOOK)
                self._heed(gone)
                self._busy = True
                self._going[what] += 1
            finally:
                self._undoing -= undo
                self._changed.notify_all()
            if not self._undoing:
                self.cancelled.clear()

    def _heed(self, gone: Callable[[], bool]) -> None:
        if gone():
            raise Cancelled("the client hung up before the command's turn")
        if self.stopping.is_set():
            raise Busy("the daemon is stopping", hint="give the command again in a moment")

    def _over(self, what: str) -> None:
        self._going -= Counter([what])  # keeps what is more than 0
        self._changed.notify_all()
