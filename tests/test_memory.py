"""Memory foretold before a model is loaded, against the loaded model and a measured peak."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner, Result

from kbsync.cli import app
from kbsync.editor.memory import assumed_preset, forecast, targets_bytes
from kbsync.editor.model import Base, load_base
from kbsync.editor.targets import compute_targets
from kbsync.errors import ModelError
from tests.tiny import CONTEXTS, FACTS, VARIANTS, request, save, tiny, tiny_preset

FACTOR = 2.0
"""How far the estimate of a batch may be from what was measured, either way."""
MANY = [
    request(fact.prompt, fact.subject, target)
    for fact in FACTS[:4]
    for target in ("Lyra", "Rome", "French", "Orion", "Paris")
]
"""Enough to fill the token budget."""


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were made inside and alive at once; views of the weights do not count."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.weights = {parameter.untyped_storage()._cdata for parameter in base.network.parameters()}
        self.alive: dict[int, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if (key := storage._cdata) not in self.alive and key not in self.weights:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.bytes = max(self.bytes, sum(self.alive.values()))
        return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_weights_are_foretold_to_the_byte(variant: str, tmp_path: Path) -> None:
    """Also where embeddings are tied, and for the dtype that is asked for."""
    folder = save(tiny(variant), tmp_path / "model")
    for dtype in ("auto", "bfloat16"):
        base = load_base(folder, fingerprint="x", dtype=dtype, device="cpu")
        loaded = sum(parameter.numel() * parameter.element_size() for parameter in base.network.parameters())
        assert forecast(folder, tiny_preset(), dtype=dtype).weights == loaded


def test_a_checkpoint_in_half_precision_is_foretold_as_such(tmp_path: Path) -> None:
    """`auto` is what the file holds."""
    folder = save(tiny("llama", dtype=torch.bfloat16), tmp_path / "model")
    base = load_base(folder, fingerprint="x", device="cpu")
    assert base.dtype == torch.bfloat16
    loaded = sum(parameter.numel() * 2 for parameter in base.network.parameters())
    assert forecast(folder, tiny_preset()).weights == loaded


def test_masters_and_statistics_are_the_formulae(tmp_path: Path) -> None:
    """Three matrices of [32, 64] that are stored as [64, 32], their float64 and float32 copies, their covariances."""
    needs = forecast(save(tiny("gpt2"), tmp_path / "model"), tiny_preset())
    assert needs.masters == 3 * 32 * 64 * (8 + 4)
    assert needs.statistics == (2 * 3 + 2) * 8 * 64 * 64
    assert needs.total == needs.weights + needs.masters + needs.statistics + needs.targets


@pytest.mark.parametrize(
    "shape", [{"hidden_size": 64, "intermediate_size": 256}, {"hidden_size": 64, "vocab_size": 6000}]
)
@pytest.mark.parametrize("variant", ["llama", "gemma3", "gptj", "gpt_neox"])
def test_a_batch_of_targets_takes_what_was_foretold_within_a_factor_of_two(variant: str, shape: dict[str, int]) -> None:
    base = tiny(variant, **shape)
    preset = tiny_preset(token_budget=300, steps=2)
    foretold = targets_bytes(base.network.config, base.weight(base.spec.down_name(0)).shape, preset, 4)
    with Peak(base) as found:
        compute_targets(base, MANY, CONTEXTS, preset)
    assert 1 / FACTOR < foretold / found.bytes < FACTOR


def test_a_preset_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="layer 9 of 6"):
        forecast(save(tiny("llama"), tmp_path / "model"), tiny_preset(layers=(9,)))


def test_a_model_without_a_preset_is_reckoned_with_five_layers_up_to_a_third(tmp_path: Path) -> None:
    folder = save(tiny("llama", num_hidden_layers=24), tmp_path / "model")
    assert assumed_preset(folder).layers == (4, 5, 6, 7, 8)
    assert forecast(folder, assumed_preset(folder)).masters == 5 * 32 * 48 * (8 + 4)


def doctor(root: Path, model: str) -> Result:
    """What `kbsync doctor --model` says."""
    return CliRunner().invoke(app, ["doctor", "--model", model, "--workspace", str(root), "--json"])


def test_doctor_says_what_a_model_needs_and_whether_it_fits(tmp_path: Path) -> None:
    folder = save(tiny("llama"), tmp_path / "model")
    said = json.loads(doctor(tmp_path, "model").stdout)
    assert said["weights_gb"] == round(forecast(folder, assumed_preset(folder)).weights / 1e9, 3)
    assert said["fits"]
    assert said["preset"].startswith("none yet")


def test_doctor_names_the_command_for_a_model_that_is_not_here(tmp_path: Path) -> None:
    said = doctor(tmp_path, "owner/never-pulled")
    assert isinstance(said.exception, ModelError)
    assert said.exception.hint == "kbsync model pull owner/never-pulled"
