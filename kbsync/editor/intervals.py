"""Means over records with 95 % intervals, and paired differences: what every table of scores is made of. Torch-free.

A run is a mapping from a metric's name to one number per record (nan where the record has nothing to measure it on).
The bootstrap draws whole records, since prompts of one record are not independent. A difference is drawn on the same
records for both runs: what is hard in both cancels out.

    run = {"efficacy": [1.0, 0.0], "paraphrase": [0.5, nan]}
    intervals(run, harmonic=("efficacy", "paraphrase"))["score"]         # Interval(value=66.7, low=…, high=…)
    differences(before, after)["efficacy"]                              # after minus before
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "Run", "differences", "intervals"]

RESAMPLES = 2000
"""Bootstrap resamples of the records; the ends of a 95 % interval then move by a few tenths of its width at most."""
_CHUNK = 100
_PER_CENT = 100.0

Run = Mapping[str, Sequence[float]]
Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A value in per cent with its 95 % interval (percentile bootstrap over records)."""

    value: float
    low: float
    high: float


def intervals(
    run: Run, *, harmonic: Sequence[str] = (), seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Interval | None]:
    """Of each metric the mean over the records that have it, in per cent; None where none has.

    `harmonic` names the metrics whose harmonic mean is `score` (0 where one of them is 0). The same seed gives the same
    intervals.
    """
    drawn = _drawn([run], harmonic, seed, resamples)
    return {name: _interval(values[0]) for name, values in drawn.items()}


def differences(
    before: Run, after: Run, *, harmonic: Sequence[str] = (), seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Interval | None]:
    """Of each metric of both runs how much higher `after` is, in points, over the same records in the same order.

    Raises ValueError where the runs have not the same number of records.
    """
    shared = [name for name in before if name in after]
    pair = [{name: run[name] for name in shared} for run in (before, after)]
    drawn = _drawn(pair, harmonic, seed, resamples)
    return {name: _interval(values[1] - values[0]) for name, values in drawn.items()}


def _drawn(runs: Sequence[Run], harmonic: Sequence[str], seed: int, resamples: int) -> dict[str, list[Numbers]]:
    """Of each metric, per run, its mean [1 + resamples]: of all records, then of each draw, the same for all runs."""
    counts = {len(values) for run in runs for values in run.values()}
    if len(counts) > 1:
        raise ValueError(f"runs over different records: {sorted(counts)}")
    records = counts.pop() if counts else 0
    names = [*runs[0], *(["score"] if harmonic else [])]
    if not records:
        return {name: [np.full(1, math.nan)] * len(runs) for name in names}
    tables = [np.array([run[name] for name in runs[0]], dtype=np.float64).T for run in runs]
    at = [list(runs[0]).index(name) for name in harmonic]
    draws = [np.ones((1, records)), *_draws(records, resamples, seed)]
    means = [np.concatenate([_means(counted, table, at) for counted in draws]) for table in tables]
    return {name: [mean[:, column] for mean in means] for column, name in enumerate(names)}


def _draws(records: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """How often each record is drawn, [chunk, records], in chunks."""
    random = np.random.default_rng(seed)
    for start in range(0, resamples, _CHUNK):
        yield random.multinomial(records, np.full(records, 1 / records), size=min(_CHUNK, resamples - start))


def _means(counts: NDArray[Any], table: Numbers, harmonic: Sequence[int]) -> Numbers:
    """Means of the columns of `table` [records, c] under `counts` [m, records], and the harmonic mean of some of them:
    [m, c or c + 1]. A record without a number does not count; nan where none has any."""
    present = np.isfinite(table)
    with np.errstate(invalid="ignore", divide="ignore"):
        means: Numbers = (counts @ np.where(present, table, 0.0)) / (counts @ present)
        if not harmonic:
            return means
        together = len(harmonic) / (1 / means[:, harmonic]).sum(1)  # 1/0 is infinite: 0 where one of them is
    return np.column_stack([means, together])


def _interval(values: Numbers) -> Interval | None:
    """Of the mean of all records, followed by those of the draws."""
    if math.isnan(values[0]):
        return None
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return Interval(_PER_CENT * float(values[0]), _PER_CENT * float(low), _PER_CENT * float(high))
