"""Notices that people are told, and how far each came on each channel.

A notice is written by the transaction that does what it tells of. Each is about a `thread`; the newest of a thread says
how that stands, so that what lasts is told once, until it has recovered. The rows of `delivery` are the outbox: a
notice is given to a channel once (`enqueue`), then tried until it is delivered or given up.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import and_, delete, func, select, update

from kbsync.facts import digest_of
from kbsync.ledger import schema
from kbsync.ledger.audit import Auditor
from kbsync.ledger.database import Session, bulk_insert, insert_row

__all__ = ["ChannelRow", "DeliveryRow", "NoticeKind", "NoticeReader", "NoticeRow", "NoticeWriter", "in_turn"]

NoticeKind = Literal["held", "rejected", "conflict", "failed", "stale", "faded", "recovered"]
RECOVERED = "recovered"

_notice, _delivery, _channel, _conflict = schema.notice, schema.delivery, schema.channel, schema.conflict


@dataclass(frozen=True, slots=True)
class NoticeRow:
    """What people are told. `detail` is for machines; of a `recovered` one, `was` in it is the kind that is over."""

    id: int
    kind: NoticeKind
    thread: str
    policy: str | None
    run_id: int | None
    message: str
    detail: Mapping[str, Any]
    at: datetime

    @property
    def uid(self) -> str:
        """One and the same however often it is sent, and no other workspace's: what receivers know it by."""
        return f"msg_{digest_of([self.id, self.thread, self.message, self.at.isoformat()])[:27]}"

    @property
    def about(self) -> str:
        """The kind that a channel asks for: that of the trouble, also where it is over."""
        return str(self.detail.get("was", self.kind)) if self.kind == RECOVERED else self.kind


@dataclass(frozen=True, slots=True)
class DeliveryRow:
    """How far a notice came on a channel: delivered, to be tried at `next_at`, or given up (neither). `error`: what was
    wrong with the last attempt, or with one that delivered it: the recipients that were refused."""

    notice_id: int
    channel: str
    attempts: int
    next_at: datetime | None
    delivered_at: datetime | None
    error: str

    @property
    def given_up(self) -> bool:
        """Whether it will not be tried again, though it was not delivered."""
        return self.delivered_at is None and self.next_at is None


@dataclass(frozen=True, slots=True)
class ChannelRow:
    """A channel that is known: the newest notice that it was considered for; `stopped`: why it gets none."""

    name: str
    seen: int
    stopped: str


Due = tuple[NoticeRow, DeliveryRow]

LONGEST_WAIT = timedelta(hours=8)
"""No wait is longer: a time that is further ahead was written by a clock that was wrong, and holds nothing up."""


def in_turn(waiting: Sequence[Due], delivered: int, now: datetime) -> list[Due]:
    """What may be sent on a channel by now, and in which order. `waiting`: all that it waits for, oldest first;
    `delivered`: the newest notice that came through on it.

    While an attempt that failed waits, nothing is due: it is the channel that does not work. But not where something
    newer came through: then it is that notice, and it holds up its own thread alone. Within a thread the order is kept;
    threads whose first notice was tried less come first, so that one that never comes through is in nobody's way.
    """

    def waits(row: DeliveryRow) -> bool:
        # What was never tried is due whatever the clock says.
        return row.attempts > 0 and row.next_at is not None and now < row.next_at <= now + LONGEST_WAIT

    if any(waits(row) and row.notice_id > delivered for _, row in waiting):
        return []
    first: dict[str, DeliveryRow] = {}
    for notice, row in waiting:
        first.setdefault(notice.thread, row)
    free = [one for one in waiting if not waits(first[one[0].thread])]
    return sorted(free, key=lambda one: (first[one[0].thread].attempts, one[0].id))


