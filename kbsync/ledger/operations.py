"""The tables of running it: what people are told, which version serves what, what was measured meanwhile. Declared as
those of `schema`, which takes them in; docs/ledger.md explains them.

Those that only grow (notice, promotion, dropped_delta, fact_check, arrival) are logs: what holds now is the newest row.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKeyConstraint, Index
from sqlmodel import Field

from kbsync.ledger.columns import LedgerTable, flag, json_value, key, one_of, refers, text, time

__all__ = [
    "NOTICE_KINDS",
    "PROMOTION_KINDS",
    "Arrival",
    "Channel",
    "Delivery",
    "DroppedDelta",
    "FactCheck",
    "Heartbeat",
    "Notice",
    "Phase",
    "Promotion",
    "SourceAnswer",
]

NOTICE_KINDS = ("held", "rejected", "conflict", "failed", "stale", "faded", "recovered")
PROMOTION_KINDS = ("promote", "demote", "end")


class Notice(LedgerTable, table=True):
    """Something that a person is told of. `thread` is what it is about (`stale sky constellation`): its newest notice
    says how that stands, so that what lasts is told once."""

    __table_args__ = (
        one_of("kind", *NOTICE_KINDS),
        Index("notice_of_thread", "thread", "id"),
        LedgerTable.__table_args__,
    )
    id: int | None = key()
    kind: str = text()
    thread: str = text()
    policy: str | None = text()
    run_id: int | None = refers("run")
    message: str = text()
    detail: Any = json_value()
    at: datetime = time()


class Delivery(LedgerTable, table=True):
    """How far a notice came on one channel: tried so often, next at, or delivered."""

    __table_args__ = (Index("delivery_due", "delivered_at", "next_at"), LedgerTable.__table_args__)
    notice_id: int = Field(primary_key=True, foreign_key="notice.id")
    channel: str = text(primary_key=True)
    attempts: int
    next_at: datetime | None = time()
    delivered_at: datetime | None = time()
    error: str = text()


class Channel(LedgerTable, table=True):
    """A channel that notices go out on. `seen`: the newest notice that it was considered for, 0 before the first;
    `stopped`: why nothing is sent there any more, empty while it is."""

    name: str = text(primary_key=True)
    seen: int
    stopped: str = text()


class Promotion(LedgerTable, table=True):
    """Every move of an alias; its newest row is where it stands. `version` NULL: it names none (`live` follows HEAD
    again). Append-only."""

    __table_args__ = (
        one_of("kind", *PROMOTION_KINDS),
        ForeignKeyConstraint(["model", "version"], ["version.model", "version.number"]),
        Index("promotion_of_alias", "model", "alias", "id"),
        LedgerTable.__table_args__,
    )
    id: int | None = key()
    model: str = text()
    alias: str = text()
    kind: str = text()
    version: int | None
    who: str = text()
    reason: str = text()
    at: datetime = time()


class DroppedDelta(LedgerTable, table=True):
    """A delta file that retention removed: the versions that need it are not restorable, until a later one is published
    that names it again. Append-only."""

    __table_args__ = (
        ForeignKeyConstraint(["model"], ["model.id"]),
        Index("dropped_delta_of_model", "model", "delta"),
        LedgerTable.__table_args__,
    )
    id: int | None = key()
    model: str = text()
    delta: str = text()
    size: int
    who: str = text()
    reason: str = text()
    at: datetime = time()


class FactCheck(LedgerTable, table=True):
    """A fact in the weights that was asked again: whether `version` still answered it, since when its column had been
    served, and when it is due next."""

    __table_args__ = (
        ForeignKeyConstraint(["model", "version"], ["version.model", "version.number"]),
        Index("fact_check_of_key", "model", "relation", "subject_id", "id"),
        LedgerTable.__table_args__,
    )
    id: int | None = key()
    model: str = text()
    version: int
    relation: str = text()
    subject_id: str = text()
    request: str = text()
    stage: int
    answered: bool = flag()
    served_at: datetime = time()
    due_at: datetime = time()
    at: datetime = time()


class Arrival(LedgerTable, table=True):
    """A change that reached a published version: after when the source changed, when that was fetched, when a
    version that answers it was published. Append-only."""

    __table_args__ = (
        ForeignKeyConstraint(["model", "version"], ["version.model", "version.number"]),
        Index("arrival_by_time", "served_at"),
        LedgerTable.__table_args__,
    )
    id: int | None = key()
    model: str = text()
    version: int
    relation: str = text()
    subject_id: str = text()
    source: str = text()
    changed_at: datetime = time()
    fetched_at: datetime = time()
    served_at: datetime = time()


class Phase(LedgerTable, table=True):
    """How long a part of a run took, and for how many things: of `targets`, the vectors that were computed."""

    run_id: int = Field(primary_key=True, foreign_key="run.id")
    phase: str = text(primary_key=True)
    milliseconds: int
    amount: int


class SourceAnswer(LedgerTable, table=True):
    """How often a source gave an answer of this kind: an HTTP status, or what went wrong instead."""

    source: str = text(primary_key=True)
    outcome: str = text(primary_key=True)
    count: int
    last_at: datetime = time()


class Heartbeat(LedgerTable, table=True):
    """The last sign of life of a part of the daemon."""

    part: str = text(primary_key=True)
    process: int
    detail: Any = json_value()
    at: datetime = time()
