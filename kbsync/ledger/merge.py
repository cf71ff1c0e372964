"""Merges a snapshot into its source's claims: set-based SQL over TEMP staging tables, so that a million rows that say
nothing new cost a comparison each and no write.

    incoming rows ──match──▶ claims said again     no write, but where the row moved in the source
                        └──▶ rows without a claim  new claims
    live claims ──without a row──▶ ended, or kept where the snapshot does not speak about them
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Integer,
    MetaData,
    Table,
    Text,
    and_,
    bindparam,
    case,
    delete,
    func,
    literal,
    or_,
    select,
    union_all,
    update,
)

from kbsync.errors import LedgerError
from kbsync.facts import Alias, Difference, QuarantinedRow, Snapshot
from kbsync.ledger import schema
from kbsync.ledger.columns import canonical
from kbsync.ledger.database import analyze, bulk_insert, insert_from, insert_new, insert_row, temporary
from kbsync.ledger.entities import record_aliases
from kbsync.ledger.records import RecordCounts

__all__ = ["record"]

_CONTENT = (
    "subject_id",
    "subject_label",
    "object_id",
    "object_label",
    "rank",
    "valid_from",
    "valid_to",
    "qualifiers",
)
"""What makes two rows of a relation the same claim: all that a source says, but not where it says it."""

NOT_MODIFIED = 304
"""HTTP's status: the answer has no body, and its validators may be left out (RFC 9110, 15.4.5)."""

_OPTIONAL = ("valid_from", "valid_to", "qualifiers")

_metadata = MetaData()
_incoming = Table(
    "incoming",
    _metadata,
    Column("position", Integer, primary_key=True),
    *(Column(name, schema.claim.c[name].type) for name in _CONTENT[:-1]),
    Column("qualifiers", Text),  # canonical JSON as `claim` keeps it: a million rows pass no type of ours
    Column("origin", Text),
    prefixes=["TEMPORARY"],
)
_matched = Table(
    "matched",
    _metadata,
    Column("position", Integer, primary_key=True),
    Column("claim_id", Integer),
    Column("moved", Integer),
    Column("paused", Integer),
    prefixes=["TEMPORARY"],
)
_said = Table(
    "said",
    _metadata,
    Column("claim_id", Integer, primary_key=True),
    Column("position", Integer),
    Column("moved", Integer),
    Column("paused", Integer),
    prefixes=["TEMPORARY"],
)
_unsaid = Table("unsaid", _metadata, Column("claim_id", Integer, primary_key=True), prefixes=["TEMPORARY"])
_covered = Table("covered", _metadata, Column("subject_id", Text, primary_key=True), prefixes=["TEMPORARY"])
_claim, _fetch, _quarantine = schema.claim, schema.fetch, schema.quarantine


