"""Scores over the number of facts inserted at once: Figure 5 of the paper (arXiv 2210.07229) on the model at hand.

result = measure(lab, records, [1, 10, 100])
result.points[-1].scores.efficacy           # of all 100 facts, with its interval
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kbsync.bench.lab import PRISTINE, Laboratory
from kbsync.editor.datasets import CounterFactRecord
from kbsync.editor.drift import Drift, HeldOut
from kbsync.editor.evaluate import CounterFactScores, summarise
from kbsync.errors import EditError

__all__ = ["Scaled", "Scaling", "measure"]


@dataclass(slots=True)
class Scaled:
    """One method with the first `facts` facts: their scores and those of the unedited model on the same records, drift
    by text, seconds without targets. `stopped`: why there are none."""

    method: str
    facts: int
    unedited: CounterFactScores
    scores: CounterFactScores | None = None
    drift: Mapping[str, Drift] = field(default_factory=dict)
    seconds: float = 0.0
    stopped: str = ""


@dataclass(frozen=True, slots=True)
class Scaling:
    """All numbers of facts, by method, ascending."""

    points: Sequence[Scaled]

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return asdict(self)


def measure(
    lab: Laboratory, records: Sequence[CounterFactRecord], counts: Sequence[int], *, texts: Sequence[HeldOut] = ()
) -> Scaling:
    """The first n facts into the pristine base in one batch, for each n of `counts`, all of them scored."""
    lab.watch(texts)
    before = lab.scores(PRISTINE, records[: max(counts)])
    targets = lab.targets([record.request for record in records[: max(counts)]])
    found = []
    for count in sorted(set(counts)):
        point = Scaled("memit", count, summarise(before[:count]))
        start = time.perf_counter()
        try:
            weights = lab.edit(PRISTINE, [record.request for record in records[:count]], targets)
            point.scores, point.drift = summarise(lab.scores(weights, records[:count])), lab.drift(weights)
        except EditError as error:
            point.stopped = error.message
        point.seconds = round(time.perf_counter() - start, 2)
        found.append(point)
        lab.progress("numbers", len(found), len(set(counts)))
    return Scaling(found)
