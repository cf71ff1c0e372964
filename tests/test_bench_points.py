"""`bench frontier`, `ablation`, `scaling`, `mix` on a tiny model: invariants and the results' shape."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kbsync.bench import mix, points, scaling
from kbsync.bench.data import counterfact_records
from kbsync.bench.grids import ablation_points, frontier_points
from kbsync.bench.lab import PRISTINE, Laboratory, Weights
from kbsync.bench.points import Point, attention_spec, front
from kbsync.bench.settings import changed
from kbsync.editor.baselines import FineTuning, finetune, rome, rome_settings
from kbsync.editor.datasets import CounterFactRecord
from kbsync.editor.evaluate import summarise
from kbsync.editor.preset import Preset
from kbsync.errors import EditError, UsageError
from kbsync.facts import EditRequest
from tests.labs import bench, tiny_dataset, tiny_laboratory, tiny_options
from tests.tiny import VARIANTS, WIDTH, tiny, tiny_preset

places = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def lab(folder: Path) -> Laboratory:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KBSYNC_CACHE", str(folder / "cache"))
        return tiny_laboratory(folder)


@pytest.fixture(autouse=True)
def _cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBSYNC_CACHE", str(folder / "cache"))


@pytest.fixture(scope="module")
def records(folder: Path) -> list[CounterFactRecord]:
    return counterfact_records(f"counterfact:{tiny_dataset(folder)}")[:8]


def test_a_point_is_one_insertion_with_its_settings(lab: Laboratory, records: list[CounterFactRecord]) -> None:
    wanted = [Point("as it is", {}), Point("heavy", {"covariance_weight": 1e4}), Point("deep", {"layers": (2, 4)})]
    found = points.measure(lab, wanted, records, texts=lab.held_out())
    same, heavy, deep = found.points
    requests = [record.request for record in records]
    weights = lab.edit(PRISTINE, requests, lab.targets(requests))
    assert same.scores == summarise(lab.scores(weights, records))
    assert same.norms == lab.norms(weights)
    assert heavy.drift["holdout"].kl < 0.1 * same.drift["holdout"].kl
    assert sorted(deep.norms) == ["model.layers.2.mlp.down_proj", "model.layers.4.mlp.down_proj"]
    assert len({one.preset_digest for one in found.points}) == 3
    assert found.unedited == summarise(lab.scores(PRISTINE, records))


def test_only_some_facts_are_scored_where_asked(lab: Laboratory, records: list[CounterFactRecord]) -> None:
    """All are inserted; the same sample is scored every time."""
    runs = [points.measure(lab, [Point("p", {})], records, evaluate=3) for _ in range(2)]
    whole = points.measure(lab, [Point("p", {})], records)
    assert runs[0].evaluated == runs[0].unedited.records == 3
    assert runs[0].points[0].scores == runs[1].points[0].scores
    assert runs[0].points[0].norms == whole.points[0].norms
    assert whole.evaluated == 8


@given(places)
def test_the_front_is_what_no_other_point_beats(pairs: list[tuple[int, int]]) -> None:
    """A point off the front is beaten by one on it; on the front, more gain costs more."""
    kept = [pair for pair, best in zip(pairs, front(pairs), strict=True) if best]
    for gain, cost in pairs:
        beaten = any(g >= gain and c <= cost and (g, c) != (gain, cost) for g, c in kept)
        assert beaten != ((gain, cost) in kept)
    costs = [cost for _, cost in sorted(set(kept))]
    assert costs == sorted(set(costs))


def test_the_default_points_are_presets_and_differ(lab: Laboratory) -> None:
    for preset in (lab.preset, tiny_preset(layers=(4,), null_space=0.02), tiny_preset(layers=(0, 1))):
        for wanted in (frontier_points(preset), ablation_points(preset, 6)):
            made = [changed(preset, point.changes) for point in wanted]
            assert wanted[0].changes == {}
            assert all(one.layers[-1] < 5 for one in made)
            mlp = [one.digest for one, point in zip(made, wanted, strict=True) if not point.attention]
            assert mlp.count(preset.digest) == 1


def test_every_default_point_is_another_edit(lab: Laboratory, records: list[CounterFactRecord]) -> None:
    """No setting of the grids is without effect in the engine; λ grows with the facts only beyond a hundred."""
    lab = lab.with_preset(changed(lab.preset, {"stop_loss": 0.0, "clamp": 2.0}))  # so that both bind
    grids = (frontier_points(lab.preset), ablation_points(lab.preset, lab.base.layers))
    wanted = {point.name: point for grid in grids for point in grid if "covariance_growth" not in point.changes}
    found = points.measure(lab, list(wanted.values()), records).points
    assert [one.stopped for one in found] == [""] * len(found)
    alike: dict[object, list[str]] = {}
    for one in found:
        alike.setdefault(tuple(sorted(one.norms.items())), []).append(one.name)
    assert [names for names in alike.values() if len(names) > 1] == []


def test_points_of_more_or_fewer_layers_share_the_targets() -> None:
    preset = Preset.model_validate(tiny_preset(layers=(4, 5, 6, 7, 8)).model_dump())
    found = {point.name: changed(preset, point.changes) for point in frontier_points(preset)}
    assert found["more layers"].layers == tuple(range(2, 9))
    assert found["fewer layers"].layers == (6, 7, 8)
    assert found["more layers"].target_digest == found["fewer layers"].target_digest == preset.target_digest
    assert found["clamp × ⅔"].target_digest != preset.target_digest


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_writes_through_its_output_projection(variant: str) -> None:
    """In every family: without these matrices, nothing of the other tokens reaches the last one."""
    base = tiny(variant)
    ids = [base.tokenizer(text).input_ids[-3:] for text in ("The capital of France", "It was late in France")]
    assert ids[0][-1] == ids[1][-1]
    assert ids[0] != ids[1]

    def difference() -> float:
        one, other = base.network(torch.tensor(ids)).logits[:, -1].detach()
        return float((one - other).abs().max())

    assert difference() > 1e-3
    attention = replace(base, spec=attention_spec(base))
    for layer in range(base.layers):
        name = attention.spec.down_name(layer)
        assert attention.weight(name).shape[0] == WIDTH
        attention.set_weight(name, torch.zeros_like(attention.weight(name)))
    assert difference() < 1e-6


def test_a_point_that_cannot_be_meant_is_refused_before_anything_is_measured(
    lab: Laboratory, records: list[CounterFactRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(points, "_PROJECTIONS", ())
    monkeypatch.setattr(points.Laboratory, "scores", never)
    with pytest.raises(UsageError, match="output projection is not known"):
        points.measure(lab, [Point("as it is", {}), Point("attention", {}, attention=True)], records)


def test_editing_the_attention_brings_the_states_to_z(lab: Laboratory, records: list[CounterFactRecord]) -> None:
    """The engine edits whatever matrix the spec names: its solution moves the objects' probabilities, the MLPs stay."""
    wanted = [Point("attention", {"covariance_weight": 1e-4}, attention=True)]
    found = points.measure(lab, wanted, records, texts=lab.held_out()).points[0]
    assert sorted(found.norms) == [f"model.layers.{layer}.self_attn.o_proj" for layer in (1, 2, 3)]
    assert found.scores is not None
    assert found.scores.efficacy is not None
    before = summarise(lab.scores(PRISTINE, records)).efficacy
    assert before is not None
    assert found.scores.efficacy.value > before.value + 20


