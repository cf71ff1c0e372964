"""Which thing a person means: by id, by a label or alias that it has or had, by an id that was merged into another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Select, func, select

from kbsync.facts import Entity, FactKey
from kbsync.ledger import schema
from kbsync.ledger.database import Session

__all__ = ["CHUNK", "SubjectReader", "chunks", "claimed_relations"]

CHUNK = 500
"""Values of one IN (…): below the limits of both databases, and enough for the round trips not to count."""


def chunks(values: Iterable[str]) -> Iterator[Sequence[str]]:
    """The values, CHUNK at a time."""
    listed = list(values)
    return (listed[start : start + CHUNK] for start in range(0, len(listed), CHUNK))


def claimed_relations() -> Select[tuple[str]]:
    """The relations that sources speak of: with them the index `claim_of_key` answers what is said of a subject."""
    return select(schema.fetch.c.relation).distinct()


class SubjectReader(Session):
    """Questions about what things are called."""

    def subjects(self, text: str) -> list[Entity]:
        """What `text` may mean, by id, each with the label that it has now; empty where the ledger has nothing of it.

        An id comes before a label, and one that was merged stands for the one that it was merged into. A label that
        no fact has, only claims, is looked for in all claims.
        """
        if ids := self._with_id(text):
            return self._named(ids)
        return self._named(self._labelled(text) or self._only_claimed(text))

    def merged(self, subject: str) -> tuple[str, ...]:
        """The ids of one thing: its own, then those that sources have merged into it."""
        query = select(schema.redirect.c.old_id).where(schema.redirect.c.new_id == subject)
        return (subject, *sorted(self._connection.scalars(query)))

    def names(self, keys: Iterable[FactKey]) -> dict[str, str]:
        """Id -> label of the subjects and objects of these keys, as claims and facts have them; the newest counts."""
        wanted: dict[str, set[str]] = {}
        for key in keys:
            wanted.setdefault(key.relation, set()).add(key.subject)
        found: dict[str, str] = {}
        for relation, subjects in wanted.items():
            for some in chunks(sorted(subjects)):
                for table in (schema.claim, schema.fact):
                    query = select(table.c.subject_id, table.c.subject_label, table.c.object_id, table.c.object_label)
                    query = query.where(table.c.relation == relation, table.c.subject_id.in_(some)).order_by(table.c.id)
                    for subject, label, object_, object_label in self._connection.execute(query):
                        found |= {object_: object_label, subject: label}
        return found

    def _with_id(self, text: str) -> set[str]:
        fact, claim, alias = schema.fact, schema.claim, schema.alias
        merged = select(schema.redirect.c.new_id).where(schema.redirect.c.old_id == text)
        if (target := self._connection.scalar(merged)) is not None:
            return {target}
        queries = (
            select(fact.c.subject_id).where(fact.c.subject_id == text),
            select(claim.c.subject_id).where(claim.c.relation.in_(claimed_relations()), claim.c.subject_id == text),
            select(alias.c.entity_id).where(alias.c.entity_id == text),
        )
        return {text} if any(self._connection.scalar(query.limit(1)) for query in queries) else set()

    def _labelled(self, text: str) -> set[str]:
        fact, alias = schema.fact, schema.alias
        queries = (
            select(fact.c.subject_id).where(fact.c.subject_label == text),
            select(alias.c.entity_id).where(alias.c.label == text),
        )
        return {id_ for query in queries for id_ in self._connection.scalars(query.distinct())}

    def _only_claimed(self, text: str) -> set[str]:
        claim = schema.claim
        return set(self._connection.scalars(select(claim.c.subject_id).where(claim.c.subject_label == text).distinct()))

    def _named(self, ids: Iterable[str]) -> list[Entity]:
        """The entities with these ids, merged ones as what they were merged into."""
        redirect = schema.redirect
        found: set[str] = set()
        for some in chunks(sorted(set(ids))):
            query = select(redirect.c.old_id, redirect.c.new_id).where(redirect.c.old_id.in_(some))
            into = {row.old_id: row.new_id for row in self._connection.execute(query)}
            found |= {into.get(id_, id_) for id_ in some}
        return [Entity(id_, self.label(id_)) for id_ in sorted(found)]

    def label(self, subject: str) -> str:
        """How a subject is written now: in its newest fact, else in its newest claim, else its id."""
        fact, claim = schema.fact, schema.claim
        queries = (
            select(fact.c.subject_label).where(fact.c.subject_id == subject).order_by(fact.c.since.desc()),
            select(claim.c.subject_label)
            .where(claim.c.relation.in_(claimed_relations()), claim.c.subject_id == subject)
            .order_by(claim.c.id.desc()),
        )
        return next((found for query in queries if (found := self._connection.scalar(query.limit(1)))), subject)

    def entity(self, id_: str) -> dict[str, Any]:
        """What a thing is and was called (labels of its facts, aliases), what was merged into it, and in how many facts
        of which relation it is subject or object now. The latter reads all facts."""
        ids = self.merged(id_)
        fact, redirect = schema.fact, schema.redirect
        merged = select(redirect.c.old_id, redirect.c.source, redirect.c.at).where(redirect.c.new_id == id_)
        relations = []
        for side in ("subject", "object"):
            query = select(fact.c.relation, func.count()).where(fact.c[f"{side}_id"].in_(ids), fact.c.until.is_(None))
            for relation, count in self._connection.execute(query.group_by(fact.c.relation).order_by(fact.c.relation)):
                relations.append({"relation": relation, "as": side, "facts": count})
        return {
            "id": id_,
            "label": self.label(id_),
            "names": [*self._labels(ids), *self._aliases(ids)],
            "merged": [
                {"id": old, "source": source, "at": at.isoformat()}
                for old, source, at in self._connection.execute(merged.order_by(redirect.c.old_id))
            ],
            "relations": relations,
        }

    def _labels(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """Each label with when facts first and last had it."""
        fact = schema.fact
        query = select(fact.c.subject_label, fact.c.source, fact.c.since, fact.c.until)
        found: dict[tuple[str, str], list[Any]] = {}
        for label, source, since, until in self._connection.execute(
            query.where(fact.c.subject_id.in_(ids)).order_by(fact.c.since)
        ):
            found.setdefault((label, source), [since, until])[1] = until
        return [_name(label, "label", source, *times) for (label, source), times in found.items()]

    def _aliases(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        alias, began, ended = schema.alias, schema.fetch.alias("began"), schema.fetch.alias("ended")
        query = (
            select(alias.c.label, alias.c.source, began.c.recorded_at, ended.c.recorded_at)
            .join(began, began.c.id == alias.c.since_fetch)
            .outerjoin(ended, ended.c.id == alias.c.until_fetch)
            .where(alias.c.entity_id.in_(ids))
            .order_by(alias.c.id)
        )
        rows = self._connection.execute(query)
        return [_name(label, "alias", source, since, until) for label, source, since, until in rows]


def _name(label: str, kind: str, source: str, since: datetime, until: datetime | None) -> dict[str, Any]:
    times = {"since": since.isoformat(), "until": until.isoformat() if until else None}
    return {"name": label, "kind": kind, "source": source} | times
