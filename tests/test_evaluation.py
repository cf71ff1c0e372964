"""`kbsync evaluate` on a tiny workspace and on a tiny model edited in memory: numbers, tables, plot, errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from kbsync.bench.lab import PRISTINE
from kbsync.cli import main
from kbsync.editor.answers import log_probabilities
from kbsync.editor.assess import Dataset
from kbsync.editor.datasets import load_counterfact
from kbsync.editor.evaluate import HARMONIC, columns, score_records
from kbsync.editor.intervals import intervals
from kbsync.errors import UsageError
from kbsync.evaluation import edit, evaluate, open_model, read_dataset
from kbsync.facts import EditRequest, FactKey
from kbsync.plots.evaluate import draw
from kbsync.serving import load_model
from tests.labs import tiny_dataset, tiny_laboratory, tiny_model
from tests.workspaces import workspace

STARS = {"Vega": "Orion", "Betelgeuse": "Lyra", "Deneb": "Paris"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose `workspace` holds one version with three facts; one cache for all tests here."""
    made = tmp_path_factory.mktemp("evaluation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KBSYNC_CACHE", str(made / "cache"))
        patch.setenv("COLUMNS", "200")
        (made / "workspace").mkdir()
        with workspace(made / "workspace", STARS).open() as reconciler:
            reconciler.sync()
        yield made


@pytest.fixture(autouse=True)
def _cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBSYNC_CACHE", str(folder / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments: str) -> int:
    """The exit code of `kbsync evaluate …`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kbsync", "evaluate", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
    return int(end.value.code or 0)


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The JSON document of `kbsync evaluate …`."""
    capsys.readouterr()
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def value(found: Any, state: str, metric: str) -> float:
    return float(found["all"][state][metric]["value"])


