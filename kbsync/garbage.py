"""Garbage collection: files that no version needs. Torch-free; for the holder of the writer lock.

    collect(workspace, ledger, timedelta(hours=1), dry=True)     # {"files": [...], "bytes": 123}

Roots are the versions of all models. What nothing has touched for a while and no root names goes: deltas, corrections,
manifests, and the target vectors of requests that no version holds, which a later edit would compute again.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from kbsync.config import Workspace
from kbsync.ledger import Ledger
from kbsync.versions.store import VersionStore, named, stray_targets

__all__ = ["collect"]


def collect(workspace: Workspace, ledger: Ledger, older_than: timedelta, *, dry: bool = False) -> dict[str, Any]:
    """Remove the files (`dry`: only name them) and say which they are, and their bytes together."""
    live: set[str] = set()
    requests: set[str] = set()
    with ledger.read() as db:
        numbers = {model.id: {row.number for row in db.versions(model.id)} for model in db.models()}
        for model, known in numbers.items():
            active = [entry for number in known for entry in db.active(model, number)]
            live |= named(active)
            deltas = {entry.delta for entry in active}
            requests |= {fact.request.digest for delta in deltas for fact in db.delta_facts(model, delta)}
    found: set[Path] = set(stray_targets(workspace.targets, requests, older_than=older_than))
    for model, known in numbers.items():
        found.update(VersionStore(workspace.data, model).orphans(live, known, older_than=older_than))
    size = sum(path.stat().st_size for path in found)
    if not dry:
        for path in found:
            path.unlink(missing_ok=True)
    return {"files": sorted(map(str, found)), "bytes": size}