@dataclass(slots=True)
class _Read:
    """What the content of a snapshot turned out to be, once it has been staged."""

    good: int = 0
    quarantined: list[QuarantinedRow] = field(default_factory=list)
    aliases: dict[str, list[str]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows read, good and quarantined."""
        return self.good + len(self.quarantined)

    def complete(self, snapshot: Snapshot) -> bool:
        """See `Snapshot.complete`."""
        return snapshot.whole and all(row.subject_id for row in self.quarantined)


@dataclass(frozen=True, slots=True)
class _Fetch:
    """The fetch being recorded: its row, its number among the source's accepted ones, what it brought."""

    id: int
    number: int
    snapshot: Snapshot
    read: _Read

    @property
    def complete(self) -> bool:
        """See `Snapshot.complete`."""
        return self.read.complete(self.snapshot)

    @property
    def live(self) -> ColumnElement[bool]:
        """Which claims are the source's live ones."""
        return and_(_claim.c.source == self.snapshot.source, _claim.c.until_fetch.is_(None))

    @property
    def new(self) -> ColumnElement[bool]:
        """Which claims this fetch began."""
        return _claim.c.since_fetch == self.id

    @property
    def spoken_about(self) -> ColumnElement[bool]:
        """Which of the live ones the snapshot speaks about: all, or those of the subjects that an increment covers."""
        if self.snapshot.covers is None:
            return self.live
        return and_(self.live, _claim.c.subject_id.in_(select(_covered.c.subject_id)))


def record(connection: Connection, run_id: int, snapshot: Snapshot, now: datetime) -> RecordCounts:
    """Make the source's live claims what the snapshot says; see `Writer.record`."""
    if snapshot.not_modified:
        return _vouched_for(connection, _accept(connection, run_id, snapshot, _Read(), now))
    with temporary(connection, _incoming, _matched, _said, _unsaid, _covered):
        fetch = _accept(connection, run_id, snapshot, _stage(connection, snapshot), now)
        _merge_quarantine(connection, fetch)
        spoken_of = snapshot.covers if fetch.complete else ()
        record_aliases(connection, snapshot.source, fetch.id, fetch.read.aliases, spoken_of)
        before, said, unsaid = _match(connection, fetch)
        fresh = connection.scalar(select(func.count()).where(_matched.c.claim_id.is_(None))) or 0
        subjects = _subjects(connection, fetch) if fetch.number > 1 and (fresh or unsaid) else 0
        ended = _end_unsaid(connection, fetch) if unsaid else 0
        _resume(connection, fetch)
        _move(connection)
        added = _add(connection, fetch) if fresh else 0
        difference = None
        if fetch.number > 1:
            changed, new, removed = _differences(connection, fetch) if fresh or unsaid else (0, 0, 0)
            all_of_it = fetch.complete and snapshot.covers is None
            rows = (fetch.read.rows, before, said + added)
            difference = Difference(snapshot.source, all_of_it, *rows, subjects, changed, new, removed)
    rows_read, quarantined = fetch.read.rows, len(fetch.read.quarantined)
    return RecordCounts(rows_read, added, ended, before - unsaid, quarantined, difference)


def _accept(connection: Connection, run_id: int, snapshot: Snapshot, read: _Read, now: datetime) -> _Fetch:
    """The fetch's own row. Where nothing is modified it carries what is known of the body of the fetch before; a 304
    its validators and hash, too."""
    query = select(_fetch).where(_fetch.c.source == snapshot.source).order_by(_fetch.c.number.desc()).limit(1)
    previous = connection.execute(query).one_or_none()
    seen = snapshot.provenance
    etag, modified, body, declaration = seen.etag, seen.last_modified, seen.body_sha256, seen.declaration
    complete, rows = read.complete(snapshot) and snapshot.covers is None, read.rows
    if snapshot.not_modified:
        if previous is None:
            raise LedgerError(f"source {snapshot.source}: not modified since a fetch that the ledger does not have")
        body, declaration = previous.body_sha256, previous.declaration
        complete, rows = previous.complete, previous.rows
        if seen.status == NOT_MODIFIED:
            etag, modified = etag or previous.etag, modified or previous.last_modified
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
        "complete": complete,
        "not_modified": snapshot.not_modified,
        "rows": rows,
        "as_of": seen.as_of,
        "cursor": seen.cursor,
        "verified": seen.verified,
    }
    return _Fetch(insert_row(connection, _fetch, row), number, snapshot, read)


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
    rows = dict.fromkeys((row.origin, row.reason, row.raw, row.subject_id) for row in fetch.read.quarantined)
    gone = [{"row_id": id_} for content, id_ in live.items() if content not in rows]
    if gone:
        statement = update(table).where(table.c.id == bindparam("row_id")).values(until_fetch=fetch.id)
        connection.execute(statement, gone)
    columns = ("source", "origin", "reason", "raw", "subject_id", "since_fetch")
    bulk_insert(connection, table, columns, ((source, *row, fetch.id) for row in rows if row not in live))


def _stage(connection: Connection, snapshot: Snapshot) -> _Read:
    """Every good row into `incoming`; the rest is what comes back."""
    covered = ((subject,) for subject in sorted(snapshot.covers or ()))
    bulk_insert(connection, _covered, ("subject_id",), covered)
    read = _Read()
    read.good = bulk_insert(connection, _incoming, ("position", *_CONTENT, "origin"), _good_rows(snapshot, read))
    analyze(connection, _incoming)
    return read


