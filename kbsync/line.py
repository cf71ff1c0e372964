"""One model's line of versions: carry a set of live columns and new requests to a published version.

    live columns + requests ─job─▶ child process ─delta, probe─▶ gate ─▶ manifest ─▶ ledger row = publication ─▶ HEAD

The row in the ledger is what publishes: what the files say is checked against it, HEAD is derived from it. A crash
before it leaves an unreferenced file or two; a crash after it leaves a HEAD that the next start puts right.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

import structlog

from kbsync.child import run_edit
from kbsync.config import Workspace
from kbsync.editor.job import ControlFile, EditJob, EditResult
from kbsync.editor.preset import Preset
from kbsync.errors import Cancelled, StoreError
from kbsync.facts import Applied, FactKey, Hold
from kbsync.gate import shortfalls
from kbsync.hub import ModelFolder
from kbsync.ledger import Ledger, Reader
from kbsync.ledger.records import PublishedVersion
from kbsync.plan import PlannedEdit
from kbsync.policy import Gate
from kbsync.progress import Progress, silent
from kbsync.serving import Versions
from kbsync.versions.manifest import ActiveDelta, Manifest, ManifestFact
from kbsync.versions.store import VersionStore

__all__ = ["Edit", "Line", "Outcome"]

RETAINED_SAMPLE = 20
"""Live facts of earlier versions that are probed again with every version: the same ones while they live."""
HOOK_SECONDS = 600

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Edit:
    """What the next version is to hold: the live columns that stay, and the edits to add."""

    kind: Literal["edit", "revert"]
    run_id: int
    keep: Mapping[FactKey, Applied]
    edits: Sequence[PlannedEdit] = ()
    skip_known: Collection[str] = ()
    controls: Sequence[ControlFile] = ()
    holds: Sequence[Hold] = ()
    """Placed with the publication: what a revert must keep the next pass from putting back."""
    releases: Collection[FactKey] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an edit. `version` is None where nothing changed in the weights (all known, or all held)."""

    result: EditResult
    version: int | None
    held: tuple[Hold, ...] = ()
    rejected: tuple[str, ...] = ()


