"""The order of a pass, and the only module that knows it:

    observe (fetch) ─▶ decide (record, resolve, plan, guard: one transaction) ─▶ carry out (edit, probe, gate, publish)

A pass compares what the ledger wants with what HEAD holds and applies the difference, so a crash, a skipped
run or a rollback needs no repair: the next pass computes the plan again. Deciding is one transaction that is rolled
back for a dry run and for a run that a guard holds; approving such a run decides again on the very snapshots it kept.

    with open_workspace(Path("."), user="ada") as reconciler:
        reports = reconciler.sync()
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from kbsync.carry import Carrier, skips_known
from kbsync.catalog import Catalog, load_catalog
from kbsync.child import run_ask, run_edit
from kbsync.config import Workspace
from kbsync.connectors import Connector
from kbsync.cost import cost_of
from kbsync.editor.job import ControlFile, EditResult
from kbsync.errors import Cancelled, GateRejected, Held, KbsyncError, Moved, SourceError, UsageError, place_of
from kbsync.facts import EditRequest, Provenance, Snapshot
from kbsync.gate import shortfalls_by_policy
from kbsync.intake import Intake, take_in
from kbsync.ledger import Ledger
from kbsync.ledger.reader import Reader
from kbsync.ledger.writer import Writer
from kbsync.line import Line
from kbsync.notify.outbox import enroll
from kbsync.notify.telling import tell_conflicts, tell_end, tell_refused
from kbsync.observe import observe
from kbsync.plan import check_edits
from kbsync.plan_document import PlanDocument, document_of
from kbsync.policy import Policy, render
from kbsync.progress import Progress, silent
from kbsync.rebase import forecast_onto, take_over
from kbsync.rechecking import Ask, recheck
from kbsync.report import Report
from kbsync.review import (
    Review,
    held_run,
    hold_refused,
    judge_rows,
    refuse_another,
    refuse_outdated,
    reviews_of,
    unseen,
)
from kbsync.timing import timed
from kbsync.versions.files import sweep_temporary

__all__ = ["SCHEDULED", "Reconciler", "open_workspace"]

SCHEDULED = "schedule"
"""The trigger of a daemon's own passes: only these mind the edit window, a person's `sync` does not."""

_Observed = tuple[list[Snapshot], list[SourceError]]

log = structlog.get_logger()


@contextmanager
def open_workspace(
    root: Path, *, user: str, progress: Progress = silent, cancelled: threading.Event | None = None
) -> Iterator[Reconciler]:
    """A reconciler on the workspace at `root`. The caller holds the writer lock while it uses what writes."""
    workspace = Workspace.load(root)
    ledger = Ledger.open(workspace.ledger_url)
    try:
        yield Reconciler(workspace, load_catalog(workspace), ledger, user, progress, cancelled or threading.Event())
    finally:
        ledger.close()


@dataclass(slots=True)
class Reconciler:
    """Brings a model's weights in line with the ledger, and the ledger in line with its sources."""

    workspace: Workspace
    catalog: Catalog
    ledger: Ledger
    user: str
    progress: Progress = silent
    cancelled: threading.Event = field(default_factory=threading.Event)
    run_edit: Callable[..., EditResult] = field(default_factory=lambda: run_edit)
    run_ask: Ask = field(default_factory=lambda: run_ask)

    def recover(self) -> None:
        """What a process that ended in the middle left behind: its runs are over, its temporary files go. For the
        holder of the writer lock, before it does anything else."""
        with self.ledger.write() as db:
            db.interrupt_runs("interrupted: the process ended; the next pass plans it again")
        enroll(self.workspace, self.ledger)
        sweep_temporary(self.workspace.data)

    def line(self, workspace: Workspace | None = None) -> Line:
        """The line of versions of the model that kbsync.yaml names, or another workspace value's model."""
        line = Line.open(workspace or self.workspace, self.ledger, user=self.user)
        line.progress, line.cancelled, line.run_edit = self.progress, self.cancelled, self.run_edit
        line.watched = lambda db: self._watched(db, line)
        line.gates = self.catalog.gates
        return line

    def judge(self, probe: Mapping[str, Any], requests: Sequence[EditRequest]) -> list[str]:
        """Each policy's gate on its own facts of a version that mixes them."""
        return shortfalls_by_policy(probe, requests, list(self.catalog.policies.values()))

    def controls(self, policies: Collection[Policy] | None = None) -> list[ControlFile]:
        """The files of never-synced subjects that these policies name; default: all policies."""
        wordings = [policy.wording() for policy in policies or self.catalog.policies.values()]
        return [
            ControlFile(path=str(path), prompt=words.prompt)
            for wording in wordings
            for relation, words in wording.items()
            if (path := self.catalog.controls(relation)) is not None
        ]

    def _watched(self, db: Reader, line: Line) -> list[EditRequest]:
        """What is not edited because the base answers it."""
        known = {digest for digest, answered in db.known(line.fingerprint).items() if answered}
        applied = db.applied(line.model, db.head(line.model))
        wordings = [policy.wording() for policy in self.catalog.policies.values()]
        words = {name: said for wording in wordings for name, said in wording.items() if skips_known(said)}
        found = [render(fact, words[fact.relation]) for fact in db.facts(tuple(words)).values()]
        return [request for request in found if request.digest in known and request.key not in applied]

    def plan(self, names: Collection[str] = (), *, reviewed: Sequence[PlanDocument] | None = None) -> list[Report]:
        """What `sync` would do now: fetches and decides, and leaves the ledger as it was."""
        if reviewed is None:
            return self._each(names, self._dry_run)
        reviews = reviews_of(reviewed, names)
        return self._each(reviews, lambda policy, line: self._dry_run(policy, line, reviews[policy.policy]))

    def sync(
        self, names: Collection[str] = (), *, trigger: str = "sync", reviewed: Sequence[PlanDocument] | None = None
    ) -> list[Report]:
        """One pass of each policy named (default: all). What goes wrong with one is in its report; others go on.

        `reviewed`: one pass of each policy that has a document, which carries out exactly that plan: where the world
        has moved the report says what, and a guard holds what the document does not show.
        """
        if reviewed is None:
            return self._each(names, lambda policy, line: self._pass(policy, line, trigger))
        reviews = reviews_of(reviewed, names)
        return self._each(reviews, lambda policy, line: self._pass(policy, line, trigger, reviews[policy.policy]))

    def replay(self, names: Collection[str] = ()) -> list[Report]:
        """One pass of each policy on the claims that the ledger has: no source is asked. For after a ruling or another
        policy."""
        return self._each(names, lambda policy, line: self._pass(policy, line, "replay", observe=lambda _: ([], [])))

    def refetch(self, source: str) -> list[Report]:
        """One pass of each policy that names the source, which is read anew, though it may say that nothing
        changed: its mapping did. Raises UsageError for a source that no policy names."""
        names = [name for name, policy in self.catalog.policies.items() if source in policy.sources]
        if not names:
            raise UsageError(f"no policy names the source {source}", hint="kbsync check")
        connectors = {source: _Anew(self.catalog.connector(source))}
        return self._each(
            names,
            lambda policy, line: self._pass(policy, line, "refetch", observe=lambda _: self._observe(connectors)),
        )

    def approve(
        self,
        run_id: int,
        *,
        digest: str | None = None,
        only: Collection[Sequence[str]] = (),
        without: Collection[Sequence[str]] = (),
        reason: str = "",
    ) -> Report:
        """Apply exactly the plan of a held run, but for the rows that were refused: of those the ledger records the
        facts, and holds keep them out of the weights. `only`, `without`: (subject, relation) of the rows to take, or to
        refuse. `digest`: the plan must have it.

        Raises UsageError where the run is not held, the plan is another one or has no such row, and Moved where the
        world is another one: then the run waits on.
        """
        with self.ledger.write() as db:
            held = held_run(db, run_id, digest)
            refuse_outdated(db, held)
            if only or without:
                judge_rows(db, held, only, without, approve=True, user=self.user, reason=reason)
            review = held.review(db.verdicts(run_id).values())
        policy, line = self.catalog.policy(held.policy), self.line()
        seconds: dict[str, float] = {}
        with timed(seconds, "decide"):
            report = self._decide(policy, line, held.snapshots, run_id=run_id, review=review)
        report.seconds = seconds
        with self.ledger.write() as db:
            detail = {"plan": review.digest, "refused": [list(key) for key in sorted(review.refused)], "reason": reason}
            db.audit(self.user, "approve", detail, run_id=run_id)
        return self._ending(run_id, policy, seconds, lambda: self._finish(policy, line, report))

    def reject(
        self,
        run_id: int,
        reason: str = "",
        *,
        only: Collection[Sequence[str]] = (),
        without: Collection[Sequence[str]] = (),
    ) -> Report:
        """Drop a held run: its snapshot never reaches the ledger. With `only` or `without`, refuse just these rows, or
        all but these: the run goes on waiting. Raises UsageError where the run is not held or has no such row."""
        with self.ledger.write() as db:
            held = held_run(db, run_id)
            if only or without:
                refused = judge_rows(db, held, only, without, approve=False, user=self.user, reason=reason)
                note = f"{refused} rows refused; kbsync approve {run_id} applies the others"
                return Report(policy=held.policy, status="held", run_id=run_id, notes=[note])
            db.unstage(run_id)
            db.finish_run(run_id, "rejected", reason)
            db.audit(self.user, "reject", {"run": run_id, "reason": reason})
            tell_refused(db, held.policy, run_id)
        return Report(policy=held.policy, status="rejected", run_id=run_id)

    def take_over(self, model: str, preset: str | None, reason: str = "", *, dry: bool = False) -> dict[str, Any]:
        """Put what HEAD of kbsync.yaml's model holds into another base, as a version of its own line. HEAD
        of the old line stays. `preset`: of the new model; default: its own. Raises ModelError where it lacks either."""
        settings = self.workspace.settings.model_copy(update={"model": model, "preset": preset})
        workspace = replace(self.workspace, settings=settings)
        if dry:
            return forecast_onto(self.line(), workspace)
        relations = [policy.relations for policy in self.catalog.policies.values()]
        skipping = {name for wording in relations for name, words in wording.items() if words.skip_known}
        return take_over(self.line(), self.line(workspace), self.judge, self.controls(), skipping, reason)

    def recheck(self, *, everything: bool = False, dry: bool = False) -> dict[str, Any]:
        """Ask the facts of HEAD again that are due, or all. Raises what `rechecking.recheck` raises."""
        settings, policies = self.workspace.settings.recheck, self.catalog.policies.values()
        return recheck(self.line(), settings, policies, self.run_ask, everything=everything, dry=dry)

    def _each(self, names: Collection[str], act: Callable[[Policy, Line], Report]) -> list[Report]:
        policies = [self.catalog.policy(name) for name in sorted(names or self.catalog.policies)]
        line = self.line()
        reports = []
        for policy in policies:
            try:
                reports.append(act(policy, line))
            except Cancelled:
                raise
            except KbsyncError as error:
                reports.append(Report(policy=policy.policy, status="failed", problems=[error]))
        return reports

    def _observe_all(self, policy: Policy) -> _Observed:
        return self._observe({name: self.catalog.connector(name) for name in policy.sources})

    def _observe(self, connectors: Mapping[str, Connector]) -> _Observed:
        """Snapshots of the sources, and what kept others from answering. Raises that where none answered."""
        snapshots, failures = observe(connectors, self.ledger, progress=self.progress, cancelled=self.cancelled)
        if failures and not snapshots:
            raise failures[0]
        return snapshots, failures

    def _dry_run(self, policy: Policy, line: Line, review: Review | None = None) -> Report:
        snapshots, failures = self._observe_all(policy)
        report = self._decide(policy, line, snapshots, review=review, dry=True)
        report.problems.extend(failures)
        return report

    def _pass(
        self,
        policy: Policy,
        line: Line,
        trigger: str,
        review: Review | None = None,
        observe: Callable[[Policy], _Observed] | None = None,
    ) -> Report:
        with self.ledger.write() as db:
            db.interrupt_runs("its end could not be written; the next pass plans it again")
            run_id = db.start_run(policy.policy, model=line.model, trigger=trigger, user=self.user)
            db.set_schedule_state(replace(db.schedule_state(policy.policy), last_started=db.now))

        seconds: dict[str, float] = {}

        def act() -> Report:
            with timed(seconds, "fetch"):
                snapshots, failures = (observe or self._observe_all)(policy)
            with timed(seconds, "decide"):
                report = self._decide(policy, line, snapshots, run_id=run_id, review=review)
            report.seconds = seconds
            report.problems.extend(failures)
            if report.status == "held":
                return report
            if trigger == SCHEDULED and self.outside_window:
                return self._postpone(report)
            return self._finish(policy, line, report, fresh=trigger != "replay")

        return self._ending(run_id, policy, seconds, act)

    def _ending(self, run_id: int, policy: Policy, seconds: dict[str, float], act: Callable[[], Report]) -> Report:
        """What the act reports; where it cannot go on, the run ends, and the report says why. However it ends, the
        ledger learns the seconds of its phases."""
        computed = 0
        try:
            report = act()
            computed = report.computed
            return report
        except Cancelled as error:
            self._give_up(run_id, "cancelled", error.message)
            raise
        except KbsyncError as error:
            status = "superseded" if isinstance(error, Moved) else "failed"
            self._give_up(run_id, status, error.message)
            return Report(policy=policy.policy, status=status, run_id=run_id, problems=[error])
        except Exception as error:
            self._give_up(run_id, "failed", place_of(error))
            raise
        finally:
            self._note_phases(run_id, seconds, computed)

    def _note_phases(self, run_id: int, seconds: Mapping[str, float], computed: int) -> None:
        try:
            with self.ledger.write() as db:
                db.note_phases(run_id, seconds, {"targets": computed})
        except KbsyncError as error:  # how the run itself ended says more
            log.warning("phases_not_noted", run=run_id, problem=error.message)

    def _give_up(self, run_id: int, status: Any, message: str) -> None:
        """End a run that cannot go on. What stopped it may keep its end from being written, too: then what went wrong
        first is what people are told, and the next pass finds a run that says `running`, and ends it."""
        try:
            self._end(run_id, status, message)
        except KbsyncError as error:
            log.error("run_not_ended", run=run_id, status=status, message=message, problem=error.message)

    def _decide(
        self,
        policy: Policy,
        line: Line,
        snapshots: Sequence[Snapshot],
        *,
        run_id: int | None = None,
        review: Review | None = None,
        dry: bool = False,
    ) -> Report:
        """Record, resolve, plan and guard in one transaction. With a review any other plan is refused, the guard is off
        as far as it says what was reviewed, and the rows that were refused are held."""
        carrier = self._carrier(policy, line)
        with self.ledger.write() as db:
            run = run_id or db.start_run(policy.policy, model=line.model, trigger="plan", user=self.user)
            db.abandon(run, self.catalog.relations)
            taken = take_in(db, policy, run, snapshots)
            plan = carrier.plan(db)
            report = Report(policy=policy.policy, run_id=run, changes=taken.changes, plan=plan, counts=taken.counts)
            report.reasons = [*taken.reasons, *check_edits(plan, policy.guard)]
            report.counts |= {"edits": len(plan.edits), "retractions": len(plan.retractions), "held": len(plan.held)}
            held = bool(unseen(report.reasons, review))
            if dry or held or review is not None:
                report.document = self._document(db, policy, snapshots, taken, report)
            if review is not None and report.document is not None:
                refuse_another(policy.policy, review, plan, report.document)
            if dry or held:
                db.rollback()
            else:
                db.resume_run(run)
                tell_conflicts(db, policy, run)
                db.supersede(run, {snapshot.source for snapshot in snapshots})
                db.release(line.model, plan.idle_holds)
                if review is not None and review.refused:
                    hold_refused(db, run, plan, review.refused)
                    report.plan = carrier.plan(db)
        report.run_id = run_id
        report.status = "planned" if dry else "held" if held else "decided"
        if dry or held:
            self._add_cost(line, report)
        if held:
            self._hold_run(run, report, snapshots, dry=dry)
        return report

    def _carrier(self, policy: Policy, line: Line) -> Carrier:
        return Carrier(self.ledger, policy, line, self.controls, self.judge)

    def _document(
        self, db: Reader, policy: Policy, snapshots: Sequence[Snapshot], taken: Intake, report: Report
    ) -> PlanDocument:
        """The plan for review; what it costs is added when the transaction is over."""
        if report.plan is None:
            raise ValueError("a report without a plan has no document")
        relations = tuple(policy.wording())
        return document_of(
            report.plan,
            policy.policy,
            snapshots=snapshots,
            changes=taken.changes,
            kinds=taken.kinds,
            conflicts=[row.conflict for row in db.conflicts() if row.conflict.key.relation in relations],
            waiting=[row.waiting for row in db.waiting(relations)],
            guard=report.reasons,
        )

    def _add_cost(self, line: Line, report: Report) -> None:
        if report.plan is None or report.document is None:
            return
        if not report.plan.empty:
            report.rebase = line.rebase_due(report.plan.leaving)
        cost = {"rebase": report.rebase, "cost": cost_of(line, report.plan)}
        report.document = report.document.model_copy(update=cost)

    def _hold_run(self, run: int, report: Report, snapshots: Sequence[Snapshot], *, dry: bool) -> None:
        if report.document is None:
            return
        problem = Held(
            f"policy {report.policy}: {'; '.join(report.reasons)}",
            hint=f"kbsync approve {run} or kbsync reject {run}" if not dry else "kbsync sync stages it for approval",
        )
        report.problems.append(problem)
        if dry:
            return
        document = report.document.model_dump(mode="json")
        with self.ledger.write() as db:
            db.stage(run, snapshots, document, report.document.digest, list(report.reasons))
            db.finish_run(run, "held", "; ".join(report.reasons), report.counts)
            self._tell(db, run, "held", "; ".join(report.reasons))

    @property
    def outside_window(self) -> bool:
        """Whether the model may not be edited now but by a person's command."""
        window = self.workspace.edit_window
        return window is not None and not window.contains(datetime.now(UTC))

    def _postpone(self, report: Report) -> Report:
        """What was decided stays recorded; the model is edited by a pass inside the window."""
        report.status = "postponed"
        if report.run_id is not None:
            window = self.workspace.settings.edit_window
            self._end(report.run_id, "postponed", f"outside the edit window {window}", report.counts)
        return report

    def _finish(self, policy: Policy, line: Line, report: Report, *, fresh: bool = True) -> Report:
        """Carry the plan out and write the run's end. `fresh`: its sources were asked."""
        if report.run_id is None:
            raise UsageError("a plan without a run cannot be carried out")
        try:
            self._carrier(policy, line).carry_out(report)
            report.status = "done"
        except GateRejected as error:
            report.status = "rejected"
            report.problems.append(error)
        message = report.problems[0].message if report.problems else ""
        self._end(report.run_id, report.status, message, report.counts)
        if not report.problems and fresh:
            with self.ledger.write() as db:
                db.set_schedule_state(replace(db.schedule_state(policy.policy), last_ok=db.now))
        return report

    def _end(self, run_id: int, status: Any, message: str, counts: Mapping[str, int] | None = None) -> None:
        with self.ledger.write() as db:
            db.finish_run(run_id, status, message, counts or {})
            self._tell(db, run_id, status, message)
        log.info("run_finished", run=run_id, status=status, message=message, **(counts or {}))

    def _tell(self, db: Writer, run_id: int, status: str, message: str) -> None:
        policy = db.run(run_id).policy
        if policy is not None:
            tell_end(db, policy, run_id, status, message, self.workspace.settings.notify.failures)


@dataclass(frozen=True, slots=True)
class _Anew:
    """A connector that is asked for everything, as if for the first time."""

    connector: Connector

    @property
    def warnings(self) -> Sequence[str]:
        return self.connector.warnings

    @property
    def host(self) -> str | None:
        """The host that the connector asks, if any."""
        return getattr(self.connector, "host", None)

    def fetch(self, _previous: Provenance | None) -> Snapshot:
        return self.connector.fetch(None)
