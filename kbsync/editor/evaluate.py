"""CounterFact scores as the paper defines them (arXiv 2210.07229, Appendix C), with intervals.

ES: P[o] > P[o_c] on the edit prompt. PS: the same on paraphrases. NS: P[o_c] > P[o] on neighborhood prompts. S: their
harmonic mean. P is compared by mean log-probability per token. Beside them the stricter whole-object accuracy: the
greedy continuation of the edit prompt starts with all of o.

    scores = evaluate_counterfact(base, load_counterfact(path))      # on the weights that base holds
    print(scores.score.value, scores.score.low, scores.score.high)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbsync.editor.answers import Scored, log_probabilities
from kbsync.editor.datasets import CounterFactRecord
from kbsync.editor.model import Base
from kbsync.progress import Progress, silent

__all__ = ["CounterFactScores", "Interval", "RecordScores", "evaluate_counterfact", "score_records", "summarise"]

RESAMPLES = 2000
"""Bootstrap resamples of the records; the ends of a 95 % interval then move by a few tenths of its width at most."""
_CHUNK = 100

Shares = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RecordScores:
    """One record: what of it holds. A tuple is empty where the record has no such prompts."""

    efficacy: bool
    accuracy: bool
    paraphrase: tuple[bool, ...]
    neighborhood: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Interval:
    """A value in per cent with its 95 % interval (percentile bootstrap over records)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class CounterFactScores:
    """ES, PS, NS, S and whole-object accuracy of `records` records, in per cent; None where no record has such
    prompts (S needs all three)."""

    records: int
    efficacy: Interval | None
    paraphrase: Interval | None
    neighborhood: Interval | None
    score: Interval | None
    accuracy: Interval | None

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return asdict(self)


def evaluate_counterfact(
    base: Base, records: Sequence[CounterFactRecord], *, seed: int = 0, progress: Progress = silent
) -> CounterFactScores:
    """Scores of the weights that `base` holds. Raises EditError where `log_probabilities` does."""
    return summarise(score_records(base, records, progress=progress), seed=seed)


def score_records(
    base: Base, records: Sequence[CounterFactRecord], *, progress: Progress = silent
) -> list[RecordScores]:
    """What holds of each record on the weights that `base` holds, so that subsets can be summarised."""
    pairs = {
        (prompt, target): None
        for record in records
        for prompt in (record.request.prompt, *record.paraphrases, *record.neighborhood)
        for target in (record.request.target, record.true_target)
    }
    scored = dict(zip(pairs, log_probabilities(base, list(pairs), progress=progress), strict=True))
    return [_record(record, scored) for record in records]


def _record(record: CounterFactRecord, scored: dict[tuple[str, str], Scored]) -> RecordScores:
    new, true = record.request.target, record.true_target

    def prefers(prompt: str, one: str, other: str) -> bool:
        return scored[prompt, one].mean_log_probability > scored[prompt, other].mean_log_probability

    return RecordScores(
        efficacy=prefers(record.request.prompt, new, true),
        accuracy=scored[record.request.prompt, new].greedy,
        paraphrase=tuple(prefers(prompt, new, true) for prompt in record.paraphrases),
        neighborhood=tuple(prefers(prompt, true, new) for prompt in record.neighborhood),
    )


def summarise(records: Sequence[RecordScores], *, seed: int = 0, resamples: int = RESAMPLES) -> CounterFactScores:
    """Means over records (of each record's own mean, as in the authors' code) and their intervals.

    The bootstrap draws whole records, since prompts of one record are not independent; the same seed gives the same
    interval.
    """
    shares = np.array(
        [[float(r.efficacy), _mean(r.paraphrase), _mean(r.neighborhood), float(r.accuracy)] for r in records]
    ).reshape(-1, 4)
    if not len(records):
        return CounterFactScores(0, None, None, None, None, None)
    values = _means(np.ones((1, len(records))), shares)
    drawn = np.concatenate([_means(counts, shares) for counts in _draws(len(records), resamples, seed)])
    intervals = [_interval(float(value), column) for value, column in zip(values[0], drawn.T, strict=True)]
    efficacy, paraphrase, neighborhood, accuracy, score = intervals
    return CounterFactScores(len(records), efficacy, paraphrase, neighborhood, score, accuracy)


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else math.nan


def _draws(records: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """How often each record is drawn, [chunk, records], in chunks."""
    random = np.random.default_rng(seed)
    for start in range(0, resamples, _CHUNK):
        yield random.multinomial(records, np.full(records, 1 / records), size=min(_CHUNK, resamples - start))


def _means(counts: NDArray[Any], shares: Shares) -> Shares:
    """Means of the columns of `shares` [records, 4] under `counts` [m, records], and S of the first three: [m, 5].

    A record without such prompts (nan) does not count; nan where none has any.
    """
    present = np.isfinite(shares)
    with np.errstate(invalid="ignore", divide="ignore"):
        means: Shares = (counts @ np.where(present, shares, 0.0)) / (counts @ present)
        harmonic = 3 / (1 / means[:, :3]).sum(1)  # 1/0 is infinite: S is 0 where one of them is
    return np.column_stack([means, harmonic])


def _interval(value: float, drawn: Shares) -> Interval | None:
    if math.isnan(value):
        return None
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return Interval(100 * value, 100 * float(low), 100 * float(high))
