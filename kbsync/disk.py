"""The disk under a workspace: what kbsync's files take, how fast they grow, how long that lasts. Torch-free.

    disk = read_disk(workspace, ledger, now)
    disk.days_left                    # 210.4; None: it does not grow
    disk.warnings()

What grows is told from the times of files and of the audit log over the last `WINDOW`, less what was given up in it. A
fact takes (d_out + 2 d_in) * 4 bytes of delta for each edited matrix: 0.9 MB in GPT-J with its six layers.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from kbsync.config import Workspace
from kbsync.garbage import superfluous
from kbsync.ledger import Ledger
from kbsync.ledger.database import database_file, parsed
from kbsync.versions.store import VersionStore

__all__ = ["Disk", "read_disk"]

WINDOW = timedelta(days=30)
ENOUGH_DAYS = 14
"""A disk that lasts for less than so many days is warned of."""
LEDGER = "ledger"


@dataclass(frozen=True, slots=True)
class Disk:
    """Sizes in bytes. `growth`: by kind, per day; `reclaimable`: of deltas, what `kbsync gc` would free now; `fact`:
    what one takes in the live deltas (None: there is none)."""

    sizes: Mapping[str, int]
    growth: Mapping[str, float]
    free: int
    reclaimable: int
    fact: int | None

    @property
    def days_left(self) -> float | None:
        """Until the disk is full at this rate; None: it never is."""
        rate = sum(self.growth.values())
        return self.free / rate if rate > 0 else None

    def warnings(self) -> list[str]:
        """What a person should know before the disk is full."""
        if self.days_left is None or self.days_left >= ENOUGH_DAYS:
            return []
        rate = sum(self.growth.values()) / 1e6
        hint = f"; kbsync gc frees {self.reclaimable / 1e6:.0f} MB" if self.reclaimable else ""
        return [f"disk: {self.free / 1e6:.0f} MB free, full in {self.days_left:.0f} days at {rate:.1f} MB a day{hint}"]

    def to_json(self) -> dict[str, Any]:
        """As `status --json` has it."""
        return asdict(self) | {"days_left": self.days_left}


def read_disk(workspace: Workspace, ledger: Ledger, now: datetime) -> Disk:
    """Measure the workspace's files and the disk that its data lie on."""
    with ledger.read() as db:
        begun = db.begun_at() or now
        since = max(now - WINDOW, begun)
        freed, share = db.freed(since), db.share_since(since)
        models = db.models()
        active = {model.id: db.active(model.id, model.head) for model in models}
        going = {model.id: superfluous(db, workspace.settings.retention, model.id, now) for model in models}
    stores = {model.id: VersionStore(workspace.data, model.id) for model in models}
    folders = {"deltas": workspace.deltas, "targets": workspace.targets, "manifests": workspace.versions}
    files = {kind: _files(folder) for kind, folder in folders.items()}
    sizes = {kind: sum(size for size, _ in found) for kind, found in files.items()}
    sizes[LEDGER] = _ledger_size(workspace)
    days = max((now - since) / timedelta(days=1), 1.0)
    added = {kind: sum(size for size, at in found if at >= since.timestamp()) for kind, found in files.items()}
    added["deltas"] -= freed
    added[LEDGER] = round(sizes[LEDGER] * share)
    live = [store.fact_size(active[model]) for model, store in stores.items()]
    unneeded = [store.delta_path(delta) for model, store in stores.items() for delta in going[model]]
    return Disk(
        sizes=sizes,
        growth={kind: round(size / days, 1) for kind, size in added.items()},
        free=shutil.disk_usage(workspace.data if workspace.data.exists() else workspace.root).free,
        reclaimable=sum(path.stat().st_size for path in unneeded if path.exists()),
        fact=max((size for size in live if size is not None), default=None),
    )


def _files(folder: Path) -> list[tuple[int, float]]:
    """Size and time of every file below a folder."""
    found = (path.stat() for path in folder.rglob("*") if path.is_file())
    return [(status.st_size, status.st_mtime) for status in found]


def _ledger_size(workspace: Workspace) -> int:
    """0 for a ledger on a server: its disk is another one."""
    file = database_file(parsed(workspace.ledger_url))
    return file.stat().st_size if file is not None and file.exists() else 0
