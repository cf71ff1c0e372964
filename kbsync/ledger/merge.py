"""Merges a snapshot into its source's claims: set-based SQL over a TEMP staging table, so that a million rows that say
nothing new cost a comparison each and no write.

    incoming rows ──match──▶ claims said again     no write, but where the row moved in the source
                        └──▶ rows without a claim  new claims
    live claims ──without a row──▶ ended, or kept where the snapshot does not speak about them
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from itertools import count

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    and_,
    bindparam,
    func,
    literal,
    or_,
    select,
    update,
)

from kbsync.errors import LedgerError
from kbsync.facts import Snapshot
from kbsync.ledger import schema
from kbsync.ledger.database import analyze, bulk_insert, insert_from, insert_row, temporary
from kbsync.ledger.records import RecordCounts

__all__ = ["record"]

_CONTENT = (
    "relation",
    "subject_id",
    "subject_label",
    "object_id",
    "object_label",
    "rank",
    "valid_from",
    "valid_to",
    "qualifiers",
)
"""What makes two rows the same claim: all that a source says, but not where it says it."""

_OPTIONAL = ("valid_from", "valid_to", "qualifiers")

_metadata = MetaData()
_incoming = Table(
    "incoming",
    _metadata,
    Column("position", Integer, primary_key=True),
    *(Column(name, schema.claim.c[name].type) for name in _CONTENT),
    Column("origin", Text),
    Column("claim_id", Integer),
    prefixes=["TEMPORARY"],
)
_covered = Table("covered", _metadata, Column("subject_id", Text, primary_key=True), prefixes=["TEMPORARY"])
_unsaid = Table("unsaid", _metadata, Column("claim_id", Integer, primary_key=True), prefixes=["TEMPORARY"])
_claim, _fetch, _quarantine = schema.claim, schema.fetch, schema.quarantine


@dataclass(frozen=True, slots=True)
class _Fetch:
    """The fetch being recorded: its row, its number among the source's accepted ones, what it brought."""

    id: int
    number: int
    snapshot: Snapshot

    @property
    def live(self) -> ColumnElement[bool]:
        """Which claims are the source's live ones."""
        return and_(_claim.c.source == self.snapshot.source, _claim.c.until_fetch.is_(None))

    @property
    def spoken_about(self) -> ColumnElement[bool]:
        """Which of them the snapshot speaks about: all, or those of the subjects that an increment covers."""
        if self.snapshot.covers is None:
            return self.live
        return and_(self.live, _claim.c.subject_id.in_(select(_covered.c.subject_id)))


def record(connection: Connection, run_id: int, snapshot: Snapshot, now: datetime) -> RecordCounts:
    """Make the source's live claims what the snapshot says; see `Writer.record`."""
    fetch = _accept(connection, run_id, snapshot, now)
    if snapshot.not_modified:
        return _vouched_for(connection, fetch)
    _merge_quarantine(connection, fetch)
    before = connection.scalar(select(func.count()).where(fetch.live)) or 0
    with temporary(connection, _incoming, _unsaid, _covered):
        bulk_insert(connection, _covered, ("subject_id",), ((id_,) for id_ in sorted(snapshot.covers or ())))
        _stage(connection, snapshot)
        _match(connection, fetch)
        unsaid, ended = _end_unsaid(connection, fetch)
        _resume(connection, fetch)
        _move(connection)
        added = _add(connection, fetch)
    return RecordCounts(snapshot.rows, added, ended, before - unsaid, len(snapshot.quarantined))


def _accept(connection: Connection, run_id: int, snapshot: Snapshot, now: datetime) -> _Fetch:
    """The fetch's own row. A 304 carries the validators and the body's hash of the fetch that it vouches for."""
    query = select(_fetch).where(_fetch.c.source == snapshot.source).order_by(_fetch.c.number.desc()).limit(1)
    previous = connection.execute(query).one_or_none()
    seen = snapshot.provenance
    etag, modified, body = seen.etag, seen.last_modified, seen.body_sha256
    declaration = seen.declaration
    if snapshot.not_modified:
        if previous is None:
            raise LedgerError(f"source {snapshot.source}: not modified since a fetch that the ledger does not have")
        etag, modified = etag or previous.etag, modified or previous.last_modified
        body, declaration = previous.body_sha256, previous.declaration
    number = 1 if previous is None else previous.number + 1
    row = {
        "run_id": run_id,
        "source": snapshot.source,
        "relation": snapshot.relation,
        "number": number,
        "location": seen.location,
        "fetched_at": seen.fetched_at,
        "recorded_at": now,
        "status": seen.status,
        "body_sha256": body,
        "etag": etag,
        "last_modified": modified,
        "declaration": declaration,
        "complete": snapshot.complete and snapshot.covers is None,
        "not_modified": snapshot.not_modified,
        "rows": snapshot.rows,
        "as_of": seen.as_of,
        "cursor": seen.cursor,
        "verified": seen.verified,
    }
    return _Fetch(insert_row(connection, _fetch, row), number, snapshot)


def _vouched_for(connection: Connection, fetch: _Fetch) -> RecordCounts:
    """Nothing changed: what the last fetch said counts as said again, by the fetch's number alone."""
    seen = connection.scalar(select(func.count()).where(fetch.live, _claim.c.seen_to.is_(None))) or 0
    waiting = select(func.count()).where(
        _quarantine.c.source == fetch.snapshot.source, _quarantine.c.until_fetch.is_(None)
    )
    return RecordCounts(0, 0, 0, seen, connection.scalar(waiting) or 0)


