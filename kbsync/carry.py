"""Carries a plan out: versions until nothing is left to do, each edited, probed, put before the gate, published.

    Carrier(ledger, policy, line, controls, judge).carry_out(report)

What each version was to do is kept in the ledger's `plan` table: the link from a run to a version, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kbsync.edit import Edit, Outcome
from kbsync.editor.job import ControlFile
from kbsync.errors import GateRejected, Inseparable
from kbsync.facts import Applied, FactKey, digest_of
from kbsync.gate import shortfalls
from kbsync.ledger import Ledger
from kbsync.ledger.read_versions import REBASE, search_of
from kbsync.ledger.reader import Reader
from kbsync.line import Judge, Line
from kbsync.plan import Plan
from kbsync.plan_document import document_of
from kbsync.planning import plan_now
from kbsync.policy import Inverse, Policy, Relation
from kbsync.report import Report
from kbsync.sift import Sifted, sift, suspects

__all__ = ["Carrier", "skips_known"]


@dataclass(frozen=True, slots=True)
class Carrier:
    """Brings one line's weights in line with one policy's facts. `judge`: the gate of all policies, for a rebase."""

    ledger: Ledger
    policy: Policy
    line: Line
    controls: Callable[[Collection[Policy] | None], Sequence[ControlFile]]
    judge: Judge

    def plan(self, db: Reader) -> Plan:
        """What has to be done now."""
        return plan_now(db, self.policy, self.line.model, self.line.terms)

    def carry_out(self, report: Report) -> None:
        """Versions until nothing is left to do. Raises GateRejected where the gate lets none through, and what editing
        raises.

        What a search for the facts to blame leaves undecided is tried again by the next pass, not by this one: each
        search takes out of the plan what it accepts and what it holds, or ends the run, so that none goes on for ever.
        """
        done: set[str] = set()
        plan = report.plan and report.plan.without(report.plan.idle_holds)
        while plan is not None and not plan.empty and plan.digest not in done:
            done.add(plan.digest)
            outcome = self._next_version(plan, report)
            report.probe = outcome.result.probe
            report.notes += _unasked(outcome.result.probe)
            report.counts["failed"] = report.counts.get("failed", 0) + len(outcome.held)
            report.took(outcome.result.seconds, outcome.result.computed)
            if outcome.version is not None:
                report.versions.append(outcome.version)
            if report.searches and report.searches[-1]["undecided"]:
                break
            with self.ledger.read() as db:
                plan = self.plan(db)
        if report.searches and not report.versions:
            raise self._refused([reason for search in report.searches for reason in search["rejected"]], report)

    def _next_version(self, plan: Plan, report: Report) -> Outcome:
        """As a rebase with the whole plan in it, where one is due, else of at most `batch.max_facts` facts on the live
        version; as a rebase after all where a fact cannot leave that version otherwise. In mode auto a rebase that is
        rejected, or would take none of the new facts, holds nothing up: it is tried again `rebase_every` versions
        later, or with other settings."""
        line = self.line
        report.rebase = line.rebase_due(plan.leaving)
        if report.rebase is not None:
            can_wait = line.strategy.mode == "auto" and not line.stored_whole(plan.leaving)
            outcome = self._edit(plan, report, can_wait=can_wait)
            if not outcome.rejected or not can_wait:
                return self._accepted(plan, outcome, report)
            report.took(outcome.result.seconds, outcome.result.computed)
            self._note_rejected(REBASE, line.terms.rebase, plan.head, outcome, report)
            report.notes.append(f"a rebase ({report.rebase}) was rejected: {'; '.join(outcome.rejected)}")
            report.rebase = None
        batch = plan.take(self.policy.batch.max_facts)
        try:
            outcome = self._edit(batch, report)
        except Inseparable as error:
            report.rebase, batch = error.message, plan
            outcome = self._edit(plan, report)
        return self._accepted(batch, outcome, report)

    def _edit(self, batch: Plan, report: Report, *, can_wait: bool = False) -> Outcome:
        """Make the batch's version and settle it. `can_wait`: a rebase, and an edit can be made in its place."""
        policy, line = self.policy, self.line
        with self.ledger.read() as db:
            applied = db.applied(line.model, batch.head)
            forgotten = db.forgotten(line.model, batch.head)
            tried = db.is_rejected(line.model, batch.digest, self._plan_terms(report), batch.head)
        if tried:
            raise GateRejected(
                f"policy {policy.policy}: the gate rejected this very plan before; it is not tried again until the "
                "plan, the settings or HEAD change",
                hint="kbsync runs",
            )
        self._note_plan(batch, report)
        first = line.try_out(self._edit_of(batch, applied, forgotten, report), self._judge(report))
        if not first.rejected or not policy.gate.trials or not suspects(batch, first):
            return line.settle(first)
        found = sift(
            line,
            batch,
            first,
            judge=self._judge(report),
            edit_of=lambda part: self._edit_of(part, applied, forgotten, report),
            trials=policy.gate.trials,
        )
        return self._sifted(found, report, can_wait=can_wait)

    def _judge(self, report: Report) -> Judge:
        """The policy's own gate; of a rebase, which mixes policies, that of all."""
        if report.rebase is not None:
            return self.judge
        return lambda probe, _: shortfalls(probe, self.policy.gate)

    def _terms(self, report: Report) -> str:
        """Digest of the terms by which the version is judged."""
        return self.line.terms.edit(self.policy.policy) if report.rebase is None else self.line.terms.rebase

    def _plan_terms(self, report: Report) -> str:
        """The same for a plan that is rejected whole: a longer search may find the facts to blame."""
        return digest_of([self._terms(report), self.policy.gate.trials])

    def _edit_of(
        self, batch: Plan, applied: Mapping[FactKey, Applied], forgotten: Collection[str], report: Report
    ) -> Edit:
        """The edit that carries a batch out on its HEAD, which holds the facts `applied`."""
        policy, anew = self.policy, report.rebase is not None
        wording = policy.wording()
        return Edit(
            kind="rebase" if anew else "edit",
            run_id=report.run_id or 0,
            keep={key: fact for key, fact in applied.items() if key not in batch.leaving},
            edits=batch.edits,
            skip_known=[
                planned.request.digest
                for planned in batch.edits
                if skips_known(wording[planned.request.key.relation]) and planned.request.digest not in forgotten
            ],
            controls=self.controls(None if anew else [policy]),
            releases=batch.ended_holds,
            reason=f"sync {policy.policy}" + (f", a rebase: {report.rebase}" if anew else ""),
        )

    def _note_plan(self, batch: Plan, report: Report) -> None:
        document = document_of(batch, self.policy.policy, rebase=report.rebase).model_dump(mode="json")
        with self.ledger.write() as db:
            db.note_plan(report.run_id or 0, self.line.model, batch.head, batch.digest, document)

    def _sifted(self, found: Sifted, report: Report, *, can_wait: bool) -> Outcome:
        """Hold the facts to blame, publish the rest. The outcome is rejected where the search leaves all as it was, or
        where all that it would do is hold facts that an edit in the place of this rebase may take."""
        with self.ledger.write() as db:
            for probe in found.reports():
                db.note_probe(self.line.model, None, probe, run_id=report.run_id)
        first, batch = found.first, found.batch
        rejected = Outcome(first.result, None, first.held, first.rejected)
        waits = can_wait and found.idle
        outcome = rejected if waits else found.publish()
        for tried in found.unpublished(outcome):
            report.took(tried.seconds, tried.computed)
        if waits:
            return rejected
        if outcome.version is None and not outcome.held:
            report.notes.append(found.nothing)
            return rejected
        self._note_plan(found.rest, report)
        search, terms = search_of(report.run_id), self._terms(report)
        self._note_rejected(search, terms, batch.head, replace(rejected, held=()), report)
        report.searches.append(found.to_json(outcome))
        return outcome

    def _accepted(self, batch: Plan, outcome: Outcome, report: Report) -> Outcome:
        """The outcome, unless the gate rejected it: then that is noted and GateRejected raised."""
        if outcome.rejected:
            self._note_rejected(batch.digest, self._plan_terms(report), batch.head, outcome, report)
            raise self._refused(outcome.rejected, report)
        return outcome

    def _refused(self, reasons: Sequence[str], report: Report) -> GateRejected:
        return GateRejected(
            f"policy {self.policy.policy}: the gate rejected the version: {'; '.join(reasons)}",
            hint=f"kbsync holds says what is held and why, kbsync runs --json has the reports of run {report.run_id}",
        )

    def _note_rejected(self, digest: str, terms: str, head: int, outcome: Outcome, report: Report) -> None:
        line, reason = self.line, "; ".join(outcome.rejected)
        with self.ledger.write() as db:
            db.note_rejected(line.model, digest, terms, head, run_id=report.run_id, reason=reason)
            for hold in outcome.held:
                db.hold(line.model, hold, run_id=report.run_id)
            db.note_probe(line.model, None, dict(outcome.result.probe), run_id=report.run_id)


def _unasked(probe: Mapping[str, Any]) -> list[str]:
    """A note where paraphrases could not be asked."""
    count = sum(fact.get("unasked", 0) for fact in probe.get("facts", ()))
    return [f"paraphrases that were not asked, being longer than the model reads: {count}"] if count else []


def skips_known(words: Relation | Inverse) -> bool:
    """Whether a fact of this relation takes no edit where the base answers it by itself."""
    return isinstance(words, Relation) and words.skip_known
