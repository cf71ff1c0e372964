"""Measures of running it: durations by phase, answers of sources, signs of life."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Table, and_, delete, func, select

from kbsync.ledger import schema
from kbsync.ledger.audit import Auditor
from kbsync.ledger.database import Session, upsert
from kbsync.ledger.records import ScheduleState, SourceState

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
_SIZES = ("page_count", "page_size")


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

    # For the metrics: numbers of rows, never the rows ----------------------------------------------------------------

    def run_counts(self) -> dict[tuple[str, str], int]:
        """How many runs there were, by policy ('' for a command's) and status."""
        table = schema.run
        return self._numbers(table, func.coalesce(table.c.policy, ""), table.c.status)

    def phase_totals(self) -> dict[tuple[str, str], Took]:
        """What the phases of all runs took, by policy and phase."""
        table, run = schema.phase, schema.run
        of = (func.coalesce(run.c.policy, ""), table.c.phase)
        sums = (func.sum(table.c.milliseconds), func.sum(table.c.amount), func.count())
        query = select(*of, *sums).join(run, run.c.id == table.c.run_id).group_by(*of).order_by(*of)
        rows = self._connection.execute(query)
        return {(policy, phase): Took(int(took) / 1000, int(n), runs) for policy, phase, took, n, runs in rows}

    def last_targets(self) -> Took | None:
        """What computing target vectors took in the newest run that computed any."""
        table = schema.phase
        query = select(table.c.milliseconds, table.c.amount).where(table.c.phase == "targets", table.c.amount > 0)
        row = self._connection.execute(query.order_by(table.c.run_id.desc()).limit(1)).first()
        return None if row is None else Took(row[0] / 1000, row[1])

    def schedule_states(self) -> list[ScheduleState]:
        """When each policy's pass last began, ended well, and is due."""
        query = select(schema.schedule_state).order_by(schema.schedule_state.c.policy)
        return [ScheduleState(*row) for row in self._connection.execute(query)]

    def source_states(self) -> list[SourceState]:
        """How each source has behaved that is known for anything; without the hosts, which are kept among them."""
        table = schema.source_state
        query = select(table).where(table.c.source.not_like("host %")).order_by(table.c.source)
        return [SourceState(*row) for row in self._connection.execute(query)]

    def answers(self) -> dict[tuple[str, str], tuple[int, datetime]]:
        """How often each source gave each kind of answer, and when last."""
        table = schema.source_answer
        rows = self._connection.execute(select(table).order_by(table.c.source, table.c.outcome))
        return {(source, outcome): (number, last) for source, outcome, number, last in rows}

    def held_runs(self) -> dict[str, tuple[int, datetime]]:
        """How many runs of a policy wait for approval, and the oldest since when."""
        staged, run = schema.staged, schema.run
        policy = func.coalesce(run.c.policy, "")
        query = select(policy, func.count(), func.min(staged.c.staged_at)).join(run, run.c.id == staged.c.run_id)
        return {name: (number, since) for name, number, since in self._connection.execute(query.group_by(policy))}

    def fact_counts(self) -> dict[tuple[str, str], int]:
        """How many facts are held true, by relation and status."""
        table = schema.fact
        return self._numbers(table, table.c.relation, table.c.status, where=table.c.until.is_(None))

    def conflict_counts(self) -> dict[tuple[str, str], int]:
        """How many conflicts are open, by relation and kind."""
        table = schema.conflict
        return self._numbers(table, table.c.relation, table.c.kind, where=table.c.closed_at.is_(None))

    def waiting_counts(self) -> dict[tuple[str, str], int]:
        """How many keys wait, by relation and reason."""
        table = schema.waiting
        return self._numbers(table, table.c.relation, table.c.reason, where=table.c.until.is_(None))

    def quarantine_counts(self) -> dict[tuple[str], int]:
        """How many rows cannot be used, by source."""
        table = schema.quarantine
        return self._numbers(table, table.c.source, where=table.c.until_fetch.is_(None))

    def hold_counts(self, model: str, *, ever: bool = False) -> dict[tuple[str], int]:
        """How many keys of a model are held, by reason; `ever`: were, too."""
        table = schema.hold
        where = table.c.model == model
        return self._numbers(table, table.c.reason, where=where if ever else and_(where, table.c.until.is_(None)))

    def version_counts(self, model: str) -> dict[tuple[str], int]:
        """How many versions were published, by kind; the base is none."""
        table = schema.version
        return self._numbers(table, table.c.kind, where=and_(table.c.model == model, table.c.kind != "base"))

    def gate_counts(self, model: str) -> dict[tuple[str, str], int]:
        """How often a policy's edits came through the gate (`published`) or did not (`rejected`)."""
        found: dict[tuple[str, str], int] = {}
        version, probe, run = schema.version, schema.probe_result, schema.run
        tried = (
            ("published", version, version.c.kind.in_(("edit", "rebase"))),
            ("rejected", probe, probe.c.version.is_(None)),
        )
        for result, table, which in tried:
            policy = func.coalesce(run.c.policy, "")
            query = select(policy, func.count()).select_from(table).outerjoin(run, run.c.id == table.c.run_id)
            for name, number in self._connection.execute(query.where(table.c.model == model, which).group_by(policy)):
                found[name, result] = number
        return found

    def check_counts(self, model: str) -> dict[tuple[bool], int]:
        """How many checks of old facts found them answered, or not."""
        table = schema.fact_check
        return self._numbers(table, table.c.answered, where=table.c.model == model)

    def notice_counts(self) -> dict[tuple[str], int]:
        """How many notices there were, by kind."""
        return self._numbers(schema.notice, schema.notice.c.kind)

    def undelivered(self) -> dict[str, int]:
        """How many notices are still to come through, by channel."""
        return self._deliveries(open_=True)

    def given_up(self) -> dict[str, int]:
        """How many notices never came through and are not tried any more, by channel."""
        return self._deliveries(open_=False)

    def _deliveries(self, *, open_: bool) -> dict[str, int]:
        table = schema.delivery
        tried = table.c.next_at.is_not(None) if open_ else table.c.next_at.is_(None)
        found = self._numbers(table, table.c.channel, where=and_(table.c.delivered_at.is_(None), tried))
        return {channel: number for (channel,), number in found.items()}

    def size(self) -> int:
        """Bytes of the database."""
        if self._connection.dialect.name == "sqlite":
            pages, size = (self._connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in _SIZES)
            return int(pages) * int(size)
        return int(self._connection.scalar(select(func.pg_database_size(func.current_database()))) or 0)

    def _numbers(self, table: Table, *groups: Any, where: Any = None) -> dict[Any, int]:
        """Numbers of rows by the values of `groups`, always a tuple."""
        query = select(*groups, func.count()).select_from(table).group_by(*groups).order_by(*groups)
        rows = self._connection.execute(query if where is None else query.where(where))
        return {tuple(group): number for *group, number in rows}


class MeasureWriter(MeasureReader, Auditor):
    """What a Writer may write about measures."""

    def beat(self, part: str, process: int, detail: Mapping[str, Any] | None = None, *, ago: float = 0.0) -> None:
        """`part` of this process was alive `ago` seconds ago. `detail`: what it says of itself; None: what it said."""
        if detail is None:
            before = self.beats().get(part)
            detail = before.detail if before else {}
        at = self.now - timedelta(seconds=ago)
        row = {"part": part, "process": process, "detail": dict(detail), "at": at}
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
