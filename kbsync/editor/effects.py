"""What causal tracing found on average over facts, with intervals, and the layers that it points to.

report = study(base, facts, Settings(), limit=100)
report.gap.mean                # [layers]: how much of a restored subject state works through the MLPs above it
report.layers                  # the window of layers where that is most
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from kbsync.editor.known import KnownFact, answered
from kbsync.editor.model import Base
from kbsync.editor.tracing import SITES, FactTrace, Grid, Kind, Settings, Site, Tracer, placeable, subject_deviation
from kbsync.errors import EditError
from kbsync.progress import Progress, silent

__all__ = ["RULE", "Effect", "TraceReport", "average", "choose_layers", "severed_gap", "study"]

_NORMAL = 1.959964
"""Standard errors on either side of the mean in a 95 % interval."""
_EDITED, _EDITED_SHARE = 5, 3
"""Layers to edit: 5 as the authors do in GPT-2 XL and NeoX, at most a third of a smaller model's."""
RULE = (
    "the contiguous layers with the highest mean gap at the last subject token between the effect of restoring the "
    "state and the same with the MLPs above severed; never the last layer"
)
"""How `choose_layers` chooses, in words for reports."""


@dataclass(frozen=True, slots=True)
class Effect:
    """Per layer, over facts: mean, standard deviation, and 95 % interval of the mean (normal). In probability."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def of(cls, effects: Tensor) -> Effect:
        """Of effects [facts, layers]; one fact alone has no spread and an interval of its value."""
        mean = effects.mean(dim=0)
        std = effects.std(dim=0) if len(effects) > 1 else torch.zeros_like(mean)
        margin = _NORMAL * std / math.sqrt(len(effects))
        return cls(*(tuple(values.tolist()) for values in (mean, std, mean - margin, mean + margin)))


@dataclass(frozen=True, slots=True)
class TraceReport:
    """Causal tracing of one model. `read` facts were read, `asked` of them put to the model until `traced` were found
    that it answers right; `sigma` is the spread of subject embeddings; `clean` and `corrupted` are the answer's mean
    probability; `gap` is the effect of the subject's state less the same with the MLPs severed, paired by fact."""

    read: int
    asked: int
    traced: int
    settings: Settings
    window: int
    sigma: float
    clean: float
    corrupted: float
    effects: dict[Site, dict[Kind, Effect]]
    gap: Effect
    layers: tuple[int, ...]
    grids: tuple[Grid, ...] = field(default=(), compare=False)

    def to_json(self) -> dict[str, Any]:
        """A JSON value: numbers by layer, and what they depend on."""
        return {
            "facts": {"read": self.read, "asked": self.asked, "traced": self.traced},
            "noise": {"factor": self.settings.noise, "sigma": self.sigma, "samples": self.settings.samples},
            "seed": self.settings.seed,
            "window": self.window,
            "probability": {"clean": self.clean, "corrupted": self.corrupted},
            "effects": {
                site: {kind: asdict(one) for kind, one in kinds.items()} for site, kinds in self.effects.items()
            },
            "gap": asdict(self.gap),
            "suggested": {"layers": list(self.layers), "rule": RULE},
            "grids": [_grid_json(grid) for grid in self.grids],
        }


def study(
    base: Base,
    facts: Sequence[KnownFact],
    settings: Settings,
    *,
    limit: int | None = None,
    grids: int = 0,
    progress: Progress = silent,
) -> TraceReport:
    """Trace the first `limit` facts that the model answers right, and the first `grids` of them at every token.

    Raises EditError where the model knows none of the facts.
    """
    sigma = subject_deviation(base, facts)
    known, asked = answered(base, placeable(base, facts), limit=limit, progress=progress)
    if not known:
        raise EditError(
            f"the model answers none of {asked} facts right: nothing can be traced", hint="give facts that it knows"
        )
    tracer = Tracer(base, sigma, settings)
    traces = [tracer.trace(fact) for fact in _counted(known, "trace", progress)]
    gap = severed_gap(traces)
    return TraceReport(
        read=len(facts),
        asked=asked,
        traced=len(known),
        settings=settings,
        window=tracer.window,
        sigma=sigma,
        clean=sum(one.clean for one in traces) / len(traces),
        corrupted=sum(one.corrupted for one in traces) / len(traces),
        effects=average(traces),
        gap=gap,
        layers=choose_layers(gap.mean),
        grids=tuple(tracer.grid(fact) for fact in _counted(known[:grids], "grid", progress)),
    )


def _counted(facts: Sequence[KnownFact], phase: str, progress: Progress) -> Iterator[KnownFact]:
    for done, fact in enumerate(facts, start=1):
        yield fact
        progress(phase, done, len(facts))


def average(traces: Sequence[FactTrace]) -> dict[Site, dict[Kind, Effect]]:
    """The average indirect effect of each kind of restoration at each site."""
    return {
        site: {kind: Effect.of(torch.stack([one.effects[site][kind] for one in traces])) for kind in kinds}
        for site, kinds in SITES.items()
    }


def severed_gap(traces: Sequence[FactTrace]) -> Effect:
    """How much less a restored subject state does when the MLPs above it are severed (Figure 3), paired by fact."""
    subject = [one.effects["last_subject"] for one in traces]
    return Effect.of(torch.stack([effects["state"] - effects["mlp_severed"] for effects in subject]))


def choose_layers(gap: Sequence[float], count: int | None = None) -> tuple[int, ...]:
    """The `count` contiguous layers with the highest mean of `gap`, the lowest where several are: see `RULE`."""
    count = count or max(1, min(_EDITED, len(gap) // _EDITED_SHARE))
    starts = range(len(gap) - count)  # above the deepest edited layer there must be another
    best = max(starts, key=lambda start: sum(gap[start : start + count]), default=0)
    return tuple(range(best, best + count))


def _grid_json(grid: Grid) -> dict[str, Any]:
    return {
        "prompt": grid.fact.prompt,
        "attribute": grid.fact.attribute,
        "tokens": grid.tokens,
        "subject": [grid.subject.start, grid.subject.stop],
        "clean": grid.clean,
        "corrupted": grid.corrupted,
        "effects": {kind: effects.tolist() for kind, effects in grid.effects.items()},
    }
