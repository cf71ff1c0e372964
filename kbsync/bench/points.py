"""Settings compared at the same facts: each named point is one insertion into the pristine base, scored and gauged.

result = measure(lab, [Point("tight", {"clamp": 0.5}), Point("attention", {}, attention=True)], records)
result.points[0].scores.score, result.points[0].drift
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from kbsync.bench.lab import PRISTINE, Laboratory
from kbsync.bench.settings import changed
from kbsync.editor.datasets import CounterFactRecord
from kbsync.editor.drift import Drift, HeldOut
from kbsync.editor.evaluate import CounterFactScores, summarise
from kbsync.editor.model import Base, ModelSpec
from kbsync.errors import EditError, UsageError

__all__ = ["Compared", "Measured", "Point", "attention_spec", "front", "measure"]

_PROJECTIONS = ("self_attn.o_proj", "attn.c_proj", "attn.out_proj", "attention.dense", "self_attn.out_proj")
"""What families call the matrix that attention writes to the residual stream with, inside a block."""


@dataclass(frozen=True, slots=True)
class Point:
    """Changes of the preset; `attention`: edit the attention's output projections instead of the MLPs'."""

    name: str
    changes: Mapping[str, Any]
    attention: bool = False


@dataclass(slots=True)
class Measured:
    """A point: scores, drift by text, ‖ΔW‖/‖W‖ by module, seconds by phase. `stopped`: why there are none.
    `pareto`: no other point has at least its S at no more change of the perplexity."""

    name: str
    changes: Mapping[str, Any]
    attention: bool
    preset_digest: str = ""
    scores: CounterFactScores | None = None
    drift: Mapping[str, Drift] = field(default_factory=dict)
    norms: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    pareto: bool = False
    stopped: str = ""


@dataclass(frozen=True, slots=True)
class Compared:
    """All points, and the scores of the unedited model on the same `evaluated` records."""

    unedited: CounterFactScores
    evaluated: int
    points: Sequence[Measured]

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return asdict(self)


def measure(
    lab: Laboratory,
    points: Sequence[Point],
    records: Sequence[CounterFactRecord],
    *,
    evaluate: int | None = None,
    texts: Sequence[HeldOut] = (),
) -> Compared:
    """Every point on the same facts; scored on `evaluate` of them, drawn with the preset's seed (default: on all).

    Points that share what a target depends on share the targets. Raises UsageError for settings that cannot be meant.
    """
    presets = [changed(lab.preset, point.changes) for point in points]
    lab = lab.covering({layer for preset in presets for layer in preset.layers})
    lab = lab.watching(texts)
    labs = [
        (replace(lab, base=replace(lab.base, spec=attention_spec(lab.base))) if point.attention else lab).with_preset(
            one
        )
        for point, one in zip(points, presets, strict=True)
    ]
    scored = _drawn(records, evaluate, lab.preset.seed)
    unedited = summarise(lab.scores(PRISTINE, scored))
    found = []
    for point, other in zip(points, labs, strict=True):
        found.append(_measure(other, point, records, scored))
        lab.progress("points", len(found), len(points))
    places = [(one, at) for one in found if (at := _place(one, texts)) is not None]
    for (one, _), best in zip(places, front([at for _, at in places]), strict=True):
        one.pareto = best
    return Compared(unedited, len(scored), found)


def _measure(
    lab: Laboratory, point: Point, records: Sequence[CounterFactRecord], scored: Sequence[CounterFactRecord]
) -> Measured:
    found = Measured(point.name, dict(point.changes), point.attention, lab.preset.digest)
    requests, before = [record.request for record in records], dict(lab.seconds)
    try:
        weights = lab.edit(PRISTINE, requests, lab.targets(requests))
        found.scores, found.drift = summarise(lab.scores(weights, scored)), lab.drift(weights)
        found.norms, found.seconds = lab.norms(weights), lab.since(before)
    except EditError as error:  # settings that ruin the model are a result
        found.stopped = error.message
    return found


def _drawn(records: Sequence[CounterFactRecord], count: int | None, seed: int) -> Sequence[CounterFactRecord]:
    if count is None or count >= len(records):
        return records
    return [records[at] for at in sorted(random.Random(seed).sample(range(len(records)), count))]  # noqa: S311


def _place(one: Measured, texts: Sequence[HeldOut]) -> tuple[float, float] | None:
    """S and the change of the perplexity of the last text, which is the one that was asked for."""
    if one.scores is None or one.scores.score is None or not texts:
        return None
    return one.scores.score.value, one.drift[texts[-1].name].change


def front(places: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of (gain, cost) pairs no other one beats: at least the gain at no more cost, and not the same."""
    return [
        not any(gain >= own and cost <= price and (gain, cost) != (own, price) for gain, cost in places)
        for own, price in places
    ]


def attention_spec(base: Base) -> ModelSpec:
    """The model's spec with the attention's output projection in the place of the MLP's down-projection.

    Raises UsageError where the family has none by a known name.
    """
    known = {name for name, _ in base.layer(0).named_modules()}
    name = next((name for name in _PROJECTIONS if name in known), None)
    if name is None:
        raise UsageError(
            f"{base.spec.family}: the attention's output projection is not known", hint="leave the attention point out"
        )
    return replace(base.spec, down=f"{base.spec.layer}.{name}")