def _good_rows(snapshot: Snapshot, read: _Read) -> Iterator[Sequence[Any]]:
    position = 0
    for entry in snapshot.content:
        if type(entry) is tuple:
            position += 1
            if entry[7]:
                pairs = [list(pair) for pair in entry[7]]
                yield (position, *entry[:7], canonical(pairs), entry[8])
            else:
                yield (position, *entry[:7], None, entry[8])
        elif isinstance(entry, QuarantinedRow):
            read.quarantined.append(entry)
        elif isinstance(entry, Alias):
            read.aliases.setdefault(entry.entity_id, []).append(entry.label)


def _match(connection: Connection, fetch: _Fetch) -> tuple[int, int, int]:
    """Each staged row learns which live claim it repeats, if any: how many claims were live, how many of them are said
    again, and how many not that the snapshot speaks about."""
    same = [_claim.c[name].is_not_distinct_from(_incoming.c[name]) for name in _CONTENT if name in _OPTIONAL]
    same += [_claim.c[name] == _incoming.c[name] for name in _CONTENT if name not in _OPTIONAL]
    again = and_(fetch.live, _claim.c.relation == fetch.snapshot.relation, *same)
    moved = case((_claim.c.origin != _incoming.c.origin, 1), else_=0)
    paused = case((_claim.c.seen_to.is_not(None), 1), else_=0)
    rows = select(_incoming.c.position, _claim.c.id, moved, paused).select_from(_incoming.outerjoin(_claim, again))
    insert_from(connection, _matched, ["position", "claim_id", "moved", "paused"], rows)
    columns = ["claim_id", "position", "moved", "paused"]
    first = select(*(_matched.c[name] for name in columns)).where(_matched.c.claim_id.is_not(None))
    said = insert_new(connection, _said, columns, first.order_by(_matched.c.position))
    analyze(connection, _matched, _said)
    before = connection.scalar(select(func.count()).select_from(_claim).where(fetch.live)) or 0
    if said == before:
        return before, said, 0
    repeated = select(_said.c.claim_id).where(_said.c.claim_id == _claim.c.id).exists()
    silent = select(_claim.c.id).where(fetch.spoken_about, ~repeated)
    return before, said, insert_from(connection, _unsaid, ["claim_id"], silent)


def _subjects(connection: Connection, fetch: _Fetch) -> int:
    """Subjects of the live claims."""
    return connection.scalar(select(func.count(_claim.c.subject_id.distinct())).where(fetch.live)) or 0


def _end_unsaid(connection: Connection, fetch: _Fetch) -> int:
    """How many of the live claims that the snapshot does not repeat end.

    They end, but where the snapshot does not speak about them: the subject is absent from a partial snapshot, or is
    there only in quarantined rows, or the claim's own row is the one in quarantine.
    """
    other = _claim.alias("other")
    of_subject = (other.c.source == _claim.c.source, other.c.subject_id == _claim.c.subject_id)
    repeated = (
        select(other.c.id)
        .join(_said, _said.c.claim_id == other.c.id)
        .where(*of_subject, other.c.until_fetch.is_(None))
        .correlate(_claim)
        .exists()
    )
    fresh = select(_incoming.c.subject_id).join(_matched, _matched.c.position == _incoming.c.position)
    absent = and_(~repeated, _claim.c.subject_id.not_in(fresh.where(_matched.c.claim_id.is_(None))))
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
    kept = unreadable if fetch.complete else or_(absent, unreadable)
    these = _claim.c.id.in_(select(_unsaid.c.claim_id))
    connection.execute(update(_claim).where(these, _claim.c.seen_to.is_(None)).values(seen_to=fetch.number - 1))
    return connection.execute(update(_claim).where(these, ~kept).values(until_fetch=fetch.id)).rowcount


def _resume(connection: Connection, fetch: _Fetch) -> None:
    """A claim that some fetches passed over, and that is said again, goes on counting where it stopped."""
    paused = select(_said.c.claim_id).where(_said.c.paused == 1)
    counted = _claim.c.seen_to - _claim.c.seen_from + 1
    values = {"seen_from": fetch.number - counted, "seen_to": None}
    connection.execute(update(_claim).where(_claim.c.id.in_(paused)).values(values))


