"""Measures of running it: durations by phase, answers of sources, signs of life."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import delete, func, select

from kbsync.ledger import schema
from kbsync.ledger.audit import Auditor
from kbsync.ledger.database import Session, upsert

__all__ = ["Beat", "MeasureReader", "MeasureWriter", "Took"]


@dataclass(frozen=True, slots=True)
class Beat:
    """The last sign of life of a part of the daemon: from which process, what it said of itself, when."""

    part: str
    process: int
    detail: Mapping[str, Any]
    at: datetime


@dataclass(frozen=True, slots=True)
class Took:
    """What a part of a run took, or of several, and for how many things."""

    seconds: float
    amount: int = 0
    runs: int = 1


_NOTHING = Took(0.0)


class MeasureReader(Session):
    """Questions about measures."""

    def beats(self) -> dict[str, Beat]:
        """The last sign of life of each part that has not said goodbye."""
        rows = self._connection.execute(select(schema.heartbeat).order_by(schema.heartbeat.c.part))
        return {row.part: Beat(*row) for row in rows}

    def phases(self, run_id: int) -> dict[str, Took]:
        """What the parts of a run took."""
        table = schema.phase
        query = select(table.c.phase, table.c.milliseconds, table.c.amount).where(table.c.run_id == run_id)
        return {
            phase: Took(milliseconds / 1000, items) for phase, milliseconds, items in self._connection.execute(query)
        }

    def run_counts(self) -> dict[tuple[str, str], int]:
        """How many runs there were, by policy ('' for a command's) and status."""
        table = schema.run
        query = select(table.c.policy, table.c.status, func.count()).group_by(table.c.policy, table.c.status)
        return {(policy or "", status): number for policy, status, number in self._connection.execute(query)}

    def failures_in_a_row(self) -> dict[str, int]:
        """How many of a policy's newest passes failed one after the other; 0 for one whose last pass did not."""
        table = schema.run
        over = table.c.policy.is_not(None) & table.c.status.not_in(("running", "cancelled", "postponed"))
        well = (
            select(table.c.policy, func.max(table.c.id).label("id"))
            .where(over, table.c.status != "failed")
            .group_by(table.c.policy)
            .subquery()
        )
        query = (
            select(table.c.policy, func.count().label("number"))
            .outerjoin(well, well.c.policy == table.c.policy)
            .where(over, table.c.id > func.coalesce(well.c.id, 0))
            .group_by(table.c.policy)
        )
        failed = {row.policy: row.number for row in self._connection.execute(query)}
        known = self._connection.scalars(select(table.c.policy).where(table.c.policy.is_not(None)).distinct())
        return {policy: failed.get(policy, 0) for policy in sorted(known)}

    def fact_counts(self) -> dict[tuple[str, str], int]:
        """How many facts are held true, by relation and status."""
        table = schema.fact
        query = select(table.c.relation, table.c.status, func.count()).where(table.c.until.is_(None))
        rows = self._connection.execute(query.group_by(table.c.relation, table.c.status))
        return {(relation, status): number for relation, status, number in rows}


class MeasureWriter(MeasureReader, Auditor):
    """What a Writer may write about measures."""

    def beat(self, part: str, process: int, detail: Mapping[str, Any] | None = None) -> None:
        """`part` of this process is alive now."""
        row = {"part": part, "process": process, "detail": dict(detail or {}), "at": self.now}
        upsert(self._connection, schema.heartbeat, [row])

    def note_phases(self, run_id: int, seconds: Mapping[str, float], amounts: Mapping[str, int]) -> None:
        """Add what parts of a run took, and for how many things, to what the ledger has of it."""
        before = self.phases(run_id)
        rows = [
            {
                "run_id": run_id,
                "phase": phase,
                "milliseconds": round(1000 * (took + before.get(phase, _NOTHING).seconds)),
                "amount": amounts.get(phase, 0) + before.get(phase, _NOTHING).amount,
            }
            for phase, took in seconds.items()
        ]
        upsert(self._connection, schema.phase, rows)

    def note_answers(self, source: str, outcomes: Mapping[str, int]) -> None:
        """Count what a source has answered."""
        table = schema.source_answer
        query = select(table.c.outcome, table.c.count).where(table.c.source == source)
        before = {row.outcome: int(row[1]) for row in self._connection.execute(query)}
        rows = [
            {"source": source, "outcome": outcome, "count": before.get(outcome, 0) + number, "last_at": self.now}
            for outcome, number in outcomes.items()
        ]
        upsert(self._connection, table, rows)

    def end_beats(self, part: str | None = None) -> None:
        """`part` (None: every part) has ended as it should: that it is silent from now on means nothing."""
        statement = delete(schema.heartbeat)
        self._connection.execute(statement if part is None else statement.where(schema.heartbeat.c.part == part))
