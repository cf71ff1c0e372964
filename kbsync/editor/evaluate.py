"""CounterFact scores as the paper defines them (arXiv 2210.07229, Appendix C), with intervals.

ES: P[o] > P[o_c] on the edit prompt. PS: the same on paraphrases. NS: P[o_c] > P[o] on neighborhood prompts. S: their
harmonic mean. P is compared by mean log-probability per token. Beside them the stricter whole-object accuracy: the
greedy continuation of the edit prompt starts with all of o.

    scores = evaluate_counterfact(base, load_counterfact(path))      # on the weights that base holds
    print(scores.score.value, scores.score.low, scores.score.high)
    paired_difference(score_records(base, records), score_records(edited, records)).score     # edited minus base
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kbsync.editor.answers import Scored, log_probabilities
from kbsync.editor.datasets import CounterFactRecord
from kbsync.editor.intervals import RESAMPLES, Interval, Run, differences, intervals
from kbsync.editor.model import Base
from kbsync.progress import Progress, silent

__all__ = [
    "HARMONIC",
    "CounterFactScores",
    "Interval",
    "RecordScores",
    "columns",
    "evaluate_counterfact",
    "paired_difference",
    "score_records",
    "summarise",
]

HARMONIC = ("efficacy", "paraphrase", "neighborhood")
"""What S is the harmonic mean of: ES, PS, NS."""


@dataclass(frozen=True, slots=True)
class RecordScores:
    """One record: what of it holds. A tuple is empty where the record has no such prompts."""

    efficacy: bool
    accuracy: bool
    paraphrase: tuple[bool, ...]
    neighborhood: tuple[bool, ...]


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


def columns(records: Sequence[RecordScores]) -> Run:
    """Each record's own mean of each metric, as in the authors' code; nan where it has no such prompts."""
    return {
        "efficacy": [float(record.efficacy) for record in records],
        "paraphrase": [_mean(record.paraphrase) for record in records],
        "neighborhood": [_mean(record.neighborhood) for record in records],
        "accuracy": [float(record.accuracy) for record in records],
    }


def summarise(records: Sequence[RecordScores], *, seed: int = 0, resamples: int = RESAMPLES) -> CounterFactScores:
    """Means over records and their intervals; the same seed gives the same intervals."""
    found = intervals(columns(records), harmonic=HARMONIC, seed=seed, resamples=resamples)
    return CounterFactScores(records=len(records), **found)


def paired_difference(
    before: Sequence[RecordScores], after: Sequence[RecordScores], *, seed: int = 0, resamples: int = RESAMPLES
) -> CounterFactScores:
    """How many points each score of `after` is above that of `before`, two runs over the same records in one order,
    with the interval of the paired bootstrap. Raises ValueError for runs over different numbers of records."""
    runs = columns(before), columns(after)
    return CounterFactScores(
        records=len(before), **differences(*runs, harmonic=HARMONIC, seed=seed, resamples=resamples)
    )


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else math.nan
