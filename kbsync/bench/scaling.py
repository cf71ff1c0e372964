"""Scores over the number of facts inserted: Figure 5 of the paper (arXiv 2210.07229) on the model at hand.

result = measure(lab, records, [1, 10, 100], methods=["memit", "rome"])
result.points[-1].scores.efficacy           # of all 100 facts, with its interval
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kbsync.bench.lab import PRISTINE, Laboratory
from kbsync.bench.methods import METHODS, Method
from kbsync.editor.datasets import CounterFactRecord
from kbsync.editor.drift import Drift, HeldOut
from kbsync.editor.evaluate import CounterFactScores, summarise
from kbsync.errors import EditError

__all__ = ["Scaled", "Scaling", "measure"]


@dataclass(slots=True)
class Scaled:
    """One method with the first `facts` facts: their scores and those of the unedited model on the same records, drift
    by text, seconds by phase. `stopped`: why there are none."""

    method: str
    facts: int
    unedited: CounterFactScores
    scores: CounterFactScores | None = None
    drift: Mapping[str, Drift] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    stopped: str = ""


@dataclass(frozen=True, slots=True)
class Scaling:
    """All numbers of facts, by method, ascending."""

    points: Sequence[Scaled]

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return asdict(self)


def measure(
    lab: Laboratory,
    records: Sequence[CounterFactRecord],
    counts: Sequence[int],
    *,
    methods: Sequence[str] = ("memit",),
    texts: Sequence[HeldOut] = (),
) -> Scaling:
    """The first n facts into the pristine base by each method named (`kbsync.bench.methods`), for each n of `counts`,
    all of them scored.

    A method that the engine refuses to go on with stops there; the result says why.
    """
    counts = sorted(set(counts))
    records = records[: counts[-1]]
    lab = lab.watching(texts)
    before = lab.scores(PRISTINE, records)
    found = []
    for name in methods:
        points = [Scaled(name, count, summarise(before[:count])) for count in counts]
        _fill(lab, METHODS[name], points, records)
        found += points
    return Scaling(found)


def _fill(lab: Laboratory, method: Method, points: Sequence[Scaled], records: Sequence[CounterFactRecord]) -> None:
    path = method(lab, [record.request for record in records], [point.facts for point in points])
    for done, point in enumerate(points):
        before = dict(lab.seconds)
        try:
            weights = next(path)
            point.scores = summarise(lab.scores(weights, records[: point.facts]))
            point.drift = lab.drift(weights)
        except EditError as error:
            for left in points[done:]:
                left.stopped = error.message
            return
        point.seconds = lab.since(before)
        lab.progress(point.method, done + 1, len(points))
