"""What happened: to one thing (its whole history, as one time line), or in a time (what changed).

db.events_of(("wikidata:Q1397",), "governor")        # claims, decisions, holds, versions, probes: oldest first
db.happened(since, kinds={"changed", "conflict"})  # what a person is to know of
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, get_args

from sqlalchemy import ColumnElement, Table, and_, or_, select

from kbsync.facts import Change, ChangeKind, Entity, FactKey
from kbsync.ledger import schema
from kbsync.ledger.codec import applied_from_json
from kbsync.ledger.read_facts import FACT, FactReader, change_kind, fact_of
from kbsync.ledger.read_subjects import SubjectReader, chunks, claimed_relations
from kbsync.ledger.read_versions import VersionReader
from kbsync.ledger.records import Placement

__all__ = ["HAPPENINGS", "Event", "EventKind", "EventReader", "Happening"]

Happening = ChangeKind | Literal["conflict", "held", "waiting"]
EventKind = Happening | Literal["claim", "same", "ruling", "verdict", "version", "probe", "alias", "merged"]
HAPPENINGS: tuple[str, ...] = (*get_args(ChangeKind), "conflict", "held", "waiting")
"""The kinds of `changes`, in the order of a summary."""
_JUDGED = {"approve": "approved", "reject": "rejected"}
"""Entries of the audit log by which a held run is held no more."""
_ORDER = ("claim", "alias", "merged", "ruling", "verdict", "waiting", "conflict", *get_args(ChangeKind), "same", "held")
_ORDER += ("version", "probe")
"""What comes first of what has the same time: a claim before the decision that follows from it."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to a key (`key` None: to a whole run or entity). `ended`: a claim, conflict, wait, hold
    or ruling is over; for a version, the fact has left the weights. `before` and `after` are objects."""

    at: datetime
    kind: EventKind
    key: FactKey | None
    subject: str = ""
    before: Entity | None = None
    after: Entity | None = None
    source: str | None = None
    origin: str | None = None
    run_id: int | None = None
    ended: bool = False
    detail: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The event as a JSON value."""
        return {
            "at": self.at.isoformat(),
            "kind": self.kind,
            "ended": self.ended,
            "relation": self.key.relation if self.key else None,
            "subject_id": self.key.subject if self.key else None,
            "subject": self.subject or None,
            "before": self.before.label if self.before else None,
            "before_id": self.before.id if self.before else None,
            "after": self.after.label if self.after else None,
            "after_id": self.after.id if self.after else None,
            "source": self.source,
            "origin": self.origin,
            "run": self.run_id,
            "detail": self.detail,
        } | dict(self.more)


@dataclass(frozen=True, slots=True)
class _Scope:
    """Which rows are asked for: of some subjects, or with a beginning or end in a time (since < t <= until)."""

    subjects: Collection[str] | None = None
    relation: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def where(self, table: Table, *times: str) -> list[ColumnElement[bool]]:
        """The condition on a table with the columns `relation`, `subject_id` and these times."""
        which: list[ColumnElement[bool]] = []
        if self.subjects is not None:
            which.append(table.c.subject_id.in_(self.subjects))
        if self.relation is not None:
            which.append(table.c.relation == self.relation)
        if self.since is not None:
            which.append(or_(*(self._inside(table.c[time]) for time in times)))
        return which

    def _inside(self, time: ColumnElement[datetime]) -> ColumnElement[bool]:
        return time > self.since if self.until is None else and_(time > self.since, time <= self.until)

    def has(self, at: datetime | None) -> bool:
        """Whether a time is asked for."""
        return at is not None and (self.since is None or at > self.since) and (self.until is None or at <= self.until)


