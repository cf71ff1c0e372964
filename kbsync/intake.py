"""Takes what sources said into the ledger and decides what follows: guard, record, resolve, accept.

All of it happens in the caller's transaction, so that a held run or a dry run can take it back whole.

    with ledger.write() as db:
        taken = take_in(db, policy, run_id, snapshots)
        if taken.reasons: db.rollback()
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kbsync.facts import Change, FactKey, Snapshot
from kbsync.ledger.obvious import functional
from kbsync.ledger.scope import prompts_of
from kbsync.ledger.writer import Writer
from kbsync.plan import check_guard
from kbsync.policy import Policy
from kbsync.resolve import resolve

__all__ = ["LISTED", "Intake", "take_in"]


LISTED = 10_000
"""Changes that are listed one by one where there was nothing to weigh: of a first load only the number matters."""


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
    changes, decided = _decide(db, policy, run)
    return Intake(changes, counts | decided, reasons)


def _decide(db: Writer, policy: Policy, run: int) -> tuple[list[Change], dict[str, int]]:
    """Decide the keys that may have changed; the changes (of the obvious ones only the first LISTED), and counts."""
    relations, undecided = tuple(policy.wording()), db.narrow(run, policy)
    added = db.begun(run, LISTED) if undecided.accepted else []
    keys = undecided.keys if undecided.keys is None else _with_rivals(db, policy, undecided.keys)
    claims, facts = db.claims(tuple(policy.relations), keys), db.facts(relations, keys=keys)
    resolution = resolve(claims, facts, policy, db.decision_context(policy, keys))
    db.set_waiting(run, resolution.pending, relations, keys)
    changes = db.apply(run, resolution.facts, resolution.conflicts, relations, keys)
    db.note_decided(run, policy)
    counts = {
        "changes": len(changes) + undecided.accepted,
        "conflicts": len(resolution.conflicts),
        "pending": len(resolution.pending),
    }
    return sorted([*added, *changes], key=lambda change: change.key), counts


def _with_rivals(db: Writer, policy: Policy, keys: Collection[FactKey]) -> frozenset[FactKey]:
    """The keys, and all whose facts have a prompt that one of them may come to: they are decided together (Eqn 5)."""
    found: frozenset[FactKey] = frozenset()
    reached = frozenset(keys)
    while new := reached - found:
        found = reached
        claims = db.claims(tuple(policy.relations), new)
        facts = db.facts(functional(policy), keys=new)
        reached = found | db.keys_written(policy, prompts_of(policy, claims, facts.values()))
    return found
