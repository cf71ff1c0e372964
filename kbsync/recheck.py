"""Spaced checks of old facts: does the model still answer them? What has faded is edited once more. Pure.

    waiting = settings.recheck.due(standings, now)              # at most `facts`, the longest overdue first
    check = settings.recheck.checked(standing, answered=True, version=7, now=now)

A fact is asked again `first` after it was published, then at intervals that grow by `factor` while it is answered, up
to `longest`: the spacing of a memory schedule (Leitner; Settles and Meeder 2016, half-life regression).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from kbsync.facts import Applied, FactKey
from kbsync.policy import Seconds

__all__ = ["AGES", "FactCheck", "Recheck", "Share", "Standing", "misses"]

AGES = (1, 7, 30, 90, 365)
"""Days that part the rows of a decay table."""


@dataclass(frozen=True, slots=True)
class FactCheck:
    """Whether `version` still answered a fact that was published at `served`; `stage`: how often in a row it had been
    answered since then, this time included; `request` is the digest of what was asked."""

    key: FactKey
    request: str
    version: int
    stage: int
    answered: bool
    served: datetime
    due_at: datetime
    at: datetime


@dataclass(frozen=True, slots=True)
class Standing:
    """A fact in the weights: since when, its newest check there (None: there is none), and from how many columns in a
    row, up to this one, it was found not to be answered."""

    fact: Applied
    served: datetime
    last: FactCheck | None = None
    misses: int = 0

    @property
    def faded(self) -> bool:
        """Whether the weights hold the fact and do not answer it."""
        return self.last is not None and not self.last.answered

    @property
    def missed(self) -> int:
        """`misses` once it is not answered this time."""
        return self.misses + (not self.faded)


class Recheck(BaseModel):
    """`recheck:` of kbsync.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    first: Annotated[Seconds, Field(gt=0)] = 86400.0
    factor: Annotated[float, Field(ge=1)] = 2.0
    longest: Annotated[Seconds, Field(gt=0)] = 60 * 86400.0
    facts: Annotated[int, Field(ge=0)] = 100
    """How many are asked at once at most; 0: none, ever."""
    edits: Annotated[int, Field(ge=0)] = 3
    """How often a fact that fades again and again is edited once more before it is held."""

    def interval(self, stage: int) -> timedelta:
        """From a check that was the `stage`-th in a row to be answered to the next one."""
        capped = stage * math.log(self.factor) >= math.log(self.longest / self.first)
        return timedelta(seconds=self.longest if capped else self.first * self.factor**stage)

    def due_at(self, standing: Standing) -> datetime:
        """When a fact is to be asked again."""
        return standing.last.due_at if standing.last else standing.served + self.interval(0)

    def due(self, standings: Iterable[Standing], now: datetime) -> list[Standing]:
        """Those to be asked by now, the longest overdue first, at most `facts` of them."""
        waiting = [standing for standing in standings if self.due_at(standing) <= now]
        waiting.sort(key=lambda standing: (self.due_at(standing), standing.fact.request.key))
        return waiting[: self.facts]

    def checked(self, standing: Standing, *, answered: bool, version: int, now: datetime) -> FactCheck:
        """The check that has just been made."""
        request, last = standing.fact.request, standing.last
        stage = 1 + (last.stage if last else 0) if answered else 0
        return FactCheck(
            request.key, request.digest, version, stage, answered, standing.served, now + self.interval(stage), now
        )

    def gives_up(self, standing: Standing) -> bool:
        """Whether a fact that is not answered is to be held: as many edits have not helped."""
        return standing.missed > self.edits


def misses(checks: Sequence[FactCheck], request: str) -> int:
    """From how many columns in a row a request was not answered: of a key's checks, newest first."""
    columns = set()
    for check in checks:
        if check.request != request or check.answered:
            break
        columns.add(check.served)
    return len(columns)


@dataclass(frozen=True, slots=True)
class Share:
    """Checks of facts of one relation at one age (in days, up to but not including `until`; None: older), and how many
    of them were answered."""

    relation: str
    until: int | None
    checks: int
    answered: int
