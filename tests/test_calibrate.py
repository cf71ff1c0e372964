"""The search for settings: halving as a decision, trials on a tiny model, the preset that comes of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbsync.bench.lab import PRISTINE, Laboratory
from kbsync.bench.trials import Trials, search
from kbsync.editor.calibrate import (
    Measurement,
    Trial,
    calibrated,
    candidates,
    numbers,
    preset_yaml,
    start,
    successive_halving,
)
from kbsync.editor.datasets import CounterFactRecord
from kbsync.editor.drift import Gauge
from kbsync.editor.evaluate import CounterFactScores, evaluate_counterfact
from kbsync.editor.intervals import Interval
from kbsync.editor.model import weights_in
from kbsync.editor.preset import Preset, load_preset
from kbsync.editor.target_store import TargetStore
from kbsync.editor.targets import Target
from kbsync.errors import EditError
from kbsync.facts import EditRequest, FactKey
from tests.tiny import tiny_llama, tiny_preset, tiny_statistics

PRESETS = [start("tiny", (1, 2)).model_copy(update={"covariance_weight": float(10 + at)}) for at in range(20)]


def measured(score: float, drift: float = 0.0) -> Measurement:
    interval = Interval(score, score, score)
    return Measurement(CounterFactScores(1, interval, interval, interval, interval, interval), drift)


RUINED = Measurement(None, stopped="the edit is not finite")


def record(subject: str, target: str) -> CounterFactRecord:
    prompt = f"{subject} belongs to the constellation of"
    wordings = (f"It was late. {subject} is in", f"I think that {subject} is a star in")
    request = EditRequest(FactKey("constellation", subject), prompt, subject, target, wordings)
    return CounterFactRecord(request, "Lyra", ("Vega belongs to the constellation of", "Sheliak is in"))


RECORDS = [record("Betelgeuse", "Rome"), record("Danielle", "Orion"), record("Rigel", "Paris")]


def tiny_laboratory(tmp_path: Path) -> Laboratory:
    base, preset = tiny_llama(), tiny_preset(steps=4)
    return Laboratory("tiny", base, preset, tiny_statistics(base, preset), tmp_path / "targets")


@given(st.lists(st.floats(0, 100), min_size=1, max_size=20), st.integers(2, 4))
def test_the_best_survive_to_the_last_rung(worths: list[float], keep: int) -> None:
    """Where more facts change nothing, the winner is the best of all; each rung keeps its best, best first."""
    asked: list[tuple[Preset, int]] = []

    def measure(preset: Preset, facts: int) -> Measurement:
        asked.append((preset, facts))
        return measured(worths[PRESETS.index(preset)])

    presets = PRESETS[: len(worths)]
    rungs = successive_halving(presets, (4, 8, 16), measure, keep=keep)
    sizes = [len(worths), math.ceil(len(worths) / keep), math.ceil(math.ceil(len(worths) / keep) / keep)]
    assert [len(rung) for rung in rungs] == sizes
    assert rungs[-1][0].worth == max(worths)
    assert rungs[-1][0].candidate == presets[worths.index(max(worths))]
    for rung in rungs:
        assert [trial.worth for trial in rung] == sorted((trial.worth for trial in rung), reverse=True)
    assert len(asked) == len({(preset.digest, facts) for preset, facts in asked}) == sum(sizes)


def test_more_facts_can_change_the_winner() -> None:
    """What only shines on few facts loses on more."""

    def measure(preset: Preset, facts: int) -> Measurement:
        return measured({10.0: 90 - facts, 11.0: 80.0}.get(preset.covariance_weight, 10.0))

    rungs = successive_halving(PRESETS[:6], (4, 40), measure)
    assert [rung[0].candidate.covariance_weight for rung in rungs] == [10, 11]


def test_drift_costs_what_its_weight_says() -> None:
    assert measured(80, 0.05).worth(100) == pytest.approx(75)
    assert measured(80, 0.05).worth(0) == 80
    assert RUINED.worth(100) == measured(80, math.nan).worth(100) == -math.inf


def test_settings_that_ruin_the_model_are_left_behind() -> None:
    """They lose to everything; where nothing is left the reason is named."""
    rungs = successive_halving(
        PRESETS[:6], (1, 2), lambda preset, _: measured(5) if preset is PRESETS[5] else RUINED, keep=2
    )
    assert [trial.candidate for trial in rungs[1]] == [PRESETS[5]]
    with pytest.raises(EditError, match="no settings could be measured on 1 facts: the edit is not finite"):
        successive_halving(PRESETS[:2], (1, 2), lambda *_: RUINED)


def test_candidates_share_targets_over_lambda() -> None:
    """The paper's way first; each way to find z comes with every λ; no candidate twice."""
    found = candidates(start("tiny", (3, 4), seed=7))
    assert len({preset.digest for preset in found}) == len(found)
    ways = {preset.target_digest for preset in found}
    weights = {preset.covariance_weight for preset in found}
    assert len(ways) * len(weights) == len(found)
    assert (found[0].clamp, found[0].rate, found[0].steps) == (0.75, 0.5, 25)
    assert {(preset.layers, preset.seed) for preset in found} == {((3, 4), 7)}


