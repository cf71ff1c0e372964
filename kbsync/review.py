"""Plans that a person has seen: a held run that is approved or rejected, whole or row by row; a plan from a file.

held = held_run(db, run)
judge_rows(db, held, only=[("Vega", "constellation")], without=[], approve=True, user="ada", reason="checked")
review = held.review(db.verdicts(run).values())        # what the pass has to keep to
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from kbsync.errors import Moved, UsageError
from kbsync.facts import FactKey, Hold, Snapshot
from kbsync.ledger import VerdictRow, Writer
from kbsync.plan import Plan, PlannedEdit, Retraction
from kbsync.plan_document import PlanDocument, moved

__all__ = [
    "HeldRun",
    "Review",
    "held_run",
    "hold_refused",
    "judge_rows",
    "refuse_another",
    "refuse_outdated",
    "reviews_of",
    "unseen",
]

SHOWN_MOVES = 5
"""Differences that a refusal names."""


@dataclass(frozen=True, slots=True)
class Review:
    """A plan that a person has seen and wants carried out: exactly that one. `document`: None where only the digest of
    the plan is known. `reasons`: what the guard is known to say (None: whatever it says); `refused`: the rows that are
    to stay out, each with the evidence for its hold."""

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
    staged_at: datetime

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
    document = PlanDocument.read(staged.plan)
    return HeldRun(run, staged.policy, staged.plan_digest, document, db.staged(run), staged.staged_at)


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


def reviews_of(documents: Sequence[PlanDocument], names: Collection[str]) -> dict[str, Review]:
    """What the passes of a plan file have to keep to, by policy: of those named, or of all in it. Raises UsageError
    where it has no plan for one of them or two, or none at all."""
    reviews = {one.policy: Review(one, one.digest, one.guard) for one in documents if one.policy is not None}
    if not reviews or len(reviews) < len(documents):
        what = "two plans for one policy" if reviews else "no plan of a policy"
        raise UsageError(f"the plan file has {what}", hint="kbsync plan --out FILE")
    if strangers := set(names) - reviews.keys():
        raise UsageError(f"the plan has none for policy {min(strangers)}", hint="kbsync plan --out FILE")
    return {name: review for name, review in reviews.items() if name in (names or reviews)}


def refuse_outdated(db: Writer, held: HeldRun) -> None:
    """Raise Moved where a source that the run read has said something since that was accepted."""
    if newer := db.accepted_since({snapshot.source for snapshot in held.snapshots}, held.staged_at):
        raise Moved(
            f"run {held.run}: what {min(newer)} said later has been accepted since the run was held",
            hint=f"kbsync sync {held.policy}, or kbsync reject {held.run}",
        )


def refuse_another(policy: str, review: Review, plan: Plan, now: PlanDocument) -> None:
    """Raise Moved, saying what has moved, where the plan is not the one that was reviewed. `now`: its document."""
    if review.document is not None:
        found = moved(review.document, now)
    else:
        found = [] if plan.digest == review.digest else ["HEAD or a fact"]
    if not found:
        return
    more = f" and {len(found) - SHOWN_MOVES} more" if len(found) > SHOWN_MOVES else ""
    raise Moved(
        f"policy {policy}: the plan is no longer the one that was reviewed: {'; '.join(found[:SHOWN_MOVES])}{more}",
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
