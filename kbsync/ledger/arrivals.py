"""Freshness: when changes at the sources reached the weights, and what of them has not yet.

A change began at its source after the last fetch that did not show it: that moment, or up to when that fetch says it
was (`as_of`), is taken for the time of the change. So what is measured from it is an upper bound, at most one interval
between two fetches too long. A source's first fetch shows no change; its facts count from the fetch itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import and_, func, or_, select

from kbsync.facts import FactKey
from kbsync.ledger import schema
from kbsync.ledger.audit import Auditor
from kbsync.ledger.database import Session, batches, bulk_insert, pages

__all__ = ["ArrivalReader", "ArrivalRow", "ArrivalWriter", "Backlog", "FactPlace", "SourceChange"]

_arrival, _claim, _fact, _fetch = schema.arrival, schema.claim, schema.fact, schema.fetch


@dataclass(frozen=True, slots=True)
class ArrivalRow:
    """A change that reached a published version."""

    model: str
    version: int
    key: FactKey
    source: str
    changed_at: datetime
    fetched_at: datetime
    served_at: datetime

    @property
    def seconds(self) -> float:
        """From the change at the source to the model that answers it, at most."""
        return max((self.served_at - self.changed_at).total_seconds(), 0.0)


@dataclass(frozen=True, slots=True)
class SourceChange:
    """Where the live fact of a key comes from: which fetch of which source showed it first, and since when the source
    may have said so."""

    source: str
    changed_at: datetime
    fetched_at: datetime


@dataclass(frozen=True, slots=True)
class FactPlace:
    """A live fact without its text: which object its key has, by which source, since when."""

    key: FactKey
    object_id: str
    source: str
    since: datetime


@dataclass(frozen=True, slots=True)
class Backlog:
    """Changes of a source and a relation that wait for one reason: how many keys, the oldest since when."""

    source: str
    relation: str
    why: str
    keys: int
    since: datetime


class ArrivalReader(Session):
    """Questions about arrivals."""

    def arrivals(self, model: str, since: datetime, relations: Collection[str] | None = None) -> list[ArrivalRow]:
        """The changes that a model's versions answered after `since`, oldest first."""
        query = select(_arrival).where(_arrival.c.model == model, _arrival.c.served_at > since)
        if relations is not None:
            query = query.where(_arrival.c.relation.in_(relations))
        return [_arrival_row(row) for row in self._connection.execute(query.order_by(_arrival.c.id))]

    def source_changes(self, keys: Collection[FactKey]) -> dict[FactKey, SourceChange]:
        """Where the live facts of these keys come from. Facts of ledgers so old that they name no claim are left out.

        A fact comes from the fetch in which its source first said this object, unbroken, or from a later one, in which
        the claim behind the fact before it ended: where one source falls silent and another one's old claim counts.
        """
        first = dict[FactKey, int]()
        for page in pages(_fact, keys):
            for query in (_first_said(*page), _made_way(*page)):
                for relation, subject, fetch in self._connection.execute(query):
                    key = FactKey(relation, subject)
                    first[key] = max(first.get(key, 0), fetch)
        fetches = self._fetches(set(first.values()))
        return {key: fetches[fetch] for key, fetch in first.items()}

    def _fetches(self, ids: Collection[int]) -> dict[int, SourceChange]:
        before = _fetch.alias("before")
        earlier = and_(before.c.source == _fetch.c.source, before.c.number == _fetch.c.number - 1)
        columns = (_fetch.c.id, _fetch.c.source, _fetch.c.fetched_at, before.c.fetched_at, before.c.as_of)
        query = select(*columns).outerjoin(before, earlier)
        found = {}
        for page in batches(ids):
            for id_, source, fetched_at, before_at, before_as_of in self._connection.execute(
                query.where(_fetch.c.id.in_(page))
            ):
                known = [time for time in (fetched_at, before_at, before_as_of) if time is not None]
                found[id_] = SourceChange(source, min(known), fetched_at)
        return found

    def fact_places(self, keys: Collection[FactKey]) -> Iterator[FactPlace]:
        """The live facts of these keys, without their text."""
        for page in pages(_fact, keys):
            yield from map(_place, self._connection.execute(select(*_PLACE).where(_fact.c.until.is_(None), *page)))

    def facts_since(self, source: str, relation: str, since: datetime) -> Iterator[FactPlace]:
        """The live facts of a source and a relation that were accepted at that very time, read one after the other."""
        query = select(*_PLACE).where(
            _fact.c.since == since, _fact.c.until.is_(None), _fact.c.source == source, _fact.c.relation == relation
        )
        with self._connection.execution_options(yield_per=1000).execute(query) as rows:
            yield from map(_place, rows)

    def accepted(self, relations: Collection[str]) -> dict[tuple[str, str, datetime], int]:
        """How many live facts of (source, relation) were accepted when: a number per pass, however many facts."""
        group = (_fact.c.source, _fact.c.relation, _fact.c.since)
        query = select(*group, func.count()).where(_fact.c.relation.in_(relations), _fact.c.until.is_(None))
        return {(row[0], row[1], row[2]): row[3] for row in self._connection.execute(query.group_by(*group))}

    def undecided(self, relations: Collection[str]) -> list[Backlog]:
        """Keys in conflict and keys that wait to be confirmed, by the sources that say something about them."""
        conflict, waiting = schema.conflict, schema.waiting
        parts = (
            (conflict, conflict.c.closed_at, conflict.c.opened_at, None),
            (waiting, waiting.c.until, waiting.c.since, waiting.c.reason),
        )
        found = []
        for table, end, begin, reason in parts:
            about = [_claim.c.relation == table.c.relation, _claim.c.subject_id == table.c.subject_id]
            if reason is not None:
                about.append(or_(table.c.object_id.is_(None), table.c.object_id == _claim.c.object_id))
            group = (func.coalesce(_claim.c.source, ""), table.c.relation, *([] if reason is None else [reason]))
            query = select(*group, func.count(table.c.id.distinct()), func.min(begin)).group_by(*group)
            query = query.outerjoin(_claim, and_(*about, _claim.c.until_fetch.is_(None)))
            for row in self._connection.execute(query.where(end.is_(None), table.c.relation.in_(relations))):
                why = "conflict" if reason is None else row[2]
                found.append(Backlog(row[0], row[1], why, row[-2], row[-1]))
        return found

    def held_since(self, policy: str) -> datetime | None:
        """Since when passes of the policy have been held, one superseding the other; None where none waits now."""
        run = schema.run
        mine = run.c.policy == policy
        held = select(func.max(run.c.id)).where(mine, run.c.status == "held").scalar_subquery()
        over = select(func.max(run.c.id)).where(
            mine, run.c.status.not_in(("held", "superseded", "failed", "cancelled", "running")), run.c.id < held
        )
        query = select(func.min(run.c.started_at)).where(
            mine,
            run.c.status.in_(("held", "superseded")),
            run.c.id <= held,
            run.c.id > func.coalesce(over.scalar_subquery(), 0),
        )
        found: datetime | None = self._connection.scalar(query)
        return found


