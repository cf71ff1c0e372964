"""One model's line of versions: carry a set of live columns and new requests to a published version.

    live columns + requests ─job─▶ child process ─delta, probe─▶ gate ─▶ manifest ─▶ ledger row = publication ─▶ HEAD

The row in the ledger is what publishes: what the files say is checked against it, HEAD is derived from it. A crash
before it leaves an unreferenced file or two; a crash after it leaves a HEAD that the next start puts right.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import structlog

from kbsync import hook
from kbsync.child import run_edit
from kbsync.config import Workspace
from kbsync.edit import Edit, Outcome, Tried, anew, columns, held_facts, new_facts, staying_facts, superseded
from kbsync.editor.job import EditJob, EditResult
from kbsync.editor.preset import Preset
from kbsync.errors import Cancelled, StoreError
from kbsync.facts import Applied, EditRequest, FactKey, Hold
from kbsync.gate import Terms
from kbsync.hub import ModelFolder
from kbsync.ledger import Ledger, Reader
from kbsync.ledger.aliases import LIVE
from kbsync.ledger.records import PublishedVersion
from kbsync.ledger.writer import Writer
from kbsync.odometer import read_odometer
from kbsync.plan import PlannedEdit, carried
from kbsync.policy import Gate
from kbsync.progress import Progress, silent
from kbsync.serving import Versions
from kbsync.strategy import Odometer, Strategy, rebase_due
from kbsync.timing import timed
from kbsync.versions.files import require_space
from kbsync.versions.manifest import ActiveDelta, Manifest, ManifestFact
from kbsync.versions.store import VersionStore

__all__ = ["Judge", "Line"]

RETAINED_SAMPLE = 40
"""Live facts of earlier versions that are probed again with every version: the same ones while they live."""
HOOK_SECONDS = 600
ROOM = 2
"""How many times its size must be free for a delta: target vectors, corrections and the ledger grow beside it."""
POINTING = threading.Lock()
"""Held by who writes HEAD and the aliases: a promotion does not wait for an edit, and both write them."""

Judge = Callable[[Mapping[str, Any], Sequence[EditRequest]], Sequence[str]]
"""Why a version with this probe report on these requests may not be published; empty: it may."""

log = structlog.get_logger()


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
    watched: Callable[[Reader], Sequence[EditRequest]] = lambda _db: ()
    """The requests without an edit because the base answers them: each version is asked, too."""
    gates: Mapping[str, Gate] = field(default_factory=dict)
    """What each policy's gate asks of a version."""

    @classmethod
    def open(cls, workspace: Workspace, ledger: Ledger, *, user: str) -> Line:
        """Find the model, register it (version 0 is the pristine base), put HEAD and aliases right.

        Raises ModelError (absent, no preset), BaseMismatch where this name stood for other weights before.
        """
        found = Versions.open(workspace, ledger)
        folder, model, store = found.folder, found.model, found.store
        with ledger.write() as db:
            db.register_model(model, name=folder.name, fingerprint=found.fingerprint, path=str(folder.path))
        preset = workspace.preset(folder.name)
        line = cls(workspace, ledger, folder, found.fingerprint, model, preset, store, user)
        line.point()
        return line

    @property
    def terms(self) -> Terms:
        """What a version depends on beside its facts: a rejected plan may be tried again once it changes."""
        return Terms(self.preset.digest, self.strategy.model_dump(mode="json"), self.gates)

    @property
    def strategy(self) -> Strategy:
        """How versions of this model are made."""
        return self.workspace.settings.strategy

    def odometer(self) -> Odometer:
        """How far HEAD is from the last rebase."""
        return read_odometer(self.ledger, self.store, self.model, settings=self.terms.rebase)

    def rebase_due(self, leaving: Collection[FactKey]) -> str | None:
        """Why the version that takes these keys' facts out of HEAD is to be a rebase; None: it is incremental."""
        with self.ledger.read() as db:
            applied = db.applied(self.model, db.head(self.model))
        live, removes = len(applied), any(key in applied for key in leaving)
        return rebase_due(
            self.strategy,
            self.odometer(),
            live=live,
            whole=self.stored_whole(leaving),
            grown=removes and self.preset.weight_at(live) > self.preset.covariance_weight,
        )

    def stored_whole(self, leaving: Collection[FactKey]) -> bool:
        """Whether a delta that one of these keys' facts would have to leave has no column per fact: its own, and those
        inserted after it, which were solved for with it in place."""
        with self.ledger.read() as db:
            head = db.head(self.model)
            applied, active = db.applied(self.model, head), db.active(self.model, head)
        moving = {applied[key].delta for key in leaving if key in applied}
        first = next((index for index, entry in enumerate(active) if entry.delta in moving), len(active))
        return any(self.store.is_whole(entry.delta) for entry in active[first:])

    def make(self, edit: Edit, judge: Judge | None) -> Outcome:
        """Edit in a child process, put the probe report before the judge (None: all passes), publish.

        Raises what `try_out` and `settle` raise; then nothing is published. A version that falls short of the gate is
        not published either: `rejected` says why.
        """
        return self.settle(self.try_out(edit, judge))

    def try_out(self, edit: Edit, judge: Judge | None) -> Tried:
        """Edit in a child process and put the probe report before the judge (None: all passes). Nothing is published.

        A rebase also falls short where it loses more of the facts that HEAD answers than `strategy.min_retention`
        allows. Raises Cancelled where the edit was cancelled, and the child's errors.
        """
        with self.ledger.read() as db:
            head = db.head(self.model)
            row = db.version(self.model, head)
            if edit.kind == "rebase":
                edits = [*carried(edit.keep, db.facts()), *edit.edits]
                edit = replace(edit, edits=sorted(edits, key=lambda planned: planned.request.key))
            job = self._job(edit, db, head, row.weights_sha256)
            applied, holds = db.applied(self.model, head), db.holds(self.model)
        self._require_room(job)
        result = self.run_edit(job, progress=self.progress, cancelled=self.cancelled)
        facts = new_facts(edit, result)
        inserted = {fact.request.key: fact for _, fact in facts}
        staying = inserted if edit.kind == "rebase" else staying_facts(applied, result.active)
        reasons = self._losses(edit, result) if edit.kind == "rebase" else []
        same = not reasons and result.weights_sha256 == (row.weights_sha256 or result.base_weights_sha256)
        if judge is not None and not same:
            reasons += judge(result.probe, [planned.request for planned, _ in facts])
        if reasons:
            staying = {} if edit.kind == "rebase" else applied
        held = () if reasons and edit.kind == "rebase" else held_facts(edit, result, staying, holds)
        return Tried(edit, result, head, facts, staying, held, tuple(reasons), same)

    def settle(self, tried: Tried) -> Outcome:
        """Publish what was tried, or only record what was learned where the weights stay as they are.

        Raises Cancelled where HEAD moved meanwhile, StoreError where the disk refuses.
        """
        edit, result, held = tried.edit, tried.result, tried.held
        if tried.rejected:
            return Outcome(result, None, held, tried.rejected)
        if tried.same:
            self._note(edit, result, held, tried.head)
            return Outcome(result, None, held)
        with timed(result.seconds, "publish"):
            number = self._publish(edit, result, held, tried.facts, tried.head)
        return Outcome(result, number, held)

    def _require_room(self, job: EditJob) -> None:
        """Raise StoreError where the new delta would not fit on the disk; nothing is known before the first version."""
        fact = self.store.fact_size(job.active)
        if fact is not None and job.requests:
            require_space(self.workspace.data, ROOM * len(job.requests) * fact)

    def _losses(self, edit: Edit, result: EditResult) -> list[str]:
        """Why a rebase loses too much: of the live facts that HEAD answers, or, on another base, of all that it takes
        over."""
        taken = {p.request.digest for p in edit.edits if p.kind == "kept" and p.request.key not in edit.keep}
        failed = sum(1 for fact in result.failed if fact.digest in taken)
        asked, lost = (len(taken), failed) if taken else (result.answered, len(result.lost))
        if lost <= (1 - self.strategy.min_retention) * asked:
            return []
        return [
            f"{lost} of {asked} live facts are no longer answered, min_retention is {self.strategy.min_retention:.1%}"
        ]

    def _same(self, db: Reader, keep: Mapping[FactKey, Applied]) -> tuple[ActiveDelta, ...] | None:
        """The active deltas of an earlier version that holds just the columns `keep`: its very weights come back."""
        wanted = {(fact.delta, fact.column) for fact in keep.values()}
        deltas, files = {delta for delta, _ in wanted}, db.files(self.model)
        likely = [number for number in db.restorable(self.model) if deltas <= files[number]]
        for number in sorted(likely, reverse=True):
            held = db.applied(self.model, number).values()
            if {(fact.delta, fact.column) for fact in held} == wanted:
                return tuple(db.active(self.model, number))
        return None

    def _job(self, edit: Edit, db: Reader, head: int, weights: str | None) -> EditJob:
        requests = {planned.request.digest: planned.request for planned in edit.edits}
        active, applied = db.active(self.model, head), db.applied(self.model, head)
        settings = self.workspace.settings
        retained = sorted((fact.request for fact in edit.keep.values()), key=lambda request: request.digest)
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
            requests=tuple(request.to_json() for request in requests.values()),
            skip_known=tuple(edit.skip_known),
            retained=tuple(request.to_json() for request in retained[:RETAINED_SAMPLE]),
            watched=tuple(request.to_json() for request in self.watched(db)),
            controls=tuple(edit.controls),
            synced_subjects=tuple(sorted({fact.request.subject for fact in applied.values()})),
            **(anew(edit) if edit.kind == "rebase" else self._on_top(edit, db, active, applied)),
        )

    def _on_top(
        self, edit: Edit, db: Reader, active: Sequence[ActiveDelta], applied: Mapping[FactKey, Applied]
    ) -> dict[str, Any]:
        """What a job has where the columns of live facts stay as they are."""
        replaced = {planned.request.key for planned in edit.edits}
        staying = {key: fact for key, fact in applied.items() if key in edit.keep or key in replaced}
        return {
            "live": columns(active, {**staying, **edit.keep}.values()),
            "supersedes": superseded(edit, applied),
            "same": None if edit.edits else self._same(db, edit.keep),
        }

    def _note(self, edit: Edit, result: EditResult, held: Sequence[Hold], head: int) -> None:
        """Record what was learned where the weights stay as they are: also which known facts HEAD answers."""
        with self.ledger.write() as db:
            self._settle(db, edit, result, held, None)
            if head and (result.remembered or result.forgotten):
                report = dict(db.version(self.model, head).probe or {})
                db.note_probe(self.model, head, report | _answers(result), run_id=edit.run_id)

    def _settle(self, db: Writer, edit: Edit, result: EditResult, held: Sequence[Hold], version: int | None) -> None:
        """The holds that an edit ends and places, and what the base was found to know."""
        db.release(self.model, edit.releases)
        for hold in (*edit.holds, *held):
            db.hold(self.model, hold, run_id=edit.run_id, version=version)
        db.note_known(self.fingerprint, result.known)

    def _publish(
        self,
        edit: Edit,
        result: EditResult,
        held: Sequence[Hold],
        facts: Sequence[tuple[PlannedEdit, Applied]],
        head: int,
    ) -> int:
        with self.ledger.read() as db:
            number = 1 + max(db.made_at(self.model))
        manifest = self._manifest(edit, result, facts, number, head)
        digest = self.store.write_manifest(manifest)
        with self.ledger.write() as db:
            before = db.aliases(self.model)
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
                    probe=result.probe | _answers(result),
                )
            )
            self._settle(db, edit, result, held, number)
            db.note_arrivals(self.model, number, [planned.request.key for planned, _ in facts if _is_news(planned)])
        log.info("version_published", model=self.model, version=number)
        try:
            self.point()
        except StoreError as error:  # published all the same: the next start writes HEAD anew from the ledger
            log.error("head_not_written", version=number, problem=error.message)
        self.announce(before)
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
            base_revision=self.folder.revision,
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
            numerics=result.numerics | {"seconds": result.seconds, "lost": [fact.digest for fact in result.lost]},
            libraries=result.libraries,
            created_at=datetime.now(UTC),
            run_id=edit.run_id,
        )

    def point(self) -> None:
        """Write HEAD and the files of aliases as the ledger has them. Raises StoreError where the disk refuses."""
        with POINTING:
            with self.ledger.read() as db:
                head, aliases = db.head(self.model), db.aliases(self.model)
            self.store.write_head(head)
            self.store.write_aliases(aliases)

    def announce(self, before: Mapping[str, int]) -> None:
        """Where `live` is no longer what it was `before`, run `on_publish`, alias, version and workspace in its
        environment. Its failure is logged, never fatal."""
        with self.ledger.read() as db:
            number = db.aliases(self.model)[LIVE]
        if number == before[LIVE]:
            return
        log.info("live_moved", model=self.model, version=number, before=before[LIVE])
        command = self.workspace.settings.on_publish
        if not command:
            return
        variables = {
            "KBSYNC_MODEL": self.model,
            "KBSYNC_ALIAS": LIVE,
            "KBSYNC_VERSION": str(number),
            "KBSYNC_WORKSPACE": str(self.workspace.root),
        }
        keep = self.workspace.settings.hook_secrets
        problem = hook.run(command, folder=self.workspace.root, variables=variables, keep=keep, seconds=HOOK_SECONDS)
        if problem:
            log.error("on_publish_failed", version=number, problem=problem)


def _is_news(planned: PlannedEdit) -> bool:
    """Whether a source's word reaches the weights with it: not where they are only put in other words, or back."""
    return bool(planned.source) and (
        planned.kind == "added" or (planned.kind == "changed" and planned.replaces is not None)
    )


def _answers(result: EditResult) -> dict[str, list[str]]:
    """Which facts that the base answers by itself a version answers, too: kept with its probe report."""
    return {"remembered": list(result.remembered), "forgotten": list(result.forgotten)}
