"""What /livez and /readyz say: whether the daemon has to be started again, and whether it can do its work.

Live is asked of the memory alone, so that a database that is down starts nothing again; ready looks at everything that
a pass needs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from kbsync.catalog import Catalog
from kbsync.errors import KbsyncError, place_of
from kbsync.hub import resolve_model
from kbsync.ledger import Ledger
from kbsync.lock import held_by
from kbsync.pulse import Pulse

__all__ = ["Check", "Health"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at: whether it is well, and if not, why."""

    name: str
    ok: bool
    why: str = ""


@dataclass(frozen=True, slots=True)
class Health:
    """Looks at a running daemon. `catalog`: gives the settings, sources and policies that are in force."""

    ledger: Ledger
    pulse: Pulse
    catalog: Callable[[], Catalog]

    def live(self) -> list[Check]:
        """One check per part that beats."""
        stuck = self.pulse.stuck()
        return [
            Check(part, part not in stuck, f"no sign of life for {seconds:.0f} s" if part in stuck else "")
            for part, seconds in self.pulse.since().items()
        ]

    def ready(self) -> list[Check]:
        """One check per thing that a pass needs, and one per policy in force: have its last passes all failed?"""
        phase = self.pulse.phase
        found = [Check("daemon", phase == "running", "" if phase == "running" else f"it is {phase}")]
        found += [_checked("lock", self._lock), _checked("model", self._model)]
        try:
            found += [Check("ledger", ok=True), *self._policies()]
        except Exception as error:
            found.append(Check("ledger", ok=False, why=_why(error)))
        return found

    def _lock(self) -> str:
        holder = held_by(self.catalog().workspace.lock)
        return "" if holder == str(os.getpid()) else f"it is held by process {holder or 'none'}"

    def _model(self) -> str:
        workspace = self.catalog().workspace
        resolve_model(workspace.settings.model, root=workspace.root)
        return ""

    def _policies(self) -> Iterator[Check]:
        with self.ledger.read() as db:
            failures: Mapping[str, int] = db.failures_in_a_row()
        catalog = self.catalog()
        most = catalog.workspace.settings.notify.failures
        for policy in sorted(catalog.policies):
            failed = failures.get(policy, 0)
            why = f"its last {failed} passes failed; kbsync runs --policy {policy}" if failed >= most else ""
            yield Check(f"policy {policy}", not why, why)


def _checked(name: str, look: Callable[[], str]) -> Check:
    try:
        why = look()
    except Exception as error:
        why = _why(error)
    return Check(name, not why, why)


def _why(error: Exception) -> str:
    return error.message if isinstance(error, KbsyncError) else place_of(error)
