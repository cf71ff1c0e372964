"""Plans that a person has seen: a held run that is approved or rejected, whole or row by row; a plan from a file.

held = held_run(db, run)
judge_rows(db, held, only=[("Vega", "constellation")], without=[], approve=True, user="ada", reason="checked")
review = held.review(db.verdicts(run).values())        # what the pass has to keep to
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kbsync.errors import UsageError
from kbsync.facts import FactKey, Hold, Snapshot
from kbsync.ledger import VerdictRow, Writer
from kbsync.plan import Plan, PlannedEdit, Retraction
from kbsync.plan_document import PlanDocument, document_of, moved

__all__ = ["HeldRun", "Review", "held_run", "hold_refused", "judge_rows", "refuse_another", "unseen"]

SHOWN_MOVES = 5
"""Differences that a refusal names."""


@dataclass(frozen=True, slots=True)
class Review:
    """A plan that a person has seen and wants carried out: exactly that one. `reasons`: what the guard is known to say
    (None: whatever it says); `refused`: the rows that are to stay out, each with the evidence for its hold."""

    document: PlanDocument | None
    digest: str
    reasons: Collection[str] | None = None
    refused: Mapping[FactKey, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HeldRun:
    """A run that waits for approval. `document`: None where an older kbsync held it."""

    run: int
    policy: str
    digest: str
    document: PlanDocument | None
    snapshots: Sequence[Snapshot]

    def review(self, verdicts: Iterable[VerdictRow]) -> Review:
        """The plan without the rows that were refused."""
        refused = {
            row.key: f"run {self.run}: refused by {row.user}" + (f": {row.reason}" if row.reason else "")
            for row in verdicts
            if not row.approved
        }
        return Review(self.document, self.digest, refused=refused)


def held_run(db: Writer, run: int, digest: str | None = None) -> HeldRun:
    """The held run; `digest`: its plan must have it. Raises UsageError where it is not held or has another plan."""
    staged = db.staged_plan(run)
    if staged is None or staged.policy is None:
        raise UsageError(f"run {run} is not held", hint="kbsync runs")
    if digest is not None and digest != staged.plan_digest:
        raise UsageError(f"run {run}: its plan is {staged.plan_digest}, not {digest}", hint="kbsync holds --json")
    return HeldRun(run, staged.policy, staged.plan_digest, PlanDocument.read(staged.plan), db.staged(run))


def judge_rows(
    db: Writer,
    held: HeldRun,
    only: Collection[Sequence[str]],
    without: Collection[Sequence[str]],
    *,
    approve: bool,
    user: str,
    reason: str,
) -> int:
    """Keep verdicts on the rows of a held plan, given as (subject, relation); the number of rows refused.

    To approve `only` some refuses all others; to reject `only` some leaves what was said of the others; `without`: all
    but these. Raises UsageError where the plan has no such row.
    """
    if held.document is None:
        raise UsageError(f"run {held.run} was held by an older kbsync, which kept no rows", hint="kbsync sync")
    rows = held.document.rows.keys()
    named = {held.document.find(*row) for row in (*only, *without)}
    chosen = named if only else rows - named
    refused = rows - chosen if approve else chosen
    for keys, approved in ((refused, False), (chosen if approve else (), True)):
        if keys:
            db.set_verdicts(held.run, keys, approved=approved, user=user, reason=reason)
    return len(refused)


def refuse_another(run: int, policy: str, review: Review, plan: Plan) -> None:
    """Raise UsageError, naming what has moved, where the plan is not the one that was reviewed."""
    if plan.digest == review.digest:
        return
    found = moved(review.document, document_of(plan, policy)) if review.document else ["HEAD or a fact"]
    more = f" and {len(found) - SHOWN_MOVES} more" if len(found) > SHOWN_MOVES else ""
    raise UsageError(
        f"run {run}: the plan is no longer the one that was reviewed: {'; '.join(found[:SHOWN_MOVES])}{more}",
        hint=f"kbsync plan {policy}, or kbsync sync {policy}",
    )


def unseen(reasons: Sequence[str], review: Review | None) -> list[str]:
    """The guard's reasons that nobody has seen yet."""
    if review is None:
        return list(reasons)
    return [] if review.reasons is None else [reason for reason in reasons if reason not in review.reasons]


def hold_refused(db: Writer, run: int, plan: Plan, refused: Mapping[FactKey, str]) -> None:
    """Freeze each refused row of the plan at what the weights hold now."""
    wanted: dict[FactKey, PlannedEdit | Retraction] = {edit.request.key: edit for edit in plan.edits}
    wanted |= {gone.key: gone for gone in plan.retractions}
    for key in sorted(refused.keys() & wanted.keys()):
        row = wanted[key]
        if isinstance(row, Retraction):
            hold = Hold(key, row.applied, None, "manual", refused[key])
        else:
            hold = Hold(key, row.replaces, row.object_id, "manual", refused[key])
        db.hold(plan.model, hold, run_id=run)
