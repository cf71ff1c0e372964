"""Plots of a trace: drawn from JSON alone, as PNG and SVG."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kbsync.errors import UsageError
from kbsync.plots.trace import draw

LAYERS = 8
EFFECT = {name: [0.01 * at for at in range(LAYERS)] for name in ("mean", "std", "low", "high")}
GRID = {
    "prompt": "Vega costs $5 in",
    "attribute": "Lyra$",
    "tokens": ["Vega", " costs", " $", "5", " in"],
    "subject": [0, 1],
    "clean": 0.5,
    "corrupted": 0.1,
    "effects": {kind: [[0.1] * LAYERS] * 5 for kind in ("state", "mlp", "attention")},
}
KINDS = ("state", "mlp", "attention", "mlp_severed", "attention_severed")
REPORT: dict[str, Any] = {
    "model": "tiny",
    "facts": {"read": 5, "asked": 4, "traced": 3},
    "noise": {"factor": 3.0, "sigma": 0.1, "samples": 10},
    "window": 2,
    "probability": {"clean": 0.5, "corrupted": 0.1},
    "effects": {"last_subject": dict.fromkeys(KINDS, EFFECT), "last_token": dict.fromkeys(KINDS[:3], EFFECT)},
    "suggested": {"layers": [3, 4], "rule": "the highest"},
    "grids": [GRID, GRID],
}


def test_every_picture_is_drawn_as_png_and_svg(tmp_path: Path) -> None:
    """Bars, lines and a heatmap per fact, whatever characters a prompt has; numbers and titles are in the SVG."""
    found = draw(json.loads(json.dumps(REPORT)), tmp_path / "new")
    names = [f"{name}.{kind}" for name in ("severed", "effects", "grid-1", "grid-2") for kind in ("png", "svg")]
    assert [path.name for path in found] == names
    for path in found:
        head = path.read_bytes()[:200]
        assert head.startswith(b"\x89PNG") if path.suffix == ".png" else b"<?xml" in head
    drawn = (tmp_path / "new" / "severed.svg").read_text(encoding="utf-8")
    for text in ("3 facts, 10 noise samples", "with MLPs severed", "layers 3–4", "average indirect effect"):
        assert text in drawn  # matplotlib writes each text as a comment beside its glyphs


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match="matplotlib") as caught:
        draw(REPORT, tmp_path)
    assert "plots" in caught.value.hint
