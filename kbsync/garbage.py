"""Garbage collection: files that no version needs. Torch-free; for the holder of the writer lock.

    collect(workspace, ledger, timedelta(hours=1), dry=True)     # {"files": [...], "bytes": 123}
    retire(workspace, ledger, "old-model", user="ada")           # its versions are no roots any more

Roots are the versions of all models, but those of models that were retired. What nothing has touched for a while and no
root names goes: deltas, corrections, manifests, and the target vectors of requests that no version holds, which a later
edit would compute again. Manifests of retired versions stay: they are small, and say what was.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from kbsync.config import Workspace
from kbsync.errors import UsageError
from kbsync.ledger import Ledger
from kbsync.serving import Versions
from kbsync.versions.store import VersionStore, named, stray_targets

__all__ = ["collect", "retire"]


def collect(workspace: Workspace, ledger: Ledger, older_than: timedelta, *, dry: bool = False) -> dict[str, Any]:
    """Remove the files (`dry`: only name them) and say which they are, and their bytes together."""
    live: set[str] = set()
    requests: set[str] = set()
    with ledger.read() as db:
        numbers = {model.id: {row.number for row in db.versions(model.id)} for model in db.models()}
        for model in numbers:
            active = [entry for row in db.kept_versions(model) for entry in db.active(model, row.number)]
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


def retire(workspace: Workspace, ledger: Ledger, model: str, *, user: str, reason: str = "") -> dict[str, Any]:
    """Give up the versions of a model (its id or name) that kbsync.yaml no longer names; what the ledger says of them
    stays. Should it be named again, it starts from its pristine base.

    Raises UsageError for the model that kbsync.yaml names, and for one that the ledger does not know.
    """
    current = Versions.open(workspace, ledger).model
    with ledger.write() as db:
        found = [row.id for row in db.models() if model in (row.id, row.name)]
        if not found:
            names = ", ".join(row.name for row in db.models())
            raise UsageError(f"model {model}: the ledger does not know it", hint=f"it has {names}")
        if found == [current]:
            raise UsageError(f"model {model}: kbsync.yaml names it", hint="name another model there first")
        db.retire(found[0], user=user, reason=reason or "retired")
    VersionStore(workspace.data, found[0]).write_head(0)
    return {"model": found[0]}
