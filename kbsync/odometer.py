"""The odometer of a model's line: how many versions since the last rebase, and what they measured. Torch-free.

odometer = read_odometer(ledger, store, model)
"""

from __future__ import annotations

from kbsync.errors import StoreError
from kbsync.ledger import Ledger, VersionRow
from kbsync.strategy import Capacity, Odometer
from kbsync.versions.store import VersionStore

__all__ = ["read_odometer"]


def read_odometer(ledger: Ledger, store: VersionStore, model: str, *, settings: str | None = None) -> Odometer:
    """From HEAD back, parent by parent, to the last rebase or the base. `settings`: the digest with which rebases that
    were rejected are remembered (None: `refused` is not asked for)."""
    with ledger.read() as db:
        path = db.since_rebase(model)
        live, anchor = db.version(model, path[0]), db.version(model, path[-1])
        rejected = db.rejected_rebases(model, settings) if settings is not None else ()
    refused = next((since for since, number in enumerate(path) if number in rejected), None)
    return Odometer(anchor.number, len(path) - 1, _capacity(store, live), _capacity(store, anchor), refused)


def _capacity(store: VersionStore, row: VersionRow) -> Capacity | None:
    """What a version's manifest has; None where it has nothing, or cannot be read (`verify` says so)."""
    if row.manifest_sha256 is None:
        return None
    try:
        found = store.manifest(row.number, row.manifest_sha256).numerics.get("capacity")
    except StoreError:
        return None
    return Capacity.from_json(found) if found else None