def test_the_preset_is_read_back_as_it_was(tmp_path: Path) -> None:
    """Settings, scores and note survive the file, and it is a preset as any other."""
    trial = Trial(PRESETS[3], 8, measured(81.25, 0.01), 80.25)
    scores = {"edited": numbers(trial.measurement.scores) if trial.measurement.scores else {}, "date": "2026-11-24"}
    preset = calibrated(trial, scores, "Layers as given: they are the best [of all].")
    path = tmp_path / "tiny.yaml"
    path.write_bytes(preset_yaml(preset))
    assert load_preset(path) == preset
    assert preset.digest == PRESETS[3].digest
    assert preset.scores["edited"]["S"] == 81.2


def test_a_trial_is_an_edit_measured(tmp_path: Path) -> None:
    """Scores and drift are those of the edited weights, computed here step by step; the model is as before."""
    lab = tiny_laboratory(tmp_path)
    before = {name: lab.base.weight(name).clone() for name in lab.statistics.covariance}
    found = Trials(lab, RECORDS).measure(lab.preset, 2)
    requests = [record.request for record in RECORDS[:2]]
    weights = lab.edit(PRISTINE, requests, lab.targets(requests))
    gauge = Gauge(lab.base, lab.held_out())
    with weights_in(lab.base, weights.masters):
        assert found.scores == evaluate_counterfact(lab.base, RECORDS[:2])
        assert found.drift == pytest.approx(next(iter(gauge.measure().values())).kl, rel=1e-3)
    assert found.drift > 0
    assert all((lab.base.weight(name) == matrix).all() for name, matrix in before.items())


def test_a_search_computes_each_target_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither another λ nor a larger rung computes again what is there."""
    lab = tiny_laboratory(tmp_path)
    computed: list[str] = []
    put = TargetStore.put

    def counted(store: TargetStore, request: EditRequest, target: Target) -> None:
        computed.append(request.digest)
        put(store, request, target)

    monkeypatch.setattr(TargetStore, "put", counted)
    presets = [tiny_preset(steps=4, covariance_weight=weight) for weight in (0.3, 3.0, 30.0, 300.0)]
    found = search(Trials(lab, RECORDS), presets, (1, 3))
    assert sorted(computed) == sorted(record.request.digest for record in RECORDS)
    assert [len(rung) for rung in found.rungs] == [4, 2]
    value = found.to_json()
    assert value["rungs"][1]["trials"][0]["lambda"] == found.best.candidate.covariance_weight
    assert found.unedited == evaluate_counterfact(lab.base, RECORDS)
    assert (found.fresh, found.confirmed) == (False, found.best.measurement)


def test_the_winner_is_scored_on_facts_that_it_was_not_chosen_on(tmp_path: Path) -> None:
    """Where there are as many again; the unedited model on the same ones."""
    lab = tiny_laboratory(tmp_path)
    found = search(Trials(lab, RECORDS), [lab.preset], (1,))
    assert found.fresh
    assert found.confirmed == Trials(lab, RECORDS[1:2]).measure(lab.preset, 1)
    assert found.unedited == evaluate_counterfact(lab.base, RECORDS[1:2])
    assert found.to_json()["confirmed"]["fresh"]


def test_wider_models_get_more_text() -> None:
    assert start("tiny", (1,), width=48).sample_tokens == 20_000
    assert start("tiny", (1,), width=16_384).sample_tokens == 6 * 16_384


def test_a_trial_of_settings_that_ruin_the_model_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = tiny_laboratory(tmp_path)

    def broken(*_: object, **__: object) -> None:
        raise EditError("the edit is not finite")

    monkeypatch.setattr(Laboratory, "edit", broken)
    assert Trials(lab, RECORDS).measure(lab.preset, 1) == RUINED