def _move(connection: Connection) -> None:
    """Where a claim's row is now: the first one that says it."""
    moved = select(_said.c.claim_id).where(_said.c.moved == 1)
    if connection.execute(moved.limit(1)).first() is None:
        return
    origin = (
        select(_incoming.c.origin)
        .join(_said, _said.c.position == _incoming.c.position)
        .where(_said.c.claim_id == _claim.c.id)
        .correlate(_claim)
        .scalar_subquery()
    )
    connection.execute(update(_claim).where(_claim.c.id.in_(moved)).values(origin=origin))


def _add(connection: Connection, fetch: _Fetch) -> int:
    """Rows that repeat no claim become claims; rows that say the same become one."""
    values = {
        "source": literal(fetch.snapshot.source),
        "relation": literal(fetch.snapshot.relation),
        **{name: _incoming.c[name] for name in _CONTENT},
        "origin": _incoming.c.origin,
        "first_origin": _incoming.c.origin,
        "since_fetch": literal(fetch.id),
        "seen_from": literal(fetch.number),
    }
    rows = select(*values.values()).join(_matched, _matched.c.position == _incoming.c.position)
    rows = rows.where(_matched.c.claim_id.is_(None)).order_by(_incoming.c.position)
    return insert_from(connection, _claim, list(values), rows) - _drop_repeated(connection, fetch)


def _drop_repeated(connection: Connection, fetch: _Fetch) -> int:
    """Of new claims that say the same, all but the first go again; looked for only where a subject and an object come
    together twice, which an index tells of a first load."""
    pair = (_claim.c.subject_id, _claim.c.object_id)
    among = fetch.live if fetch.number == 1 else fetch.new
    twice = select(*pair).where(among).group_by(*pair).having(func.count() > 1)
    if connection.execute(twice.limit(1)).first() is None:
        return 0
    content = [_claim.c.relation, *(_claim.c[name] for name in _CONTENT)]
    nth = func.row_number().over(partition_by=content, order_by=_claim.c.id)
    ranked = select(_claim.c.id, nth.label("nth")).where(fetch.new).subquery()
    return connection.execute(
        delete(_claim).where(_claim.c.id.in_(select(ranked.c.id).where(ranked.c.nth > 1)))
    ).rowcount


def _differences(connection: Connection, fetch: _Fetch) -> tuple[int, int, int]:
    """How many subjects are changed, added, removed. A subject that was merged into another one is that one."""
    redirect = schema.redirect
    now = func.coalesce(redirect.c.new_id, _claim.c.subject_id).label("subject_id")
    claims = _claim.outerjoin(redirect, redirect.c.old_id == _claim.c.subject_id)
    begun = select(now, literal(1).label("begun"), literal(0).label("gone")).select_from(claims).where(fetch.new)
    gone = select(now, literal(0), literal(1)).select_from(claims).join(_unsaid, _unsaid.c.claim_id == _claim.c.id)
    rows = union_all(begun, gone).subquery()
    touched = (
        select(rows.c.subject_id, func.max(rows.c.begun).label("begun"), func.max(rows.c.gone).label("gone"))
        .group_by(rows.c.subject_id)
        .subquery()
    )
    repeated = (
        select(_said.c.claim_id)
        .join(_claim, _claim.c.id == _said.c.claim_id)
        .where(fetch.live, _claim.c.subject_id == touched.c.subject_id)
        .correlate(touched)
        .exists()
    )
    waiting = (_quarantine.c.source == fetch.snapshot.source, _quarantine.c.until_fetch.is_(None))
    unreadable = select(_quarantine.c.id).where(*waiting, _quarantine.c.subject_id == touched.c.subject_id)
    stays = case((repeated, 1), else_=0).label("stays")
    present = case((unreadable.correlate(touched).exists(), 1), else_=0).label("present")
    kinds = select(touched.c.begun, touched.c.gone, stays, present).subquery()
    counted = select(*kinds.c, func.count()).group_by(*kinds.c)
    changed = added = removed = 0
    for row in connection.execute(counted):
        new, old, kept, waits, number = tuple(row)
        if new and not (old or kept):
            added += number
        elif new or kept:
            changed += number
        elif not waits and fetch.complete:
            removed += number
    return changed, added, removed
