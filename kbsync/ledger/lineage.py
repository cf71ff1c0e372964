"""Where a fact comes from and where it went: the whole chain behind `kbsync blame`.

source row ─ fetch ─ run ─ decision ─ plan ─ version, column of its delta ─ what was measured of it

chain = lineage(db, FactKey("governor", "wikidata:Q1397"), model="smollm2-135m-0123456789ab", request=request)
chain.gaps                    # link -> why there is none: {"column": "held: rolled back from 2 to 1"}
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Text, and_, or_, select, type_coerce

from kbsync.facts import Applied, EditRequest, Entity, FactKey, Provenance
from kbsync.ledger import schema
from kbsync.ledger.read_sources import PROVENANCE, provenance_of
from kbsync.ledger.reader import Reader
from kbsync.ledger.records import FactRow, Placement, RunRow

__all__ = ["ClaimLink", "ColumnLink", "FetchLink", "Lineage", "Measured", "PlanLink", "lineage"]

_KINDS = {"adds": "added", "changes": "changed", "re_rendered": "re-rendered", "kept": "kept"}
"""The lists of a plan document that ask for something, and what each of their rows is called."""
EARLIER = "not kept: it was made by an earlier kbsync"


@dataclass(frozen=True, slots=True)
class ClaimLink:
    """What a source says: `origin` is where it first said so, `last_origin` where it last did; `said` counts the
    consecutive fetches. `start` and `end` are the source's own dates, `until` is when it ceased to say it."""

    id: int
    source: str
    relation: str
    subject: Entity
    object: Entity
    origin: str
    last_origin: str
    rank: str
    start: str | None
    end: str | None
    qualifiers: Mapping[str, str]
    said: int
    first_said: datetime
    until: datetime | None


@dataclass(frozen=True, slots=True)
class FetchLink:
    """The fetch that the decision rests on: the newest one by then that said the claim."""

    id: int
    run_id: int
    number: int
    complete: bool
    rows: int
    recorded_at: datetime
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class PlanLink:
    """The plan that put the fact into the weights; `kind` is what it did: `added`, `changed`, `kept` (a rebase)."""

    id: int
    run_id: int
    digest: str
    head: int
    at: datetime
    kind: str


