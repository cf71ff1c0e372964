"""What was done: runs, what is staged for approval, the audit log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select

from kbsync.errors import UsageError
from kbsync.facts import Snapshot
from kbsync.ledger import schema
from kbsync.ledger.codec import snapshot_from_text
from kbsync.ledger.database import Session
from kbsync.ledger.records import AuditRow, RunRow, RunStatus, StagedPlan

__all__ = ["RunReader"]


class RunReader(Session):
    """Questions about runs."""

    def runs(self, limit: int | None = 20, policy: str | None = None, status: RunStatus | None = None) -> list[RunRow]:
        """The newest runs first; `limit` None: all of them."""
        query = select(schema.run).order_by(schema.run.c.id.desc()).limit(limit)
        if policy is not None:
            query = query.where(schema.run.c.policy == policy)
        if status is not None:
            query = query.where(schema.run.c.status == status)
        return [RunRow(*row) for row in self._connection.execute(query)]

    def run(self, run_id: int) -> RunRow:
        """One run. Raises UsageError where there is none of that number."""
        row = self._connection.execute(select(schema.run).where(schema.run.c.id == run_id)).one_or_none()
        if row is None:
            raise UsageError(f"run {run_id}: there is no such run", hint="kbsync runs")
        return RunRow(*row)

    def staged(self, run_id: int) -> list[Snapshot]:
        """What the sources said in a held run; empty where it is held no more."""
        table = schema.staged_snapshot
        query = select(table.c.snapshot).where(table.c.run_id == run_id).order_by(table.c.position)
        return [snapshot_from_text(text) for text in self._connection.scalars(query)]

    def staged_sources(self, run_id: int) -> set[str]:
        """The sources that a held run read."""
        table = schema.staged_snapshot
        return set(self._connection.scalars(select(table.c.source).where(table.c.run_id == run_id)))

    def staged_plan(self, run_id: int) -> StagedPlan | None:
        """Why a run is held and what approving it would do; None where it is held no more."""
        plans = self.staged_plans(run_id=run_id)
        return plans[0] if plans else None

    def staged_plans(self, *, run_id: int | None = None) -> list[StagedPlan]:
        """Everything that waits for approval, oldest first."""
        query = (
            select(schema.staged, schema.run.c.policy)
            .join(schema.run, schema.run.c.id == schema.staged.c.run_id)
            .order_by(schema.staged.c.run_id)
        )
        if run_id is not None:
            query = query.where(schema.staged.c.run_id == run_id)
        return [_staged_plan(row) for row in self._connection.execute(query)]

    def audit_log(self, limit: int | None = 100) -> list[AuditRow]:
        """Who did what when, newest first; `limit` None: everything."""
        query = select(schema.audit).order_by(schema.audit.c.id.desc()).limit(limit)
        return [AuditRow(*row) for row in self._connection.execute(query)]


def _staged_plan(row: Sequence[Any]) -> StagedPlan:
    run_id, plan, digest, reasons, staged_at, policy = row
    return StagedPlan(run_id, policy, plan, digest, tuple(reasons), staged_at)
