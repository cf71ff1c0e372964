"""The laboratory of the benchmarks: edits in memory, cached targets, drift, settings as they are typed."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kbsync.bench.conditions import document
from kbsync.bench.data import counterfact_records
from kbsync.bench.lab import PRISTINE, Laboratory, open_laboratory
from kbsync.bench.settings import changed, points, typed
from kbsync.editor import datasets
from kbsync.editor.datasets import CounterFactRecord
from kbsync.editor.drift import Gauge, HeldOut, windows
from kbsync.editor.memit import insert
from kbsync.editor.targets import compute_targets
from kbsync.errors import UsageError
from tests.labs import tiny_dataset, tiny_laboratory
from tests.tiny import tiny_llama, tiny_preset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def lab(folder: Path) -> Laboratory:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KBSYNC_CACHE", str(folder / "cache"))
        return tiny_laboratory(folder)


@pytest.fixture(scope="module")
def records(folder: Path) -> list[CounterFactRecord]:
    return counterfact_records(f"counterfact:{tiny_dataset(folder)}")[:6]


def test_an_edit_is_the_engines_and_leaves_the_network_as_it_was(
    lab: Laboratory, records: list[CounterFactRecord]
) -> None:
    requests = [record.request for record in records]
    before = {name: value.clone() for name, value in lab.base.network.state_dict().items()}
    targets = compute_targets(lab.base, requests, lab.statistics.contexts, lab.preset)
    expected = insert(lab.base, requests, targets, lab.statistics, lab.preset).delta
    weights = lab.edit(PRISTINE, requests, lab.targets(requests))
    for name, factors in expected.factors.items():
        change = factors.left.double() @ factors.right.double()
        assert torch.allclose(weights.masters[name], lab.base.weight(name).double() + change, atol=1e-6)
        assert torch.equal(weights.keys[name], factors.keys)
    assert weights.facts == 6
    assert all(torch.equal(value, before[name]) for name, value in lab.base.network.state_dict().items())


def test_targets_are_computed_once_per_weights_and_settings(
    lab: Laboratory, records: list[CounterFactRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run, and one with another λ, takes z from the cache; other weights and another clamp do not."""
    requests = [record.request for record in records[:2]]
    first = lab.targets(requests)
    weights = lab.edit(PRISTINE, requests, first)
    asked: list[int] = []

    def counted(base: object, missing: list[object], *_: object, **__: object) -> dict[str, object]:
        asked.append(len(missing))
        return {}

    monkeypatch.setattr("kbsync.bench.lab.compute_targets", counted)
    again = lab.targets(requests)
    lab.with_preset(changed(lab.preset, {"covariance_weight": 1.0})).targets(requests)
    lab.targets(requests, weights)
    lab.with_preset(changed(lab.preset, {"clamp": 1.0})).targets(requests)
    assert asked == [0, 0, 2, 2]
    assert all(torch.equal(again[digest].z, target.z) for digest, target in first.items())


def test_targets_on_edited_weights_are_those_of_the_edited_model(
    lab: Laboratory, records: list[CounterFactRecord]
) -> None:
    requests = [record.request for record in records]
    weights = lab.edit(PRISTINE, requests[:3], lab.targets(requests[:3]))
    found = lab.targets(requests[3:], weights)
    with lab.holding(weights) as base:
        expected = compute_targets(base, requests[3:], lab.statistics.contexts, lab.preset)
    for request in requests[3:]:
        assert torch.equal(found[request.digest].z, expected[request.digest].z)
        assert not torch.equal(found[request.digest].z, lab.targets([request])[request.digest].z)


