"""Writing decisions: what waits, rulings, verdicts on held plans, plans as they are carried out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import timedelta
from typing import Any

from sqlalchemy import bindparam, delete, insert, select, update

from kbsync.errors import UsageError
from kbsync.facts import FactKey, Ruling, Waiting
from kbsync.ledger import schema
from kbsync.ledger.audit import Auditor
from kbsync.ledger.database import bulk_insert, upsert
from kbsync.ledger.read_decisions import DecisionReader
from kbsync.policy import Policy
from kbsync.weigh import Context

__all__ = ["DecisionWriter"]


class DecisionWriter(DecisionReader, Auditor):
    """What a Writer may write about decisions."""

    def decision_context(self, policy: Policy, keys: Collection[FactKey] | None = None) -> Context:
        """What resolving the policy's relations depends on beside claims and facts; `keys`: only for these."""
        rulings = {row.key: row.ruling for row in self.rulings(tuple(policy.wording()))}
        recent: Mapping[FactKey, frozenset[str]] = {}
        if policy.confirm.flip_flop:
            since = self.now - timedelta(seconds=policy.confirm.flip_flop)
            recent = self.recent_objects(tuple(policy.relations), since, keys)
        return Context(self.now, rulings, recent)

    def set_waiting(
        self,
        run_id: int,
        pending: Collection[Waiting],
        relations: Collection[str],
        keys: Collection[FactKey] | None = None,
    ) -> None:
        """Make the open waits of `relations` exactly `pending`; `keys`: only those of these keys, which were decided
        anew. A wait goes on while it is for the same object and reason."""
        opening = {one.key: one for one in pending}
        over = []
        for row in self.waiting(relations):
            key = row.waiting.key
            if keys is not None and key not in keys:
                continue
            new = opening.get(key)
            if new is not None and (new.reason, new.object) == (row.waiting.reason, row.waiting.object):
                del opening[key]
            else:
                over.append(row.id)
        table = schema.waiting
        if over:
            statement = update(table).where(table.c.id == bindparam("row_id"))
            statement = statement.values(until=self.now, until_run=run_id)
            self._connection.execute(statement, [{"row_id": id_} for id_ in over])
        columns = ("relation", "subject_id", "object_id", "reason", "detail", "since", "since_run")
        rows = ((*one.key, one.object, one.reason, one.detail, self.now, run_id) for one in opening.values())
        bulk_insert(self._connection, table, columns, rows)

    def abandon(self, run_id: int, kept: Collection[str]) -> None:
        """Close the conflicts and waits of relations other than those `kept`: no policy will ever decide them. Who
        keeps one again decides all of it anew."""
        for table, ended, by in (
            (schema.conflict, "closed_at", "closed_run"),
            (schema.waiting, "until", "until_run"),
        ):
            statement = update(table).where(table.c.relation.not_in(kept), table.c[ended].is_(None))
            self._connection.execute(statement.values({ended: self.now, by: run_id}))
        state = schema.policy_state
        self._connection.execute(delete(state).where(state.c.relation.in_(kept), state.c.digest == ""))
        self._connection.execute(update(state).where(state.c.relation.not_in(kept)).values(digest=""))

    def rule(self, key: FactKey, ruling: Ruling, *, user: str) -> None:
        """A person chooses an object for a key, in place of what was chosen before. Audited."""
        self._end_ruling(key)
        values = {"object_id": ruling.object, "overruled": sorted(ruling.overruled), "reason": ruling.reason}
        place = {"relation": key.relation, "subject_id": key.subject}
        self._connection.execute(insert(schema.ruling).values(**place, **values, who=user, since=self.now))
        self.audit(user, "rule", place | values)

    def unrule(self, key: FactKey, *, user: str, reason: str = "") -> None:
        """Withdraw a ruling. Audited. Raises UsageError where there is none."""
        if not self._end_ruling(key):
            raise UsageError(f"{key.relation} of {key.subject}: there is no ruling", hint="kbsync conflicts list")
        self.audit(user, "unrule", {"relation": key.relation, "subject_id": key.subject, "reason": reason})

    def _end_ruling(self, key: FactKey) -> int:
        table = schema.ruling
        which = (table.c.relation == key.relation, table.c.subject_id == key.subject, table.c.until.is_(None))
        return self._connection.execute(update(table).where(*which).values(until=self.now)).rowcount

    def set_verdicts(
        self, run_id: int, keys: Collection[FactKey], *, approved: bool, user: str, reason: str = ""
    ) -> None:
        """What a person says of single rows of a held plan, in place of what was said of them before. Audited."""
        said = {"approved": approved, "who": user, "reason": reason, "at": self.now}
        rows = [{"run_id": run_id, "relation": key.relation, "subject_id": key.subject, **said} for key in sorted(keys)]
        upsert(self._connection, schema.verdict, rows)
        detail = {"approved": approved, "keys": [list(key) for key in sorted(keys)], "reason": reason}
        self.audit(user, "verdict", detail, run_id=run_id)

    def note_plan(self, run_id: int, model: str, head: int, digest: str, document: Mapping[str, Any]) -> None:
        """A plan that is carried out, whole: the link from a run to what it decided. The same one twice is one."""
        table = schema.plan
        known = select(table.c.id).where(table.c.run_id == run_id, table.c.head == head, table.c.digest == digest)
        if self._connection.execute(known).first() is None:
            values = {"run_id": run_id, "model": model, "head": head, "digest": digest, "document": dict(document)}
            self._connection.execute(insert(table).values(**values, at=self.now))
