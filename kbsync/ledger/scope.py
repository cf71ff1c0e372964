"""Which keys a pass has to decide again. All others stay as they are: their claims, their policy and what they were
weighed with are the same, and `resolve` on the same gives the same.

    touched by a fetch since the last decision ─┐
    in conflict, waiting, ruled on              ├─▶ dirty ──obvious──▶ accepted by SQL
    with claims that may only now count         ┘         └──▶ undecided: for `resolve`, with all that they meet
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Column, Connection, MetaData, Row, Select, Table, Text, and_, func, or_, select, true, union

import kbsync
from kbsync.facts import Claim, Fact, FactKey, digest_of
from kbsync.ledger import schema
from kbsync.ledger.database import analyze, batches, bulk_insert, insert_new, note_growth, temporary, upsert
from kbsync.ledger.entities import follow_key, redirects_in
from kbsync.ledger.obvious import accept_obvious, functional, said_by
from kbsync.ledger.read_facts import FACT
from kbsync.policy import SUBJECT, Policy

__all__ = ["Undecided", "begun", "met_by", "narrow", "note_decided"]

_dirty = Table(
    "dirty",
    MetaData(),
    Column("relation", Text, primary_key=True),
    Column("subject_id", Text, primary_key=True),
    prefixes=["TEMPORARY"],
)
_claim, _fact, _fetch, _state = schema.claim, schema.fact, schema.fetch, schema.policy_state


@dataclass(frozen=True, slots=True)
class Undecided:
    """The keys that are left to `resolve` (None: every key of the policy), after `accepted` facts that were obvious."""

    keys: frozenset[FactKey] | None
    accepted: int = 0


def narrow(
    connection: Connection, policy: Policy, run_id: int, now: datetime, restless: Collection[FactKey]
) -> Undecided:
    """Accept what is obvious, and find what is left. `restless`: keys that every pass decides again.

    Every key is left where the policy is not the one of the last decision, and where ids were merged or parted since.
    """
    state = _last_decision(connection, policy)
    if state is None:
        if restless or _turned(policy) or _begun_before(connection, policy):
            return Undecided(None)
        note_growth(connection, _claim)
        accepted = accept_obvious(connection, policy, run_id, now, None)
        note_growth(connection, _fact)
        return Undecided(_without_fact(connection, policy), accepted)
    with temporary(connection, _dirty):
        columns = ("relation", "subject_id")
        found = bulk_insert(connection, _dirty, columns, sorted(restless))
        found += insert_new(connection, _dirty, columns, _touched(policy, state))
        if not found:
            return Undecided(frozenset())
        for same in _merged():
            insert_new(connection, _dirty, columns, same)
        analyze(connection, _dirty)
        accepted = accept_obvious(connection, policy, run_id, now, _dirty)
        mine = and_(_fact.c.relation == _dirty.c.relation, _fact.c.subject_id == _dirty.c.subject_id)
        done = select(_fact.c.id).where(mine, _fact.c.since == now).correlate(_dirty).exists()
        return Undecided(_keys(connection.execute(select(_dirty).where(~done))), accepted)


def _last_decision(connection: Connection, policy: Policy) -> Row[Any] | None:
    """When all relations of the policy were last decided; None where not all were by this policy as it is now."""
    relations, digest = tuple(policy.wording()), _digest(connection, policy)
    same = (_state.c.policy == policy.policy, _state.c.digest == digest)
    query = select(func.count(), func.min(_state.c.fetch_id).label("fetch_id"), func.min(_state.c.at).label("at"))
    found = connection.execute(query.where(_state.c.relation.in_(relations), *same)).one()
    return found if found[0] == len(relations) else None


def _begun_before(connection: Connection, policy: Policy) -> bool:
    """Whether there ever was a fact of the policy's relations, or a conflict."""
    tables = (_fact, schema.conflict)
    found = (select(table.c.id).where(table.c.relation.in_(tuple(policy.wording()))).limit(1) for table in tables)
    return any(connection.execute(query).first() for query in found)


def note_decided(connection: Connection, policy: Policy, run_id: int, now: datetime) -> None:
    """From here on, only what changes is decided again."""
    newest = connection.scalar(select(func.max(_fetch.c.id))) or 0
    values = {"digest": _digest(connection, policy), "fetch_id": newest, "run_id": run_id, "at": now}
    rows = [{"relation": name, "policy": policy.policy, **values} for name in policy.wording()]
    upsert(connection, _state, rows)


def begun(connection: Connection, run_id: int, now: datetime, limit: int) -> list[Row[Any]]:
    """The columns of the first facts that a run began at a time, by key."""
    query = select(*(_fact.c[name] for name in FACT)).where(_fact.c.since == now, _fact.c.since_run == run_id)
    return list(connection.execute(query.order_by(_fact.c.relation, _fact.c.subject_id).limit(limit)))


def met_by(
    connection: Connection,
    policy: Policy,
    keys: Collection[FactKey],
    claims: Collection[Claim],
    facts: Collection[Fact],
) -> set[FactKey]:
    """The keys that cannot be decided apart from `keys`, of which there are these claims and facts: those whose facts
    have a prompt that one of these may come to, the same in the opposite direction, and other ids of all of them."""
    found = _written(connection, policy, _prompts(policy, claims, facts))
    found |= _opposite(connection, policy, keys, [*claims, *facts])
    moved = redirects_in(connection)
    old: dict[str, list[str]] = {}
    for was, now in moved.items():
        old.setdefault(now, []).append(was)
    followed = {follow_key(key, moved) for key in found} if moved else set()
    return found | followed | {FactKey(key.relation, was) for key in followed for was in old.get(key.subject, ())}


