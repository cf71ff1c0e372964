"""`kbsync trace` and `kbsync calibrate` on a tiny model in a folder: no workspace is needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kbsync.cli import main
from kbsync.cli.study import _traced
from kbsync.editor.model import load_base
from kbsync.editor.preset import load_preset
from kbsync.errors import ConfigError
from kbsync.hub import fingerprint
from tests.tiny import save, tiny_gpt2

KNOWN = [
    {"subject": name, "prompt": f"{name} belongs to the constellation of", "attribute": "Orion", "relation_id": "P59"}
    for name in ("Betelgeuse", "Rigel", "Bellatrix", "Mintaka")
]
LOST = {"subject": "Vega", "prompt": "Vega belongs to the constellation of", "attribute": "Lyra", "relation_id": "P59"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that says " Orion" after everything."""
    base = tiny_gpt2()
    (token,) = base.tokenizer(" Orion").input_ids
    head = 0.1 * base.network.lm_head.weight.clone()
    head[token] = 1.0
    base.network.transformer.ln_f.bias.fill_(1.0)
    base.network.lm_head.weight = base.network.transformer.wte.weight = torch.nn.Parameter(head, False)
    return save(base, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([LOST, *KNOWN]), encoding="utf-8")
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 0) -> tuple[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kbsync", *map(str, arguments)])
        patch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as caught:
            main()
    out, err = capsys.readouterr()
    assert (caught.value.code or 0) == code, out + err
    return out, err


def test_trace_prints_writes_and_draws(
    model: Path, facts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table for people; trace.json and the pictures in the folder; the layers and the rule behind them."""
    out, _ = run(capsys, "trace", model, "--facts", facts, "--samples", "2", "--grid", "1", "--out", tmp_path / "out")
    assert "4 facts traced (5 of 5 asked)" in out
    assert "layers to edit: [" in out
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"trace.json"} | {f"{n}.{s}" for n in ("severed", "effects", "grid-1") for s in ("png", "svg")}
    assert all(f"wrote {tmp_path / 'out' / name}" in out for name in written)
    kept: dict[str, Any] = json.loads((tmp_path / "out" / "trace.json").read_text(encoding="utf-8"))
    assert kept["model"] == "tiny"
    assert kept["file"]["name"] == "facts.json"
    assert len(kept["effects"]["last_token"]["mlp"]["mean"]) == 6
    assert str(tmp_path) not in json.dumps(kept)


def test_trace_as_json_is_the_whole_report(model: Path, facts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "trace", model, "--facts", facts, "--samples", "1", "--limit", "2", "--json")
    found = json.loads(out)
    assert found["facts"] == {"read": 5, "asked": 3, "traced": 2}
    assert found["suggested"]["layers"] == sorted(found["suggested"]["layers"])


def test_trace_of_a_missing_file_names_it(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = run(capsys, "trace", model, "--facts", tmp_path / "none.json", code=2)
    assert "none.json: no JSON to read" in err


@pytest.fixture
def cities(tmp_path: Path) -> Path:
    """Known facts of one relation with two objects: counterfactuals can be made of them."""
    rows = [
        {"subject": name, "prompt": f"{name} {wording}", "attribute": thing, "relation_id": "P17"}
        for (name, thing) in {"Rome": "Italy", "Milan": "Italy", "Paris": "France", "Lyon": "France"}.items()
        for wording in (["is a city in"] if name in ("Rome", "Paris") else ["lies in"])
    ]
    path = tmp_path / "cities.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_calibrate_writes_a_preset_that_can_be_used(
    model: Path, cities: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, scores, facts, date and libraries; a second run does not overwrite it unless it is told to."""
    monkeypatch.setenv("KBSYNC_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "mine.yaml"
    arguments = ("calibrate", model, "--facts", cities, "--layers", "2-3", "--rungs", "1,2", "--out", out)
    printed, _ = run(capsys, *arguments)
    preset = load_preset(out)
    assert preset.layers == (2, 3)
    assert preset.name == "mine"
    assert {"edited", "unedited", "date", "libraries", "data", "search"} <= preset.scores.keys()
    assert preset.scores["search"]["facts"] == [1, 2]
    assert "2 facts of cities.json" in preset.scores["data"]
    assert "which the settings were not chosen on" in preset.scores["data"]
    assert f"{preset.covariance_weight:g}" in printed
    assert "the best on as many fresh facts" in printed
    written = out.read_bytes()
    _, err = run(capsys, *arguments, code=2)
    assert "mine.yaml: is there already" in err
    assert out.read_bytes() == written
    found = json.loads(run(capsys, *arguments, "--force", "--json")[0])
    assert found["rungs"][1]["trials"][0]["lambda"] == load_preset(out).covariance_weight
    assert found["layers"] == {"chosen": [2, 3], "why": "as given"}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--rungs", "8,4"), "no ascending numbers"),
        (("--rungs", "1,x"), "no ascending numbers"),
        (("--rungs", "1,90"), "4 facts to try settings on, 90 wanted"),
        (("--rungs", "1,2", "--layers", "3,2"), "layers"),
        (("--rungs", "1,2", "--layers", "first"), "layers"),
        (("--out", "mine.json"), "ends in .yaml"),
        (("--rungs", "1,2", "--dtype", "int8"), "--dtype int8 is not known"),
    ],
)
def test_calibrate_refuses_what_cannot_be_meant(
    model: Path, cities: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], problem: str
) -> None:
    _, err = run(capsys, "calibrate", model, "--facts", cities, *arguments, code=2)
    assert problem in err


def test_calibrate_takes_layers_of_a_trace_of_the_same_model_only(
    model: Path, facts: Path, cities: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "trace", model, "--facts", facts, "--samples", "1", "--limit", "1", "--out", tmp_path)
    base = load_base(model, fingerprint=fingerprint(model))
    trace = tmp_path / "trace.json"
    suggested = json.loads(trace.read_text(encoding="utf-8"))["suggested"]["layers"]
    assert _traced(base, trace)[0] == tuple(suggested)
    other = load_base(model, fingerprint="another")
    with pytest.raises(ConfigError, match="trace of another model"):
        _traced(other, trace)
    with pytest.raises(ConfigError, match="not a trace"):
        _traced(base, cities)


def test_calibrate_of_a_model_that_knows_nothing_writes_nothing(
    model: Path, cities: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers are traced where none are given, and there must be something to trace."""
    out = tmp_path / "mine.yaml"
    _, err = run(capsys, "calibrate", model, "--facts", cities, "--rungs", "1,2", "--out", out, code=1)
    assert "answers none of 4 facts right" in err
    assert not out.exists()
