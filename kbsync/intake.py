"""Takes what sources said into the ledger and decides what follows: guard, record, resolve, accept.

All of it happens in the caller's transaction, so that a held run or a dry run can take it back whole.

    with ledger.write() as db:
        taken = take_in(db, policy, run_id, snapshots)
        if taken.reasons: db.rollback()
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from kbsync.facts import Change, Claim, Fact, FactKey, Snapshot
from kbsync.ledger.writer import Writer
from kbsync.plan import check_guard
from kbsync.policy import Policy
from kbsync.resolve import resolve

__all__ = ["LISTED", "Intake", "take_in"]


LISTED = 10_000
"""Changes that are listed one by one where there was nothing to weigh: of a first load only the number matters."""


@dataclass(frozen=True, slots=True)
class Intake:
    """What the ledger made of some snapshots: `reasons` are the guard's for holding them; `kinds` counts all changes,
    those that are not listed included."""

    changes: Sequence[Change]
    kinds: Mapping[str, int]
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
    changes, kinds, decided = _decide(db, policy, run)
    gone = _let_go(db, policy, run)
    for relation, facts in Counter(change.key.relation for change in gone).items():
        reasons.append(f"relation {relation} is kept by no policy any more: {facts} facts leave")
    kinds.update(str(change.kind) for change in gone)
    return Intake([*changes, *gone], kinds, counts | decided | {"changes": kinds.total()}, reasons)


def _let_go(db: Writer, policy: Policy, run: int) -> list[Change]:
    """End the facts of the relations that the policy was the last to keep. A guard always holds that."""
    lost = db.lost_relations(policy.policy)
    return db.apply(run, {}, [], lost) if lost else []


def _decide(db: Writer, policy: Policy, run: int) -> tuple[list[Change], Counter[str], dict[str, int]]:
    """Decide the keys that may have changed; the changes (of the obvious ones only the first LISTED), and counts: of
    all changes by kind, and of what was decided."""
    relations, undecided = tuple(policy.wording()), db.narrow(run, policy)
    added = db.begun(run, LISTED) if undecided.accepted else []
    keys, claims, facts = _weighed(db, policy, undecided.keys)
    resolution = resolve(claims, facts, policy, db.decision_context(policy, keys))
    db.set_waiting(run, resolution.pending, relations, keys)
    changes = db.apply(run, resolution.facts, resolution.conflicts, relations, keys)
    db.note_decided(run, policy)
    kinds = Counter(str(change.kind) for change in changes)
    kinds.update(added=undecided.accepted)
    counts = {
        "changes": kinds.total(),
        "conflicts": len(resolution.conflicts),
        "pending": len(resolution.pending),
    }
    return sorted([*added, *changes], key=lambda change: change.key), +kinds, counts


def _weighed(
    db: Writer, policy: Policy, keys: Collection[FactKey] | None
) -> tuple[Collection[FactKey] | None, list[Claim], dict[FactKey, Fact]]:
    """The keys, and all that are decided together with them: of one prompt (Eqn 5), or of one fact turned round; with
    their claims and facts."""
    relations, written = tuple(policy.relations), tuple(policy.wording())
    if keys is None:
        return None, db.claims(relations), db.facts(written)
    claims: list[Claim] = []
    facts: dict[FactKey, Fact] = {}
    found, new = set[FactKey](), set(keys)
    while new:
        found |= new
        claims += (said := db.claims(relations, new))
        facts |= (known := db.facts(written, keys=new))
        new = db.met_by(policy, new, said, known.values()) - found
    return found, claims, facts