def _merge_quarantine(connection: Connection, fetch: _Fetch) -> None:
    """The source's live quarantined rows become those of this fetch; a row that stays is not written again, and one
    that an increment does not speak about stays."""
    table, source, covers = _quarantine, fetch.snapshot.source, fetch.snapshot.covers
    query = select(table).where(table.c.source == source, table.c.until_fetch.is_(None))
    live = {
        (row.origin, row.reason, row.raw, row.subject_id): row.id
        for row in connection.execute(query)
        if covers is None or row.subject_id in covers
    }
    rows = dict.fromkeys((row.origin, row.reason, row.raw, row.subject_id) for row in fetch.snapshot.quarantined)
    gone = [{"row_id": id_} for content, id_ in live.items() if content not in rows]
    if gone:
        statement = update(table).where(table.c.id == bindparam("row_id")).values(until_fetch=fetch.id)
        connection.execute(statement, gone)
    columns = ("source", "origin", "reason", "raw", "subject_id", "since_fetch")
    bulk_insert(connection, table, columns, ((source, *row, fetch.id) for row in rows if row not in live))


def _stage(connection: Connection, snapshot: Snapshot) -> None:
    said = (entry for entry in snapshot.content if isinstance(entry, tuple))
    rows = (
        (position, snapshot.relation, *row[:7], [list(pair) for pair in row[7]] or None, row[8])
        for position, row in zip(count(), said)
    )
    bulk_insert(connection, _incoming, ("position", *_CONTENT, "origin"), rows)
    analyze(connection, _incoming)


def _match(connection: Connection, fetch: _Fetch) -> None:
    """Each staged row learns which live claim it repeats, if any."""
    same = [_claim.c[name].is_not_distinct_from(_incoming.c[name]) for name in _CONTENT if name in _OPTIONAL]
    same += [_claim.c[name] == _incoming.c[name] for name in _CONTENT if name not in _OPTIONAL]
    claim_id = select(_claim.c.id).where(fetch.live, *same).limit(1).correlate(_incoming).scalar_subquery()
    connection.execute(update(_incoming).values(claim_id=claim_id))


def _end_unsaid(connection: Connection, fetch: _Fetch) -> tuple[int, int]:
    """What happens to live claims that the snapshot does not repeat: their number, and how many of them end.

    They end, but where the snapshot does not speak about them: the subject is absent from a partial snapshot, or is
    there only in quarantined rows, or the claim's own row is the one in quarantine.
    """
    said = select(_incoming.c.claim_id).where(_incoming.c.claim_id.is_not(None))
    unsaid = select(_claim.c.id).where(fetch.spoken_about).except_(said)
    found = insert_from(connection, _unsaid, ["claim_id"], unsaid)
    if not found:
        return 0, 0
    absent = _claim.c.subject_id.not_in(select(_incoming.c.subject_id))
    unreadable = (
        select(_quarantine.c.id)
        .where(
            _quarantine.c.source == fetch.snapshot.source,
            _quarantine.c.until_fetch.is_(None),
            _quarantine.c.subject_id == _claim.c.subject_id,
            or_(_quarantine.c.origin == _claim.c.origin, absent),
        )
        .correlate(_claim)
        .exists()
    )
    kept = unreadable if fetch.snapshot.complete else or_(absent, unreadable)
    these = _claim.c.id.in_(select(_unsaid.c.claim_id))
    connection.execute(update(_claim).where(these, _claim.c.seen_to.is_(None)).values(seen_to=fetch.number - 1))
    ended = connection.execute(update(_claim).where(these, ~kept).values(until_fetch=fetch.id)).rowcount
    return found, ended


def _resume(connection: Connection, fetch: _Fetch) -> None:
    """A claim that some fetches passed over, and that is said again, goes on counting where it stopped."""
    counted = _claim.c.seen_to - _claim.c.seen_from + 1
    connection.execute(
        update(_claim)
        .where(fetch.live, _claim.c.seen_to.is_not(None), _claim.c.id.in_(select(_incoming.c.claim_id)))
        .values(seen_from=fetch.number - counted, seen_to=None)
    )


def _move(connection: Connection) -> None:
    """Where a claim's row is now: the first one that says it."""
    moved = (
        select(_incoming.c.claim_id)
        .join(_claim, _claim.c.id == _incoming.c.claim_id)
        .where(_incoming.c.origin != _claim.c.origin)
    )
    if connection.execute(moved.limit(1)).first() is None:
        return
    by_claim = Index("incoming_by_claim", _incoming.c.claim_id, _incoming.c.position)
    by_claim.create(connection)
    _incoming.indexes.discard(by_claim)
    origin = (
        select(_incoming.c.origin)
        .where(_incoming.c.claim_id == _claim.c.id)
        .order_by(_incoming.c.position)
        .limit(1)
        .correlate(_claim)
        .scalar_subquery()
    )
    connection.execute(update(_claim).where(_claim.c.id.in_(moved)).values(origin=origin))


def _add(connection: Connection, fetch: _Fetch) -> int:
    """Rows that repeat no claim become claims; rows that say the same become one."""
    nth = func.row_number().over(partition_by=[_incoming.c[name] for name in _CONTENT], order_by=_incoming.c.position)
    rows = select(_incoming, nth.label("nth")).where(_incoming.c.claim_id.is_(None)).subquery()
    values = {
        "source": literal(fetch.snapshot.source),
        **{name: rows.c[name] for name in _CONTENT},
        "origin": rows.c.origin,
        "first_origin": rows.c.origin,
        "since_fetch": literal(fetch.id),
        "seen_from": literal(fetch.number),
    }
    first = select(*values.values()).where(rows.c.nth == 1).order_by(rows.c.position)
    return insert_from(connection, _claim, list(values), first)
