"""What was decided and by whom: keys that wait, rulings, verdicts on the rows of held plans, plans as carried out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import func, or_, select

from kbsync.facts import Claim, FactKey, Ruling, Waiting
from kbsync.ledger import schema
from kbsync.ledger.database import pages
from kbsync.ledger.read_sources import SourceReader
from kbsync.ledger.records import Orphan, PlanRow, RulingRow, VerdictRow, WaitingRow

__all__ = ["DecisionReader"]


class DecisionReader(SourceReader):
    """Questions about decisions."""

    def waiting(self, relations: Collection[str] | None = None, *, open_only: bool = True) -> list[WaitingRow]:
        """Keys whose claims do not count yet, oldest first."""
        table = schema.waiting
        query = select(table).order_by(table.c.id)
        if relations is not None:
            query = query.where(table.c.relation.in_(relations))
        if open_only:
            query = query.where(table.c.until.is_(None))
        return [_waiting_row(row) for row in self._connection.execute(query)]

    def rulings(self, relations: Collection[str] | None = None, *, open_only: bool = True) -> list[RulingRow]:
        """People's choices, oldest first."""
        table = schema.ruling
        query = select(table).order_by(table.c.id)
        if relations is not None:
            query = query.where(table.c.relation.in_(relations))
        if open_only:
            query = query.where(table.c.until.is_(None))
        return [_ruling_row(row) for row in self._connection.execute(query)]

    def claims_about(self, relation: str, subject: str) -> list[Claim]:
        """The live claims of a relation about a subject, given by its id or as some source writes it, oldest first."""
        table = schema.claim
        return self._claims(
            (table.c.relation == relation) & or_(table.c.subject_id == subject, table.c.subject_label == subject)
        )

    def restless_keys(self, relations: Collection[str]) -> set[FactKey]:
        """Keys that every pass decides again, whatever changed at their sources: those that wait, since time alone may
        end that, and those that anybody ever ruled on."""
        waits = {row.waiting.key for row in self.waiting(relations)}
        return waits | {row.key for row in self.rulings(relations, open_only=False)}

    def lost_relations(self, policy: str) -> list[str]:
        """The relations that a policy was the last to decide, and that `abandon` found to be kept by none."""
        table = schema.policy_state
        query = select(table.c.relation).where(table.c.policy == policy, table.c.digest == "")
        return list(self._connection.scalars(query.order_by(table.c.relation)))

    def orphans(self, kept: Collection[str]) -> list[Orphan]:
        """The relations other than those `kept` that have live facts."""
        fact, state = schema.fact, schema.policy_state
        query = (
            select(fact.c.relation, func.count(), func.max(state.c.policy))
            .outerjoin(state, state.c.relation == fact.c.relation)
            .where(fact.c.relation.not_in(kept), fact.c.until.is_(None))
            .group_by(fact.c.relation)
            .order_by(fact.c.relation)
        )
        return [Orphan(*row) for row in self._connection.execute(query)]

    def recent_objects(
        self, relations: Collection[str], since: datetime, keys: Collection[FactKey] | None = None
    ) -> dict[FactKey, frozenset[str]]:
        """The object ids that keys had at some time after `since` and have no more."""
        table = schema.fact
        query = select(table.c.relation, table.c.subject_id, table.c.object_id).where(
            table.c.relation.in_(relations), table.c.until > since
        )
        found: dict[FactKey, set[str]] = {}
        for which in pages(table, keys):
            for relation, subject, object_ in self._connection.execute(query.where(*which)):
                found.setdefault(FactKey(relation, subject), set()).add(object_)
        return {key: frozenset(objects) for key, objects in found.items()}

    def verdicts(self, run_id: int) -> dict[FactKey, VerdictRow]:
        """What people said of single rows of a held plan."""
        table = schema.verdict
        query = select(table).where(table.c.run_id == run_id).order_by(table.c.relation, table.c.subject_id)
        rows = (_verdict_row(row) for row in self._connection.execute(query))
        return {row.key: row for row in rows}

    def plans(self, run_id: int | None = None, *, limit: int | None = None) -> list[PlanRow]:
        """Plans that were carried out, newest first: of one run, or all."""
        table = schema.plan
        query = select(table).order_by(table.c.id.desc()).limit(limit)
        if run_id is not None:
            query = query.where(table.c.run_id == run_id)
        return [PlanRow(*row) for row in self._connection.execute(query)]


def _waiting_row(row: Sequence[Any]) -> WaitingRow:
    id_, relation, subject, object_id, reason, detail, since, until, since_run, until_run = row
    waiting = Waiting(FactKey(relation, subject), reason, object_id, detail)
    return WaitingRow(id_, waiting, since, until, since_run, until_run)


def _ruling_row(row: Sequence[Any]) -> RulingRow:
    id_, relation, subject, object_id, overruled, who, reason, since, until = row
    ruling = Ruling(object_id, frozenset(overruled), reason)
    return RulingRow(id_, FactKey(relation, subject), ruling, who, since, until)


def _verdict_row(row: Sequence[Any]) -> VerdictRow:
    run_id, relation, subject, approved, who, reason, at = row
    return VerdictRow(run_id, FactKey(relation, subject), approved, who, reason, at)
