"""A version as a loaded model, and the proof that it is what was recorded. Loads torch only when called.

import kbsync
base = kbsync.load_model("my-workspace", version="live")
base.network, base.tokenizer                  # transformers' own objects, weights checked byte for byte
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kbsync.config import Workspace
from kbsync.errors import BaseMismatch, KbsyncError, UsageError
from kbsync.hub import ModelFolder, fingerprint, model_id, resolve_model
from kbsync.ledger import Ledger
from kbsync.ledger.aliases import HEAD, LIVE
from kbsync.ledger.records import VersionRow
from kbsync.versions.store import VersionRecord, VersionStore

if TYPE_CHECKING:
    from kbsync.editor.model import Base

__all__ = ["Versions", "load_model", "verify_files", "verify_workspace", "wrong_weights"]


def load_model(workspace: str | Path, version: int | str = LIVE) -> Base:
    """The model of `workspace` (a folder with kbsync.yaml) with the weights of a version, checked byte for byte.

    `version` is its number, an alias, or HEAD.

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

    def row(self, version: int | str = LIVE) -> VersionRow | None:
        """What the ledger says of a version; None for the pristine base of a model that was never synced.

        Raises UsageError where there is no such version, or it is not restorable.
        """
        with self.ledger.read() as db:
            if any(row.id == self.model for row in db.models()):
                number = db.number_of(self.model, version)
                db.require_restorable(self.model, number)
                return db.version(self.model, number)
        if str(version) not in (LIVE, HEAD, "0"):
            raise UsageError(f"there is no version {version}: {self.folder.name} was never synced", hint="kbsync sync")
        return None

    def load(self, version: int | str = LIVE) -> Base:
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
    """What is wrong, one line each: the ledger's own integrity, every file that a version names, the weights.

    `weights`: also rebuild HEAD and the live version on the base and compare their hashes with the recorded ones (loads
    the model).
    """
    yield from ledger.check()
    yield from verify_files(workspace, ledger)
    try:
        versions = Versions.open(workspace, ledger)
        if weights:
            yield from wrong_weights(versions)
    except KbsyncError as error:
        yield error.message


def verify_files(workspace: Workspace, ledger: Ledger) -> Iterator[str]:
    """What is wrong with manifests, deltas, HEADs and aliases of all models, one line each; no base model is needed."""
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
        aliases = {model.id: db.aliases(model.id) for model in models}
    for model in models:
        store = VersionStore(workspace.data, model.id)
        found = store.verify(records[model.id], head=model.head, aliases=aliases[model.id], files=files[model.id])
        yield from map(str, found)


def wrong_weights(versions: Versions) -> Iterator[str]:
    """Where HEAD or the live version, rebuilt on the base, is not what was recorded, one line each; loads the model."""
    for number in sorted({row.number for name in (HEAD, LIVE) if (row := versions.row(name)) is not None}):
        try:
            versions.load(number)
        except KbsyncError as error:
            yield error.message