def test_facts_whose_targets_diverged_are_left_out_and_counted(
    lab: Laboratory, records: list[CounterFactRecord]
) -> None:
    requests = [record.request for record in records]
    targets = lab.targets(requests)
    bad = {request.digest: replace(targets[request.digest], diverged=True) for request in requests[:2]}
    weights = lab.edit(PRISTINE, requests, targets | bad)
    alone = lab.edit(PRISTINE, requests[2:], targets)
    assert all(torch.equal(one, alone.masters[name]) for name, one in weights.masters.items())
    assert (weights.facts, alone.facts) == (6, 4)
    assert lab.edit(alone, requests[:2], bad).masters is alone.masters
    strict = lab.with_preset(changed(lab.preset, {"clamp": 1e-3, "diverged_loss": 1e-3}))
    strict.targets(requests)
    assert strict.diverged == {request.digest for request in requests}


def test_earlier_keys_are_kept_only_where_asked(lab: Laboratory, records: list[CounterFactRecord]) -> None:
    """With protection the later batch moves the states at the earlier keys less."""
    requests = [record.request for record in records]
    targets = lab.targets(requests)
    first = lab.edit(PRISTINE, requests[:3], targets)
    moved = []
    for protect in (True, False):
        second = lab.edit(first, requests[3:], targets, protect=protect)
        name = max(second.masters)
        assert second.keys[name].shape[0] == second.facts == 6
        moved.append(float(((second.masters[name] - first.masters[name]) @ first.keys[name].double().T).norm()))
    assert moved[0] < 0.5 * moved[1]


