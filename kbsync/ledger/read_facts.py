"""What was accepted: facts now and as of a time, their history, what changed between two times, conflicts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, func, or_, select

from kbsync.errors import UsageError
from kbsync.facts import Change, ChangeKind, Conflict, Entity, Fact, FactKey
from kbsync.ledger import schema
from kbsync.ledger.codec import claims_from_json
from kbsync.ledger.database import Session, pages
from kbsync.ledger.entities import follow_fact, follow_key, redirects_in
from kbsync.ledger.read_sources import PROVENANCE, provenance_of
from kbsync.ledger.records import ConflictRow, FactRow
from kbsync.weigh import date_parts

__all__ = ["FACT", "PAGE", "STREAMED", "FactFilter", "FactReader", "change_kind", "fact_of"]

STREAMED = 2_000
"""Rows that a long answer holds in memory at a time."""
PAGE = 800
"""Rows that may be asked for by id at a time: old builds of SQLite allow 999 parameters."""

FACT = (
    "relation",
    "subject_id",
    "subject_label",
    "object_id",
    "object_label",
    "source",
    "origin",
    "status",
    "claim_id",
    "rule",
)
"""The columns that make a Fact, in the order of `fact_of`."""


_BY_NAME = (schema.fact.c.relation, schema.fact.c.subject_label, schema.fact.c.id)


def fact_of(values: Collection[Any]) -> Fact:
    """The columns FACT as a value."""
    relation, subject, subject_label, object_, object_label, *rest = values
    return Fact(relation, Entity(subject, subject_label), Entity(object_, object_label), *rest)


def change_kind(before: Fact | None, after: Fact | None) -> ChangeKind | None:
    """What a user would call the step from one state of a key to the next; None where only the source or its row is
    another."""
    if before is None or after is None:
        return None if before is after else "added" if before is None else "removed"
    if before.object.id != after.object.id:
        return "changed"
    if before.status != after.status:
        return "withdrawn" if after.status == "withdrawn" else "restored"
    written = (before.subject.label, before.object.label) != (after.subject.label, after.object.label)
    return "relabelled" if written else None


@dataclass(frozen=True, slots=True)
class FactFilter:
    """Which facts: those live, or those that kbsync held true at `as_of`. `subject` and `object` are an id or a label,
    `search` is a part of either's label, in upper or lower case."""

    relation: str | None = None
    subject: str | None = None
    object: str | None = None
    source: str | None = None
    search: str | None = None
    as_of: datetime | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        """As a WHERE of `fact`."""
        return [*_valid(None if self.relation is None else [self.relation], self.as_of), *self.about(schema.fact)]

    def about(self, table: Any) -> list[ColumnElement[bool]]:
        """What it says of things and sources, as a WHERE of `fact` or `claim`."""
        which: list[ColumnElement[bool]] = []
        if self.subject is not None:
            which.append(or_(table.c.subject_id == self.subject, table.c.subject_label == self.subject))
        if self.object is not None:
            which.append(or_(table.c.object_id == self.object, table.c.object_label == self.object))
        if self.source is not None:
            which.append(table.c.source == self.source)
        if self.search is not None:
            labels = (table.c.subject_label, table.c.object_label)
            which.append(or_(*(label.icontains(self.search, autoescape=True) for label in labels)))
        return which


