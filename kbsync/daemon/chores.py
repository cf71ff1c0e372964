"""What the daemon does beside the passes of its policies: small recurring work, each with a period of its own.

A chore that is `alone` takes its turn with passes and commands, because it writes versions or loads a model; the others
run beside them and must be quick: they read the ledger and write a row or two. What goes wrong with a chore is logged
and audited; it comes again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from kbsync.reconcile import Reconciler

__all__ = ["CHORES", "Chore"]


@dataclass(frozen=True, slots=True)
class Chore:
    """`act` every so often, at first one period after the start of the daemon."""

    name: str
    every: timedelta
    act: Callable[[Reconciler], None]
    alone: bool = False


CHORES: Sequence[Chore] = ()