class EventReader(FactReader, SubjectReader, VersionReader):
    """Questions about what happened."""

    def events_of(
        self, subjects: Collection[str], relation: str | None = None, model: str | None = None
    ) -> list[Event]:
        """All that happened to one thing (its id and those merged into it), oldest first. `model`: whose holds,
        versions and probes; None: all models'."""
        scope = _Scope(subjects, relation)
        events = [*self._claims_made(scope), *self._decided(scope), *self._opened(scope), *self._ruled(scope)]
        events += [*self._held(scope, model), *self._named_and_merged(subjects)]
        events += self._in_weights([place for place in self.placements(subjects, model) if _of(place, relation)])
        return sorted(events, key=_order)

    def happened(
        self,
        since: datetime,
        until: datetime | None = None,
        *,
        relation: str | None = None,
        source: str | None = None,
        kinds: Collection[str] = HAPPENINGS,
        model: str | None = None,
    ) -> list[Event]:
        """What changed after `since`, up to and with `until` (default: now), oldest first.

        `source` is the one that said the new fact, or the old one where it was removed; conflicts, waits and holds are
        of no single source, and left out with it. `model`: whose holds; None: all models'.
        """
        scope = _Scope(None, relation, since, until)
        found = [_changed(change) for change in self.changes(since, until, relation=relation, source=source)]
        if source is None:
            found += [*self._opened(scope), *self._held(scope, model)]
            found += self._runs_held(scope) if relation is None else ()
        return sorted((event for event in found if event.kind in kinds), key=_order)

    # What was said and decided ------------------------------------------------------------------------------------

    def _claims_made(self, scope: _Scope) -> Iterator[Event]:
        claim, began, ended = schema.claim, schema.fetch.alias("began"), schema.fetch.alias("ended")
        query = (
            select(claim, began.c.recorded_at, began.c.run_id, ended.c.recorded_at, ended.c.run_id)
            .join(began, began.c.id == claim.c.since_fetch)
            .outerjoin(ended, ended.c.id == claim.c.until_fetch)
            .where(*scope.where(claim))
        )
        if scope.relation is None:
            query = query.where(claim.c.relation.in_(claimed_relations()))
        for row in self._connection.execute(query):
            *_, since, since_run, until, until_run = row
            event = {
                "kind": "claim",
                "key": FactKey(row.relation, row.subject_id),
                "subject": row.subject_label,
                "after": Entity(row.object_id, row.object_label),
                "source": row.source,
                "origin": row.first_origin,
                "detail": _validity(row.rank, row.valid_from, row.valid_to),
                "more": {"rank": row.rank, "valid_from": row.valid_from, "valid_to": row.valid_to},
            }
            yield Event(at=since, run_id=since_run, **event)
            if until is not None:
                yield Event(at=until, run_id=until_run, ended=True, **event | {"origin": row.origin})

    def _decided(self, scope: _Scope) -> Iterator[Event]:
        """Every fact row as a step from the one before it. Rows under merged ids are one key's."""
        table = schema.fact
        columns = [table.c[name] for name in FACT]
        query = select(*columns, table.c.since, table.c.until, table.c.since_run, table.c.until_run)
        rows = self._connection.execute(query.where(*scope.where(table)).order_by(table.c.relation, table.c.since))
        before: dict[str, tuple[Any, datetime | None, int | None]] = {}
        for row in rows:
            fact, (since, until, run, until_run) = fact_of(row[: len(FACT)]), row[len(FACT) :]
            old, ended, ended_run = before.get(fact.relation, (None, None, None))
            if old is not None and ended != since:
                yield _changed(Change(old.key, "removed", old, None, ended, ended_run))
                old = None
            kind = change_kind(old, fact)
            change = Change(fact.key, kind or "relabelled", old, fact, since, run)
            yield _changed(change, kind or "same")
            before[fact.relation] = (fact, until, until_run)
        for old, ended, ended_run in before.values():
            if ended is not None:
                yield _changed(Change(old.key, "removed", old, None, ended, ended_run))

    def _opened(self, scope: _Scope) -> Iterator[Event]:
        """Conflicts and waits: opened, and over."""
        table = schema.conflict
        conflicts = self._connection.execute(select(table).where(*scope.where(table, "opened_at", "closed_at"))).all()
        table = schema.waiting
        waits = self._connection.execute(select(table).where(*scope.where(table, "since", "until"))).all()
        names = self.names(FactKey(row.relation, row.subject_id) for row in (*conflicts, *waits))
        for row in conflicts:
            more = {"conflict": row.kind, "claims": row.claims}
            times = (row.opened_at, row.opened_run, row.closed_at, row.closed_run)
            claimed = {side["subject"]["id"]: side["subject"]["label"] for side in row.claims}
            yield from _spell("conflict", row, times, scope, claimed | names, detail=row.reason, more=more)
        for row in waits:
            times = (row.since, row.since_run, row.until, row.until_run)
            more = {"waiting": row.reason}
            after = _entity(row.object_id, names)
            detail = f"{row.reason}: {row.detail}" if row.detail else row.reason
            yield from _spell("waiting", row, times, scope, names, detail=detail, more=more, after=after)

    def _ruled(self, scope: _Scope) -> Iterator[Event]:
        """What people decided: rulings, and verdicts on rows of held plans."""
        table = schema.ruling
        rulings = self._connection.execute(select(table).where(*scope.where(table))).all()
        names = self.names(FactKey(row.relation, row.subject_id) for row in rulings)
        for row in rulings:
            said = {"after": _entity(row.object_id, names), "detail": _by(row.who, row.reason), "more": {"by": row.who}}
            yield from _spell("ruling", row, (row.since, None, row.until, None), scope, names, **said)
        table = schema.verdict
        for row in self._connection.execute(select(table).where(*scope.where(table))):
            key, what = FactKey(row.relation, row.subject_id), "approved" if row.approved else "refused"
            more = {"by": row.who, "approved": row.approved}
            detail = f"{what} {_by(row.who, row.reason)}"
            yield Event(row.at, "verdict", key, self.label(key.subject), run_id=row.run_id, detail=detail, more=more)

    # What was held, and what the weights hold -----------------------------------------------------------------------

    def _held(self, scope: _Scope, model: str | None) -> Iterator[Event]:
        table = schema.hold
        query = select(table).where(*scope.where(table, "since", "until"))
        rows = self._connection.execute(query if model is None else query.where(table.c.model == model)).all()
        names = self.names(FactKey(row.relation, row.subject_id) for row in rows)
        for row in rows:
            frozen = None if row.frozen is None else applied_from_json(row.frozen)
            yield from _spell(
                "held",
                row,
                (row.since, row.run_id, row.until, None),
                scope,
                names,
                detail=f"{row.reason}: {row.evidence}" if row.evidence else row.reason,
                before=Entity(frozen.object_id, frozen.request.target) if frozen else None,
                after=_entity(row.held_out, names),
                more={"model": row.model, "reason": row.reason, "version": row.version},
            )

    def _runs_held(self, scope: _Scope) -> Iterator[Event]:
        """Runs that were held for approval, and what a person said of them."""
        table = schema.staged
        query = select(table.c.run_id, table.c.reasons, table.c.staged_at, table.c.plan_digest, schema.run.c.policy)
        for row in self._connection.execute(query.join(schema.run, schema.run.c.id == table.c.run_id)):
            if scope.has(row.staged_at):
                detail = f"run {row.run_id} of {row.policy} waits for approval: {'; '.join(row.reasons)}"
                more = {"policy": row.policy, "digest": row.plan_digest}
                yield Event(row.staged_at, "held", None, run_id=row.run_id, detail=detail, more=more)
        yield from self._runs_judged(scope)

    def _runs_judged(self, scope: _Scope) -> Iterator[Event]:
        """Runs that are held no more. When they were staged is kept no longer: they were held since they began."""
        audit, run = schema.audit, schema.run
        query = select(audit).where(audit.c.action.in_(_JUDGED)).order_by(audit.c.id)
        if scope.since is not None:
            query = query.where(audit.c.at > scope.since)
        judged = {row.run_id or row.detail["run"]: row for row in self._connection.execute(query)}
        for some in chunks(map(str, judged)):
            about = select(run.c.id, run.c.policy, run.c.started_at).where(run.c.id.in_(map(int, some)))
            for id_, policy, began in self._connection.execute(about.order_by(run.c.id)):
                row, called = judged[id_], f"run {id_} of {policy}"
                more = {"policy": policy}
                if scope.has(began):
                    yield Event(began, "held", None, run_id=id_, detail=f"{called} was held for approval", more=more)
                if scope.has(row.at):
                    said = f"{called} was {_JUDGED[row.action]} {_by(row.who, row.detail.get('reason', ''))}"
                    more = more | {"by": row.who, "verdict": _JUDGED[row.action]}
                    yield Event(row.at, "held", None, run_id=id_, ended=True, detail=said, more=more)

    def _named_and_merged(self, subjects: Collection[str]) -> Iterator[Event]:
        alias, began, ended = schema.alias, schema.fetch.alias("began"), schema.fetch.alias("ended")
        query = (
            select(alias.c.source, alias.c.label, began.c.recorded_at, began.c.run_id, ended.c.recorded_at)
            .join(began, began.c.id == alias.c.since_fetch)
            .outerjoin(ended, ended.c.id == alias.c.until_fetch)
            .where(alias.c.entity_id.in_(subjects))
        )
        for source, label, since, run, until in self._connection.execute(query):
            yield Event(since, "alias", None, source=source, run_id=run, detail=label)
            if until is not None:
                yield Event(until, "alias", None, source=source, ended=True, detail=label)
        redirect = schema.redirect
        for row in self._connection.execute(select(redirect).where(redirect.c.old_id.in_(subjects))):
            detail = f"{row.old_id} is {row.new_id}"
            yield Event(row.at, "merged", None, source=row.source, run_id=row.run_id, detail=detail)

    def _in_weights(self, places: Sequence[Placement]) -> Iterator[Event]:
        """When HEAD began or ceased to hold which object, and what was measured of it."""
        for model in sorted({place.model for place in places}):
            ours = [place for place in places if place.model == model]
            for key in sorted({place.applied.request.key for place in ours}):
                yield from self._moves(model, [place for place in ours if place.applied.request.key == key])
            yield from self._probed(model, ours)

    def _moves(self, model: str, places: Sequence[Placement]) -> Iterator[Event]:
        holding = {version: place.applied for place in places for version in place.versions}
        before = None
        for move in reversed(self.head_moves(model)):
            now = holding.get(move.number)
            if _content(now) == _content(before):
                before = now
                continue
            request = (now or before).request  # type: ignore[union-attr]  # they differ, so one is there
            yield Event(
                move.at,
                "version",
                request.key,
                request.subject,
                Entity(before.object_id, before.request.target) if before else None,
                Entity(now.object_id, now.request.target) if now else None,
                ended=now is None,
                detail=_by(move.user, f"version {move.number}, {move.reason}"),
                more={"model": model, "version": move.number, "by": move.user}
                | ({"delta": now.delta, "column": now.column} if now else {}),
            )
            before = now

    def _probed(self, model: str, places: Sequence[Placement]) -> Iterator[Event]:
        """What the versions that made these columns measured of their requests."""
        requests = {place.applied.request.digest: place.applied for place in places}
        made = {min(place.versions) for place in places if place.versions}
        table = schema.probe_result
        query = select(table).where(table.c.model == model, table.c.version.in_(made)).order_by(table.c.id)
        told: set[tuple[int, str]] = set()
        for row in self._connection.execute(query):
            for fact in row.report.get("facts", ()):
                applied, place = requests.get(fact["digest"]), (row.version, fact["digest"])
                if applied is None or place in told:
                    continue
                told.add(place)
                yield Event(
                    row.measured_at,
                    "probe",
                    applied.request.key,
                    applied.request.subject,
                    after=Entity(applied.object_id, applied.request.target),
                    run_id=row.run_id,
                    detail=_measured(fact),
                    more={"model": model, "version": row.version, "probability": fact["probability"]},
                )