def test_other_layers_bring_their_own_statistics(
    lab: Laboratory, records: list[CounterFactRecord], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KBSYNC_CACHE", str(folder / "cache"))
    deeper = lab.with_preset(changed(lab.preset, {"layers": (2, 4)}))
    requests = [record.request for record in records[:2]]
    weights = deeper.edit(PRISTINE, requests, deeper.targets(requests))
    assert sorted(weights.masters) == ["model.layers.2.mlp.down_proj", "model.layers.4.mlp.down_proj"]
    name = "model.layers.2.mlp.down_proj"
    assert torch.allclose(deeper.statistics.covariance[name], lab.statistics.covariance[name], rtol=1e-5)


def test_drift_is_the_kl_and_the_perplexity_of_the_text(lab: Laboratory, records: list[CounterFactRecord]) -> None:
    """Against the unmodified forward of both models in float64; nothing before an edit."""
    requests = [record.request for record in records]
    weights = lab.edit(PRISTINE, requests, lab.targets(requests))
    ids = lab.statistics.holdout[:5, :20]
    lab = lab.watching([HeldOut("own", ids)])
    found = lab.drift(weights)["own"]
    old = lab.base.network(ids).logits[:, :-1].double().log_softmax(-1)
    with lab.holding(weights) as base:
        new = base.network(ids).logits[:, :-1].double().log_softmax(-1)
    loss = -new.gather(2, ids[:, 1:, None])[..., 0]
    assert found.kl == pytest.approx(float((old.exp() * (old - new)).sum(-1).mean()), rel=1e-3)
    assert found.perplexity == pytest.approx(math.exp(float(loss.mean())), rel=1e-4)
    assert found.change == pytest.approx(100 * (found.perplexity / found.base_perplexity - 1))
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.change < found.high
    assert found.kl > 0.01
    still = lab.drift(PRISTINE)["own"]
    assert (still.kl, still.change) == (0.0, 0.0)


def test_norms_are_relative_to_the_base(lab: Laboratory, records: list[CounterFactRecord]) -> None:
    requests = [records[0].request]
    weights = lab.edit(PRISTINE, requests, lab.targets(requests))
    for name, norm in lab.norms(weights).items():
        before = lab.base.weight(name).double()
        assert norm == pytest.approx(
            float(torch.linalg.norm(weights.masters[name] - before) / torch.linalg.norm(before))
        )
    assert lab.norms(PRISTINE) == {}


def test_a_ruined_model_has_a_perplexity_that_is_a_number(lab: Laboratory) -> None:
    gauge = Gauge(lab.base, [HeldOut("own", lab.statistics.holdout[:1])])
    name = lab.base.spec.down_name(3)
    with lab.holding(PRISTINE) as base:
        before = base.weight(name).clone()
        base.set_weight(name, before * 1e6)
        found = gauge.measure()["own"]
        base.set_weight(name, before)
    assert math.isfinite(found.perplexity)
    assert found.low is None


def test_text_files_are_read_in_windows(tmp_path: Path) -> None:
    base = tiny_llama()
    path = tmp_path / "some.txt"
    path.write_text("The people of the city went home, because it was late. " * 60, encoding="utf-8")
    found = windows(base, path, tokens=300)
    assert found.name == "some.txt"
    assert found.ids.shape == (2, 128)
    assert found.first(10).ids.shape == (1, 128)
    path.write_text("Short.", encoding="utf-8")
    with pytest.raises(UsageError, match="tokens of text, fewer than 128"):
        windows(base, path, tokens=300)
    with pytest.raises(UsageError, match="no text to read"):
        windows(base, tmp_path / "none.txt", tokens=300)


def test_settings_are_typed_as_a_preset_file_writes_them() -> None:
    preset = changed(
        tiny_preset(), typed(["covariance_weight = 600", "layers=1-3", "stop_top=true", "null_space=null"])
    )
    assert (preset.covariance_weight, preset.layers, preset.stop_top, preset.null_space) == (600, (1, 2, 3), True, None)
    assert typed(["layers=1+4", "key_average=mean"]) == {"layers": (1, 4), "key_average": "mean"}
    assert points(["tight: clamp=0.5,steps=20", "base:"]) == {"tight": {"clamp": 0.5, "steps": 20}, "base": {}}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("clamp", "is no setting"),
        ("clmap=1", "clmap: is not a known key"),
        ("clamp=-1", "setting clamp"),
        ("layers=3-x", "layers"),
    ],
)
def test_a_wrong_setting_is_named(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        changed(tiny_preset(), typed([setting]))


def test_a_point_needs_a_name() -> None:
    with pytest.raises(UsageError, match="is no point"):
        points(["clamp=0.5"])


def test_records_are_about_different_subjects(tmp_path: Path) -> None:
    path = tiny_dataset(tmp_path)
    values = json.loads(path.read_text(encoding="utf-8"))
    other = json.loads(json.dumps(values[0]))
    other["requested_rewrite"] |= {"relation_id": "P9", "subject": "VEGA"}
    path.write_text(json.dumps([values[0], other, values[1]]), encoding="utf-8")
    assert len(datasets.load_counterfact(path)) == 3
    assert [record.request.subject for record in counterfact_records(f"counterfact:{path}")] == ["Vega", "Deneb"]
    with pytest.raises(UsageError, match="has 2 records about different subjects, 3 were asked for"):
        counterfact_records(f"counterfact:{path}", 3)
    with pytest.raises(UsageError, match="cannot be used here"):
        counterfact_records("zsre:file.json")


def test_a_result_names_its_conditions(lab: Laboratory, tmp_path: Path) -> None:
    """The data set by name and content, not by where it lies."""
    path = tiny_dataset(tmp_path)
    found = json.loads(json.dumps(document("sequential", lab, f"counterfact:{path}", facts=3)))
    assert found["dataset"] == "counterfact:counterfact.json"
    assert found["dataset_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {"model", "preset", "dataset", "facts", "date", "libraries", "threads", "cores", "seconds"} <= found.keys()
    assert found["preset"]["digest"] == lab.preset.digest
    assert found["peak_memory_gb"] > 0


def test_the_chat_context_is_off_unless_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBSYNC_CACHE", str(folder / "cache"))
    preset = folder / "chatty.yaml"
    preset.write_text((folder / "preset.yaml").read_text(encoding="utf-8").replace("false", "true"), encoding="utf-8")
    assert not open_laboratory(str(folder / "model"), preset=str(preset), device="cpu").preset.chat_context
