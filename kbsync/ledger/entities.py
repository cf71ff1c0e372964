"""Which ids stand for one thing: the ids that sources have merged into others, and other ways to write a thing.

The ledger keeps what was said under the id that it was said of. What is read as the present state (claims, facts, what
a version holds) follows the redirects, so that a merged thing keeps its facts, its history and its columns; the next
decision about it is written under the new id.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from sqlalchemy import Connection, bindparam, select, union, update

from kbsync.facts import Applied, Claim, Entity, Fact, FactKey
from kbsync.ledger import schema
from kbsync.ledger.database import Session, bulk_insert

__all__ = [
    "EntityReader",
    "collapsed",
    "follow_applied",
    "follow_claim",
    "follow_fact",
    "follow_key",
    "record_aliases",
    "redirects_in",
]


def redirects_in(connection: Connection) -> dict[str, str]:
    """Every id that was merged into another one -> the id that it is now; never a chain."""
    table = schema.redirect
    return {row.old_id: row.new_id for row in connection.execute(select(table.c.old_id, table.c.new_id))}


class EntityReader(Session):
    """Questions about which ids are one thing."""

    def redirects(self) -> dict[str, str]:
        """Every id that was merged into another one -> the id that it is now."""
        return redirects_in(self._connection)

    def ids_of(self, entity_id: str) -> tuple[str, ...]:
        """The id that a thing has now, then those that it had."""
        moved = self.redirects()
        now = moved.get(entity_id, entity_id)
        return (now, *sorted(old for old, new in moved.items() if new == now))

    def other_labels(self, entity_id: str) -> list[str]:
        """Other ways to write a thing, as its sources give them now."""
        table = schema.alias
        query = select(table.c.label).where(
            table.c.entity_id.in_(self.ids_of(entity_id)), table.c.until_fetch.is_(None)
        )
        return sorted(set(self._connection.scalars(query)))

    def claimed_ids(self, source: str) -> set[str]:
        """The ids of all subjects and objects of a source's live claims."""
        table = schema.claim
        live = (table.c.source == source, table.c.until_fetch.is_(None))
        query = union(select(table.c.subject_id).where(*live), select(table.c.object_id).where(*live))
        return set(self._connection.scalars(query))


def collapsed(known: Mapping[str, str], found: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """(all redirects with every chain followed to its end, those of `found` that would close a circle and count not).

    What was found last wins over what was known of the same id.
    """
    moved, refused = {**known}, {}
    for old, new in sorted(found.items()):
        before = moved.pop(old, None)
        if _end(moved, new) == old:
            refused[old] = new
            if before is not None:
                moved[old] = before
        else:
            moved[old] = new
    return {old: _end(moved, old) for old in moved}, refused


def _end(moved: Mapping[str, str], id_: str) -> str:
    while id_ in moved:
        id_ = moved[id_]
    return id_


def follow_key(key: FactKey, moved: Mapping[str, str]) -> FactKey:
    """The key under the id that its subject has now."""
    return FactKey(key.relation, moved.get(key.subject, key.subject))


def _follow(entity: Entity, moved: Mapping[str, str]) -> Entity:
    return Entity(moved[entity.id], entity.label) if entity.id in moved else entity


def follow_claim(claim: Claim, moved: Mapping[str, str]) -> Claim:
    """The claim about the ids that its subject and object have now."""
    return replace(claim, subject=_follow(claim.subject, moved), object=_follow(claim.object, moved))


def follow_fact(fact: Fact, moved: Mapping[str, str]) -> Fact:
    """The fact about the ids that its subject and object have now."""
    return replace(fact, subject=_follow(fact.subject, moved), object=_follow(fact.object, moved))


def follow_applied(applied: Applied, moved: Mapping[str, str]) -> Applied:
    """What a column holds, under the ids of now: the same prompt and target."""
    request = replace(applied.request, key=follow_key(applied.request.key, moved))
    return replace(applied, request=request, object_id=moved.get(applied.object_id, applied.object_id))


def record_aliases(
    connection: Connection,
    source: str,
    fetch_id: int,
    said: Mapping[str, Iterable[str]],
    spoken_of: Iterable[str] | None,
) -> None:
    """Make the live aliases of a source what its fetch says; `spoken_of`: only those of these entities (None: all)."""
    table = schema.alias
    query = select(table.c.id, table.c.entity_id, table.c.label).where(
        table.c.source == source, table.c.until_fetch.is_(None)
    )
    live = {(row.entity_id, row.label): row.id for row in connection.execute(query)}
    wanted = dict.fromkeys((entity, label) for entity, labels in said.items() for label in labels)
    about = None if spoken_of is None else {*said, *spoken_of}
    over = [id_ for alias, id_ in live.items() if alias not in wanted and (about is None or alias[0] in about)]
    if over:
        statement = update(table).where(table.c.id == bindparam("row_id")).values(until_fetch=fetch_id)
        connection.execute(statement, [{"row_id": id_} for id_ in over])
    rows = ((source, *alias, fetch_id) for alias in wanted if alias not in live)
    bulk_insert(connection, table, ("source", "entity_id", "label", "since_fetch"), rows)
