"""A version as a loaded model, and the proof that it is what was recorded. Loads torch only when called.

import kbsync
base = kbsync.load_model("my-workspace", version="live")
base.network, base.tokenizer                  # transformers' own objects, weights checked byte for byte
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kbsync.config import Workspace
from kbsync.errors import BaseMismatch, KbsyncError, UsageError
from kbsync.hub import ModelFolder, fingerprint, model_id, resolve_model
from kbsync.ledger import Ledger
from kbsync.ledger.records import VersionRow
from kbsync.versions.store import VersionRecord, VersionStore

if TYPE_CHECKING:
    from kbsync.editor.model import Base

__all__ = ["Versions", "load_model", "verify_workspace"]


def load_model(workspace: str | Path, version: int | Literal["live"] = "live") -> Base:
    """The model of `workspace` (a folder with kbsync.yaml) with the weights of `version`, checked byte for byte.

    Raises ConfigError, ModelError, UsageError (no such version), BaseMismatch, StoreError (a file is not as recorded).
    """
    opened = Workspace.load(Path(workspace))
    ledger = Ledger.open(opened.ledger_url)
    try:
        return Versions.open(opened, ledger).load(version)
    finally:
        ledger.close()


@dataclass(frozen=True, slots=True)
class Versions:
    """The versions of the model that kbsync.yaml names, for reading."""

    workspace: Workspace
    ledger: Ledger
    folder: ModelFolder
    fingerprint: str
    model: str
    store: VersionStore

    @classmethod
    def open(cls, workspace: Workspace, ledger: Ledger) -> Versions:
        """Find the model and its store.

        Raises ModelError where the model is absent, BaseMismatch where its name stood for other weights before.
        """
        folder = resolve_model(workspace.settings.model, root=workspace.root)
        print_ = fingerprint(folder.path)
        model = model_id(folder.name, print_)
        with ledger.read() as db:
            others = [row.fingerprint for row in db.models() if row.name == folder.name and row.id != model]
        if others:
            raise BaseMismatch(
                f"model {folder.name}: its weights are not those that the versions were made on "
                f"({print_[:12]} now, {others[0][:12]} recorded)",
                hint="put the recorded weights back, or give the new model a name of its own in kbsync.yaml",
            )
        return cls(workspace, ledger, folder, print_, model, VersionStore(workspace.data, model))

    def row(self, version: int | Literal["live"] = "live") -> VersionRow | None:
        """What the ledger says of a version; None for version 0 of a model that was never synced.

        Raises UsageError where there is none of that number, or it is not restorable."""
        with self.ledger.read() as db:
            known = any(row.id == self.model for row in db.models())
            if not known and version in ("live", 0):
                return None
            number = db.head(self.model) if version == "live" else version
            rows = {row.number: row for row in db.versions(self.model)} if known else {}
            if number in rows:
                db.require_restorable(self.model, number)
        if number not in rows:
            raise UsageError(f"there is no version {number}", hint="kbsync log lists the versions")
        return rows[number]

    def load(self, version: int | Literal["live"] = "live") -> Base:
        """The base with the version's weights. Raises what `load_version` raises."""
        from kbsync.editor.model import load_base
        from kbsync.versions.export import load_version

        settings, row = self.workspace.settings, self.row(version)
        if row is None or row.manifest_sha256 is None:
            return load_base(
                self.folder.path, fingerprint=self.fingerprint, device=settings.device, dtype=settings.dtype
            )
        manifest = self.store.manifest(row.number, row.manifest_sha256)
        return load_version(
            self.folder.path, manifest, self.store.deltas, fingerprint=self.fingerprint, device=settings.device
        )


def verify_workspace(workspace: Workspace, ledger: Ledger, *, weights: bool = True) -> Iterator[str]:
    """What is wrong, one line each: the ledger's own integrity, every file that a version names, the live weights.

    `weights`: also rebuild the live version on the base and compare its hash with the recorded one (loads the model).
    """
    yield from ledger.check()
    try:
        versions = Versions.open(workspace, ledger)
    except KbsyncError as error:
        yield error.message
        return
    with ledger.read() as db:
        models = db.models()
        records = {
            model.id: [
                VersionRecord(row.number, row.manifest_sha256, tuple(db.active(model.id, row.number)))
                for row in db.versions(model.id)
            ]
            for model in models
        }
        files = {model.id: db.kept_files(model.id) for model in models}
    for model in models:
        store = VersionStore(workspace.data, model.id)
        yield from map(str, store.verify(records[model.id], head=model.head, files=files[model.id]))
    if weights and versions.model in records:
        try:
            versions.load("live")
        except KbsyncError as error:
            yield error.message