def test_settings_that_the_engine_refuses_are_a_result(
    lab: Laboratory, records: list[CounterFactRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise EditError("the solve is off")

    monkeypatch.setattr(points.Laboratory, "edit", refuse)
    (found,) = points.measure(lab, [Point("bad", {})], records, texts=lab.held_out()).points
    assert (found.stopped, found.scores, found.pareto) == ("the solve is off", None, False)


def test_scaling_takes_the_first_facts_of_each_number(lab: Laboratory, records: list[CounterFactRecord]) -> None:
    found = scaling.measure(lab, records, [8, 1, 3], texts=lab.held_out()).points
    assert [point.facts for point in found] == [1, 3, 8]
    assert [point.scores.records for point in found if point.scores] == [1, 3, 8]
    requests = [record.request for record in records[:3]]
    weights = lab.edit(PRISTINE, requests, lab.targets(requests))
    assert found[1].scores == summarise(lab.scores(weights, records[:3]))
    assert found[0].unedited == summarise(lab.scores(PRISTINE, records[:1]))
    assert found[0].drift["holdout"].kl < found[2].drift["holdout"].kl


def test_other_methods_are_measured_beside_memit(lab: Laboratory, records: list[CounterFactRecord]) -> None:
    """ROME goes on from fact to fact, FT-W takes the first n at once; the network is as it was afterwards."""
    before = {name: value.clone() for name, value in lab.base.network.state_dict().items()}
    found = scaling.measure(lab, records, [2, 4], methods=["memit", "rome", "ft-w"], texts=lab.held_out()).points
    assert [(point.method, point.facts) for point in found] == [
        (name, facts) for name in ("memit", "rome", "ft-w") for facts in (2, 4)
    ]
    assert all(torch.equal(value, before[name]) for name, value in lab.base.network.state_dict().items())
    settings = rome_settings(lab.preset)
    requests = [record.request for record in records[:4]]
    weights = lab.plus(PRISTINE, rome(lab.base, requests, lab.statistics, settings), facts=4)
    assert found[3].drift["holdout"].kl == pytest.approx(
        lab.watching(lab.held_out()).drift(weights)["holdout"].kl, rel=1e-3
    )
    weights = lab.plus(PRISTINE, finetune(lab.base, requests, FineTuning.of(lab.base)), facts=4)
    assert found[5].scores == summarise(lab.scores(weights, records[:4]))
    assert {"rome", "score"} <= found[3].seconds.keys()


def test_a_method_that_stops_leaves_the_larger_numbers_out(
    lab: Laboratory, records: list[CounterFactRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = Laboratory.edit

    def fragile(self: Laboratory, weights: Weights, requests: list[EditRequest], *rest: Any, **more: Any) -> Weights:
        if len(requests) > 2:
            raise EditError("not finite")
        return edit(self, weights, requests, *rest, **more)

    monkeypatch.setattr(scaling.Laboratory, "edit", fragile)
    found = scaling.measure(lab, records, [1, 2, 4, 8]).points
    assert [(point.stopped, point.scores is None) for point in found] == [("", False)] * 2 + [("not finite", True)] * 2


def test_a_mix_is_compared_with_its_own_facts_alone(lab: Laboratory, folder: Path) -> None:
    every = counterfact_records(f"counterfact:{tiny_dataset(folder)}")
    found = mix.measure(lab, mix.pairs(every, count=3, facts=4))
    (pair,) = found.pairs
    assert pair.relations == ("P0", "P1")
    first, second = ([record for record in every if record.request.key.relation == name][:4] for name in ("P0", "P1"))
    assert [scores.records for scores in (*pair.alone, pair.mixed, pair.difference)] == [4, 4, 4, 4]
    mixed = [record.request for record in [*first[:2], *second[:2]]]
    weights = lab.edit(PRISTINE, mixed, lab.targets(mixed))
    assert pair.mixed == summarise(lab.scores(weights, [*first[:2], *second[:2]]))
    assert found.difference == pair.difference


def test_relations_with_too_few_records_are_named(folder: Path) -> None:
    every = counterfact_records(f"counterfact:{tiny_dataset(folder)}")
    assert [len(part) for pair in mix.pairs(every, count=1, facts=6, named=[("P1", "P0")]) for part in pair] == [6, 6]
    with pytest.raises(UsageError, match="P0 has 6 records, 7 were asked for"):
        mix.pairs(every, count=1, facts=7)
    with pytest.raises(UsageError, match="P7 has 0 records"):
        mix.pairs(every, count=1, facts=2, named=[("P7", "P0")])
    with pytest.raises(UsageError, match="no two relations"):
        mix.pairs(every[:1], count=1, facts=1)


COMMANDS = [
    ("frontier", "--facts", "4", "--point", "as it is:", "--point", "deep: layers=2+3,covariance_weight=0.5"),
    ("ablation", "--facts", "4", "--evaluate", "3", "--point", "as it is:"),
    ("scaling", "--facts", "1,4", "--method", "memit,ft-w"),
    ("mix", "--facts", "2"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_command_prints_a_document_or_a_table_and_draws(
    command: tuple[str, ...], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*command, *tiny_options(folder), "--plot", str(tmp_path / "plot"))
    assert bench(*options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["benchmark"], found["model"]) == (command[0], "model")
    assert {"fingerprint", "preset", "dataset", "date", "seconds", "threads"} <= found.keys()
    assert (tmp_path / "plot.png").stat().st_size > 5_000
    assert (tmp_path / "plot.svg").is_file()
    assert bench(*options) == 0
    out = capsys.readouterr().out
    assert f"bench {command[0]}: model" in out
    assert "plot.svg" in out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("scaling", "--facts", "1,x"), "not a list of numbers"),
        (("mix", "--pair", "P1"), "a pair needs two relations"),
        (("frontier", "--facts", "4", "--point", "a: clmap=1"), "clmap"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    command: tuple[str, ...], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(*command, *tiny_options(folder)) == 2
    assert message in capsys.readouterr().err


def test_other_text_brings_other_statistics(lab: Laboratory) -> None:
    """Fewer tokens of the corpus are another covariance, for all points that ask for it."""
    other = lab.with_preset(changed(lab.preset, {"sample_tokens": 400}))
    name = "model.layers.2.mlp.down_proj"
    assert not torch.equal(other.statistics.covariance[name], lab.statistics.covariance[name])