class FactReader(Session):
    """Questions about facts."""

    def facts(
        self,
        relations: Collection[str] | None = None,
        *,
        as_of: datetime | None = None,
        keys: Collection[FactKey] | None = None,
    ) -> dict[FactKey, Fact]:
        """The live facts, withdrawn ones that are kept included, by the ids of now; or those that kbsync held true at
        `as_of`, by the ids of then. Of two facts that have become one by a merge, that of the new id counts. `keys`:
        only those written under these keys."""
        query = select(*_columns(schema.fact)).where(*_valid(relations, as_of))
        rows = (row for page in pages(schema.fact, keys) for row in self._connection.execute(query.where(*page)))
        found = {FactKey(row[0], row[1]): fact_of(row) for row in rows}
        moved = redirects_in(self._connection) if as_of is None else {}
        if not moved:
            return found
        followed = {follow_key(key, moved): follow_fact(fact, moved) for key, fact in found.items()}
        return followed | {key: follow_fact(fact, moved) for key, fact in found.items() if key in followed}

    def fact_rows(self, relations: Collection[str] | None = None, as_of: datetime | None = None) -> list[FactRow]:
        """The same facts with their time, run and provenance, by relation and subject label."""
        return list(self._rows(*_valid(relations, as_of)))

    def select_facts(self, wanted: FactFilter, limit: int | None = None) -> Generator[FactRow]:
        """The facts that pass a filter, one after the other, never all in memory; by relation and subject label. Who
        does not read to the end closes it while the ledger is open: it is a server's cursor."""
        return self._rows(*wanted.conditions(), limit=limit)

    def fact_ids(self, wanted: FactFilter, limit: int | None = None) -> list[int]:
        """The ids of the facts that pass a filter, in the order of `select_facts`: a long answer is read by
        `facts_by_id`, page by page, each in a block of its own."""
        query = select(schema.fact.c.id).where(*wanted.conditions()).order_by(*_BY_NAME)
        return list(self._connection.scalars(query.limit(limit)))

    def facts_by_id(self, ids: Collection[int]) -> list[FactRow]:
        """These facts, in the order of `select_facts`: no more than `PAGE`. One that has ended since says so."""
        return list(self._rows(schema.fact.c.id.in_(ids)))

    def count_facts(self, wanted: FactFilter) -> int:
        """How many there are."""
        query = select(func.count()).select_from(schema.fact).where(*wanted.conditions())
        return self._connection.scalar(query) or 0

    def claims_valid_at(self, wanted: FactFilter, date: str) -> Generator[FactRow]:
        """What sources say was true at `date` (ISO 8601, or its beginning), as kbsync knows it now or at `as_of`; to be
        closed like `select_facts`.

        Dates are compared as far as both are known: what began in 2011 was true at 2011-03. A claim without dates is
        always true, a deprecated one never. Raises UsageError for what is no date.
        """
        at = _date(date)
        return self._streamed(_claims(wanted), _claim_row, lambda row: _covers(row.valid_from, row.valid_to, at))

    def claim_ids(self, wanted: FactFilter, date: str) -> list[int]:
        """The ids of what `claims_valid_at` gives, to be read by `claims_by_id`."""
        at, table = _date(date), schema.claim.c
        rows = self._connection.execute(_claims(wanted).with_only_columns(table.id, table.valid_from, table.valid_to))
        return [row.id for row in rows if _covers(row.valid_from, row.valid_to, at)]

    def claims_by_id(self, ids: Collection[int]) -> list[FactRow]:
        """These claims in the form of facts: no more than `PAGE`. One that has ended since says so."""
        return list(self._streamed(_claims().where(schema.claim.c.id.in_(ids)), _claim_row))

    def fact_row(self, relation: str, subjects: Collection[str]) -> FactRow | None:
        """The live fact of a key, by any of the ids of its subject; None where there is none."""
        table = schema.fact
        which = (table.c.relation == relation, table.c.subject_id.in_(subjects), table.c.until.is_(None))
        return next(self._rows(*which), None)

    def history(self, subject: str, relation: str | None = None) -> list[FactRow]:
        """Every fact that there ever was about a subject, by relation, oldest first. `subject` is its id or any label
        that it has had."""
        table = schema.fact
        labelled = select(table.c.subject_id).where(table.c.subject_label == subject).distinct()
        # Two questions: PostgreSQL would read all facts for one that has the other as a subquery beside OR.
        ids = {subject, *self._connection.scalars(labelled)}
        which: list[ColumnElement[bool]] = [table.c.subject_id.in_(ids)]
        if relation is not None:
            which.append(table.c.relation == relation)
        return list(self._rows(*which, order=(table.c.relation, table.c.subject_id, table.c.since)))

    def _rows(
        self, *which: ColumnElement[bool], order: Sequence[ColumnElement[Any]] = (), limit: int | None = None
    ) -> Generator[FactRow]:
        table, fetch, claim = schema.fact, schema.fetch, schema.claim
        newest = (
            select(fetch.c.id)
            .where(fetch.c.source == table.c.source, fetch.c.recorded_at <= table.c.since)
            .order_by(fetch.c.recorded_at.desc())
            .limit(1)
            .correlate(table)
            .scalar_subquery()
        )
        more = (table.c.since, table.c.until, table.c.since_run, table.c.until_run, table.c.id)
        query = (
            select(*_columns(table), *more, claim.c.valid_from, claim.c.valid_to, *PROVENANCE)
            .outerjoin(fetch, fetch.c.id == newest)
            .outerjoin(claim, claim.c.id == table.c.claim_id)
            .where(*which)
            .order_by(*(order or _BY_NAME))
            .limit(limit)
        )
        return self._streamed(query, _fact_row)

    def _streamed(
        self,
        query: Select[Any],
        made: Callable[[Any], FactRow],
        wanted: Callable[[Any], bool] = lambda _: True,
    ) -> Generator[FactRow]:
        """The rows of a long answer that are wanted; its cursor is closed with it."""
        result = self._connection.execute(query, execution_options={"yield_per": STREAMED})
        try:
            yield from (made(row) for row in result if wanted(row))
        finally:
            result.close()

    def changes(
        self,
        since: datetime,
        until: datetime | None = None,
        *,
        relation: str | None = None,
        source: str | None = None,
    ) -> list[Change]:
        """What changed after `since`, up to and with `until` (default: now), oldest first. `source` is the one that
        said the new fact, or the old one where it was removed."""
        found = [*self._begun(since, until, relation), *self._ended(since, until, relation)]
        found = _through_merges(found, redirects_in(self._connection))
        kept = [change for change in found if source is None or _source(change) == source]
        return sorted(kept, key=lambda change: (change.at, change.key))

    def _begun(self, since: datetime, until: datetime | None, relation: str | None) -> list[Change]:
        """Facts that began in the window, each with the one that it replaced at that moment."""
        after, before = schema.fact, schema.fact.alias("before")
        query = (
            select(*_columns(before), *_columns(after), after.c.since, after.c.since_run)
            .select_from(after)
            .outerjoin(before, and_(_same_key(before, after), before.c.until == after.c.since))
            .where(*_window(after.c.since, since, until, relation))
        )
        width = len(FACT)
        changes = []
        for row in self._connection.execute(query):
            old = None if row[0] is None else fact_of(row[:width])
            new = fact_of(row[width : 2 * width])
            if (kind := change_kind(old, new)) is not None:
                changes.append(Change(new.key, kind, old, new, row[-2], row[-1]))
        return changes

    def _ended(self, since: datetime, until: datetime | None, relation: str | None) -> list[Change]:
        """Facts that ended in the window with nothing in their place."""
        table, successor = schema.fact, schema.fact.alias("successor")
        replaced = select(successor.c.id).where(_same_key(successor, table), successor.c.since == table.c.until)
        query = select(*_columns(table), table.c.until, table.c.until_run).where(
            *_window(table.c.until, since, until, relation), ~replaced.exists()
        )
        return [
            Change((fact := fact_of(row[:-2])).key, "removed", fact, None, row[-2], row[-1])
            for row in self._connection.execute(query)
        ]

    def conflicts(self, *, open_only: bool = True) -> list[ConflictRow]:
        """Conflicts, oldest first."""
        table = schema.conflict
        query = select(table).order_by(table.c.id)
        if open_only:
            query = query.where(table.c.closed_at.is_(None))
        return [_conflict_row(row) for row in self._connection.execute(query)]