@dataclass(slots=True)
class Line:
    """The versions of the model that kbsync.yaml names. Needs the workspace's writer lock for all that writes."""

    workspace: Workspace
    ledger: Ledger
    folder: ModelFolder
    fingerprint: str
    model: str
    preset: Preset
    store: VersionStore
    user: str
    progress: Progress = silent
    cancelled: threading.Event = field(default_factory=threading.Event)
    run_edit: Callable[..., EditResult] = run_edit

    @classmethod
    def open(cls, workspace: Workspace, ledger: Ledger, *, user: str) -> Line:
        """Find the model, register it (version 0 is the pristine base), put HEAD right.

        Raises ModelError (absent, no preset), BaseMismatch where this name stood for other weights before.
        """
        found = Versions.open(workspace, ledger)
        folder, model, store = found.folder, found.model, found.store
        with ledger.write() as db:
            db.register_model(model, name=folder.name, fingerprint=found.fingerprint, path=str(folder.path))
            head = db.head(model)
        store.write_head(head)
        preset = workspace.preset(folder.name)
        return cls(workspace, ledger, folder, found.fingerprint, model, preset, store, user)

    @property
    def settings_digest(self) -> str:
        """sha256 of what a version depends on beside its facts: a rejected plan may be tried again once it changes."""
        return self.preset.digest

    def make(self, edit: Edit, gate: Gate | None) -> Outcome:
        """Edit in a child process, put the probe report before the gate (None: all passes), publish.

        Raises Cancelled where HEAD moved meanwhile or the edit was cancelled, and the child's errors; then nothing is
        published. A version that falls short of the gate is not published either: `rejected` says why.
        """
        with self.ledger.read() as db:
            head = db.head(self.model)
            row = db.version(self.model, head)
            active = db.active(self.model, head)
            applied = db.applied(self.model, head)
            same = None if edit.edits else self._same(db, edit.keep)
        job = self._job(edit, active, applied, row.weights_sha256).model_copy(update={"same": same})
        result = self.run_edit(job, progress=self.progress, cancelled=self.cancelled)
        held = self._held(edit, result, applied)
        if result.weights_sha256 == (row.weights_sha256 or result.base_weights_sha256):
            self._note(edit, result, held)
            return Outcome(result, None, held)
        if gate is not None and (reasons := shortfalls(result.probe, gate)):
            return Outcome(result, None, held, tuple(reasons))
        number = self._publish(edit, result, held, head)
        return Outcome(result, number, held)

    def _same(self, db: Reader, keep: Mapping[FactKey, Applied]) -> tuple[ActiveDelta, ...] | None:
        """The active deltas of an earlier version that holds just the columns `keep`: its very weights come back."""
        wanted = {(fact.delta, fact.column) for fact in keep.values()}
        for version in reversed(db.versions(self.model)):
            held = db.applied(self.model, version.number).values()
            if {(fact.delta, fact.column) for fact in held} == wanted:
                return tuple(db.active(self.model, version.number))
        return None

    def _job(
        self,
        edit: Edit,
        active: Sequence[ActiveDelta],
        applied: Mapping[FactKey, Applied],
        weights: str | None,
    ) -> EditJob:
        requests = {planned.request.digest: planned.request for planned in edit.edits}
        replaced = {planned.request.key for planned in edit.edits}
        staying = {key: fact for key, fact in applied.items() if key in edit.keep or key in replaced}
        live = {**staying, **edit.keep}
        settings = self.workspace.settings
        retained = sorted((fact.request for key, fact in edit.keep.items()), key=lambda request: request.digest)
        return EditJob(
            model_path=str(self.folder.path),
            fingerprint=self.fingerprint,
            device=settings.device,
            dtype=settings.dtype,
            max_gpu_memory=settings.max_gpu_memory,
            preset=self.preset,
            executor=settings.executor,
            deltas=str(self.workspace.deltas),
            targets=str(self.workspace.targets),
            active=tuple(active),
            weights_sha256=weights,
            live=_columns(active, live.values()),
            supersedes=_superseded(edit, applied),
            requests=tuple(request.to_json() for request in requests.values()),
            skip_known=tuple(edit.skip_known),
            retained=tuple(request.to_json() for request in retained[:RETAINED_SAMPLE]),
            controls=tuple(edit.controls),
            synced_subjects=tuple(sorted({fact.request.subject for fact in applied.values()})),
        )

    def _held(self, edit: Edit, result: EditResult, applied: Mapping[FactKey, Applied]) -> tuple[Hold, ...]:
        evidence = {failed.digest: failed.evidence for failed in result.failed}
        return tuple(
            Hold(
                key=planned.request.key,
                frozen=applied.get(planned.request.key),
                held_out=planned.object_id,
                reason="probe",
                evidence=evidence[planned.request.digest],
            )
            for planned in edit.edits
            if planned.request.digest in evidence
        )

    def _note(self, edit: Edit, result: EditResult, held: Sequence[Hold]) -> None:
        """Record what was learned where the weights stay as they are."""
        with self.ledger.write() as db:
            for hold in (*held, *edit.holds):
                db.hold(self.model, hold, run_id=edit.run_id)
            db.release(self.model, edit.releases)
            db.note_known(self.fingerprint, result.known)

    def _publish(self, edit: Edit, result: EditResult, held: Sequence[Hold], head: int) -> int:
        facts = _new_facts(edit, result)
        with self.ledger.read() as db:
            number = 1 + max(version.number for version in db.versions(self.model))
        manifest = self._manifest(edit, result, facts, number, head)
        digest = self.store.write_manifest(manifest)
        with self.ledger.write() as db:
            if (now := db.head(self.model)) != head:
                raise Cancelled(f"HEAD moved from version {head} to {now} during the edit", hint="kbsync sync")
            db.set_weights(self.model, 0, result.base_weights_sha256)
            db.publish(
                PublishedVersion(
                    model=self.model,
                    number=number,
                    parent=head,
                    kind=edit.kind,
                    run_id=edit.run_id,
                    manifest_sha256=digest,
                    weights_sha256=result.weights_sha256,
                    active=result.active,
                    facts=[applied for _, applied in facts],
                    user=self.user,
                    reason=edit.reason,
                    probe=result.probe,
                )
            )
            for hold in (*held, *edit.holds):
                db.hold(self.model, hold, run_id=edit.run_id, version=number)
            db.release(self.model, edit.releases)
            db.note_known(self.fingerprint, result.known)
        try:
            self.store.write_head(number)
        except StoreError as error:  # published all the same: the next start writes HEAD anew from the ledger
            log.error("head_not_written", version=number, problem=error.message)
        self.announce(number)
        return number

    def _manifest(
        self, edit: Edit, result: EditResult, facts: Sequence[tuple[PlannedEdit, Applied]], number: int, head: int
    ) -> Manifest:
        return Manifest(
            model=self.model,
            number=number,
            parent=head,
            kind=edit.kind,
            base_fingerprint=self.fingerprint,
            modules=result.modules,
            dtype=result.dtype,
            active=result.active,
            weights_sha256=result.weights_sha256,
            facts=tuple(
                ManifestFact(
                    delta=applied.delta,
                    column=applied.column,
                    request=applied.request.to_json(),
                    object_id=applied.object_id,
                    source=planned.source,
                    origin=planned.origin,
                )
                for planned, applied in facts
            ),
            settings=self.preset.model_dump(mode="json"),
            probe=result.probe,
            numerics=result.numerics,
            libraries=result.libraries,
            created_at=datetime.now(UTC),
            run_id=edit.run_id,
        )

    def announce(self, number: int) -> None:
        """Run `on_publish`, version and workspace in its environment. Its failure is logged, never fatal."""
        log.info("version_published", model=self.model, version=number)
        command = self.workspace.settings.on_publish
        if not command:
            return
        environment = {
            **os.environ,
            "KBSYNC_MODEL": self.model,
            "KBSYNC_VERSION": str(number),
            "KBSYNC_WORKSPACE": str(self.workspace.root),
        }
        try:
            done = subprocess.run(  # noqa: S602 - the owner's own command line from kbsync.yaml
                command, shell=True, env=environment, cwd=self.workspace.root, timeout=HOOK_SECONDS, capture_output=True
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            log.error("on_publish_failed", version=number, problem=str(error))
            return
        if done.returncode:
            said = done.stderr[-500:].decode(errors="replace")
            log.error("on_publish_failed", version=number, status=done.returncode, stderr=said)


def _columns(active: Sequence[ActiveDelta], live: Collection[Applied]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The live columns by delta: those of `active` in its order, then deltas that come back, by name."""
    columns: dict[str, set[int]] = {entry.delta: set() for entry in active}
    for fact in sorted(live, key=lambda fact: fact.delta):
        columns.setdefault(fact.delta, set()).add(fact.column)
    return tuple((delta, tuple(sorted(kept))) for delta, kept in columns.items() if kept)


def _superseded(edit: Edit, applied: Mapping[FactKey, Applied]) -> dict[str, tuple[str, int]]:
    """Digest of a new request -> the column of the fact that it replaces, unless another live fact shares it."""
    shared = {(fact.delta, fact.column) for fact in edit.keep.values()}
    return {
        planned.request.digest: (old.delta, old.column)
        for planned in edit.edits
        if (old := applied.get(planned.request.key)) is not None and (old.delta, old.column) not in shared
    }


def _new_facts(edit: Edit, result: EditResult) -> list[tuple[PlannedEdit, Applied]]:
    """Each planned edit that got a column, with it. Two keys with one and the same request share theirs."""
    column = {digest: index for index, digest in enumerate(result.columns)}
    return [
        (planned, Applied(planned.request, planned.object_id, result.delta or "", column[planned.request.digest]))
        for planned in edit.edits
        if planned.request.digest in column
    ]
