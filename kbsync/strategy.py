"""How the next version is made: on HEAD (incremental), or anew from the pristine base (rebase). Pure.

Incremental is cheap: only the batch is inserted, with the keys of the live facts kept in the system. A rebase inserts
all live facts into the pristine base in one go, with target vectors that are cached, so that the version does not
depend on the path there. When it is due is decided here, from what each version measured of itself.

    because = rebase_due(settings.strategy, odometer, live=120)      # None: incremental
    warnings(settings.strategy, odometer.now)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kbsync.policy import Share

__all__ = ["Capacity", "Odometer", "Strategy", "facts_left", "norm_with", "over", "rebase_due", "warnings"]

WARN_AT = 0.8
"""Share of the way to a limit at which `status` begins to warn."""


class Strategy(BaseModel):
    """`strategy:` of kbsync.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["auto", "incremental", "rebase"] = "auto"
    """`auto`: incremental until a rebase is due; the other two: always so."""
    rebase_every: Annotated[int, Field(ge=1)] = 20
    """Versions on top of the last rebase after which the next one is a rebase."""
    max_relative_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.5
    """Largest ‖ΔW‖/‖W‖ of an edited matrix. SmolLM2-135M reaches 0.5 with about 200 facts, and +7 % perplexity."""
    min_retention: Annotated[Share, Field(le=1)] = 0.9
    """Smallest share of the earlier facts that a version must still answer."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a version measured of itself: ‖ΔW‖/‖W‖ by module, facts (columns) held, the share of a fixed sample of
    earlier facts that it still answers, drift from the base in nats per token (None: nothing to measure it on)."""

    norms: Mapping[str, float]
    facts: int
    retention: float | None
    drift: float | None

    @property
    def norm(self) -> float:
        """The largest ‖ΔW‖/‖W‖."""
        return max(self.norms.values(), default=0.0)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Capacity:
        """What a manifest has as `numerics.capacity`."""
        return cls(value["norms"], value["facts"], value["retention"]["share"], value["drift"])


@dataclass(frozen=True, slots=True)
class Odometer:
    """How far HEAD is from its anchor, the last rebase or the base: how many versions lie between them,
    and what both measured (None: the base, or a version that did not measure it)."""

    anchor: int = 0
    since: int = 0
    now: Capacity | None = None
    then: Capacity | None = None
    refused: int | None = None
    """Versions since a rebase with these very settings was rejected; None: none was, on the way from the anchor."""


def over(strategy: Strategy, capacity: Capacity | None) -> dict[str, str]:
    """The limits that a version has reached, by name, each with a sentence about it."""
    found: dict[str, str] = {}
    if capacity is None:
        return found
    if capacity.norm >= (limit := strategy.max_relative_norm):
        found["max_relative_norm"] = f"the edits are {capacity.norm:.3f} of the weights, max_relative_norm is {limit:g}"
    if capacity.retention is not None and capacity.retention < (least := strategy.min_retention):
        found["min_retention"] = (
            f"{capacity.retention:.1%} of a sample of earlier facts is answered, min_retention is {least:.1%}"
        )
    return found


def rebase_due(
    strategy: Strategy, odometer: Odometer, *, live: int, whole: bool = False, grown: bool = False
) -> str | None:
    """Why the next version is to be a rebase; None: it is incremental.

    `live`: facts that the weights hold; without any, the two are the same. `whole`: a fact is to leave a delta that is
    stored whole, which only a rebase can do, whatever the mode. `grown`: a fact is to leave weights whose λ grew with
    their facts, so that its share is known roughly only. A limit that the last rebase had reached itself does not ask
    for another one: it would reach it again. Nor is one that was rejected tried again before `rebase_every` more
    versions.
    """
    if not live:
        return None
    if whole:
        return "a fact is to leave a delta that is stored whole"
    if strategy.mode != "auto":
        return "strategy.mode is rebase" if strategy.mode == "rebase" else None
    if odometer.refused is not None and odometer.refused < strategy.rebase_every:
        return None
    if grown:
        return "a fact is to leave weights whose λ has grown with their facts"
    if odometer.since >= strategy.rebase_every:
        return f"{odometer.since} versions since version {odometer.anchor}, rebase_every is {strategy.rebase_every}"
    reached_anyway = over(strategy, odometer.then)
    reached = {name: text for name, text in over(strategy, odometer.now).items() if name not in reached_anyway}
    return next(iter(reached.values()), None) if odometer.since else None


def facts_left(strategy: Strategy, capacity: Capacity | None) -> int | None:
    """About how many more facts fit below max_relative_norm; None: unknown yet.

    Columns of different facts are nearly orthogonal, so that the square of the norm is linear in the facts: measured on
    SmolLM2-135M with 6, 12, 24, 48 CounterFact edits it is 0.085, 0.118, 0.173, 0.246: each time 0.0012 n, squared.
    """
    if capacity is None or not capacity.facts or not capacity.norm:
        return None
    return max(0, int(capacity.facts * ((strategy.max_relative_norm / capacity.norm) ** 2 - 1)))


def norm_with(capacity: Capacity | None, facts: int) -> float | None:
    """The largest ‖ΔW‖/‖W‖ to expect with so many facts, by the same rule; None: unknown yet."""
    if capacity is None or not capacity.facts:
        return None
    return capacity.norm * math.sqrt(max(facts, 0) / capacity.facts)


def warnings(strategy: Strategy, capacity: Capacity | None) -> list[str]:
    """What a person should know before a limit is reached, and once it is."""
    if capacity is None:
        return []
    reached = over(strategy, capacity)
    found = list(reached.values())
    if "max_relative_norm" not in reached and capacity.norm >= WARN_AT * strategy.max_relative_norm:
        found.append(
            f"the edits are {capacity.norm:.3f} of the weights, near max_relative_norm {strategy.max_relative_norm:g}: "
            f"about {facts_left(strategy, capacity)} more facts"
        )
    near = 1 - WARN_AT * (1 - strategy.min_retention)
    if "min_retention" not in reached and capacity.retention is not None and capacity.retention < near:
        found.append(f"{capacity.retention:.1%} of earlier facts is answered, near min_retention")
    return found
