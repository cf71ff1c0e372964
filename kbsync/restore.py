"""Restoring a backup: a new workspace, checked before it is there. Torch-free until the weights are compared.

    restore(Path("backups/2026-11-25"), Path("/srv/kbsync"))

Every file is compared with the index; what the index does not name is left alone. The new workspace keeps its ledger
and its files in `data/` of its own, wherever those of the old one were. Versions whose deltas are not in the backup are
not restorable in it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from kbsync.backup import Index, check_backup, made_whole, read_entry, written
from kbsync.catalog import load_catalog
from kbsync.config import CONFIG, Workspace
from kbsync.errors import KbsyncError, ModelError, StoreError, UsageError
from kbsync.ledger import Ledger
from kbsync.ledger.aliases import LIVE
from kbsync.progress import Progress, silent
from kbsync.serving import Versions, verify_files, wrong_weights
from kbsync.versions.store import VersionStore

__all__ = ["restore"]

ELSEWHERE = ("data", "ledger")
"""Keys of kbsync.yaml that say where the old workspace had its files: the new one has its own."""
_ELSEWHERE = re.compile(rf"""^["']?({"|".join(ELSEWHERE)})["']?[ \t]*:.*(?:\n[ \t]+\S.*)*""", re.MULTILINE)
NOT_SAVED = "not in the backup"


def restore(backup: Path, root: Path, *, user: str, progress: Progress = silent) -> dict[str, Any]:
    """Make the workspace `root` of a backup: all of it, or nothing.

    `weights`: the live weights' hash, as rebuilt on the base model; None where that is not on this machine. `left_out`:
    what the backup lacks, and why; `problems`: what `kbsync check` says of the new workspace. Raises UsageError where
    `root` is not empty or `backup` is none, StoreError and LedgerError where the backup is damaged or the weights are
    not those recorded.
    """
    root = root.absolute()
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UsageError(f"{root} is not empty", hint="restore into a folder that does not exist: --workspace DIR")
    if named := [key for key in ELSEWHERE if f"KBSYNC_{key.upper()}" in os.environ]:
        variable = f"KBSYNC_{named[0].upper()}"
        raise UsageError(f"{variable} is set: it would lead to another workspace", hint=f"unset {variable}")
    index = check_backup(backup, progress)
    with made_whole(root) as made:
        for done, entry in enumerate(index.files, 1):
            written(read_entry(backup, entry), made / entry.path)
            progress("restore", done, len(index.files))
        changed = _own_places(made / CONFIG)
        workspace = Workspace.load(made)
        if workspace.data != made / "data" or workspace.settings.ledger is not None:
            raise StoreError(f"{backup / CONFIG}: data or ledger leads elsewhere", hint="give each a line of its own")
        with Ledger.open(workspace.ledger_url, create=False) as ledger:
            lost = _settle(workspace, ledger, index, user)
            weights = _checked(workspace, ledger, index.left_out)
    return {
        "workspace": str(root),
        "files": len(index.files),
        "made_at": index.made_at,
        "not_restorable": lost,
        "weights_sha256": weights,
        "changed": changed,
        "left_out": dict(index.left_out),
        "problems": _problems(root),
    }


def _own_places(config: Path) -> list[str]:
    """Make comments of the keys in kbsync.yaml that lead out of the new workspace; which."""
    text, found = config.read_text(encoding="utf-8"), []

    def comment(match: re.Match[str]) -> str:
        found.append(match[1])
        return "\n".join(f"# {line}" for line in match[0].split("\n"))

    changed = _ELSEWHERE.sub(comment, text)
    if found:
        config.unlink()
        written([changed.encode()], config)
    return sorted(found)


def _settle(workspace: Workspace, ledger: Ledger, index: Index, user: str) -> dict[str, list[int]]:
    """Write down which deltas are not there, and HEADs; by model, the versions that are not restorable."""
    lost = {}
    with ledger.write() as db:
        models = db.models()
        for model in models:
            store = VersionStore(workspace.data, model.id)
            missing = [delta for delta in sorted(db.kept_files(model.id)) if not store.delta_path(delta).exists()]
            if missing:
                db.drop_deltas(model.id, dict.fromkeys(missing, 0), user=user, reason=NOT_SAVED)
            lost[model.id] = sorted(db.made_at(model.id).keys() - db.restorable(model.id))
        db.audit(user, "restore", {"made_at": index.made_at.isoformat(), "kbsync": index.kbsync})
        aliases = {model.id: db.aliases(model.id) for model in models}
    for model in models:
        store = VersionStore(workspace.data, model.id)
        store.write_head(model.head)
        store.write_aliases(aliases[model.id])
    return {model: numbers for model, numbers in lost.items() if numbers}


def _problems(root: Path) -> list[str]:
    """What is missing of what the new workspace declares, or looks like a mistake."""
    try:
        workspace = Workspace.load(root)
        found = load_catalog(workspace).check()
        if (preset := workspace.settings.preset or "").endswith(".yaml"):
            workspace.preset(preset)
    except KbsyncError as error:
        return [error.message]
    return found


def _checked(workspace: Workspace, ledger: Ledger, left_out: Collection[str]) -> str | None:
    """The hash of the live weights. Raises StoreError where anything is not as recorded, but for the manifests of
    versions that are not served which the backup says it lacks."""
    with ledger.read() as db:
        served = {model.id: {model.head, db.aliases(model.id)[LIVE]} for model in db.models()}
        lost = [model for model, numbers in served.items() if not numbers <= db.restorable(model)]
    stores = {model: VersionStore(workspace.data, model) for model in served}
    needed = {stores[model].manifest_path(number) for model, numbers in served.items() for number in numbers}
    lacking = tuple(f"{path}: " for path in {workspace.root / name for name in left_out} - needed)
    problems = [*ledger.check(), *verify_files(workspace, ledger)]
    for problem in problems:
        if not problem.startswith(lacking):
            raise StoreError(f"the backup is not whole: {problem}", hint="take another backup")
    if lost:
        raise StoreError(f"the backup lacks deltas of the live version of {lost[0]}", hint="take another backup")
    try:
        versions = Versions.open(workspace, ledger)
    except ModelError:
        return None
    if problems := list(wrong_weights(versions)):
        raise StoreError(f"the backup is not whole: {problems[0]}", hint="take another backup")
    row = versions.row(LIVE)
    return row.weights_sha256 if row else None
