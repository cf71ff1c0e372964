"""Makes the live facts and open conflicts of some relations what a resolution says: ends rows and begins rows, and
overwrites none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, bindparam, select, update

from kbsync.facts import Change, Conflict, Fact, FactKey
from kbsync.ledger import schema
from kbsync.ledger.codec import claims_from_json, claims_to_json, same_claims
from kbsync.ledger.database import bulk_insert, pages
from kbsync.ledger.entities import follow_fact, follow_key, redirects_in
from kbsync.ledger.read_facts import FACT, change_kind, fact_of

__all__ = ["Decision", "accept"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What a resolution of `relations` came to, by which run, when."""

    run_id: int
    at: datetime
    relations: Collection[str]
    facts: Mapping[FactKey, Fact]
    conflicts: Sequence[Conflict]
    keys: Collection[FactKey] | None = None
    """The keys that were decided; None: all of the relations."""


def accept(connection: Connection, decision: Decision) -> tuple[list[Change], Counter[str]]:
    """The changes, by key, and the counts of everything that was written; see `Writer.apply`."""
    _refuse_strays(decision)
    changes, from_elsewhere = _accept_facts(connection, decision)
    written = Counter(str(change.kind) for change in changes)
    written.update(_accept_conflicts(connection, decision))
    written["from_another_source"] = from_elsewhere
    return changes, +written  # without the zeros


def _refuse_strays(decision: Decision) -> None:
    keys = [*decision.facts, *(conflict.key for conflict in decision.conflicts)]
    if strays := sorted({key.relation for key in keys} - set(decision.relations)):
        raise ValueError(f"relations {strays} are not among those resolved, {sorted(decision.relations)}")


def _accept_facts(connection: Connection, decision: Decision) -> tuple[list[Change], int]:
    """The changes, and how many facts are written anew only because another source now stands for them."""
    table, moved = schema.fact, redirects_in(connection)
    begun = dict(decision.facts)
    ended: dict[FactKey, int] = {}
    changes: list[Change] = []
    query = select(table.c.id, *(table.c[name] for name in FACT)).where(
        table.c.relation.in_(decision.relations), table.c.until.is_(None)
    )
    rows = [row for page in pages(table, decision.keys) for row in connection.execute(query.where(*page))]
    own = {FactKey(row[1], row[2]) for row in rows} if moved else set()
    for row in rows:
        said = FactKey(row[1], row[2])
        now = follow_key(said, moved)
        # Of two facts that have become one by a merge, that of the old id ends with nothing in its place.
        key = said if now in own else now
        after = begun.get(key)
        if after is not None and _unchanged(row, after):
            del begun[key]
            continue
        ended[key] = row[0]
        before = fact_of(row[1:])
        changes += _change(decision, follow_fact(before, moved) if key == now else before, after)
    for key, fact in begun.items():
        if key not in ended:
            changes += _change(decision, None, fact)
    _end(connection, "fact", ended.values(), {"until": decision.at, "until_run": decision.run_id})
    _begin_facts(connection, begun.values(), decision)
    silent = len(begun.keys() | ended.keys()) - len(changes)
    return sorted(changes, key=lambda change: change.key), silent


def _unchanged(row: Sequence[Any], fact: Fact) -> bool:
    """Whether a live row says the same. That the claim has moved within its source is no change of the fact: the row
    keeps the place that the decision was made on."""
    return bool(
        row[2] == fact.subject.id
        and row[4] == fact.object.id
        and row[3] == fact.subject.label
        and row[5] == fact.object.label
        and row[8] == fact.status
        and row[6] == fact.source
    )


def _change(decision: Decision, before: Fact | None, after: Fact | None) -> list[Change]:
    kind = change_kind(before, after)
    key = (after or before).key  # type: ignore[union-attr]  # one of them is there
    return [] if kind is None else [Change(key, kind, before, after, decision.at, decision.run_id)]


def _begin_facts(connection: Connection, facts: Iterable[Fact], decision: Decision) -> None:
    rows = (
        (
            fact.relation,
            fact.subject.id,
            fact.subject.label,
            fact.object.id,
            fact.object.label,
            fact.source,
            fact.origin,
            fact.status,
            fact.claim,
            fact.rule,
            decision.at,
            decision.run_id,
        )
        for fact in facts
    )
    bulk_insert(connection, schema.fact, (*FACT, "since", "since_run"), rows)


def _accept_conflicts(connection: Connection, decision: Decision) -> dict[str, int]:
    """A conflict stays open while it is about the same claims; where only their places moved, they are updated."""
    table = schema.conflict
    query = select(table).where(table.c.relation.in_(decision.relations), table.c.closed_at.is_(None))
    opening = {(conflict.key, conflict.kind): conflict for conflict in decision.conflicts}
    closing: list[int] = []
    for row in connection.execute(query).all():
        place = (FactKey(row.relation, row.subject_id), row.kind)
        if decision.keys is not None and place[0] not in decision.keys:
            continue
        conflict = opening.get(place)
        if conflict is None or not same_claims(conflict.claims, claims_from_json(row.claims)):
            closing.append(row.id)
            continue
        del opening[place]
        if (claims := claims_to_json(conflict.claims)) != row.claims:
            connection.execute(update(table).where(table.c.id == row.id).values(claims=claims))
    _end(connection, "conflict", closing, {"closed_at": decision.at, "closed_run": decision.run_id})
    _open_conflicts(connection, opening.values(), decision)
    return {"conflicts_opened": len(opening), "conflicts_closed": len(closing)}


def _open_conflicts(connection: Connection, conflicts: Iterable[Conflict], decision: Decision) -> None:
    columns = ("relation", "subject_id", "kind", "reason", "claims", "opened_run", "opened_at")
    rows = (
        (*conflict.key, conflict.kind, conflict.reason, claims_to_json(conflict.claims), decision.run_id, decision.at)
        for conflict in conflicts
    )
    bulk_insert(connection, schema.conflict, columns, rows)


def _end(connection: Connection, name: str, ids: Collection[int], values: Mapping[str, Any]) -> None:
    if ids:
        table = schema.metadata.tables[name]
        statement = update(table).where(table.c.id == bindparam("row_id")).values(values)
        connection.execute(statement, [{"row_id": id_} for id_ in ids])