class NoticeReader(Session):
    """Questions about notices."""

    def notices(self, limit: int | None = 100) -> list[NoticeRow]:
        """The newest first; `limit` None: all of them."""
        return self._notices(select(_notice).order_by(_notice.c.id.desc()).limit(limit))

    def troubles(self) -> list[NoticeRow]:
        """The newest notice of each thread that has not recovered, newest first."""
        newest = select(func.max(_notice.c.id)).group_by(_notice.c.thread)
        query = select(_notice).where(_notice.c.id.in_(newest), _notice.c.kind != RECOVERED)
        return self._notices(query.order_by(_notice.c.id.desc()))

    def newest_of(self, thread: str) -> NoticeRow | None:
        """How a thread stands; None where nobody was ever told of it."""
        query = select(_notice).where(_notice.c.thread == thread).order_by(_notice.c.id.desc()).limit(1)
        return next(iter(self._notices(query)), None)

    def _notices(self, query: Any) -> list[NoticeRow]:
        return [NoticeRow(*row) for row in self._connection.execute(query)]

    def channels(self) -> dict[str, ChannelRow]:
        """The channels that are known, by name."""
        rows = self._connection.execute(select(_channel).order_by(_channel.c.name))
        return {row.name: ChannelRow(*row) for row in rows}

    def due(self, channel: str, now: datetime) -> list[Due]:
        """What may be sent on a channel by now, in order."""
        query = select(_notice, _delivery).join(_delivery, _delivery.c.notice_id == _notice.c.id)
        query = query.where(_delivery.c.channel == channel, *_OPEN).order_by(_notice.c.id)
        waiting = [(NoticeRow(*row[:8]), DeliveryRow(*row[8:])) for row in self._connection.execute(query)]
        return in_turn(waiting, self._delivered(channel), now) if waiting else []

    def failures(self, channel: str) -> int:
        """How many attempts on a channel failed since something last came through, of what still waits."""
        newer = _delivery.c.notice_id > self._delivered(channel)
        query = select(func.sum(_delivery.c.attempts)).where(_delivery.c.channel == channel, *_OPEN, newer)
        return int(self._connection.scalar(query) or 0)

    def _delivered(self, channel: str) -> int:
        """The newest notice that came through on a channel; 0 where none did."""
        query = select(func.max(_delivery.c.notice_id))
        query = query.where(_delivery.c.channel == channel, _delivery.c.delivered_at.is_not(None))
        return self._connection.scalar(query) or 0

    def deliveries(self, notices: Collection[int]) -> dict[int, list[DeliveryRow]]:
        """How far notices came, by notice, and of each by channel."""
        query = select(_delivery).where(_delivery.c.notice_id.in_(notices)).order_by(_delivery.c.channel)
        found: dict[int, list[DeliveryRow]] = {}
        for row in self._connection.execute(query):
            found.setdefault(row.notice_id, []).append(DeliveryRow(*row))
        return found

    def conflicts_opened(self, run_id: int, relations: Collection[str]) -> list[tuple[str, str, str]]:
        """(relation, subject id, reason) of the conflicts that a run opened and that are open still."""
        columns = (_conflict.c.relation, _conflict.c.subject_id, _conflict.c.reason)
        query = select(*columns).where(
            _conflict.c.opened_run == run_id, _conflict.c.closed_at.is_(None), _conflict.c.relation.in_(relations)
        )
        return [(row[0], row[1], row[2]) for row in self._connection.execute(query.order_by(_conflict.c.id))]

    def in_conflict(self, relations: Collection[str]) -> bool:
        """Whether any key of the relations is in conflict."""
        query = select(_conflict.c.id).where(_conflict.c.closed_at.is_(None), _conflict.c.relation.in_(relations))
        return self._connection.execute(query.limit(1)).first() is not None


