"""Takes what sources said into the ledger and decides what follows: guard, record, resolve, accept.

All of it happens in the caller's transaction, so that a held run or a dry run can take it back whole.

    with ledger.write() as db:
        taken = take_in(db, policy, run_id, snapshots)
        if taken.reasons: db.rollback()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kbsync.facts import Change, Snapshot
from kbsync.ledger.writer import Writer
from kbsync.plan import check_guard
from kbsync.policy import Policy
from kbsync.resolve import resolve

__all__ = ["Intake", "take_in"]


@dataclass(frozen=True, slots=True)
class Intake:
    """What the ledger made of some snapshots: `reasons` are the guard's for holding them."""

    changes: Sequence[Change]
    counts: dict[str, int]
    reasons: list[str]


def take_in(db: Writer, policy: Policy, run: int, snapshots: Sequence[Snapshot]) -> Intake:
    """Record the snapshots and make the policy's facts what their claims come to."""
    reasons: list[str] = []
    counts = dict.fromkeys(("rows", "added", "ended", "quarantined"), 0)
    for snapshot in snapshots:
        db.merge_entities(run, snapshot)
        recorded = db.record(run, snapshot)
        if recorded.difference is not None:
            reasons += check_guard(recorded.difference, policy.guard)
        for name in counts:
            counts[name] += getattr(recorded, name)
    relations = tuple(policy.wording())
    claims = db.claims(tuple(policy.relations))
    resolution = resolve(claims, db.facts(relations), policy, db.decision_context(policy))
    db.set_waiting(run, resolution.pending, relations)
    changes = db.apply(run, resolution.facts, resolution.conflicts, relations)
    counts |= {
        "changes": len(changes),
        "conflicts": len(resolution.conflicts),
        "pending": len(resolution.pending),
    }
    return Intake(changes, counts, reasons)