def _columns(table: Any) -> list[ColumnElement[Any]]:
    return [table.c[name] for name in FACT]


def _same_key(one: Any, other: Any) -> ColumnElement[bool]:
    return and_(one.c.relation == other.c.relation, one.c.subject_id == other.c.subject_id)


def _through_merges(changes: Sequence[Change], moved: Mapping[str, str]) -> list[Change]:
    """The changes as they are of things, not of ids: a fact that ended under an old id and began under the new one at
    the same moment is one change, or none."""
    if not moved:
        return list(changes)
    begun = {(change.key, change.at): change for change in changes if change.kind == "added"}
    found: list[Change] = []
    joined: set[tuple[FactKey, datetime | None]] = set()
    for change in changes:
        now = (follow_key(change.key, moved), change.at)
        after = begun.get(now) if change.kind == "removed" and now[0] != change.key else None
        if after is not None and now not in joined:
            joined.add(now)
            change = replace(after, before=change.before)
        before = change.before and follow_fact(change.before, moved)
        kind = change_kind(before, change.after and follow_fact(change.after, moved))
        if kind is not None:
            found.append(replace(change, kind=kind))
    return [change for change in found if change.kind != "added" or (change.key, change.at) not in joined]


def _valid(relations: Collection[str] | None, as_of: datetime | None) -> list[ColumnElement[bool]]:
    table = schema.fact
    which: list[ColumnElement[bool]] = [] if relations is None else [table.c.relation.in_(relations)]
    if as_of is None:
        return [*which, table.c.until.is_(None)]
    return [*which, table.c.since <= as_of, or_(table.c.until.is_(None), table.c.until > as_of)]


