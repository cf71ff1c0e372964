"""Settings tried on held-out facts: what `kbsync calibrate` measures a candidate by, and the search over them.

found = search(Trials(lab, records), candidates(lab.preset), (8, 24, 72))
found.rungs[-1][0].candidate         # the best settings on 72 facts
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kbsync.bench.lab import PRISTINE, Laboratory
from kbsync.bench.settings import OWN_TEXT
from kbsync.editor.calibrate import DRIFT_WEIGHT, KEEP, Measurement, Trial, numbers, successive_halving
from kbsync.editor.datasets import CounterFactRecord
from kbsync.editor.evaluate import CounterFactScores, summarise
from kbsync.editor.preset import Preset
from kbsync.errors import EditError

__all__ = ["Search", "Trials", "search"]

DRIFT_TOKENS = 1000
"""Tokens that drift is measured on: the same for all candidates, and there are dozens of them."""


class Trials:
    """Candidates on the same records, in their order; drift is measured on 1,000 tokens of the text that the statistics
    kept apart.

    Target vectors are kept by the laboratory, so a later, larger trial computes only those of its new facts.
    """

    def __init__(self, lab: Laboratory, records: Sequence[CounterFactRecord]) -> None:
        self.lab = lab.watching([text.first(DRIFT_TOKENS) for text in lab.held_out()])
        self.records = records

    def fresh(self, facts: int) -> Trials | None:
        """The same on the `facts` records after the first `facts`; None where there are not so many."""
        rest = self.records[facts : 2 * facts]
        return Trials(self.lab, rest) if len(rest) == facts else None

    def unedited(self, facts: int) -> CounterFactScores:
        """Scores of the first `facts` records before any edit."""
        return summarise(self.lab.scores(PRISTINE, self.records[:facts]))

    def measure(self, preset: Preset, facts: int) -> Measurement:
        """The first `facts` records inserted with these settings. Settings that ruin the model are a result."""
        lab, records = self.lab.with_preset(preset), self.records[:facts]
        requests = [record.request for record in records]
        try:
            weights = lab.edit(PRISTINE, requests, lab.targets(requests))
            return Measurement(summarise(lab.scores(weights, records)), lab.drift(weights)[OWN_TEXT].kl)
        except EditError as error:
            return Measurement(None, stopped=error.message)


@dataclass(frozen=True, slots=True)
class Search:
    """The trials of each rung, best first; what the winner reaches on as many facts as the last rung had, and the
    unedited model's scores there. `fresh`: they are other facts, so that the choice does not flatter the numbers."""

    rungs: list[list[Trial]]
    confirmed: Measurement
    unedited: CounterFactScores
    fresh: bool
    drift_weight: float

    @property
    def best(self) -> Trial:
        """The winner."""
        return self.rungs[-1][0]

    def to_json(self) -> dict[str, Any]:
        """A JSON value: the settings that differ between candidates and what they measured, rung by rung."""
        return {
            "drift_weight": self.drift_weight,
            "unedited": numbers(self.unedited),
            "confirmed": {"fresh": self.fresh, **_measured_json(self.confirmed)},
            "rungs": [
                {"facts": rung[0].facts, "candidates": len(rung), "trials": [_trial_json(trial) for trial in rung]}
                for rung in self.rungs
            ],
        }


def search(
    trials: Trials, presets: Sequence[Preset], sizes: Sequence[int], *, drift_weight: float = DRIFT_WEIGHT
) -> Search:
    """The best of `presets` by successive halving on `sizes` facts. Raises EditError where none can be measured."""
    total = sum(math.ceil(len(presets) / KEEP**rung) for rung in range(len(sizes)))
    done = 0

    def measure(preset: Preset, facts: int) -> Measurement:
        nonlocal done
        found = trials.measure(preset, facts)
        done += 1
        trials.lab.progress("settings", done, max(done, total))
        return found

    rungs = successive_halving(presets, sizes, measure, drift_weight=drift_weight)
    best, judge = rungs[-1][0], trials.fresh(sizes[-1])
    confirmed = judge.measure(best.candidate, sizes[-1]) if judge else best.measurement
    return Search(rungs, confirmed, (judge or trials).unedited(sizes[-1]), judge is not None, drift_weight)


def _trial_json(trial: Trial) -> dict[str, Any]:
    preset = trial.candidate
    return {
        "lambda": preset.covariance_weight,
        "clamp": preset.clamp,
        "rate": preset.rate,
        "steps": preset.steps,
        "stop_top": preset.stop_top,
        "worth": trial.worth if math.isfinite(trial.worth) else None,
        **_measured_json(trial.measurement),
    }


def _measured_json(measured: Measurement) -> dict[str, Any]:
    return {
        "scores": numbers(measured.scores) if measured.scores else None,
        "drift": measured.drift,
        "stopped": measured.stopped,
    }
