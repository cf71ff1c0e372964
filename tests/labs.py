"""A laboratory for tests: a tiny real model on disk, a preset file, a CounterFact file about invented people.

lab = tiny_laboratory(tmp_path)                         # needs KBSYNC_CACHE to be a folder of the test's own
records = load_counterfact(tiny_dataset(tmp_path))
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kbsync.bench.lab import Laboratory, open_laboratory
from kbsync.cli import main
from tests.tiny import save, tiny_llama

PRESET = """\
name: tiny
layers: [1, 2, 3]
covariance_weight: 0.05
clamp: 6.0
rate: 0.5
steps: 6
stop_loss: 0.02
corpus: self
sample_tokens: 600
token_budget: 4096
chat_context: false
"""
NAMES = ("Vega", "Deneb", "Rigel", "Spica", "Mira", "Algol", "Castor", "Pollux", "Antares", "Regulus", "Alcor", "Mizar")
OBJECTS = ("Orion", "Lyra", "Paris", "Rome")


def tiny_dataset(folder: Path) -> Path:
    """A full CounterFact file of 12 records of two relations, two paraphrases and two neighbors each."""
    path = folder / "counterfact.json"
    path.write_text(json.dumps([_record(index, name) for index, name in enumerate(NAMES)]), encoding="utf-8")
    return path


def _record(index: int, name: str) -> dict[str, Any]:
    new, true = OBJECTS[index % 4], OBJECTS[(index + 1) % 4]
    prompt = ("Where is {}", "It was late. The city of {}")[index % 2]
    return {
        "case_id": index,
        "requested_rewrite": {
            "prompt": prompt,
            "relation_id": f"P{index % 2}",
            "subject": name,
            "target_new": {"str": new},
            "target_true": {"str": true},
        },
        "paraphrase_prompts": [f"I think. Where is {name}", f"Therefore. {name}"],
        "neighborhood_prompts": [prompt.format(f"{name}us"), prompt.format(f"{name}is")],
    }


def tiny_model(folder: Path) -> tuple[Path, Path]:
    """A model folder and its preset file."""
    preset = folder / "preset.yaml"
    preset.write_text(PRESET, encoding="utf-8")
    return save(tiny_llama(), folder / "model"), preset


def tiny_laboratory(folder: Path, **changes: Any) -> Laboratory:
    """The laboratory of a tiny Llama with these changes of its preset."""
    model, preset = tiny_model(folder)
    return open_laboratory(str(model), preset=str(preset), changes=changes, device="cpu")


def tiny_options(folder: Path) -> tuple[str, ...]:
    """What a `kbsync bench` command needs to run on the tiny model."""
    model, preset = tiny_model(folder)
    data = f"counterfact:{tiny_dataset(folder)}"
    return ("--dataset", data, "--model", str(model), "--preset", str(preset), "--device", "cpu")


def bench(*arguments: str) -> object:
    """Run `kbsync bench …` in this process. The answer is its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kbsync", "bench", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
    return end.value.code or 0
