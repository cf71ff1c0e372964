"""How long work says how far it is: one callback, drawn as a bar on a terminal and silent elsewhere."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "silent"]

Progress = Callable[[str, int, int], None]
"""`progress(phase, done, total)`: called as often as the worker likes; `done` of `total` units of `phase`."""


def silent(phase: str, done: int, total: int) -> None:
    """The progress of work that nobody watches."""
