"""What sources said: claims with their provenance, quarantined rows, how sources and schedules have behaved."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, and_, func, or_, select

from kbsync.facts import Claim, Entity, FactKey, Provenance, QuarantinedRow
from kbsync.ledger import schema
from kbsync.ledger.database import Session, pages
from kbsync.ledger.entities import follow_claim, redirects_in
from kbsync.ledger.records import QuarantineRow, ScheduleState, SourceState

__all__ = ["PROVENANCE", "SourceReader", "provenance_of"]

_CLAIM = (
    schema.claim.c.source,
    schema.claim.c.relation,
    schema.claim.c.subject_id,
    schema.claim.c.subject_label,
    schema.claim.c.object_id,
    schema.claim.c.object_label,
    schema.claim.c.origin,
    schema.claim.c.rank,
    schema.claim.c.valid_from,
    schema.claim.c.valid_to,
    schema.claim.c.seen_from,
    schema.claim.c.seen_to,
    schema.claim.c.qualifiers,
    schema.fetch.c.recorded_at,
    schema.claim.c.id,
)
PROVENANCE = (
    schema.fetch.c.location,
    schema.fetch.c.fetched_at,
    schema.fetch.c.status,
    schema.fetch.c.body_sha256,
    schema.fetch.c.etag,
    schema.fetch.c.last_modified,
    schema.fetch.c.declaration,
    schema.fetch.c.as_of,
    schema.fetch.c.cursor,
    schema.fetch.c.verified,
)
"""The columns of a fetch that `provenance_of` wants, in its order."""


def provenance_of(values: tuple[Any, ...]) -> Provenance | None:
    """The columns PROVENANCE as a value; None where the join found no fetch."""
    return None if values[0] is None else Provenance(*values)


class SourceReader(Session):
    """Questions about sources."""

    def claims(self, relations: Collection[str], keys: Collection[FactKey] | None = None) -> list[Claim]:
        """The live claims of these relations, of every source, by the ids of now, oldest first; `keys`: only
        those that were said about these keys."""
        of_these = schema.claim.c.relation.in_(relations)
        found = [one for page in pages(schema.claim, keys) for one in self._claims(and_(of_these, *page))]
        return found if keys is None else sorted(found, key=lambda claim: claim.id or 0)

    def claims_of(self, source: str) -> list[Claim]:
        """The live claims of one source, by the ids of now, oldest first."""
        return self._claims(schema.claim.c.source == source)

    def _claims(self, which: ColumnElement[bool]) -> list[Claim]:
        newest = self._newest_fetches()
        claim, fetch = schema.claim, schema.fetch
        query = (
            select(*_CLAIM)
            .join(fetch, fetch.c.id == claim.c.since_fetch)
            .where(which, claim.c.until_fetch.is_(None))
            .order_by(claim.c.id)
        )
        found = [_claim(row, newest) for row in self._connection.execute(query)]
        moved = redirects_in(self._connection)
        return [follow_claim(claim, moved) for claim in found] if moved else found

    def _newest_fetches(self) -> dict[str, int]:
        query = select(schema.fetch.c.source, func.max(schema.fetch.c.number).label("newest")).group_by(
            schema.fetch.c.source
        )
        return {row.source: row.newest for row in self._connection.execute(query)}

    def newest_number(self, source: str) -> int:
        """How many fetches of a source were accepted."""
        return (
            self._connection.scalar(select(func.max(schema.fetch.c.number)).where(schema.fetch.c.source == source)) or 0
        )

    def last_accepted(self, source: str) -> Provenance | None:
        """The newest fetch of `source` that was accepted; None before the first."""
        query = (
            select(*PROVENANCE).where(schema.fetch.c.source == source).order_by(schema.fetch.c.number.desc()).limit(1)
        )
        row = self._connection.execute(query).one_or_none()
        return None if row is None else provenance_of(tuple(row))

    def accepted_since(self, sources: Collection[str], since: datetime) -> set[str]:
        """Those of the sources of which a fetch was accepted after `since`."""
        table = schema.fetch
        query = select(table.c.source).where(table.c.source.in_(sources), table.c.recorded_at > since).distinct()
        return set(self._connection.scalars(query))

    def quarantined(self, source: str | None = None, run_id: int | None = None) -> list[QuarantineRow]:
        """Rows that could not be used: those that sources still have, or all that the fetches of `run_id` had."""
        table, began, ended = schema.quarantine, schema.fetch.alias("began"), schema.fetch.alias("ended")
        query = (
            select(table, began.c.run_id, began.c.recorded_at, ended.c.recorded_at)
            .join(began, began.c.id == table.c.since_fetch)
            .outerjoin(ended, ended.c.id == table.c.until_fetch)
            .order_by(table.c.source, table.c.id)
        )
        if source is not None:
            query = query.where(table.c.source == source)
        if run_id is None:
            query = query.where(table.c.until_fetch.is_(None))
        else:
            during = schema.fetch.alias("during")
            query = query.join(during, during.c.source == table.c.source).where(
                during.c.run_id == run_id,
                table.c.since_fetch <= during.c.id,
                or_(table.c.until_fetch.is_(None), table.c.until_fetch > during.c.id),
            )
        return [_quarantined(row) for row in self._connection.execute(query)]

    def source_state(self, source: str) -> SourceState:
        """How a source has behaved; a source never seen has behaved well."""
        query = select(schema.source_state).where(schema.source_state.c.source == source)
        row = self._connection.execute(query).one_or_none()
        return SourceState(source) if row is None else SourceState(*row)

    def schedule_state(self, policy: str) -> ScheduleState:
        """When a policy's pass last began, ended well, and is due."""
        query = select(schema.schedule_state).where(schema.schedule_state.c.policy == policy)
        row = self._connection.execute(query).one_or_none()
        return ScheduleState(policy) if row is None else ScheduleState(*row)


def _claim(row: Sequence[Any], newest: dict[str, int]) -> Claim:
    source, relation, subject, subject_label, object_, object_label, origin, rank, start, end, *more = row
    seen_from, seen_to, qualifiers, since, id_ = more
    return Claim(
        source=source,
        relation=relation,
        subject=Entity(subject, subject_label),
        object=Entity(object_, object_label),
        origin=origin,
        rank=rank,
        start=start,
        end=end,
        seen=(newest[source] if seen_to is None else seen_to) - seen_from + 1,
        qualifiers=tuple((name, value) for name, value in qualifiers or ()),
        since=since,
        id=id_,
    )


def _quarantined(row: Sequence[Any]) -> QuarantineRow:
    id_, source, origin, reason, raw, subject_id, _, _, run_id, since, until = row
    return QuarantineRow(id_, source, QuarantinedRow(origin, reason, raw, subject_id), run_id, since, until)