class ArrivalWriter(ArrivalReader, Auditor):
    """What a Writer may write about arrivals."""

    def note_arrivals(self, model: str, version: int, keys: Collection[FactKey]) -> int:
        """The changes behind the live facts of these keys are answered by this version, as of now; how many there are.

        For a model that came later than a change, the change is as old as the model's own beginning here.
        """
        began = self._connection.scalar(select(schema.model.c.registered_at).where(schema.model.c.id == model))
        columns = ("model", "version", "relation", "subject_id", "source", "changed_at", "fetched_at", "served_at")
        changes: Mapping[FactKey, SourceChange] = self.source_changes(keys)
        rows = (
            (model, version, *key, one.source, max(one.changed_at, began or one.changed_at), one.fetched_at, self.now)
            for key, one in sorted(changes.items())
        )
        return bulk_insert(self._connection, _arrival, columns, rows)


_PLACE = (_fact.c.relation, _fact.c.subject_id, _fact.c.object_id, _fact.c.source, _fact.c.since)


def _place(row: Sequence[Any]) -> FactPlace:
    relation, subject, *more = row
    return FactPlace(FactKey(relation, subject), *more)


def _arrival_row(row: Sequence[Any]) -> ArrivalRow:
    _, model, version, relation, subject, *more = row
    return ArrivalRow(model, version, FactKey(relation, subject), *more)


def _first_said(*which: Any) -> Any:
    """(relation, subject, fetch) of live facts: the first fetch of those in a row that said the object. A claim with
    another label, rank or date is a row of its own, which begins where the one before it ended."""
    key = (_fact.c.relation.label("of_relation"), _fact.c.subject_id.label("of_subject"))
    said = (_claim.c.source, _claim.c.relation, _claim.c.subject_id, _claim.c.object_id, _claim.c.since_fetch)
    begin = select(*key, *said).join(_claim, _claim.c.id == _fact.c.claim_id).where(_fact.c.until.is_(None), *which)
    chain = begin.cte("chain", recursive=True)
    earlier = and_(
        _claim.c.relation == chain.c.relation,
        _claim.c.subject_id == chain.c.subject_id,
        _claim.c.source == chain.c.source,
        _claim.c.object_id == chain.c.object_id,
        _claim.c.until_fetch == chain.c.since_fetch,
        _claim.c.rank != "deprecated",
    )
    chain = chain.union(select(chain.c.of_relation, chain.c.of_subject, *said).join(chain, earlier))
    group = (chain.c.of_relation, chain.c.of_subject)
    return select(*group, func.min(chain.c.since_fetch)).group_by(*group)


def _made_way(*which: Any) -> Any:
    """(relation, subject, fetch) of live facts: the fetch in which the claim behind another object before it ended."""
    before, gone = _fact.alias("before_it"), _claim.alias("gone")
    same_key = (before.c.relation == _fact.c.relation, before.c.subject_id == _fact.c.subject_id)
    other = (before.c.until == _fact.c.since, before.c.object_id != _fact.c.object_id)
    return (
        select(_fact.c.relation, _fact.c.subject_id, gone.c.until_fetch)
        .join(before, and_(*same_key, *other))
        .join(gone, gone.c.id == before.c.claim_id)
        .where(_fact.c.until.is_(None), gone.c.until_fetch.is_not(None), *which)
    )