def _window(
    time: ColumnElement[datetime], since: datetime, until: datetime | None, relation: str | None
) -> list[ColumnElement[bool]]:
    which = [time > since]
    if until is not None:
        which.append(time <= until)
    if relation is not None:
        which.append(time.table.c.relation == relation)
    return which


def _source(change: Change) -> str | None:
    fact = change.after or change.before
    return None if fact is None else fact.source


def _fact_row(row: Sequence[Any]) -> FactRow:
    since, until, run, until_run, id_, start, end, *provenance = row[len(FACT) :]
    fact, fetched = fact_of(row[: len(FACT)]), provenance_of(tuple(provenance))
    return FactRow(fact, since, until, run, until_run, fetched, id_, start, end)


def _date(text: str) -> tuple[int, ...]:
    if not (at := date_parts(text)):
        raise UsageError(f"{text!r} is no date", hint="2011, 2011-03 or 2011-03-04")
    return at


def _claims(wanted: FactFilter | None = None) -> Select[Any]:
    """The claims that pass a filter, as kbsync knows them now or at `as_of`, but for deprecated ones; None: all that
    there ever were."""
    claim, began, ended = schema.claim, schema.fetch.alias("began"), schema.fetch.alias("ended")
    which: list[ColumnElement[bool]] = []
    if wanted is not None:
        which = [*wanted.about(claim), claim.c.rank != "deprecated"]
        if wanted.as_of is None:
            which.append(claim.c.until_fetch.is_(None))
        else:
            which.append(began.c.recorded_at <= wanted.as_of)
            which.append(or_(ended.c.recorded_at.is_(None), ended.c.recorded_at > wanted.as_of))
        if wanted.relation is not None:
            which.append(claim.c.relation == wanted.relation)
    return (
        select(claim, began.c.recorded_at, began.c.run_id, ended.c.recorded_at, ended.c.run_id)
        .add_columns(*(began.c[column.name] for column in PROVENANCE))
        .join(began, began.c.id == claim.c.since_fetch)
        .outerjoin(ended, ended.c.id == claim.c.until_fetch)
        .where(*which)
        .order_by(claim.c.relation, claim.c.subject_label, claim.c.id)
    )


def _claim_row(row: Any) -> FactRow:
    """A claim in the form of a fact."""
    since, run, until, until_run, *provenance = row[-4 - len(PROVENANCE) :]
    subject, object_ = Entity(row.subject_id, row.subject_label), Entity(row.object_id, row.object_label)
    fact = Fact(row.relation, subject, object_, row.source, row.origin, claim=row.id)
    fetched = provenance_of(tuple(provenance))
    return FactRow(fact, since, until, run, until_run, fetched, None, row.valid_from, row.valid_to)


def _covers(start: str | None, end: str | None, at: tuple[int, ...]) -> bool:
    """Whether a time is between two dates, as far as all are known."""
    begun, over = date_parts(start), date_parts(end)
    return begun[: len(at)] <= at[: len(begun)] and (not over or at[: len(over)] <= over[: len(at)])


def _conflict_row(row: Sequence[Any]) -> ConflictRow:
    id_, relation, subject, kind, reason, claims, opened_run, opened_at, closed_run, closed_at = row
    conflict = Conflict(FactKey(relation, subject), kind, claims_from_json(claims), reason)
    return ConflictRow(id_, conflict, opened_run, opened_at, closed_run, closed_at)