def _prompts(policy: Policy, claims: Iterable[Claim], facts: Iterable[Fact]) -> set[str]:
    """Every prompt that some keys may come to, in both directions, and those that their facts have."""
    wording = policy.wording()
    written = [(fact.relation, fact.subject.label) for fact in facts]
    for claim in claims:
        words = policy.relations[claim.relation]
        written.append((claim.relation, words.subject_label(claim.subject.label, dict(claim.qualifiers))))
        if words.inverse is not None:
            written.append((words.inverse.relation, claim.object.label))
    return {wording[relation].prompt.replace(SUBJECT, label) for relation, label in written}


def _turned(policy: Policy) -> dict[str, str]:
    """Relation -> its inverse, for those that have one."""
    return {name: words.inverse.relation for name, words in policy.relations.items() if words.inverse is not None}


def _opposite(
    connection: Connection, policy: Policy, keys: Collection[FactKey], said: Iterable[Claim | Fact]
) -> set[FactKey]:
    """The inverse keys of all objects that are named, and the keys whose facts make those inverse ones of `keys`."""
    turned = _turned(policy)
    found = {FactKey(turned[one.relation], one.object.id) for one in said if one.relation in turned}
    for name, inverse in turned.items():
        for page in batches([key.subject for key in keys if key.relation == inverse]):
            behind = (_fact.c.relation == name, _fact.c.object_id.in_(page), _fact.c.until.is_(None))
            found |= _keys(connection.execute(select(_fact.c.relation, _fact.c.subject_id).where(*behind)))
    return found


def _written(connection: Connection, policy: Policy, prompts: Collection[str]) -> set[FactKey]:
    """The keys whose facts have one of these prompts."""
    found: set[FactKey] = set()
    for name, words in policy.wording().items():
        start, _, end = words.prompt.partition(SUBJECT)
        least = len(start) + len(end)
        labels = {
            prompt[len(start) : len(prompt) - len(end)]
            for prompt in prompts
            if len(prompt) > least and prompt.startswith(start) and prompt.endswith(end)
        }
        for page in batches(labels):
            which = (_fact.c.relation == name, _fact.c.subject_label.in_(page), _fact.c.until.is_(None))
            found |= _keys(connection.execute(select(_fact.c.relation, _fact.c.subject_id).where(*which)))
    return found


def _merged() -> list[Select[Any]]:
    """The dirty keys under the ids that their subjects have now, then those of now under the ids that they had."""
    moved = schema.redirect
    return [
        select(_dirty.c.relation, other).where(one == _dirty.c.subject_id)
        for one, other in ((moved.c.old_id, moved.c.new_id), (moved.c.new_id, moved.c.old_id))
    ]


def _digest(connection: Connection, policy: Policy) -> str:
    """What decisions depend on beside claims: these keys of the policy, this kbsync, which ids are merged."""
    decisive = policy.model_dump(mode="json", include={"sources", "precedence", "relations", "confirm"})
    return digest_of([kbsync.__version__, decisive, sorted(redirects_in(connection).items())])


def _touched(policy: Policy, state: Row[Any]) -> Any:
    """Keys whose claims began or ended since the last decision, that are in conflict, or whose claims may only now
    count. A conflict of inverse facts can only end where one of those facts does."""
    fetches = select(_fetch.c.id).where(_fetch.c.source.in_(policy.sources), _fetch.c.id > state.fetch_id)
    # `|| ''`: SQLite would look through all claims of the relation instead of those of the fetches.
    ours = _claim.c.relation.concat("").in_(functional(policy))
    key = (_claim.c.relation, _claim.c.subject_id)
    conflict = schema.conflict
    in_conflict = (
        conflict.c.relation.in_(tuple(policy.wording())),
        conflict.c.closed_at.is_(None),
        conflict.c.kind != "inverse",
    )
    parts = [
        select(*key).where(_claim.c.since_fetch.in_(fetches), ours),
        select(*key).where(_claim.c.until_fetch.in_(fetches), ours),
        select(conflict.c.relation, conflict.c.subject_id).where(*in_conflict),
    ]
    confirm = policy.confirm
    if confirm.fetches > 1 or confirm.hours:
        newest = select(func.max(_fetch.c.number)).where(_fetch.c.source == _claim.c.source).scalar_subquery()
        seen = func.coalesce(_claim.c.seen_to, newest) - _claim.c.seen_from + 1
        since = select(_fetch.c.recorded_at).where(_fetch.c.id == _claim.c.since_fetch).scalar_subquery()
        young = or_(seen <= confirm.fetches, since > state.at - timedelta(hours=confirm.hours))
        parts.append(select(*key).where(*said_by(policy, None), young))
    every = union(*parts).subquery()
    return select(every.c.relation, every.c.subject_id).where(true())


def _without_fact(connection: Connection, policy: Policy) -> frozenset[FactKey]:
    """Keys that are claimed and have no fact."""
    mine = and_(_fact.c.relation == _claim.c.relation, _fact.c.subject_id == _claim.c.subject_id)
    fact = select(_fact.c.id).where(mine, _fact.c.until.is_(None)).correlate(_claim).exists()
    query = select(_claim.c.relation, _claim.c.subject_id).where(*said_by(policy, None), ~fact).distinct()
    return _keys(connection.execute(query))


def _keys(rows: Iterable[Any]) -> frozenset[FactKey]:
    return frozenset(FactKey(*row) for row in rows)
