"""Accepts, by set-based SQL, what `resolve` would accept without weighing anything: a key that never had a fact, with
one claim, written like no other key. Of a first load that is nearly everything.

A property test holds that the outcome is `resolve`'s own.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from itertools import combinations
from typing import Any

from sqlalchemy import Column as SqlColumn
from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    MetaData,
    Select,
    Table,
    and_,
    func,
    literal,
    or_,
    select,
    tuple_,
)

from kbsync.ledger import schema
from kbsync.ledger.database import analyze, insert_from, temporary
from kbsync.policy import SUBJECT, Policy
from kbsync.weigh import ONLY_CLAIM

__all__ = ["accept_obvious", "functional", "said_by"]

_lone = Table("lone", MetaData(), SqlColumn("claim_id", Integer, primary_key=True), prefixes=["TEMPORARY"])
_claim, _fact = schema.claim, schema.fact


def functional(policy: Policy) -> list[str]:
    """The policy's relations that have facts."""
    return [name for name, relation in policy.relations.items() if relation.cardinality == "one"]


def accept_obvious(connection: Connection, policy: Policy, run_id: int, now: datetime, dirty: Table | None) -> int:
    """Accept what is obvious among the keys in `dirty` (relation, subject_id); None: among all. How many facts."""
    if not _one_claim_decides(policy):
        return 0
    with temporary(connection, _lone):
        if not insert_from(connection, _lone, ["claim_id"], _alone(policy, dirty)):
            return 0
        analyze(connection, _lone)
        values = {
            **{name: _claim.c[name] for name in _COPIED},
            "status": literal("live"),
            "claim_id": _claim.c.id,
            "rule": literal(ONLY_CLAIM),
            "since": literal(now, schema.fact.c.since.type),
            "since_run": literal(run_id),
        }
        rows = select(*values.values()).join(_lone, _lone.c.claim_id == _claim.c.id).order_by(_claim.c.id)
        rows = rows.where(_claim.c.rank != "deprecated", *_written_like_no_other(policy, dirty))
        return insert_from(connection, _fact, list(values), rows)


_COPIED = ("relation", "subject_id", "subject_label", "object_id", "object_label", "source", "origin")


def _one_claim_decides(policy: Policy) -> bool:
    """Whether one claim is enough, and no two relations can come to one prompt."""
    words = [policy.relations[name] for name in functional(policy)]
    plain = all(relation.inverse is None and relation.subject == SUBJECT for relation in words)
    apart = not any(_may_meet(one.prompt, other.prompt) for one, other in combinations(words, 2))
    confirm = policy.confirm
    return plain and apart and policy.quorum is None and confirm.fetches == 1 and not confirm.hours


def _may_meet(one: str, other: str) -> bool:
    """Whether some subjects would make one prompt of two templates."""
    (start, _, end), (begin, _, finish) = one.partition(SUBJECT), other.partition(SUBJECT)
    starts = start.startswith(begin) or begin.startswith(start)
    return starts and (end.endswith(finish) or finish.endswith(end))


def said_by(policy: Policy, dirty: Table | None) -> list[ColumnElement[bool]]:
    """The live claims of the policy's sources and functional relations, about the keys in `dirty`."""
    live, source, relation = _claim.c.until_fetch.is_(None), _claim.c.source, _claim.c.relation
    if dirty is None:
        return [live, source.in_(policy.sources), relation.in_(functional(policy))]
    # `|| ''`: SQLite would look through all claims of the sources instead of those about the keys.
    of_policy = [source.concat("").in_(policy.sources), relation.concat("").in_(functional(policy))]
    return [live, *of_policy, _same_key(dirty)]


def _same_key(table: Table) -> ColumnElement[bool]:
    return and_(table.c.relation == _claim.c.relation, table.c.subject_id == _claim.c.subject_id)


def _alone(policy: Policy, dirty: Table | None) -> Select[Any]:
    query = select(func.min(_claim.c.id)).where(*said_by(policy, dirty), *_untouched())
    return query.group_by(_claim.c.relation, _claim.c.subject_id).having(func.count() == 1)


def _untouched() -> list[ColumnElement[bool]]:
    """The key never had a fact, is in no conflict, does not wait, nobody ever ruled on it, and its ids are no others'
    too."""
    ends: Sequence[tuple[Table, ColumnElement[bool] | None]] = [
        (_fact, None),
        (schema.conflict, schema.conflict.c.closed_at.is_(None)),
        (schema.waiting, schema.waiting.c.until.is_(None)),
        (schema.ruling, None),
    ]
    found = []
    for table, still in ends:
        query = select(table.c.id).where(_same_key(table))
        found.append(~(query if still is None else query.where(still)).correlate(_claim).exists())
    moved = schema.redirect
    merged = or_(moved.c.old_id.in_((_claim.c.subject_id, _claim.c.object_id)), moved.c.new_id == _claim.c.subject_id)
    found.append(~select(moved.c.old_id).where(merged).correlate(_claim).exists())
    return found


def _written_like_no_other(policy: Policy, dirty: Table | None) -> list[ColumnElement[bool]]:
    """Neither another key's fact nor another key that is being decided has the label."""
    written = (_claim.c.relation, _claim.c.subject_label)
    shared = select(*written).where(*said_by(policy, dirty)).group_by(*written)
    shared = shared.having(func.count(_claim.c.subject_id.distinct()) > 1)
    taken = select(_fact.c.id).where(
        _fact.c.subject_label == _claim.c.subject_label,
        _fact.c.relation == _claim.c.relation,
        _fact.c.until.is_(None),
    )
    return [tuple_(*written).not_in(shared.correlate(None)), ~taken.correlate(_claim).exists()]
