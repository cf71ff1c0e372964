"""What the daemon does beside the passes of its policies: small recurring work, each with a period of its own.

A chore that is `alone` takes its turn with passes and commands, because it writes versions or loads a model; the others
run beside them and must be quick: they read the ledger and write a row or two. What goes wrong with a chore is logged
and audited; it comes again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import structlog

from kbsync.garbage import collect
from kbsync.notify.outbox import Outbox
from kbsync.notify.telling import tell_freshness
from kbsync.reconcile import Reconciler
from kbsync.versions.store import ORPHAN_AGE

__all__ = ["CHORES", "Chore", "delivery"]


log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Chore:
    """`act` every so often, at first one period after the start of the daemon."""

    name: str
    every: timedelta
    act: Callable[[Reconciler], None]
    alone: bool = False


def _retain(reconciler: Reconciler) -> None:
    """What `kbsync gc` does."""
    done = collect(reconciler.workspace, reconciler.ledger, ORPHAN_AGE, user=reconciler.user)
    if done["files"]:
        log.info("garbage_collected", files=len(done["files"]), bytes=done["bytes"], dropped=len(done["dropped"]))


def _tell_freshness(reconciler: Reconciler) -> None:
    tell_freshness(reconciler.ledger, reconciler.catalog)


def delivery(outbox: Outbox) -> Chore:
    """Notices go out through the daemon's outbox, which goes on beside all chores."""
    return Chore("notify", timedelta(seconds=15), lambda it: outbox.deliver(it.workspace, it.ledger))


def _recheck(reconciler: Reconciler) -> None:
    """Within the edit window: asking takes the same memory as editing."""
    if reconciler.outside_window or not reconciler.workspace.settings.recheck.facts:
        return
    done = reconciler.recheck()
    if done["asked"]:
        log.info("facts_rechecked", asked=done["asked"], answered=done["answered"], held=len(done["held"]))


CHORES: Sequence[Chore] = (
    Chore("freshness", timedelta(minutes=1), _tell_freshness),
    # Four times a day, so that it happens daily though the daemon is started anew each morning.
    Chore("retention", timedelta(hours=6), _retain, alone=True),
    Chore("recheck", timedelta(hours=1), _recheck, alone=True),
)
