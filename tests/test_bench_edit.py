"""`bench edit` on a tiny model: the three ways reach the same facts, and the figures are what they are called."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kbsync.bench.data import counterfact_records
from kbsync.bench.edit import EXACT, matrix_rate, measure
from kbsync.bench.lab import PRISTINE, Laboratory
from kbsync.bench.report import edit_table
from kbsync.bench.settings import changed
from kbsync.editor.datasets import CounterFactRecord
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
    return counterfact_records(f"counterfact:{tiny_dataset(folder)}", 6)


def test_engine_and_baseline_score_the_same_and_speedups_are_per_fact(
    lab: Laboratory, records: list[CounterFactRecord]
) -> None:
    found = measure(lab, records, baseline=3).to_json()
    exact, plain = found["paths"]["exact"], found["paths"]["baseline"]
    assert (exact["facts"], plain["facts"]) == (6, 3)
    assert found["speedup_z"] == pytest.approx(plain["z_seconds"] / 3 / (exact["z_seconds"] / 6))
    assert found["speedup_insert"] == pytest.approx(plain["insert_seconds"] / 3 / (exact["insert_seconds"] / 6))
    assert found["speedup_z_preset"] > found["speedup_z"]  # 6 steps instead of 25
    assert found["statistics"]["speedup_statistics"] > 1


def test_exact_and_baseline_insert_the_same_on_the_same_facts(
    lab: Laboratory, records: list[CounterFactRecord]
) -> None:
    """Over the same facts the two ways give the same scores, so their difference is 0 with an interval of 0."""
    found = measure(lab, records, baseline=6)
    assert found.paths["exact"].scores == found.paths["baseline"].scores
    score = found.differences["baseline"]["score"]
    assert score is None or (score["value"], score["low"], score["high"]) == (0.0, 0.0, 0.0)


def test_a_preset_with_the_exact_settings_is_measured_once(lab: Laboratory, records: list[CounterFactRecord]) -> None:
    same = replace(lab, preset=changed(lab.preset, EXACT))
    assert list(measure(same, records[:2]).paths) == ["exact"]


def test_operations_are_those_of_the_matrix_products(lab: Laboratory, records: list[CounterFactRecord]) -> None:
    """More facts take more operations, and no machine does more of them than its own rate allows."""
    one, four = (measure(lab, records[:count]) for count in (1, 4))
    assert 0 < one.gflop < four.gflop
    assert four.to_json()["z_share_of_matrix_rate"] < 1.0
    assert matrix_rate() > 0


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
