"""Calibration: from candidate settings to a preset, by successive halving. Pure decisions; what measures is handed in.

Settings of MEMIT do not carry over between models (arXiv 2210.07229 uses λ = 15,000 on GPT-J, which ruins
SmolLM2-135M), so each model's are searched: all candidates on few facts, the best third on more, and so on (successive
halving: Jamieson and Talwalkar 2016, arXiv 1502.07943). A candidate's worth is S less a weight times the drift.

    rungs = successive_halving(candidates(start), (8, 24, 72), measure)
    best = rungs[-1][0]                      # best.candidate, best.measurement.scores, best.worth
    write_durably(path, preset_yaml(calibrated(best, scores, note)))
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML

from kbsync.editor.evaluate import CounterFactScores
from kbsync.editor.preset import Preset
from kbsync.errors import EditError

__all__ = [
    "DRIFT_WEIGHT",
    "KEEP",
    "Measurement",
    "Trial",
    "calibrated",
    "candidates",
    "numbers",
    "preset_yaml",
    "start",
    "successive_halving",
]

DRIFT_WEIGHT = 100.0
"""Points of S that one nat of drift costs: 0.1 nats, where the gate rejects a version by default, cost 10 points."""
_WEIGHTS = (10, 30, 100, 300, 1000, 3000, 10_000, 30_000)
"""λ: what is good has been found between 30 and 20,000, by the size of the model."""
_SEARCHES: tuple[Mapping[str, Any], ...] = (
    {},
    {"clamp": 0.5},
    {"clamp": 1.0},
    {"rate": 0.25},
    {"steps": 15},
    {"stop_top": True},
)
"""Ways to look for z: the paper's for GPT-J, and one thing changed at a time. λ does not touch z, so each way costs
its z once, whatever the number of λ."""
_TOKENS, _TOKENS_PER_NEURON = 20_000, 6
"""Tokens of the statistics: C [f, f] of hardly more tokens than f has directions that no text was seen in."""
KEEP = 3
"""One of so many candidates goes on to the next rung."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a candidate did: scores in per cent and drift in nats per token; `stopped`: why there are none."""

    scores: CounterFactScores | None
    drift: float = 0.0
    stopped: str = ""

    def worth(self, drift_weight: float) -> float:
        """S - `drift_weight` · drift; minus infinity where nothing could be measured."""
        if self.scores is None or self.scores.score is None or not math.isfinite(self.drift):
            return -math.inf
        return self.scores.score.value - drift_weight * self.drift


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate on a number of facts, and its worth."""

    candidate: Preset
    facts: int
    measurement: Measurement
    worth: float


def start(name: str, layers: Sequence[int], *, width: int = 0, seed: int = 0) -> Preset:
    """The settings to search from: the paper's for GPT-J, on these layers. What is not searched stays as it is here.

    `width` is f, the inner width of the MLPs: the wider, the more tokens the statistics are made of.
    """
    return Preset(
        name=name,
        layers=tuple(layers),
        covariance_weight=_WEIGHTS[0],
        clamp=0.75,
        rate=0.5,
        steps=25,
        sample_tokens=max(_TOKENS, _TOKENS_PER_NEURON * width),
        seed=seed,
        token_budget=2048,
        chat_context=False,
    )


def candidates(preset: Preset) -> list[Preset]:
    """Every way to look for z with every λ, on the layers and with all other settings of `preset`."""
    return [
        Preset.model_validate(preset.model_dump() | dict(search) | {"covariance_weight": float(weight)})
        for search in _SEARCHES
        for weight in _WEIGHTS
    ]


def successive_halving(
    presets: Sequence[Preset],
    sizes: Sequence[int],
    measure: Callable[[Preset, int], Measurement],
    *,
    drift_weight: float = DRIFT_WEIGHT,
    keep: int = KEEP,
) -> list[list[Trial]]:
    """The trials of each rung, best first: all `presets` on `sizes[0]` facts, one of `keep` of them on `sizes[1]`, …

    Of equals the earlier one is the better. Raises EditError where a rung leaves no candidate that can be measured.
    """
    rungs: list[list[Trial]] = []
    for size in sizes:
        trials = []
        for preset in presets:
            found = measure(preset, size)
            trials.append(Trial(preset, size, found, found.worth(drift_weight)))
        trials.sort(key=lambda trial: -trial.worth)
        if trials[0].worth == -math.inf:
            reason = trials[0].measurement.stopped or "the facts have no paraphrases or no neighborhood prompts"
            raise EditError(f"no settings could be measured on {size} facts: {reason}", hint="give other --facts")
        rungs.append(trials)
        alive = [trial.candidate for trial in trials if trial.worth > -math.inf]
        presets = alive[: math.ceil(len(trials) / keep)]
    return rungs


def numbers(scores: CounterFactScores) -> dict[str, float]:
    """Scores as presets hold them: per cent, one decimal, without what was not measured."""
    named = {
        "ES": scores.efficacy,
        "PS": scores.paraphrase,
        "NS": scores.neighborhood,
        "S": scores.score,
        "whole_object_accuracy": scores.accuracy,
    }
    return {name: round(interval.value, 1) for name, interval in named.items() if interval is not None}


def calibrated(best: Trial, scores: Mapping[str, Any], note: str) -> Preset:
    """The preset of a winner, with what it measured."""
    return best.candidate.model_copy(update={"scores": dict(scores), "note": note})


def preset_yaml(preset: Preset) -> bytes:
    """The YAML file of a preset, UTF-8, that `load_preset` reads back."""
    yaml = YAML(pure=True)
    yaml.default_flow_style = None  # lists and mappings of plain values on one line
    yaml.width = 110
    stream = io.StringIO()
    yaml.dump(preset.model_dump(mode="json"), stream)
    return stream.getvalue().encode()