class NoticeWriter(NoticeReader, Auditor):
    """What a Writer may write about notices."""

    def notify(
        self,
        kind: NoticeKind,
        thread: str,
        message: str,
        *,
        detail: Mapping[str, Any] | None = None,
        policy: str | None = None,
        run_id: int | None = None,
        again: bool = False,
    ) -> bool:
        """Tell people, unless the thread's newest notice is of this kind already (`again`: even then). Whether it is
        told. `thread`: the kind and what it is about, `stale sky stars constellation`."""
        newest = self.newest_of(thread)
        if not again and newest is not None and newest.kind == kind:
            return False
        values = {"kind": kind, "thread": thread, "policy": policy, "run_id": run_id, "message": message}
        insert_row(self._connection, _notice, values | {"detail": dict(detail or {}), "at": self.now})
        return True

    def recovered(self, thread: str, message: str, *, policy: str | None = None, run_id: int | None = None) -> bool:
        """Tell people that a thread's trouble is over, if there was any and they have not been told. Whether it is."""
        newest = self.newest_of(thread)
        if newest is None or newest.kind == RECOVERED:
            return False
        return self.notify("recovered", thread, message, detail={"was": newest.kind}, policy=policy, run_id=run_id)

    def set_channels(self, names: Collection[str]) -> None:
        """These are the channels from now on: a new one gets what is written after this, one that is gone gets nothing
        more, and is new where it comes back."""
        newest = self._connection.scalar(select(func.max(_notice.c.id))) or 0
        gone = self.channels().keys() - set(names)
        self._connection.execute(delete(_channel).where(_channel.c.name.in_(gone)))
        self._connection.execute(delete(_delivery).where(_delivery.c.channel.in_(gone), *_OPEN))
        rows = [(name, newest, "") for name in sorted(set(names) - self.channels().keys())]
        bulk_insert(self._connection, _channel, ("name", "seen", "stopped"), rows)

    def enqueue(self, kinds: Mapping[str, Collection[str]]) -> int:
        """Give each channel the notices that it has not been considered for, if it takes their kind (channel ->
        kinds); how many deliveries that makes."""
        made = 0
        for channel in self.channels().values():
            new = self._notices(select(_notice).where(_notice.c.id > channel.seen).order_by(_notice.c.id))
            if new:
                taken = () if channel.stopped else kinds.get(channel.name, ())
                wanted = [one.id for one in new if one.about in taken]
                made += bulk_insert(self._connection, _delivery, _DELIVERY, self._first(channel.name, wanted))
                self._set_channel(channel.name, seen=new[-1].id)
        return made

    def _first(self, channel: str, notices: Sequence[int]) -> Iterator[tuple[Any, ...]]:
        return ((notice, channel, 0, self.now, None, "") for notice in notices)

    def note_delivery(self, row: DeliveryRow) -> None:
        """How an attempt ended."""
        values = {name: getattr(row, name) for name in _DELIVERY[2:]}
        which = and_(_delivery.c.notice_id == row.notice_id, _delivery.c.channel == row.channel)
        self._connection.execute(update(_delivery).where(which).values(values))

    def stop_channel(self, name: str, why: str) -> None:
        """Send nothing on a channel any more: its receiver does not want it. What waits for it is given up."""
        self._set_channel(name, stopped=why)
        self._connection.execute(
            update(_delivery).where(_delivery.c.channel == name, *_OPEN).values(next_at=None, error=why)
        )

    def resume_channel(self, name: str) -> None:
        """A channel works: what waits for its next attempt is due now. One that was stopped gets what is written from
        now on."""
        if (channel := self.channels().get(name)) is not None and channel.stopped:
            newest = self._connection.scalar(select(func.max(_notice.c.id))) or 0
            self._set_channel(name, stopped="", seen=newest)
        self._connection.execute(update(_delivery).where(_delivery.c.channel == name, *_OPEN).values(next_at=self.now))

    def _set_channel(self, name: str, **values: Any) -> None:
        self._connection.execute(update(_channel).where(_channel.c.name == name).values(values))


_DELIVERY = ("notice_id", "channel", "attempts", "next_at", "delivered_at", "error")
_OPEN = (_delivery.c.delivered_at.is_(None), _delivery.c.next_at.is_not(None))
"""Deliveries that are still to be tried."""
