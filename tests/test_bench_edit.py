"""`bench edit` on a tiny model: the three ways reach the same facts, and the figures are what they are called."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kbsync.bench import edit
from kbsync.bench.data import counterfact_records
from kbsync.bench.edit import matrix_rate, measure
from kbsync.bench.lab import PRISTINE, Laboratory
from kbsync.bench.report import edit_table
from kbsync.bench.settings import changed
from kbsync.editor.datasets import CounterFactRecord
from kbsync.editor.model import Base
from kbsync.editor.preset import AUTHORS
from tests.labs import bench, tiny_dataset, tiny_laboratory, tiny_options


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KBSYNC_CACHE", str(path / "cache"))
        yield path


@pytest.fixture(scope="module")
def lab(folder: Path) -> Laboratory:
    return tiny_laboratory(folder)


@pytest.fixture(scope="module")
def records(folder: Path) -> list[CounterFactRecord]:
    return counterfact_records(f"counterfact:{tiny_dataset(folder)}")[:6]


def test_engine_and_baseline_score_the_same_and_speedups_are_per_fact(
    lab: Laboratory, records: list[CounterFactRecord]
) -> None:
    found = measure(lab, records, baseline=3).to_json()
    exact, plain = found["paths"]["exact"], found["paths"]["baseline"]
    assert (exact["facts"], plain["facts"]) == (6, 3)
    assert found["speedup_z"] == pytest.approx(plain["z_seconds"] / 3 / (exact["z_seconds"] / 6))
    assert found["speedup_insert"] == pytest.approx(plain["insert_seconds"] / 3 / (exact["insert_seconds"] / 6))
    preset = found["paths"]["preset"]
    assert found["speedup_z_preset"] == pytest.approx(plain["z_seconds"] / 3 / (preset["z_seconds"] / 6))
    assert preset["steps"] <= 6 < exact["steps"] <= 25


def test_statistics_are_one_pass_for_all_layers_beside_one_for_each(
    lab: Laboratory, records: list[CounterFactRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[tuple[int, int]] = []
    collect = edit.collect

    def counted(base: Base, names: Sequence[str], blocks: Sequence[Tensor]) -> Any:
        passes.append((len(names), sum(map(len, blocks))))
        return collect(base, names, blocks)

    monkeypatch.setattr(edit, "collect", counted)
    found = measure(lab, records[:1]).statistics
    warm, together, *alone = passes
    assert (warm[0], together[0], [names for names, _ in alone]) == (1, 3, [1, 1, 1])
    assert {tokens for _, tokens in alone} == {together[1]}
    rates = found["tokens_per_second"], found["baseline_tokens_per_second"]
    assert found["speedup_statistics"] == pytest.approx(rates[0] / rates[1])


def test_exact_and_baseline_insert_the_same_on_the_same_facts(
    lab: Laboratory, records: list[CounterFactRecord]
) -> None:
    """Over the same facts the two ways give the same scores, so their difference is 0 with an interval of 0."""
    found = measure(lab, records, baseline=6)
    assert found.paths["exact"].scores == found.paths["baseline"].scores
    for name in ("efficacy", "paraphrase", "neighborhood"):
        one = found.differences["baseline"][name]
        assert (one["value"], one["low"], one["high"]) == (0.0, 0.0, 0.0)


def test_a_preset_with_the_exact_settings_is_measured_once(lab: Laboratory, records: list[CounterFactRecord]) -> None:
    same = replace(lab, preset=changed(lab.preset, AUTHORS))
    assert list(measure(same, records[:2]).paths) == ["exact"]


def test_operations_are_those_of_the_matrix_products(lab: Laboratory, records: list[CounterFactRecord]) -> None:
    """More facts take more operations; the share is of the rate that this machine reaches in the model's dtype."""
    one, four = (measure(lab, records[:count]) for count in (1, 4))
    assert 0 < one.gflop < four.gflop
    share = four.gflop / four.paths["exact"].z_seconds / four.gflops
    assert four.to_json()["z_share_of_matrix_rate"] == pytest.approx(share)
    assert matrix_rate(lab.base.device, torch.bfloat16) > 0


def test_the_network_is_pristine_afterwards(lab: Laboratory, records: list[CounterFactRecord]) -> None:
    before = lab.base.weight(lab.base.spec.down_name(1)).clone()
    measure(lab, records[:2], baseline=1)
    assert bool((lab.base.weight(lab.base.spec.down_name(1)) == before).all())
    assert lab.norms(PRISTINE) == {}


def test_the_command_prints_a_table_and_one_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("edit", *tiny_options(folder), "--facts", "3", "--baseline")
    bench(*options)
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("exact", "preset", "baseline", "z_share_of_matrix_rate"))
    bench(*options, "--json")
    document = json.loads(capsys.readouterr().out)
    assert {"z_seconds", "baseline_z_seconds", "speedup_z", "speedup_insert", "peak_memory_gb"} <= document.keys()
    assert len(edit_table(document)[1]) == 3
