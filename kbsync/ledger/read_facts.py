"""What was accepted: facts now and as of a time, their history, what changed between two times, conflicts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, and_, or_, select

from kbsync.facts import Change, ChangeKind, Conflict, Entity, Fact, FactKey
from kbsync.ledger import schema
from kbsync.ledger.codec import claims_from_json
from kbsync.ledger.database import Session
from kbsync.ledger.entities import follow_fact, follow_key, redirects_in
from kbsync.ledger.read_sources import PROVENANCE, provenance_of
from kbsync.ledger.records import ConflictRow, FactRow

__all__ = ["FACT", "FactReader", "change_kind", "fact_of"]

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
    return "relabelled" if (before.subject, before.object) != (after.subject, after.object) else None


class FactReader(Session):
    """Questions about facts."""

    def facts(self, relations: Collection[str] | None = None, *, as_of: datetime | None = None) -> dict[FactKey, Fact]:
        """The live facts, withdrawn ones that are kept included, by the ids of now; or those that kbsync held true at
        `as_of`, by the ids of then. Of two facts that have become one by a merge, that of the new id counts."""
        query = select(*_columns(schema.fact)).where(*_valid(relations, as_of))
        found = {FactKey(row[0], row[1]): fact_of(row) for row in self._connection.execute(query)}
        moved = redirects_in(self._connection) if as_of is None else {}
        if not moved:
            return found
        followed = {follow_key(key, moved): follow_fact(fact, moved) for key, fact in found.items()}
        return followed | {key: follow_fact(fact, moved) for key, fact in found.items() if key in followed}

    def fact_rows(self, relations: Collection[str] | None = None, as_of: datetime | None = None) -> list[FactRow]:
        """The same facts with their time, run and provenance, by relation and subject label."""
        table = schema.fact
        return self._rows(*_valid(relations, as_of), order=(table.c.relation, table.c.subject_label, table.c.id))

    def history(self, subject: str, relation: str | None = None) -> list[FactRow]:
        """Every fact that there ever was about a subject, by relation, oldest first. `subject` is its id or any label
        that it has had."""
        table = schema.fact
        ids = select(table.c.subject_id).where(table.c.subject_label == subject)
        which: list[ColumnElement[bool]] = [or_(table.c.subject_id == subject, table.c.subject_id.in_(ids))]
        if relation is not None:
            which.append(table.c.relation == relation)
        return self._rows(*which, order=(table.c.relation, table.c.subject_id, table.c.since))

    def _rows(self, *which: ColumnElement[bool], order: tuple[ColumnElement[Any], ...]) -> list[FactRow]:
        table, fetch = schema.fact, schema.fetch
        newest = (
            select(fetch.c.id)
            .where(fetch.c.source == table.c.source, fetch.c.recorded_at <= table.c.since)
            .order_by(fetch.c.recorded_at.desc())
            .limit(1)
            .correlate(table)
            .scalar_subquery()
        )
        times = (table.c.since, table.c.until, table.c.since_run, table.c.until_run)
        query = (
            select(*_columns(table), *times, *PROVENANCE)
            .outerjoin(fetch, fetch.c.id == newest)
            .where(*which)
            .order_by(*order)
        )
        return [_fact_row(row) for row in self._connection.execute(query)]

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
    width = len(FACT)
    since, until, run_id, until_run = row[width : width + 4]
    return FactRow(fact_of(row[:width]), since, until, run_id, until_run, provenance_of(tuple(row[width + 4 :])))


def _conflict_row(row: Sequence[Any]) -> ConflictRow:
    id_, relation, subject, kind, reason, claims, opened_run, opened_at, closed_run, closed_at = row
    conflict = Conflict(FactKey(relation, subject), kind, claims_from_json(claims), reason)
    return ConflictRow(id_, conflict, opened_run, opened_at, closed_run, closed_at)
