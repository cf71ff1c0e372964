"""`bench sequential` on a tiny model: what the strategies have in common, and the result's shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kbsync.bench import sequential
from kbsync.bench.data import counterfact_records
from kbsync.bench.lab import Laboratory, Weights
from kbsync.bench.report import sequential_table
from kbsync.bench.sequential import STRATEGIES, measure, trajectory
from kbsync.bench.settings import changed
from kbsync.editor.datasets import CounterFactRecord
from kbsync.errors import EditError
from kbsync.plots.bench import draw_sequential
from tests.labs import bench, tiny_dataset, tiny_laboratory, tiny_options


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
    return counterfact_records(f"counterfact:{tiny_dataset(folder)}")[:9]


def path_of(lab: Laboratory, records: list[CounterFactRecord], name: str) -> list[Weights]:
    return list(trajectory(lab, STRATEGIES[name], [record.request for record in records], 4))


def test_rebase_ends_where_one_batch_does_to_the_bit(lab: Laboratory, records: list[CounterFactRecord]) -> None:
    """The version is a function of the facts, not of the way to it."""
    (whole,) = path_of(lab, records, "one-batch")
    steps = path_of(lab, records, "rebase")
    assert [weights.facts for weights in steps] == [4, 8, 9]
    assert all(torch.equal(steps[-1].masters[name], one) for name, one in whole.masters.items())


def test_incremental_in_one_layer_is_one_batch(lab: Laboratory, records: list[CounterFactRecord]) -> None:
    """Recursive least squares: exact in one layer, where keys and states are read in the same text."""
    one = lab.with_preset(changed(lab.preset, {"layers": (3,)}))
    one.statistics = type(one.statistics)(**{
        name: getattr(one.statistics, name) for name in ("covariance", "tokens", "error", "holdout", "fingerprint")
    } | {"contexts": ("{}",)})  # fmt: skip
    (whole,) = path_of(one, records, "one-batch")
    last = path_of(one, records, "incremental")[-1]
    for name, matrix in whole.masters.items():
        size = float((matrix - one.base.weight(name)).norm())
        assert float((last.masters[name] - matrix).norm()) < 1e-4 * size


def test_without_earlier_facts_all_small_batches_are_alike(lab: Laboratory, records: list[CounterFactRecord]) -> None:
    """After the first batch nothing tells the strategies apart; after the second z and protection do."""
    paths = {name: path_of(lab, records, name) for name in ("incremental", "rebase", "plain-z0", "plain")}
    for name in paths["plain"][0].masters:
        first = [path[0].masters[name] for path in paths.values()]
        second = [path[1].masters[name] for path in paths.values()]
        assert all(torch.equal(first[0], other) for other in first)
        assert not any(torch.equal(a, b) for index, a in enumerate(second) for b in second[:index])


def test_every_strategy_is_measured_after_each_batch_and_at_the_end(
    lab: Laboratory, records: list[CounterFactRecord], tmp_path: Path
) -> None:
    found = measure(lab, records, batch=4, strategies=list(STRATEGIES), texts=lab.held_out(), probe=5)
    assert list(found.runs) == list(STRATEGIES)
    assert lab.drift(path_of(lab, records, "rebase")[0]) == {}  # this laboratory itself watches nothing
    for name, run in found.runs.items():
        assert [step.facts for step in run.steps] == ([9] if name == "one-batch" else [4, 8, 9])
        assert run.scores is not None
        assert run.scores.records == 9
        assert run.steps[-1].sample.records == 5
        assert run.drift["holdout"].tokens == lab.statistics.holdout.numel()
        assert 0 <= run.steps[-1].first_batch <= 100
    reference, rebase = found.runs["one-batch"], found.runs["rebase"]
    assert reference.difference is None
    assert rebase.difference is not None
    assert rebase.difference.efficacy is not None
    assert (rebase.difference.efficacy.low, rebase.difference.efficacy.high) == (0, 0)
    assert rebase.drift == reference.drift
    result: dict[str, Any] = {"benchmark": "sequential", "model": "tiny", "dataset": "x", "facts": 9, "batch": 4}
    result = json.loads(json.dumps(result | found.to_json(), sort_keys=True))
    columns, rows = sequential_table(result)
    assert sorted(str(row[0]) for row in rows) == sorted(["unedited", *STRATEGIES])
    assert {len(row) for row in rows} == {len(columns)}
    draw_sequential(result, tmp_path / "sequential")
    assert (tmp_path / "sequential.png").stat().st_size > 10_000
    assert (tmp_path / "sequential.svg").is_file()


def test_facts_that_are_not_edited_yet_are_not_probed(lab: Laboratory, records: list[CounterFactRecord]) -> None:
    """A sample of all facts: after the first batch those of it that went in."""
    found = measure(lab, records, batch=4, strategies=["rebase"], probe=9)
    assert [step.sample.records for step in found.runs["rebase"].steps] == [4, 8, 9]


def test_a_strategy_that_ruins_the_model_is_a_result(
    lab: Laboratory, records: list[CounterFactRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says after how many facts; the others are measured."""
    edit = Laboratory.edit

    def fragile(self: Laboratory, weights: Weights, *rest: Any, protect: bool = True) -> Weights:
        if not protect and weights.facts == 8:
            raise EditError("the edit is not finite")
        return edit(self, weights, *rest, protect=protect)

    monkeypatch.setattr(sequential.Laboratory, "edit", fragile)
    found = measure(lab, records, batch=4, strategies=["plain-z0", "incremental"], probe=2)
    stopped = found.runs["plain-z0"]
    assert (stopped.stopped, len(stopped.steps)) == ("after 8 facts: the edit is not finite", 2)
    assert (stopped.scores, stopped.difference) == (None, None)
    assert found.runs["incremental"].scores is not None


def test_the_command_prints_one_document(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KBSYNC_CACHE", str(folder / "cache"))
    command = ("sequential", "--facts", "4", "--batch", "2", "--strategy", "rebase", *tiny_options(folder))
    assert bench(*command, "--set", "covariance_weight=0.1", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["preset"]["changes"] == {"covariance_weight": 0.1}
    assert (found["facts"], found["batch"], sorted(found["strategies"])) == (4, 2, ["one-batch", "rebase"])
    assert bench(*command) == 0
    assert "bench sequential: model, 4 facts" in capsys.readouterr().out


def test_an_unknown_strategy_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("sequential", "--facts", "4", "--strategy", "best", *tiny_options(folder)) == 2
    assert "strategy 'best' is not known" in capsys.readouterr().err
