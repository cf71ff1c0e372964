"""The links of a fact's lineage: what a source says, the fetch that said it, plan, column, what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from kbsync.facts import EditRequest, Entity, FactKey, Provenance

__all__ = ["EARLIER", "ClaimLink", "ColumnLink", "FetchLink", "Measured", "PlanLink", "minute"]

EARLIER = "not kept: it was made by an earlier kbsync"
"""Why a link is missing that this kbsync would have kept."""


def minute(at: datetime | None) -> str:
    """A time in words of a gap, to the minute (UTC)."""
    return f"{at:%Y-%m-%d %H:%M}" if at else ""


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
    """The column that holds a fact in the weights of `head`. `version` made it; `first` is the version since which the
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
    live: int
    shared: tuple[FactKey, ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """What a probe measured of the request: the probability of the whole object after the prompt."""

    version: int
    at: datetime
    probability: float
    answered: bool
    answer: str
