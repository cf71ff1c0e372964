"""Writing what each model holds: publication, moves of HEAD, holds, measurements; and the audit log of all that."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import and_, insert, update

from kbsync.errors import LedgerError
from kbsync.facts import Applied, FactKey, Hold
from kbsync.ledger import schema
from kbsync.ledger.audit import Auditor
from kbsync.ledger.codec import applied_to_json
from kbsync.ledger.database import bulk_insert, upsert
from kbsync.ledger.entities import follow_applied, redirects_in
from kbsync.ledger.read_versions import RETIRE, VersionReader
from kbsync.ledger.records import PublishedVersion

__all__ = ["VersionWriter"]


class VersionWriter(VersionReader, Auditor):
    """What a Writer may write about models. `model` is always the model's id."""

    def register_model(self, model_id: str, *, name: str, fingerprint: str, path: str) -> None:
        """Let a model follow the ledger, its pristine base as version 0. A model that does already only gets its name
        and path, which may change; raises LedgerError where the fingerprint is another."""
        known = {row.id: row for row in self.models()}.get(model_id)
        if known is not None:
            if known.fingerprint != fingerprint:
                raise LedgerError(f"model {model_id}: the ledger has it with fingerprint {known.fingerprint}")
            statement = update(schema.model).where(schema.model.c.id == model_id)
            self._connection.execute(statement.values(name=name, path=path))
            return
        values = {"id": model_id, "name": name, "fingerprint": fingerprint, "path": path}
        self._connection.execute(insert(schema.model).values(**values, registered_at=self.now))
        base = {"model": model_id, "number": 0, "kind": "base", "facts": 0, "who": "kbsync", "reason": "the base model"}
        self._connection.execute(insert(schema.version).values(**base, created_at=self.now))
        self._move(model_id, 0, "kbsync", "the base model")
        self.audit("kbsync", "register", {"model": model_id, "name": name})

    def publish(self, published: PublishedVersion) -> None:
        """A new version and HEAD on it, at once.

        Raises LedgerError where its number is taken or its parent is not HEAD: then another publication or a rollback
        came first.
        """
        model = published.model
        if (head := self.head(model)) != published.parent:
            raise LedgerError(f"version {published.number} was made on {published.parent}, but HEAD is {head}")
        self._connection.execute(
            insert(schema.version).values(
                model=model,
                number=published.number,
                parent=published.parent,
                kind=published.kind,
                manifest_sha256=published.manifest_sha256,
                weights_sha256=published.weights_sha256,
                facts=len(published.facts),
                run_id=published.run_id,
                who=published.user,
                reason=published.reason,
                created_at=self.now,
            )
        )
        self._write_deltas(published)
        self._move(model, published.number, published.user, published.reason or published.kind)
        if published.probe is not None:
            self.note_probe(model, published.number, published.probe, run_id=published.run_id)
        detail = {"model": model, "version": published.number, "facts": len(published.facts)}
        self.audit(published.user, "publish", {**detail, "kind": published.kind}, run_id=published.run_id)

    def _write_deltas(self, published: PublishedVersion) -> None:
        model = published.model
        columns = ("model", "version", "position", "delta", "excluded", "corrections")
        rows = (
            (model, published.number, position, active.delta, list(active.excluded), active.corrections)
            for position, active in enumerate(published.active)
        )
        bulk_insert(self._connection, schema.version_delta, columns, rows)
        for delta in {applied.delta for applied in published.facts}:
            self._write_columns(model, delta, [applied for applied in published.facts if applied.delta == delta])

    def _write_columns(self, model: str, delta: str, facts: list[Applied]) -> None:
        """What a delta's columns hold. The same edit made again gives the same file: then they are there already."""
        facts = sorted(facts, key=lambda applied: (applied.column, applied.request.key))
        moved = redirects_in(self._connection)
        known = [follow_applied(one, moved) for one in self.delta_facts(model, delta)]
        if sorted(known, key=lambda applied: (applied.column, applied.request.key)) == facts:
            return
        if known:
            raise LedgerError(f"delta {delta}: is in the ledger with other facts", hint="kbsync verify")
        rows = (
            (
                model,
                delta,
                applied.column,
                *applied.request.key,
                applied.object_id,
                applied.request.prompt,
                applied.request.subject,
                applied.request.target,
                list(applied.request.paraphrases),
            )
            for applied in facts
        )
        bulk_insert(self._connection, schema.delta_fact, [column.name for column in _DELTA_FACT], rows)

    def move_head(self, model: str, number: int, *, user: str, reason: str) -> None:
        """Let HEAD be a version that exists. Raises UsageError where there is none of that number."""
        before = self.head(model)
        self.version(model, number)
        self._move(model, number, user, reason)
        self.audit(user, "move head", {"model": model, "from": before, "to": number, "reason": reason})

    def retire(self, model: str, *, user: str, reason: str) -> None:
        """Give up a model's versions so far: HEAD is its pristine base, and no file of theirs has to be kept."""
        newest = self.versions(model)[-1].number
        self.move_head(model, 0, user=user, reason=reason)
        self.audit(user, RETIRE, {"model": model, "version": newest, "reason": reason})

    def _move(self, model: str, number: int, user: str, reason: str) -> None:
        values = {"model": model, "version": number, "at": self.now, "who": user, "reason": reason}
        self._connection.execute(insert(schema.head).values(values))

    def set_weights(self, model: str, number: int, weights_sha256: str) -> None:
        """The hash of a version's weights, once measured (version 0's is not known when it is registered).

        Raises LedgerError where another one is recorded."""
        recorded = self.version(model, number).weights_sha256
        if recorded not in (None, weights_sha256):
            raise LedgerError(
                f"version {number} of {model}: weights have hash {weights_sha256}, recorded is {recorded}"
            )
        table = schema.version
        statement = update(table).where(table.c.model == model, table.c.number == number)
        self._connection.execute(statement.values(weights_sha256=weights_sha256))

    def hold(self, model: str, hold: Hold, *, run_id: int | None = None, version: int | None = None) -> None:
        """Freeze a key. An earlier hold on it ends."""
        self._end_holds(model, [hold.key])
        self._connection.execute(
            insert(schema.hold).values(
                model=model,
                relation=hold.key.relation,
                subject_id=hold.key.subject,
                frozen=None if hold.frozen is None else applied_to_json(hold.frozen),
                held_out=hold.held_out,
                reason=hold.reason,
                evidence=hold.evidence,
                run_id=run_id,
                version=version,
                since=self.now,
            )
        )

    def release(self, model: str, keys: Collection[FactKey]) -> int:
        """End the holds on these keys; how many there were."""
        return self._end_holds(model, keys)

    def _end_holds(self, model: str, keys: Collection[FactKey]) -> int:
        table = schema.hold
        ended = 0
        for key in keys:
            which = and_(table.c.relation == key.relation, table.c.subject_id == key.subject)
            statement = update(table).where(table.c.model == model, table.c.until.is_(None), which)
            ended += self._connection.execute(statement.values(until=self.now)).rowcount
        return ended

    def note_known(self, fingerprint: str, answers: Mapping[str, bool]) -> None:
        """Whether the base of that fingerprint answers these requests (by digest) without an edit."""
        rows = [
            {"fingerprint": fingerprint, "request": request, "known": known, "measured_at": self.now}
            for request, known in answers.items()
        ]
        upsert(self._connection, schema.known, rows)

    def note_rejected(
        self,
        model: str,
        plan_digest: str,
        settings_digest: str,
        head: int,
        *,
        run_id: int | None = None,
        reason: str = "",
    ) -> None:
        """The gate refused this plan (REBASE: a rebase that was due by itself; `search_of` a run: what it then searched
        for the facts to hold) with these settings on this HEAD."""
        key = {"model": model, "plan_digest": plan_digest, "settings_digest": settings_digest, "head": head}
        row = {**key, "run_id": run_id, "reason": reason, "rejected_at": self.now}
        upsert(self._connection, schema.rejected_plan, [row])

    def note_probe(
        self, model: str, version: int | None, report: Mapping[str, Any], *, run_id: int | None = None
    ) -> None:
        """A probe report; `version` None: of an edit that became no version."""
        values = {"model": model, "version": version, "run_id": run_id, "report": dict(report)}
        self._connection.execute(insert(schema.probe_result).values(**values, measured_at=self.now))


_DELTA_FACT = schema.delta_fact.c
