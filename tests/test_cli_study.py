"""`kbsync trace` and `kbsync calibrate` on a tiny model in a folder: no workspace is needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kbsync.cli import main
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
