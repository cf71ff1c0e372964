"""The odometer of a model's line: how many versions since the last rebase, and what they measured. Torch-free.

with ledger.read() as db:
    odometer = read_odometer(db, store, model)
"""

from __future__ import annotations

from kbsync.errors import StoreError
from kbsync.ledger import Reader, VersionRow
from kbsync.strategy import Capacity, Odometer
from kbsync.versions.store import VersionStore

__all__ = ["read_odometer"]


def read_odometer(db: Reader, store: VersionStore, model: str) -> Odometer:
    """From HEAD back, parent by parent, to the last rebase or the base."""
    rows = {row.number: row for row in db.versions(model)}
    live = anchor = rows[db.head(model)]
    since = 0
    while anchor.kind not in ("base", "rebase") and anchor.parent is not None:
        anchor, since = rows[anchor.parent], since + 1
    return Odometer(anchor.number, since, _capacity(store, live), _capacity(store, anchor))


def _capacity(store: VersionStore, row: VersionRow) -> Capacity | None:
    """What a version's manifest has; None where it has nothing, or cannot be read (`verify` says so)."""
    if row.manifest_sha256 is None:
        return None
    try:
        found = store.manifest(row.number, row.manifest_sha256).numerics.get("capacity")
    except StoreError:
        return None
    return Capacity.from_json(found) if found else None
