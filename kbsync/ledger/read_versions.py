"""What each model holds: versions and what is in them, HEAD, holds, known answers, rejected plans, probes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import and_, func, select

from kbsync.errors import UsageError
from kbsync.facts import Applied, EditRequest, FactKey, Hold
from kbsync.ledger import schema
from kbsync.ledger.codec import applied_from_json
from kbsync.ledger.database import Session, batches
from kbsync.ledger.entities import follow_applied, follow_key, redirects_in
from kbsync.ledger.records import HeadMove, HoldRow, ModelRow, Placement, ProbeRow, VersionRow
from kbsync.versions.manifest import ActiveDelta

__all__ = ["REBASE", "RETIRE", "VersionReader", "search_of"]

REBASE = "rebase"
"""In the place of a plan's digest: a rebase that was due by itself, whatever else was to go into it."""
SEARCH = "search "
RETIRE = "retire"
"""The entry of the audit log by which a model's versions so far were given up."""


def search_of(run_id: int | None) -> str:
    """In the place of a plan's digest: what a run searched for the facts to hold. Once they are released, that very
    plan is tried again."""
    return f"{SEARCH}{run_id}"


class VersionReader(Session):
    """Questions about models and their versions. `model` is always the model's id."""

    def models(self) -> list[ModelRow]:
        """The models that follow the ledger, oldest first."""
        table = schema.model
        query = select(table.c.id, table.c.name, table.c.fingerprint, table.c.path, table.c.registered_at)
        rows = self._connection.execute(query.order_by(table.c.registered_at, table.c.id)).all()
        return [ModelRow(*row[:4], self.head(row[0]), row[4]) for row in rows]

    def model_named(self, setting: str) -> ModelRow | None:
        """The model that `model:` of kbsync.yaml stands for, as the ledger knows it; None where it was never synced.
        It need not be on this machine."""
        names = {setting, setting.partition("@")[0], Path(setting).name}
        found = [model for model in self.models() if model.name in names]
        return found[-1] if found else None

    def head(self, model: str) -> int:
        """The number of the version that edits build on. Raises UsageError where the model is not registered."""
        moves = self.head_moves(model, limit=1)
        if not moves:
            raise UsageError(f"model {model}: the ledger does not know it", hint="kbsync status")
        return moves[0].number

    def head_moves(self, model: str, *, limit: int | None = None) -> list[HeadMove]:
        """Where HEAD was from when, newest first."""
        table = schema.head
        query = select(table.c.model, table.c.version, table.c.at, table.c.who, table.c.reason)
        query = query.where(table.c.model == model).order_by(table.c.id.desc()).limit(limit)
        return [HeadMove(*row) for row in self._connection.execute(query)]

    def versions(self, model: str, *, newest: int | None = None) -> list[VersionRow]:
        """Published versions, by number: all, or so many of the newest."""
        which = [schema.version.c.model == model]
        if newest is not None:
            numbers = sorted(self.made_at(model))[-newest:]
            which += [schema.version.c.number >= numbers[0]] if numbers else []
        return self._versions(*which)

    def version(self, model: str, number: int) -> VersionRow:
        """One version. Raises UsageError where there is none of that number."""
        found = self._versions(schema.version.c.model == model, schema.version.c.number == number)
        if not found:
            raise UsageError(f"version {number} of {model}: there is no such version", hint="kbsync log")
        return found[0]

    def parents(self, model: str) -> dict[int, int]:
        """Version -> the one that it was made on; version 0 has none."""
        table = schema.version
        query = select(table.c.number, table.c.parent).where(table.c.model == model, table.c.parent.is_not(None))
        return {row.number: row.parent for row in self._connection.execute(query)}

    def since_rebase(self, model: str) -> list[int]:
        """HEAD and the versions that it was made on, newest first, back to a rebase or the base, which is the last."""
        table = schema.version.c
        rows = self._connection.execute(select(table.number, table.parent, table.kind).where(table.model == model))
        made = {row.number: row for row in rows}
        path = [self.head(model)]
        while (row := made[path[-1]]).kind not in ("base", "rebase") and row.parent is not None:
            path.append(row.parent)
        return path

    def made_at(self, model: str) -> dict[int, datetime]:
        """Version -> when it was made."""
        table = schema.version
        query = select(table.c.number, table.c.created_at).where(table.c.model == model)
        return {row.number: row.created_at for row in self._connection.execute(query)}

    def retired(self) -> dict[str, int]:
        """Models whose versions were given up -> the newest of those: their files need not be there."""
        table = schema.audit
        query = select(table.c.detail).where(table.c.action == RETIRE).order_by(table.c.id)
        return {detail["model"]: detail["version"] for detail in self._connection.scalars(query)}

    def _versions(self, *which: Any) -> list[VersionRow]:
        table, probe = schema.version, schema.probe_result
        newest = (
            select(func.max(probe.c.id))
            .where(probe.c.model == table.c.model, probe.c.version == table.c.number)
            .correlate(table)
            .scalar_subquery()
        )
        query = select(table, probe.c.report).outerjoin(probe, probe.c.id == newest)
        rows = self._connection.execute(query.where(*which).order_by(table.c.model, table.c.number))
        return [VersionRow(*row) for row in rows]

    def active(self, model: str, number: int) -> list[ActiveDelta]:
        """The deltas that a version's weights are rebuilt from, in order."""
        table = schema.version_delta
        query = (
            select(table.c.delta, table.c.excluded, table.c.corrections)
            .where(table.c.model == model, table.c.version == number)
            .order_by(table.c.position)
        )
        return [
            ActiveDelta(delta=delta, excluded=tuple(excluded), corrections=corrections)
            for delta, excluded, corrections in self._connection.execute(query)
        ]

    def applied(self, model: str, number: int) -> dict[FactKey, Applied]:
        """What a version's weights hold, by the ids of now: the columns of its active deltas but those excluded; the
        later one wins. Of two ids that have been merged the old one keeps its own key, and so leaves the weights."""
        held: dict[FactKey, Applied] = {}
        for active in self.active(model, number):
            for applied in self.delta_facts(model, active.delta):
                if applied.column not in active.excluded:
                    held[applied.request.key] = applied
        moved = redirects_in(self._connection)
        for key in sorted(held) if moved else ():
            now = follow_key(key, moved)
            followed = follow_applied(held[key], moved)
            if now == key:
                held[key] = followed
            elif now not in held:
                held[now] = followed
                del held[key]
        return held

    def holding(self, model: str, numbers: Collection[int]) -> dict[int, int]:
        """How many facts each of these versions holds: as many as `applied` has, at a small part of the cost."""
        table, columns = schema.version_delta.c, schema.delta_fact.c
        active: list[Any] = []
        for page in batches(numbers):
            query = select(table.version, table.delta, table.excluded)
            active += self._connection.execute(query.where(table.model == model, table.version.in_(page)))
        keys: dict[str, list[tuple[int, tuple[str, str]]]] = {}
        for names in batches({row.delta for row in active}):
            facts = select(columns.delta, columns.delta_column, columns.relation, columns.subject_id)
            for row in self._connection.execute(facts.where(columns.model == model, columns.delta.in_(names))):
                keys.setdefault(row[0], []).append((row[1], (row[2], row[3])))
        held: dict[int, set[tuple[str, str]]] = {number: set() for number in numbers}
        for number, delta, excluded in active:
            out = set(excluded)
            held[number].update(key for column, key in keys.get(delta, ()) if column not in out)
        return {number: len(found) for number, found in held.items()}

    def delta_facts(self, model: str, delta: str) -> list[Applied]:
        """What each column of a delta put into the weights, by column."""
        table = schema.delta_fact
        query = (
            select(table)
            .where(table.c.model == model, table.c.delta == delta)
            .order_by(table.c.delta_column, table.c.relation, table.c.subject_id)
        )
        return [_applied(row) for row in self._connection.execute(query)]

    def placements(self, subjects: Collection[str], model: str | None = None) -> list[Placement]:
        """Every column that was ever made for these subjects, oldest version first; `model` None: of all models."""
        table = schema.delta_fact
        query = select(table).where(table.c.subject_id.in_(subjects))
        if model is not None:
            query = query.where(table.c.model == model)
        moved = redirects_in(self._connection)
        columns = [(row.model, follow_applied(_applied(row), moved)) for row in self._connection.execute(query)]
        holding: dict[tuple[str, str, int], list[int]] = {}
        for (where, version, _), (_, applied) in sorted(self._holders(columns).items()):
            holding.setdefault((where, applied.delta, applied.column), []).append(version)
        found = [
            Placement(where, applied, tuple(holding.get((where, applied.delta, applied.column), ())))
            for where, applied in columns
        ]
        return sorted(found, key=lambda place: (place.model, place.versions, place.applied.request.key))

    def _holders(self, columns: Sequence[tuple[str, Applied]]) -> dict[tuple[str, int, FactKey], tuple[int, Applied]]:
        """(model, version, key) -> the column that counts there, with its delta's position."""
        table = schema.version_delta
        query = select(table.c.model, table.c.version, table.c.position, table.c.delta, table.c.excluded).where(
            table.c.model.in_({where for where, _ in columns}),
            table.c.delta.in_({applied.delta for _, applied in columns}),
        )
        active: dict[tuple[str, str], list[Any]] = {}
        for row in self._connection.execute(query):
            active.setdefault((row.model, row.delta), []).append(row)
        found: dict[tuple[str, int, FactKey], tuple[int, Applied]] = {}
        for where, applied in columns:
            for row in active.get((where, applied.delta), ()):
                place = (where, row.version, applied.request.key)
                if applied.column not in row.excluded and (place not in found or found[place][0] < row.position):
                    found[place] = (row.position, applied)
        return found

    def holds(self, model: str) -> dict[FactKey, Hold]:
        """The holds in force."""
        return {row.hold.key: row.hold for row in self.hold_rows(model)}

    def hold_rows(self, model: str, *, open_only: bool = True) -> list[HoldRow]:
        """Holds with who made them and when, oldest first."""
        query = select(schema.hold).where(schema.hold.c.model == model).order_by(schema.hold.c.id)
        if open_only:
            query = query.where(schema.hold.c.until.is_(None))
        return [_hold_row(row) for row in self._connection.execute(query)]

    def known(self, fingerprint: str) -> dict[str, bool]:
        """Request digest -> whether the base of that fingerprint answers it by itself."""
        query = select(schema.known.c.request, schema.known.c.known).where(schema.known.c.fingerprint == fingerprint)
        return {row.request: row.known for row in self._connection.execute(query)}

    def forgotten(self, model: str, number: int) -> set[str]:
        """Digests of requests that the base answers by itself, and this version does not."""
        return self._reported(model, number, "forgotten")

    def known_to(self, model: str, number: int) -> set[str]:
        """Digests of requests that need no edit in a version: the base answers them, and the version was asked and
        does, too. Not those that were learned of since, and so never asked of it: a rollback may have come between."""
        [fingerprint] = [row.fingerprint for row in self.models() if row.id == model]
        known = {digest for digest, answered in self.known(fingerprint).items() if answered}
        return known & self._reported(model, number, "remembered") if number else known

    def _reported(self, model: str, number: int, what: str) -> set[str]:
        reports = (row.report for row in self.probes(model, number))
        return {digest for report in reports for digest in report.get(what, ())}

    def is_rejected(self, model: str, plan_digest: str, settings_digest: str, head: int) -> bool:
        """Whether the gate has refused exactly this plan, with these settings, on this HEAD."""
        table = schema.rejected_plan
        query = select(table.c.model).where(
            table.c.model == model,
            table.c.plan_digest == plan_digest,
            table.c.settings_digest == settings_digest,
            table.c.head == head,
        )
        return self._connection.execute(query).first() is not None

    def outdated_holds(self, model: str, settings_digests: Collection[str]) -> set[FactKey]:
        """The keys that the gate holds since a search with settings that are none of these: it may let them pass."""
        hold, rejected = schema.hold, schema.rejected_plan
        same = and_(rejected.c.model == hold.c.model, rejected.c.run_id == hold.c.run_id)
        query = (
            select(hold.c.relation, hold.c.subject_id)
            .join(rejected, same)
            .where(hold.c.model == model, hold.c.until.is_(None), hold.c.reason == "gate")
            .where(rejected.c.plan_digest.startswith(SEARCH))
            .where(rejected.c.settings_digest.not_in(settings_digests))
        )
        return {FactKey(*row) for row in self._connection.execute(query)}

    def rejected_rebases(self, model: str, settings_digest: str) -> set[int]:
        """The versions on which a rebase that was due by itself was rejected with these settings."""
        table = schema.rejected_plan
        query = select(table.c.head).where(
            table.c.model == model, table.c.plan_digest == REBASE, table.c.settings_digest == settings_digest
        )
        return set(self._connection.scalars(query))

    def probes(self, model: str, version: int | None = None) -> list[ProbeRow]:
        """Probe reports, newest first: of one version, or all, those of rejected edits included."""
        table = schema.probe_result
        query = select(table.c.model, table.c.version, table.c.run_id, table.c.report, table.c.measured_at)
        query = query.where(table.c.model == model).order_by(table.c.id.desc())
        if version is not None:
            query = query.where(table.c.version == version)
        return [ProbeRow(*row) for row in self._connection.execute(query)]

    def live_deltas(self, models: Collection[str] | None = None) -> set[str]:
        """The sha256 of every delta and corrections file that some version needs: what `gc` must keep."""
        table = schema.version_delta
        query = select(table.c.delta, table.c.corrections)
        if models is not None:
            query = query.where(table.c.model.in_(models))
        return {sha for row in self._connection.execute(query) for sha in row if sha is not None}


def _applied(row: Sequence[Any]) -> Applied:
    _, delta, position, relation, subject_id, object_id, prompt, subject, target, paraphrases = row
    request = EditRequest(FactKey(relation, subject_id), prompt, subject, target, tuple(paraphrases))
    return Applied(request, object_id, delta, position)


def _hold_row(row: Sequence[Any]) -> HoldRow:
    _, model, relation, subject, frozen, held_out, reason, evidence, run_id, version, since, until = row
    applied = None if frozen is None else applied_from_json(frozen)
    return HoldRow(
        hold=Hold(FactKey(relation, subject), applied, held_out, reason, evidence),
        model=model,
        since=since,
        until=until,
        run_id=run_id,
        version=version,
    )
