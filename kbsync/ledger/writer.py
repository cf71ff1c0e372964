"""Writing the ledger: runs, what sources said, what was accepted. One transaction: all of it or nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, insert, update

from kbsync.errors import UsageError
from kbsync.facts import Change, Claim, Conflict, Fact, FactKey, Snapshot
from kbsync.ledger import merge, schema, scope
from kbsync.ledger.accept import Decision, accept
from kbsync.ledger.aliases import PromotionWriter
from kbsync.ledger.arrivals import ArrivalWriter
from kbsync.ledger.checks import CheckWriter
from kbsync.ledger.codec import snapshot_to_text
from kbsync.ledger.database import insert_row, upsert
from kbsync.ledger.dropped import DroppedWriter
from kbsync.ledger.measures import MeasureWriter
from kbsync.ledger.notices import NoticeWriter
from kbsync.ledger.read_facts import fact_of
from kbsync.ledger.reader import Reader
from kbsync.ledger.records import RecordCounts, RunStatus, ScheduleState, SourceState
from kbsync.ledger.scope import Undecided
from kbsync.ledger.write_entities import EntityWriter
from kbsync.policy import Policy

__all__ = ["Writer"]

_UNFINISHED = ("running", "held")


class OperationWriter(PromotionWriter, DroppedWriter, CheckWriter, ArrivalWriter, NoticeWriter, MeasureWriter):
    """What may be written about running it."""


class Writer(Reader, OperationWriter, EntityWriter):
    """A Reader that may also write. `now` is the time of the transaction: later than that of any before it, so that
    `since` and `until` order what happened even where the clock of the machine went back."""

    def __init__(self, connection: Connection, now: datetime) -> None:
        super().__init__(connection)
        self.now = now
        self.kept = True

    def rollback(self) -> None:
        """Undo all that the block did and will do: a dry run."""
        self.kept = False
        self._connection.rollback()

    def start_run(self, policy: str | None, *, model: str | None, trigger: str, user: str) -> int:
        """A new run, `running`; its id."""
        values = {"policy": policy, "model": model, "cause": trigger, "who": user, "status": "running"}
        return insert_row(self._connection, schema.run, {**values, "message": "", "counts": {}, "started_at": self.now})

    def finish_run(
        self, run_id: int, status: RunStatus, message: str = "", counts: Mapping[str, int] | None = None
    ) -> None:
        """How a run ended; a held one is finished again when it is approved or rejected. `counts` add to those that
        it has. Raises UsageError where the run is over."""
        run = self.run(run_id)
        if run.status not in _UNFINISHED:
            raise UsageError(f"run {run_id} is over: {run.status}", hint=f"kbsync runs {run_id}")
        values = {"status": status, "message": message, "counts": {**run.counts, **(counts or {})}}
        statement = update(schema.run).where(schema.run.c.id == run_id)
        self._connection.execute(statement.values(**values, finished_at=self.now))

    def resume_run(self, run_id: int) -> None:
        """A held run that was approved is `running` again until it ends; what was staged for it is forgotten."""
        self.unstage(run_id)
        statement = update(schema.run).where(schema.run.c.id == run_id)
        self._connection.execute(statement.values(status="running", message="", finished_at=None))

    def interrupt_runs(self, message: str) -> int:
        """Runs that still say `running`, though nothing runs: failed, with this message. Their number. For the start
        of the one process that may write."""
        statement = update(schema.run).where(schema.run.c.status == "running")
        return self._connection.execute(
            statement.values(status="failed", message=message, finished_at=self.now)
        ).rowcount

    def record(self, run_id: int, snapshot: Snapshot) -> RecordCounts:
        """Take a snapshot as what its source says now.

        New claims begin, claims that it no longer makes end: those about an absent subject only where the snapshot is
        complete, and never those about a subject that is there in quarantined rows alone. Claims that stay count one
        fetch more, also where the source vouched that nothing changed. Raises LedgerError for such a vouch without an
        earlier fetch.
        """
        return merge.record(self._connection, run_id, snapshot, self.now)

    def apply(
        self,
        run_id: int,
        facts: Mapping[FactKey, Fact],
        conflicts: Sequence[Conflict],
        relations: Collection[str],
        keys: Collection[FactKey] | None = None,
    ) -> list[Change]:
        """Make the live facts of `relations` exactly `facts` and their open conflicts `conflicts`; the changes, by key.
        `keys`: only those of these keys, which were decided anew.

        A fact that only moved within its source stays as it was accepted. Raises ValueError where a key is of another
        relation.
        """
        changes, written = accept(self._connection, Decision(run_id, self.now, relations, facts, conflicts, keys))
        if written:
            self.audit(self.run(run_id).user, "accept", dict(written), run_id=run_id)
        return changes

    def narrow(self, run_id: int, policy: Policy) -> Undecided:
        """Accept what is obvious of the policy's facts, and find the keys that are left to be decided."""
        restless = self.restless_keys(tuple(policy.wording()))
        undecided = scope.narrow(self._connection, policy, run_id, self.now, restless)
        if undecided.accepted:
            self.audit(self.run(run_id).user, "accept", {"added": undecided.accepted}, run_id=run_id)
        return undecided

    def met_by(
        self, policy: Policy, keys: Collection[FactKey], claims: Collection[Claim], facts: Collection[Fact]
    ) -> set[FactKey]:
        """The keys that cannot be decided apart from `keys`, of which there are these claims and facts."""
        return scope.met_by(self._connection, policy, keys, claims, facts)

    def begun(self, run_id: int, limit: int) -> list[Change]:
        """The first facts that the run began in this transaction where there was none, as changes."""
        rows = scope.begun(self._connection, run_id, self.now, limit)
        return [Change(fact.key, "added", None, fact, self.now, run_id) for fact in map(fact_of, rows)]

    def note_decided(self, run_id: int, policy: Policy) -> None:
        """Every key of the policy is decided as of now: the next pass looks at what changes from here on."""
        scope.note_decided(self._connection, policy, run_id, self.now)

    def stage(
        self,
        run_id: int,
        snapshots: Sequence[Snapshot],
        plan: Mapping[str, Any],
        plan_digest: str,
        reasons: Sequence[str],
    ) -> None:
        """Keep what a held run fetched and would do. Earlier held runs of its policy are superseded."""
        self.supersede(run_id)
        self.unstage(run_id)
        values = {"plan": dict(plan), "plan_digest": plan_digest, "reasons": list(reasons), "staged_at": self.now}
        self._connection.execute(insert(schema.staged).values(run_id=run_id, **values))
        for position, snapshot in enumerate(snapshots):
            row = {"run_id": run_id, "position": position, "source": snapshot.source}
            self._connection.execute(insert(schema.staged_snapshot).values(**row, snapshot=snapshot_to_text(snapshot)))

    def supersede(self, run_id: int, sources: Set[str] | None = None) -> None:
        """Earlier held runs of the run's policy are over; `sources`: only those that read one of these."""
        run = self.run(run_id)
        for earlier in self.runs(limit=None, policy=run.policy, status="held"):
            if earlier.id == run_id or earlier.policy != run.policy:
                continue
            if sources is None or not sources.isdisjoint(self.staged_sources(earlier.id)):
                self.unstage(earlier.id)
                self.finish_run(earlier.id, "superseded", f"by run {run_id}")

    def unstage(self, run_id: int) -> None:
        """Forget what is staged for a run: it was approved, rejected or superseded."""
        for table in (schema.staged_snapshot, schema.staged):
            self._connection.execute(delete(table).where(table.c.run_id == run_id))

    def set_source_state(self, state: SourceState) -> None:
        """How a source has behaved."""
        upsert(self._connection, schema.source_state, [_row(schema.source_state, state)])

    def set_schedule_state(self, state: ScheduleState) -> None:
        """When a policy's pass last began, ended well, and is due."""
        upsert(self._connection, schema.schedule_state, [_row(schema.schedule_state, state)])


def _row(table: Any, value: object) -> dict[str, Any]:
    return {column.name: getattr(value, column.name) for column in table.c}
