"""Where a fact comes from: what the sources said of its key, which fetch, run and rule decided, what else spoke.

links = decided_by(db, row, ids, gaps)              # claim, fetch, run, rule, weighed: fields of a Lineage
links |= open_questions(db, row.fact.relation, ids)  # conflicts, waiting, ruling
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, and_, or_, select

from kbsync.facts import Entity, FactKey
from kbsync.ledger import schema
from kbsync.ledger.links import EARLIER, ClaimLink, FetchLink, minute
from kbsync.ledger.read_sources import PROVENANCE, provenance_of
from kbsync.ledger.reader import Reader
from kbsync.ledger.records import FactRow

__all__ = ["decided_by", "no_fact", "open_questions"]


def decided_by(db: Reader, row: FactRow, ids: Collection[str], gaps: dict[str, str]) -> dict[str, Any]:
    """What a fact rests on; what is missing has its reason put into `gaps`."""
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


def open_questions(db: Reader, relation: str, ids: Collection[str]) -> dict[str, Any]:
    """Conflicts, waits and a ruling that are in force for a key."""
    return {
        "conflicts": tuple(_conflicts(db, relation, ids)),
        "waiting": _wait(db, relation, ids),
        "ruling": _ruling(db, relation, ids),
    }


def _conflicts(db: Reader, relation: str, ids: Collection[str]) -> Iterator[str]:
    """Open conflicts of the key."""
    table = schema.conflict
    query = select(table.c.id, table.c.kind, table.c.reason).where(
        table.c.relation == relation, table.c.subject_id.in_(ids), table.c.closed_at.is_(None)
    )
    yield from (f"conflict {row.id} ({row.kind}): {row.reason}" for row in db.execute(query))


def _wait(db: Reader, relation: str, ids: Collection[str]) -> str | None:
    table = schema.waiting
    query = select(table.c.reason, table.c.detail, table.c.since).where(
        table.c.relation == relation, table.c.subject_id.in_(ids), table.c.until.is_(None)
    )
    row = db.execute(query.limit(1)).one_or_none()
    return None if row is None else f"{row.reason}: {row.detail} (since {minute(row.since)})"


def _ruling(db: Reader, relation: str, ids: Collection[str]) -> dict[str, Any] | None:
    """A person's choice that is in force."""
    table = schema.ruling
    query = select(table).where(table.c.relation == relation, table.c.subject_id.in_(ids), table.c.until.is_(None))
    row = db.execute(query.limit(1)).one_or_none()
    if row is None:
        return None
    return {"object_id": row.object_id, "by": row.who, "reason": row.reason, "since": row.since}


def no_fact(db: Reader, key: FactKey, ids: Collection[str], found: Mapping[str, Any], kept_out: str) -> str:
    """Why the ledger accepts nothing for a key."""
    if found["conflicts"]:
        return "; ".join(found["conflicts"])
    if found["waiting"]:
        return f"waits, {found['waiting']}"
    if found["approval"]:
        return f"run {found['approval']} waits for approval: kbsync approve {found['approval']}"
    said = list(_claims(db, _spoken_of(key.relation, ids), schema.claim.c.until_fetch.is_(None)))
    if said and kept_out:
        return f"{len(said)} claims are recorded, and {kept_out}"
    if said:
        return f"{len(said)} claims are recorded, and no policy has accepted one: kbsync sync"
    last = next((row for row in reversed(db.history(key.subject, key.relation)) if row.until), None)
    if last is not None:
        return f"it was {last.fact.object.label} until {minute(last.until)}; no source says anything since"
    return "no source has said anything of it"