def _order(event: Event) -> tuple[Any, ...]:
    return event.at, _ORDER.index(event.kind), event.key or ("", ""), event.ended


def _of(place: Placement, relation: str | None) -> bool:
    return relation is None or place.applied.request.key.relation == relation


def _content(applied: Any) -> tuple[str, str] | None:
    return (applied.request.digest, applied.object_id) if applied else None


def _entity(id_: str | None, names: Mapping[str, str]) -> Entity | None:
    return None if id_ is None else Entity(id_, names.get(id_, id_))


def _by(who: str, reason: str) -> str:
    return f"by {who}: {reason}" if reason else f"by {who}"


def _validity(rank: str, start: str | None, end: str | None) -> str:
    """Rank and dates of a claim in words; nothing where there is nothing to say."""
    said = [] if rank == "normal" else [rank]
    said += [f"from {start}"] if start else []
    said += [f"to {end}"] if end else []
    return ", ".join(said)


def _measured(fact: Mapping[str, Any]) -> str:
    """One fact of a probe report in words."""
    said = f"P {fact['probability']:.3f}, {fact['hits']} of {fact['paraphrases']} paraphrases"
    return said if fact["efficacy"] else f"{said}; the answer is {fact['answer']!r}"


def _changed(change: Change, kind: ChangeKind | Literal["same"] | None = None) -> Event:
    """A change of a fact as an event."""
    fact = change.after or change.before
    if fact is None or change.at is None:
        raise ValueError(f"{change.key}: a change of nothing, or without a time")
    return Event(
        change.at,
        kind or change.kind,
        change.key,
        fact.subject.label,
        change.before.object if change.before else None,
        change.after.object if change.after else None,
        fact.source,
        fact.origin,
        change.run_id,
        detail=change.after.rule if change.after else "",
        more={"subject_before": change.before.subject.label if change.before else None},
    )


def _spell(
    kind: EventKind,
    row: Any,
    times: tuple[datetime, int | None, datetime | None, int | None],
    scope: _Scope,
    names: Mapping[str, str],
    **said: Any,
) -> Iterator[Event]:
    """The beginning and the end of a row that lasts, where they are asked for."""
    since, run, until, until_run = times
    key = FactKey(row.relation, row.subject_id)
    subject = names.get(key.subject, key.subject)
    if scope.has(since):
        yield Event(since, kind, key, subject, run_id=run, **said)
    if until is not None and scope.has(until):
        yield Event(until, kind, key, subject, run_id=until_run, ended=True, **said)
