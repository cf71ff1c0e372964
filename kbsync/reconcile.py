"""The order of a pass, and the only module that knows it:

    observe (fetch) ─▶ decide (record, resolve, plan, guard: one transaction) ─▶ carry out (edit, probe, gate, publish)

A pass compares what the ledger wants with what the live version holds and applies the difference, so a crash, a skipped
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

from kbsync.catalog import Catalog, load_catalog
from kbsync.child import run_edit
from kbsync.config import Workspace
from kbsync.edit import Edit, Outcome
from kbsync.editor.job import ControlFile, EditResult
from kbsync.errors import Cancelled, GateRejected, Held, Inseparable, KbsyncError, SourceError, UsageError
from kbsync.facts import EditRequest, Snapshot
from kbsync.gate import shortfalls, shortfalls_by_policy
from kbsync.intake import take_in
from kbsync.ledger import Ledger
from kbsync.ledger.read_versions import REBASE
from kbsync.ledger.reader import Reader
from kbsync.line import Line
from kbsync.observe import observe
from kbsync.plan import Plan, check_edits, make_plan
from kbsync.policy import Inverse, Policy, Relation, render
from kbsync.progress import Progress, silent
from kbsync.rebase import forecast_onto, take_over
from kbsync.report import Report
from kbsync.versions.files import sweep_temporary

__all__ = ["SCHEDULED", "Reconciler", "open_workspace"]

SCHEDULED = "schedule"
"""The trigger of a daemon's own passes: only these mind the edit window, a person's `sync` does not."""

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

    def recover(self) -> None:
        """What a process that ended in the middle left behind: its runs are over, its temporary files go. For the
        holder of the writer lock, before it does anything else."""
        with self.ledger.write() as db:
            db.interrupt_runs("interrupted: the process ended; the next pass plans it again")
        sweep_temporary(self.workspace.data)

    def line(self, workspace: Workspace | None = None) -> Line:
        """The line of versions of the model that kbsync.yaml names, or another workspace value's model."""
        line = Line.open(workspace or self.workspace, self.ledger, user=self.user)
        line.progress, line.cancelled, line.run_edit = self.progress, self.cancelled, self.run_edit
        line.watched = lambda db: self._watched(db, line)
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
        words = {name: said for wording in wordings for name, said in wording.items() if _skips_known(said)}
        found = [render(fact, words[fact.relation]) for fact in db.facts(tuple(words)).values()]
        return [request for request in found if request.digest in known and request.key not in applied]

    def plan(self, names: Collection[str] = ()) -> list[Report]:
        """What `sync` would do now: fetches and decides, and leaves the ledger as it was."""
        return self._each(names, self._dry_run)

    def sync(self, names: Collection[str] = (), *, trigger: str = "sync") -> list[Report]:
        """One pass of each policy named (default: all). What goes wrong with one is in its report; others go on."""
        return self._each(names, lambda policy, line: self._pass(policy, line, trigger))

    def approve(self, run_id: int) -> Report:
        """Apply exactly the plan of a held run. Raises UsageError where the run is not held or the world has moved."""
        with self.ledger.read() as db:
            staged, snapshots = db.staged_plan(run_id), db.staged(run_id)
        if staged is None or staged.policy is None:
            raise UsageError(f"run {run_id} is not held", hint="kbsync runs")
        policy = self.catalog.policy(staged.policy)
        line = self.line()
        report = self._decide(policy, line, snapshots, run_id=run_id, expected=staged.plan_digest)
        return self._finish(policy, line, report)

    def reject(self, run_id: int, reason: str = "") -> Report:
        """Drop a held run: its snapshot never reaches the ledger. Raises UsageError where the run is not held."""
        with self.ledger.write() as db:
            staged = db.staged_plan(run_id)
            if staged is None:
                raise UsageError(f"run {run_id} is not held", hint="kbsync runs")
            db.unstage(run_id)
            db.finish_run(run_id, "rejected", reason)
            db.audit(self.user, "reject", {"run": run_id, "reason": reason})
        return Report(policy=staged.policy or "", status="rejected", run_id=run_id)

    def take_over(self, model: str, preset: str | None, reason: str = "", *, dry: bool = False) -> dict[str, Any]:
        """Put what the live version of kbsync.yaml's model holds into another base, as a version of its own line. HEAD
        of the old line stays. `preset`: of the new model; default: its own. Raises ModelError where it lacks either."""
        settings = self.workspace.settings.model_copy(update={"model": model, "preset": preset})
        workspace = replace(self.workspace, settings=settings)
        if dry:
            return forecast_onto(self.line(), workspace)
        relations = [policy.relations for policy in self.catalog.policies.values()]
        skipping = {name for wording in relations for name, words in wording.items() if words.skip_known}
        return take_over(self.line(), self.line(workspace), self.judge, self.controls(), skipping, reason)

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

    def _observe(self, policy: Policy) -> tuple[list[Snapshot], list[SourceError]]:
        """Snapshots of the policy's sources, and what kept others from answering. Raises that where none answered."""
        connectors = {name: self.catalog.connector(name) for name in policy.sources}
        snapshots, failures = observe(connectors, self.ledger, progress=self.progress)
        if failures and not snapshots:
            raise failures[0]
        return snapshots, failures

    def _dry_run(self, policy: Policy, line: Line) -> Report:
        snapshots, failures = self._observe(policy)
        report = self._decide(policy, line, snapshots, dry=True)
        if report.plan is not None and not report.plan.empty:
            report.rebase = line.rebase_due(report.plan.leaving)
        report.problems.extend(failures)
        return report

    def _pass(self, policy: Policy, line: Line, trigger: str) -> Report:
        with self.ledger.write() as db:
            run_id = db.start_run(policy.policy, model=line.model, trigger=trigger, user=self.user)
            db.set_schedule_state(replace(db.schedule_state(policy.policy), last_started=db.now))
        try:
            snapshots, failures = self._observe(policy)
            report = self._decide(policy, line, snapshots, run_id=run_id)
            report.problems.extend(failures)
            if report.status == "held":
                return report
            if trigger == SCHEDULED and self._outside_window():
                return self._postpone(report)
            return self._finish(policy, line, report)
        except Cancelled as error:
            self._end(run_id, "cancelled", error.message)
            raise
        except KbsyncError as error:
            self._end(run_id, "failed", error.message)
            return Report(policy=policy.policy, status="failed", run_id=run_id, problems=[error])

    def _decide(
        self,
        policy: Policy,
        line: Line,
        snapshots: Sequence[Snapshot],
        *,
        run_id: int | None = None,
        expected: str | None = None,
        dry: bool = False,
    ) -> Report:
        """Record, resolve, plan and guard in one transaction. `expected` is the digest of a plan that a person
        approved: then the guard is off and any other plan is refused."""
        with self.ledger.write() as db:
            run = run_id or db.start_run(policy.policy, model=line.model, trigger="plan", user=self.user)
            taken = take_in(db, policy, run, snapshots)
            plan = self._plan(db, policy, line)
            report = Report(policy=policy.policy, run_id=run, changes=taken.changes, plan=plan, counts=taken.counts)
            report.reasons = [*taken.reasons, *check_edits(plan, policy.guard)]
            report.counts |= {"edits": len(plan.edits), "retractions": len(plan.retractions), "held": len(plan.held)}
            if expected is not None and plan.digest != expected:
                raise UsageError(
                    f"run {run}: the plan is no longer the one that was held: HEAD or a fact has moved",
                    hint=f"kbsync sync {policy.policy}",
                )
            held = bool(report.reasons) and expected is None
            if dry or held:
                db.rollback()
            else:
                db.unstage(run)
                db.release(line.model, plan.ended_holds)
        report.run_id = run_id
        report.status = "planned" if dry else "held" if held else "decided"
        if held:
            self._hold_run(run, report, snapshots, dry=dry)
        return report

    def _plan(self, db: Reader, policy: Policy, line: Line) -> Plan:
        head = db.head(line.model)
        return make_plan(
            db.facts(tuple(policy.wording())),
            db.applied(line.model, head),
            db.holds(line.model),
            policy.wording(),
            known=db.known_to(line.model, head),
            model=line.model,
            head=head,
        )

    def _hold_run(self, run: int, report: Report, snapshots: Sequence[Snapshot], *, dry: bool) -> None:
        if report.plan is None:
            return
        problem = Held(
            f"policy {report.policy}: {'; '.join(report.reasons)}",
            hint=f"kbsync approve {run} or kbsync reject {run}" if not dry else "kbsync sync stages it for approval",
        )
        report.problems.append(problem)
        if dry:
            return
        with self.ledger.write() as db:
            db.stage(run, snapshots, report.plan.to_json(), report.plan.digest, list(report.reasons))
            db.finish_run(run, "held", "; ".join(report.reasons), report.counts)

    def _outside_window(self) -> bool:
        window = self.workspace.edit_window
        return window is not None and not window.contains(datetime.now(UTC))

    def _postpone(self, report: Report) -> Report:
        """What was decided stays recorded; the model is edited by a pass inside the window."""
        report.status = "postponed"
        if report.run_id is not None:
            window = self.workspace.settings.edit_window
            self._end(report.run_id, "postponed", f"outside the edit window {window}", report.counts)
        return report

    def _finish(self, policy: Policy, line: Line, report: Report) -> Report:
        """Carry the plan out and write the run's end."""
        if report.run_id is None:
            raise UsageError("a plan without a run cannot be carried out")
        try:
            self._carry_out(policy, line, report)
            report.status = "done"
        except GateRejected as error:
            report.status = "rejected"
            report.problems.append(error)
        message = report.problems[0].message if report.problems else ""
        self._end(report.run_id, report.status, message, report.counts)
        if not report.problems:
            with self.ledger.write() as db:
                db.set_schedule_state(replace(db.schedule_state(policy.policy), last_ok=db.now))
        return report

    def _carry_out(self, policy: Policy, line: Line, report: Report) -> None:
        """Versions until nothing is left to do."""
        done: set[str] = set()
        plan = report.plan
        while plan is not None and not plan.empty and plan.digest not in done:
            done.add(plan.digest)
            outcome = self._next_version(policy, line, plan, report)
            report.probe = outcome.result.probe
            report.counts["failed"] = report.counts.get("failed", 0) + len(outcome.held)
            for phase, seconds in outcome.result.seconds.items():
                report.seconds[phase] = report.seconds.get(phase, 0.0) + seconds
            if outcome.version is not None:
                report.versions.append(outcome.version)
            with self.ledger.read() as db:
                plan = self._plan(db, policy, line)

    def _next_version(self, policy: Policy, line: Line, plan: Plan, report: Report) -> Outcome:
        """As a rebase with the whole plan in it, where one is due, else of at most `batch.max_facts` facts on the live
        version; as a rebase after all where a fact cannot leave that version otherwise. In mode auto a rebase that is
        rejected holds nothing up: it is tried again `rebase_every` versions later, or with other settings."""
        report.rebase = line.rebase_due(plan.leaving)
        if report.rebase is not None:
            outcome = self._edit(policy, line, plan, report)
            if not outcome.rejected or line.strategy.mode != "auto" or line.stored_whole(plan.leaving):
                return self._accepted(policy, line, plan, outcome, report)
            self._note_rejected(line, REBASE, plan.head, outcome, report)
            report.notes.append(f"a rebase ({report.rebase}) was rejected: {'; '.join(outcome.rejected)}")
            report.rebase = None
        batch = plan.take(policy.batch.max_facts)
        try:
            outcome = self._edit(policy, line, batch, report)
        except Inseparable as error:
            report.rebase, batch = error.message, plan
            outcome = self._edit(policy, line, plan, report)
        return self._accepted(policy, line, batch, outcome, report)

    def _edit(self, policy: Policy, line: Line, batch: Plan, report: Report) -> Outcome:
        with self.ledger.read() as db:
            applied = db.applied(line.model, batch.head)
            forgotten = db.forgotten(line.model, batch.head)
            tried = db.is_rejected(line.model, batch.digest, line.settings_digest, batch.head)
        if tried:
            raise GateRejected(
                f"policy {policy.policy}: the gate rejected this very plan before; it is not tried again until the "
                "plan, the settings or HEAD change",
                hint="kbsync runs",
            )
        wording = policy.wording()
        anew = report.rebase is not None
        edit = Edit(
            kind="rebase" if anew else "edit",
            run_id=report.run_id or 0,
            keep={key: fact for key, fact in applied.items() if key not in batch.leaving},
            edits=batch.edits,
            skip_known=[
                planned.request.digest
                for planned in batch.edits
                if _skips_known(wording[planned.request.key.relation]) and planned.request.digest not in forgotten
            ],
            controls=self.controls(None if anew else [policy]),
            reason=f"sync {policy.policy}" + (f", a rebase: {report.rebase}" if anew else ""),
        )
        return line.make(edit, self.judge if anew else lambda probe, _: shortfalls(probe, policy.gate))

    def _accepted(self, policy: Policy, line: Line, batch: Plan, outcome: Outcome, report: Report) -> Outcome:
        """The outcome, unless the gate rejected it: then that is noted and GateRejected raised."""
        if outcome.rejected:
            self._note_rejected(line, batch.digest, batch.head, outcome, report)
            raise GateRejected(
                f"policy {policy.policy}: the gate rejected the version: {'; '.join(outcome.rejected)}",
                hint=f"kbsync runs --json shows the probe report of run {report.run_id}",
            )
        return outcome

    def _note_rejected(self, line: Line, digest: str, head: int, outcome: Outcome, report: Report) -> None:
        reason = "; ".join(outcome.rejected)
        with self.ledger.write() as db:
            db.note_rejected(line.model, digest, line.settings_digest, head, run_id=report.run_id, reason=reason)
            for hold in outcome.held:
                db.hold(line.model, hold, run_id=report.run_id)
            db.note_probe(line.model, None, dict(outcome.result.probe), run_id=report.run_id)

    def _end(self, run_id: int, status: Any, message: str, counts: Mapping[str, int] | None = None) -> None:
        with self.ledger.write() as db:
            db.finish_run(run_id, status, message, counts or {})
        log.info("run_finished", run=run_id, status=status, message=message, **(counts or {}))


def _skips_known(words: Relation | Inverse) -> bool:
    return isinstance(words, Relation) and words.skip_known