def test_the_live_facts_are_measured_against_the_base(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By default: what the live version holds, before and after, with the conditions named."""
    found = measured(capsys, "-w", str(folder / "workspace"))
    assert (found["version"], found["records"], found["total"], found["dataset"]) == (1, 3, 3, None)
    assert value(found, "after", "accuracy") == 100
    assert value(found, "before", "accuracy") < 50
    assert value(found, "difference", "accuracy") == 100 - value(found, "before", "accuracy")
    assert found["drift"]["holdout"]["kl"] > 0
    assert (found["dtype"], found["device"]) == ("float32", "cpu")
    assert len(found["settings"]) == len(found["weights_sha256"]) == 64


def test_the_numbers_of_a_data_set_are_those_of_the_loaded_version(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --edit: what the syncs did to records that have nothing to do with them."""
    path = tiny_dataset(folder)
    found = measured(capsys, "-w", str(folder / "workspace"), "--dataset", f"counterfact:{path}", "--limit", "4")
    records = load_counterfact(path)[:4]
    for state, version in (("before", 0), ("after", "live")):
        base = load_model(folder / "workspace", version)  # type: ignore[arg-type]
        expected = intervals(columns(score_records(base, records)), harmonic=HARMONIC)
        assert value(found, state, "score") == (expected["score"].value if expected["score"] else None)
    assert found["relations"].keys() == {"P0", "P1"}
    assert (found["records"], found["total"]) == (4, 12)


def test_version_0_has_no_facts_but_can_be_measured_on_a_data_set(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(folder / "workspace")
    assert run("-w", root, "--version", "0") == 2
    assert "there are no facts to measure" in capsys.readouterr().err
    found = measured(capsys, "-w", root, "--version", "0", "--dataset", f"counterfact:{tiny_dataset(folder)}")
    assert found["all"].keys() == {"before"}


def test_an_edit_in_memory_is_that_of_the_laboratory(folder: Path) -> None:
    """One batch on the pristine base; before and after as the benchmarks measure them; nothing stays."""
    model, preset = tiny_model(folder)
    data = read_dataset(f"counterfact:{tiny_dataset(folder)}", limit=4)
    subject = open_model(str(model), str(preset), device="cpu")
    edit(subject, data.requests)
    found = evaluate(subject, data)
    lab = tiny_laboratory(folder)
    records = load_counterfact(tiny_dataset(folder))[:4]
    weights = lab.edit(PRISTINE, data.requests, lab.targets(data.requests))
    for state, there in (("before", PRISTINE), ("after", weights)):
        expected = intervals(columns(lab.scores(there, records)), harmonic=HARMONIC)
        assert value(found, state, "efficacy") == expected["efficacy"].value  # type: ignore[union-attr]
    assert value(found, "after", "efficacy") > value(found, "before", "efficacy")
    assert (found["batch"], found["left_out"], found["version"]) == (4, [], None)
    assert found["norms"] == lab.norms(weights)


@pytest.mark.parametrize(("method", "modules"), [("memit", 3), ("ft-w", 1), ("rome", 1)])
def test_a_baseline_edits_the_same_records(folder: Path, method: str, modules: int) -> None:
    """Each makes the objects of the records more probable in its own layers, and leaves the base alone."""
    model, preset = tiny_model(folder)
    data = read_dataset(f"counterfact:{tiny_dataset(folder)}", limit=4)
    subject = open_model(str(model), str(preset), device="cpu")
    before = evaluate(subject, data)
    edit(subject, data.requests, method=method)
    found = evaluate(subject, data)
    assert found["all"]["before"] == before["all"]["before"]
    assert len(found["norms"]) == modules
    assert all(norm > 0 for norm in found["norms"].values())
    assert found["drift"]["holdout"]["kl"] > 0
    pairs = [(request.prompt, request.target) for request in data.requests]
    was = sum(one.mean_log_probability for one in log_probabilities(subject.base, pairs))
    assert subject.edited is not None
    with subject.edited():
        assert sum(one.mean_log_probability for one in log_probabilities(subject.base, pairs)) > was


def test_other_settings_are_those_of_the_method(folder: Path) -> None:
    """Keys of the preset, or fine-tuning's own; what changed is named, and the settings' digest is another."""
    model, preset = tiny_model(folder)
    data = read_dataset(f"counterfact:{tiny_dataset(folder)}", limit=2)
    norms, digests = [], set()
    for method, changes in [
        ("memit", {}),
        ("memit", {"covariance_weight": 50.0}),
        ("ft-w", {"rate": 1e-3}),
        ("ft-w", {"rate": 1e-2}),
    ]:
        subject = open_model(str(model), str(preset), device="cpu")
        edit(subject, data.requests, method=method, changes=changes)
        found = evaluate(subject, data)
        assert found["changes"] == changes
        norms.append(sum(found["norms"].values()))
        digests.add(found["settings"])
    assert norms[1] < norms[0]
    assert norms[2] < norms[3]
    assert len(digests) == 2


@pytest.mark.parametrize(("method", "problem"), [("ft-w", "ft-w has no setting 'clamps'"), ("memit", "clamps")])
def test_a_setting_that_a_method_does_not_have_is_refused(folder: Path, method: str, problem: str) -> None:
    model, preset = tiny_model(folder)
    with pytest.raises(UsageError, match=problem):
        edit(open_model(str(model), str(preset), device="cpu"), [], method=method, changes={"clamps": 1})


def test_another_method_is_refused(folder: Path) -> None:
    model, preset = tiny_model(folder)
    with pytest.raises(UsageError, match="method 'mend' is not known"):
        edit(open_model(str(model), str(preset), device="cpu"), [], method="mend")


def test_a_request_that_cannot_be_placed_is_left_out_and_named(folder: Path) -> None:
    """It is measured all the same: as a fact that the edit does not hold."""
    model, preset = tiny_model(folder)
    twice = EditRequest(FactKey("r", "city"), "The city of city", "city", "Orion")
    good = EditRequest(FactKey("r", "Vega"), "Where is Vega", "Vega", "Orion")
    subject = open_model(str(model), str(preset), device="cpu")
    edit(subject, [twice, good])
    found = evaluate(subject, Dataset("facts", [twice, good], 2))
    assert found["batch"] == 1
    assert found["records"] == 2
    assert "more than once" in found["left_out"][0]


def test_a_model_without_a_preset_can_be_measured_but_not_edited(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = tiny_model(folder)
    options = ("--model", str(model), "--dataset", f"counterfact:{tiny_dataset(folder)}", "--limit", "2")
    assert measured(capsys, *options)["settings"] is None
    assert run(*options, "--edit") == 2
    said = capsys.readouterr().err
    assert "no preset" in said
    assert "kbsync calibrate" in said


def test_the_table_shows_metrics_relations_and_protocol(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    model, preset = tiny_model(folder)
    data = f"counterfact:{tiny_dataset(folder)}"
    options = ("--model", str(model), "--preset", str(preset), "--dataset", data, "--limit", "4", "--edit")
    (folder / "text.txt").write_text("The people of the city went home, because it was late. " * 60)
    assert run(*options, "--plot", str(folder / "figure"), "--text", str(folder / "text.txt")) == 0
    said = capsys.readouterr().out
    for text in ("4 edited by memit", "score (S)", "neighborhood (NS)", "difference", "by relation, after", "P1"):
        assert text in said
    for text in ("perplexity (holdout)", "KL to the base (text.txt)", "mean log-probability", "tokens read in"):
        assert text in said
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "figure.svg").read_text()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--edit",), "--edit needs records"),
        (("--preset", "x.yaml"), "--preset goes with --model"),
        (("--set", "clamp=1"), "--method and --set are for --edit"),
        (("--method", "rome"), "--method and --set are for --edit"),
        (("--version", "0", "--model", "x"), "--version goes neither with --model nor with --edit"),
        (("--version", "live", "--edit", "--dataset", "csv:x.csv"), "--version goes neither with --model nor"),
        (("--version", "99"), "there is no such version"),
        (("--dataset", "mend:x.json"), "data set 'mend:x.json' is not known"),
        (("--dataset", "zsre:x.json", "--references", "y.json"), "reference texts go with CounterFact alone"),
        (("--dataset", "zsre:absent.json"), "absent.json"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(
    folder: Path, options: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("-w", str(folder / "workspace"), *options) == 2
    assert problem in capsys.readouterr().err


def test_every_kind_of_data_set_can_be_read(folder: Path) -> None:
    (folder / "facts.csv").write_text("subject,object,relation\nVega,Lyra,is in\nRigel,Orion,is in\n")
    found = read_dataset(f"csv:{folder / 'facts.csv'}", limit=1)
    assert (found.protocol, len(found.records), found.total) == ("facts", 1, 2)
    question = {"subject": "Vega", "src": "Where is Vega?", "rephrase": "Vega is where?", "answers": ["Lyra"]}
    (folder / "zsre.json").write_text(json.dumps([question | {"loc": "nq question: who", "loc_ans": "I"}]))
    assert read_dataset(f"zsre:{folder / 'zsre.json'}").protocol == "zsre"


def test_the_plot_has_a_pair_of_bars_per_relation_with_their_intervals(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As high as the values say."""
    found = measured(capsys, "-w", str(folder / "workspace"), "--dataset", f"counterfact:{tiny_dataset(folder)}")
    made: list[Figure] = []

    @contextmanager
    def kept(*_path: Path, width: float, height: float) -> Iterator[Figure]:
        made.append(Figure(figsize=(width, height)))
        yield made[0]

    monkeypatch.setattr("kbsync.plots.evaluate.figure", kept)
    draw(found, folder / "figure")
    panels = {panel.get_title(): panel for panel in made[0].axes}
    widths = [bar.get_width() for bar in panels["neighborhood"].patches]  # type: ignore[attr-defined]
    groups = [found["all"], *found["relations"].values()]
    assert widths == [one[state]["neighborhood"]["value"] for state in ("before", "after") for one in groups]
    assert [label.get_text() for label in made[0].axes[0].get_yticklabels()] == ["all (12)", "P0 (6)", "P1 (6)"]