@dataclass(frozen=True, slots=True)
class ColumnLink:
    """The column that holds a fact in the live weights. `version` made it; `first` is the version since which the
    weights hold this very request without a break; `shared`: other keys that the column serves."""

    delta: str
    column: int
    request: EditRequest
    object_id: str
    version: int
    kind: str
    at: datetime
    by: str
    run_id: int | None
    first: int
    head: int
    shared: tuple[FactKey, ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """What a probe measured of the request: the probability of the whole object after the prompt."""

    version: int
    at: datetime
    probability: float
    answered: bool
    answer: str


@dataclass(frozen=True, slots=True)
class Lineage:
    """The chain of one key. A link that is None has its reason in `gaps`, under the link's name."""

    key: FactKey
    subject: Entity
    model: str | None
    fact: FactRow | None = None
    claim: ClaimLink | None = None
    fetch: FetchLink | None = None
    run: RunRow | None = None
    rule: str | None = None
    weighed: tuple[ClaimLink, ...] = ()
    ruling: Mapping[str, Any] | None = None
    conflicts: tuple[str, ...] = ()
    waiting: str | None = None
    plan: PlanLink | None = None
    column: ColumnLink | None = None
    measured: Measured | None = None
    gaps: Mapping[str, str] = field(default_factory=dict)

    @property
    def current(self) -> bool:
        """Whether the live weights hold the object that the ledger wants."""
        wanted, held = self.fact, self.column
        return wanted is not None and held is not None and held.object_id == wanted.fact.object.id

    def to_json(self) -> dict[str, Any]:
        """The chain as a JSON value; times are ISO 8601."""
        value: dict[str, Any] = _plain(asdict(self))
        return value | {"current": self.current}


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


def lineage(
    db: Reader, key: FactKey, *, model: str | None, request: EditRequest | None = None, kept_out: str = ""
) -> Lineage:
    """The chain of a key as the ledger has it now.

    `model`: whose weights; None: no model follows the ledger yet. `request`: what the policy would ask the model, to
    tell whether the base knows it; `kept_out`: why the policy never edits this key, if so.
    """
    ids = db.merged(key.subject)
    row = db.fact_row(key.relation, ids)
    gaps: dict[str, str] = {}
    found: dict[str, Any] = {"conflicts": tuple(_conflicts(db, key.relation, ids)), "waiting": _wait(db, key, ids)}
    found["ruling"] = _ruling(db, key.relation, ids)
    if row is None:
        gaps["fact"] = _no_fact(db, key, ids, found, kept_out)
    else:
        found |= _source_side(db, row, ids, gaps)
    found |= _model_side(_Weights(db, model, key, ids), row, request, kept_out, gaps)
    return Lineage(key, Entity(key.subject, db.label(key.subject)), model, row, **found, gaps=gaps)


# What the sources said, and what was made of it --------------------------------------------------------------------


def _source_side(db: Reader, row: FactRow, ids: Collection[str], gaps: dict[str, str]) -> dict[str, Any]:
    claim = _claim_of(db, row)
    fetch = _fetch_of(db, row, claim)
    if claim is None:
        gaps["claim"] = EARLIER
    if fetch is None:
        gaps["fetch"] = EARLIER
    if not row.fact.rule:
        gaps["rule"] = EARLIER
    return {
        "claim": claim,
        "fetch": fetch,
        "run": db.run(row.run_id),
        "rule": row.fact.rule or None,
        "weighed": tuple(_claims(db, _spoken_of(row.fact.relation, ids), _at(row.since), but=claim)),
    }


def _claim_of(db: Reader, row: FactRow) -> ClaimLink | None:
    """The claim behind a fact: the one recorded with it, or, where an earlier kbsync accepted it, the one of its source
    that said so then; for an inverse fact the one that says it the other way round."""
    claim, fact = schema.claim, row.fact
    if fact.claim is not None:
        return next(_claims(db, [claim.c.id == fact.claim]), None)
    source = claim.c.source == fact.source
    ways = (
        [claim.c.relation == fact.relation, claim.c.subject_id == fact.subject.id, claim.c.object_id == fact.object.id],
        [
            claim.c.relation.in_(select(schema.fetch.c.relation).where(schema.fetch.c.source == fact.source)),
            claim.c.subject_id == fact.object.id,
            claim.c.object_id == fact.subject.id,
        ],
    )
    found = (said for way in ways for said in _claims(db, [*way, source], _by(row.since)))
    return next(found, None)


def _claims(
    db: Reader, which: Sequence[ColumnElement[bool]], *more: ColumnElement[bool], but: ClaimLink | None = None
) -> Iterator[ClaimLink]:
    """Claims with their times, the newest first; `but`: not this one."""
    claim = schema.claim
    query = (
        select(claim, _BEGAN.c.recorded_at, _ENDED.c.recorded_at)
        .join(_BEGAN, _BEGAN.c.id == claim.c.since_fetch)
        .outerjoin(_ENDED, _ENDED.c.id == claim.c.until_fetch)
        .where(*which, *more)
        .order_by(claim.c.id.desc())
    )
    row: Any
    for row in db.execute(query).all():
        if but is not None and row.id == but.id:
            continue
        seen_to = db.newest_number(row.source) if row.seen_to is None else row.seen_to
        yield ClaimLink(
            row.id,
            row.source,
            row.relation,
            Entity(row.subject_id, row.subject_label),
            Entity(row.object_id, row.object_label),
            row.first_origin,
            row.origin,
            row.rank,
            row.valid_from,
            row.valid_to,
            dict(row.qualifiers or ()),
            seen_to - row.seen_from + 1,
            row[-2],
            row[-1],
        )


_BEGAN, _ENDED = schema.fetch.alias("began"), schema.fetch.alias("ended")


def _by(at: datetime) -> ColumnElement[bool]:
    """Claims that had begun by then."""
    return _BEGAN.c.recorded_at <= at


def _at(at: datetime) -> ColumnElement[bool]:
    """Claims that were live then."""
    return and_(_by(at), or_(_ENDED.c.recorded_at.is_(None), _ENDED.c.recorded_at > at))


def _spoken_of(relation: str, ids: Collection[str]) -> list[ColumnElement[bool]]:
    return [schema.claim.c.relation == relation, schema.claim.c.subject_id.in_(ids)]


def _fetch_of(db: Reader, row: FactRow, claim: ClaimLink | None) -> FetchLink | None:
    """The newest fetch of the source by the time of the decision, or, where the claim was gone by then, the last one
    that still made it."""
    fetch = schema.fetch
    query = select(fetch.c.id, fetch.c.run_id, fetch.c.number, fetch.c.complete, fetch.c.rows, fetch.c.recorded_at)
    query = query.add_columns(*PROVENANCE).where(fetch.c.source == row.fact.source, fetch.c.recorded_at <= row.since)
    if claim is not None and claim.until is not None and claim.until <= row.since:
        query = query.where(fetch.c.recorded_at < claim.until)
    found: Any = db.execute(query.order_by(fetch.c.recorded_at.desc()).limit(1)).one_or_none()
    if found is None:
        return None
    provenance = provenance_of(tuple(found[6:]))
    if provenance is None:
        return None
    return FetchLink(found.id, found.run_id, found.number, found.complete, found.rows, found.recorded_at, provenance)


def _conflicts(db: Reader, relation: str, ids: Collection[str]) -> Iterator[str]:
    """Open conflicts of the key."""
    table = schema.conflict
    query = select(table.c.id, table.c.kind, table.c.reason).where(
        table.c.relation == relation, table.c.subject_id.in_(ids), table.c.closed_at.is_(None)
    )
    yield from (f"conflict {row.id} ({row.kind}): {row.reason}" for row in db.execute(query))


def _wait(db: Reader, key: FactKey, ids: Collection[str]) -> str | None:
    table = schema.waiting
    query = select(table.c.reason, table.c.detail, table.c.since).where(
        table.c.relation == key.relation, table.c.subject_id.in_(ids), table.c.until.is_(None)
    )
    row = db.execute(query.limit(1)).one_or_none()
    return None if row is None else f"{row.reason}: {row.detail} (since {_minute(row.since)})"


def _ruling(db: Reader, relation: str, ids: Collection[str]) -> dict[str, Any] | None:
    """A person's choice that is in force."""
    table = schema.ruling
    query = select(table).where(table.c.relation == relation, table.c.subject_id.in_(ids), table.c.until.is_(None))
    row = db.execute(query.limit(1)).one_or_none()
    if row is None:
        return None
    return {"object_id": row.object_id, "by": row.who, "reason": row.reason, "since": row.since}


def _no_fact(db: Reader, key: FactKey, ids: Collection[str], found: Mapping[str, Any], kept_out: str) -> str:
    """Why the ledger accepts nothing for a key."""
    if found["conflicts"]:
        return "; ".join(found["conflicts"])
    if found["waiting"]:
        return f"waits, {found['waiting']}"
    said = list(_claims(db, _spoken_of(key.relation, ids), schema.claim.c.until_fetch.is_(None)))
    if said and kept_out:
        return f"{len(said)} claims are recorded, and {kept_out}"
    if said:
        return f"{len(said)} claims are recorded, and no policy has accepted one: kbsync sync"
    last = next((row for row in reversed(db.history(key.subject, key.relation)) if row.until), None)
    if last is not None:
        return f"it was {last.fact.object.label} until {_minute(last.until)}; no source says anything since"
    return "no source has said anything of it"


def _minute(at: datetime | None) -> str:
    return f"{at:%Y-%m-%d %H:%M}" if at else ""


# What the weights hold ---------------------------------------------------------------------------------------------


class _Weights:
    """What one model's versions hold for a key."""

    def __init__(self, db: Reader, model: str | None, key: FactKey, ids: Collection[str]) -> None:
        self.db, self.model, self.key, self.ids = db, model, key, ids
        self.head = db.head(model) if model else 0
        places = db.placements(ids, model) if model else []
        self.places = [place for place in places if place.applied.request.key.relation == key.relation]

    def live(self) -> Placement | None:
        """The column in the live version."""
        return next((place for place in self.places if self.head in place.versions), None)

    def column(self, place: Placement) -> ColumnLink:
        """A live column with the version that made it."""
        applied, version = place.applied, min(place.versions)
        made = self.db.version(place.model, version)
        return ColumnLink(
            applied.delta,
            applied.column,
            applied.request,
            applied.object_id,
            version,
            made.kind,
            made.created_at,
            made.user,
            made.run_id,
            self._first(applied),
            self.head,
            tuple(self._sharing(place)),
        )

    def _first(self, applied: Applied) -> int:
        """From the live version back, parent by parent, as long as the request is held."""
        holding = {number for place in self.places if _same(place.applied, applied) for number in place.versions}
        parents, number = self.db.parents(self.model or ""), self.head
        while (parent := parents.get(number)) is not None and parent in holding:
            number = parent
        return number

    def _sharing(self, place: Placement) -> Iterator[FactKey]:
        table = schema.delta_fact
        query = select(table.c.relation, table.c.subject_id).where(
            table.c.model == place.model,
            table.c.delta == place.applied.delta,
            table.c.delta_column == place.applied.column,
        )
        for row in self.db.execute(query):
            if (key := FactKey(row.relation, row.subject_id)) != place.applied.request.key:
                yield key

    def plan(self, column: ColumnLink) -> PlanLink | None:
        """The plan of the run that made the column; where a rebase did, that of the version it was first put in by."""
        for number in dict.fromkeys((column.version, column.first)):
            version = self.db.version(self.model or "", number)
            if (plan := self._planned(version.run_id, version.parent)) is not None:
                return plan
        return None

    def _planned(self, run_id: int | None, head: int | None) -> PlanLink | None:
        table = schema.plan
        query = select(table).where(table.c.run_id == run_id, table.c.model == self.model, table.c.head == head)
        for row in self.db.execute(query.order_by(table.c.id.desc())):
            for kind, asked in _edits_of(row.document):
                if _about(asked, self.key, self.ids):
                    return PlanLink(row.id, row.run_id, row.digest, row.head, row.at, kind)
        return None

    def measured(self, digest: str, since: int) -> Measured | None:
        """The newest probe of a request in versions from `since` on."""
        table = schema.probe_result
        query = (
            select(table.c.version, table.c.measured_at, table.c.report)
            .where(table.c.model == self.model, table.c.version >= since)
            .where(type_coerce(table.c.report, Text).contains(digest))
            .order_by(table.c.version.desc(), table.c.id.desc())
        )
        row: Any
        for row in self.db.execute(query):
            for fact in row.report.get("facts", ()):
                if fact["digest"] == digest:
                    return Measured(row.version, row.measured_at, fact["probability"], fact["efficacy"], fact["answer"])
        return None


def _same(one: Applied, other: Applied) -> bool:
    return (one.request.digest, one.object_id) == (other.request.digest, other.object_id)


def _model_side(
    weights: _Weights, row: FactRow | None, request: EditRequest | None, kept_out: str, gaps: dict[str, str]
) -> dict[str, Any]:
    """Plan, column and measurement; and why the weights do not hold what the ledger wants, under `column`."""
    place = weights.live()
    if place is None or row is None or place.applied.object_id != row.fact.object.id:
        gaps["column"] = _not_in_weights(weights, row, request, kept_out)
    if place is None:
        gaps |= dict.fromkeys(("plan", "measured"), "the live weights hold no column for it")
        return {}
    column = weights.column(place)
    plan, measured = weights.plan(column), weights.measured(place.applied.request.digest, column.version)
    if plan is None:
        gaps["plan"] = EARLIER if column.kind == "edit" else f"version {column.version} is a {column.kind}"
    if measured is None:
        gaps["measured"] = f"no probe since version {column.version} asked for it"
    return {"plan": plan, "column": column, "measured": measured}


def _not_in_weights(weights: _Weights, row: FactRow | None, request: EditRequest | None, kept_out: str) -> str:
    """Why the live weights do not hold the ledger's fact: the first reason that applies, as plan would find it."""
    db, model, key = weights.db, weights.model, weights.key
    if row is None:
        return "the ledger holds no such fact" + (", and the next sync takes it out" if weights.live() else "")
    if model is None:
        return "no model follows the ledger yet: kbsync sync"
    if kept_out:
        return kept_out
    for held in db.hold_rows(model):
        if held.hold.key.relation == key.relation:
            return f"held since {_minute(held.since)} ({held.hold.reason}): {held.hold.evidence}"
    if request is not None and request.digest in db.known_to(model, weights.head):
        return "the model knows it without an edit"
    if (blocked := _blocked(db, model, key, weights.ids)) is not None:
        return f"blocked: {blocked}"
    if (run := _held_run(db, key, weights.ids)) is not None:
        return f"run {run} waits for approval: kbsync approve {run}"
    later = [place for place in weights.places if place.applied.object_id == row.fact.object.id and place.versions]
    if later:
        return f"version {max(later[-1].versions)} holds it, but version {weights.head} is live"
    return "not edited yet: kbsync sync"


def _blocked(db: Reader, model: str, key: FactKey, ids: Collection[str]) -> str | None:
    """Why the newest plan that was kept could not ask for the key."""
    table = schema.plan
    query = select(table.c.document).where(table.c.model == model).order_by(table.c.id.desc()).limit(1)
    document = db.execute(query).scalar_one_or_none() or {}
    return next((str(entry["reason"]) for entry in document.get("blocked", ()) if _about(entry, key, ids)), None)


def _held_run(db: Reader, key: FactKey, ids: Collection[str]) -> int | None:
    """A run that waits for approval and would edit the key."""
    for staged in db.staged_plans():
        if any(_about(asked, key, ids) for _, asked in _edits_of(staged.plan)):
            return staged.run_id
    return None


def _edits_of(document: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What a plan asks for: (kind, row). Plans that an earlier kbsync staged have `edits`."""
    for name, kind in _KINDS.items():
        yield from ((kind, row) for row in document.get(name, ()))
    yield from ((edit["kind"], edit["request"]) for edit in document.get("edits", ()))


def _about(entry: Mapping[str, Any], key: FactKey, ids: Collection[str]) -> bool:
    return entry.get("relation") == key.relation and entry.get("subject_id") in ids
