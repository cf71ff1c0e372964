"""Retention carried out, and garbage collection: files that no version needs. Torch-free; for the holder of the writer
lock.

    collect(workspace, ledger, timedelta(hours=1), user="ada", dry=True)    # {"files": [...], "bytes": 123, …}
    retire(workspace, ledger, "old-model", user="ada")           # its versions are no roots any more

A delta that retention gives up is written down in the ledger first (`dropped_delta`) and unlinked then; a crash in
between leaves a file that no version needs.

Roots are the restorable versions of all models. What nothing has touched for a while and no root names goes: deltas,
corrections, manifests, and the target vectors of requests that no version holds, which a later edit would compute
again. Manifests of versions that are not restorable stay: they are small, and say what was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from kbsync.config import Workspace
from kbsync.errors import UsageError
from kbsync.ledger import Ledger, Reader
from kbsync.ledger.writer import Writer
from kbsync.retention import Retention
from kbsync.serving import Versions
from kbsync.versions.store import VersionStore, stray_targets

__all__ = ["collect", "retire", "superfluous"]


@dataclass(frozen=True, slots=True)
class _Model:
    """A model's versions: which there are, which are not restorable any more, what the others need."""

    store: VersionStore
    numbers: frozenset[int]
    lost: tuple[int, ...]
    kept: frozenset[str]
    requests: frozenset[str]


def collect(
    workspace: Workspace, ledger: Ledger, older_than: timedelta, *, user: str, dry: bool = False
) -> dict[str, Any]:
    """Give up what retention allows and remove the files that no version needs any more, of which other ones must be
    untouched for `older_than`. `dry`: only say which they would be.

    `files`, and their `bytes` together; `dropped`: the deltas among them that retention gave up; `versions`: by model,
    those that are not restorable any more.
    """
    dropped: set[Path] = set()
    models = []
    with ledger.write() as db:
        for row in db.models():
            store = VersionStore(workspace.data, row.id)
            sizes, lost = _drop(db, workspace.settings.retention, store, user)
            models.append(_after(db, store, lost))
            dropped.update(map(store.delta_path, sizes))
        if dry:
            db.rollback()
    kept = {path for model in models for path in map(model.store.delta_path, model.kept)}
    dropped -= kept
    found = dropped | set(_orphans(workspace, models, older_than))
    size = sum(path.stat().st_size for path in found if path.exists())
    if not dry:
        for path in found:
            path.unlink(missing_ok=True)
    return {
        "files": sorted(map(str, found)),
        "bytes": size,
        "dropped": sorted(path.stem for path in dropped),
        "versions": {model.store.model: list(model.lost) for model in models if model.lost},
    }


def superfluous(db: Reader, retention: Retention, model: str, now: datetime) -> set[str]:
    """The deltas and corrections of a model that only restorable versions need which retention does not keep."""
    restorable = db.restorable(model)
    pinned = {db.head(model), *db.aliases(model).values(), *db.behind(model).values()}
    kept = restorable & retention.keeps(db.made_at(model), pinned, now)
    if restorable <= kept:
        return set()
    files = db.files(model)
    needed = {delta for number in kept for delta in files[number]}
    return {delta for number in restorable - kept for delta in files[number]} - needed


def _drop(
    db: Writer, retention: Retention, store: VersionStore, user: str
) -> tuple[Mapping[str, int], tuple[int, ...]]:
    """Give up what is superfluous: its sizes, and the versions that are not restorable any more."""
    model, before = store.model, db.restorable(store.model)
    going = superfluous(db, retention, model, db.now)
    if not going:
        return {}, ()
    sizes = {delta: _size(store.delta_path(delta)) for delta in going}
    db.drop_deltas(model, sizes, user=user, reason=f"{retention.versions} versions, {retention.days:g} days")
    return sizes, tuple(sorted(before - db.restorable(model)))


def _after(db: Reader, store: VersionStore, lost: tuple[int, ...]) -> _Model:
    """What has to be there once that is given up."""
    model, kept = store.model, db.kept_files(store.model)
    requests = {fact.request.digest for delta in kept for fact in db.delta_facts(model, delta)}
    return _Model(store, frozenset(db.made_at(model)), lost, frozenset(kept), frozenset(requests))


def _orphans(workspace: Workspace, models: Iterable[_Model], older_than: timedelta) -> Iterable[Path]:
    """Files that no version needs, untouched for so long."""
    models = list(models)
    live = {delta for model in models for delta in model.kept}
    requests = {digest for model in models for digest in model.requests}
    yield from stray_targets(workspace.targets, requests, older_than=older_than)
    for model in models:
        yield from model.store.orphans(live, model.numbers, older_than=older_than)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


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
        for alias in db.pinned(found[0]):
            db.note_promotion(found[0], alias, "end", None, user=user, reason=reason or "retired")
        db.retire(found[0], user=user, reason=reason or "retired")
        aliases = db.aliases(found[0])
    store = VersionStore(workspace.data, found[0])
    store.write_head(0)
    store.write_aliases(aliases)
    return {"model": found[0]}
