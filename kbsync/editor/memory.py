"""What a model and its edit will take of the memory, before anything is loaded: from its config.json and file headers.

The weights are exact: transformers' own class is built on the meta device, where tensors have shapes and no numbers.
The rest are estimates by the formulae below; the tests hold the target vectors' to a factor of two of what is measured.

    needs = forecast(folder, preset)
    needs.weights, needs.total                    # bytes
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from kbsync.editor.model import ModelSpec, read_config
from kbsync.editor.objective import BLOCK
from kbsync.editor.preset import Preset
from kbsync.errors import ModelError

__all__ = ["Needs", "assumed_preset", "available", "forecast", "targets_bytes"]

_DOUBLE = 8
_SUFFIX = 5
"""Tokens of a text from the lookup token on, as in CounterFact: a token budget is a fifth as many texts."""
_BEFORE = 15
"""Tokens of a text before it."""
_PREDICTED = 0.3
"""The share of a batch's tokens that predict a token of an object, and so have logits."""
_TEXTS = 7
"""Texts of a fact: six contexts and the KL term's."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes that are held at once where the model is."""

    weights: int
    """Of all parameters, tied ones counted once."""
    masters: int
    """n·d·f·(8 + size): each of the n edited matrices in float64, and its served copy that is put back afterwards."""
    statistics: int
    """(2n + 2)·8f²: each covariance [f, f] and its factor in float64, and a pair in work. On a GPU the covariances
    themselves stay in the machine's memory, so this is then an upper bound."""
    targets: int
    """The target vectors' batch, by `targets_bytes`."""

    @property
    def total(self) -> int:
        """Everything at once: an upper bound, for the batch is gone when the systems are solved."""
        return self.weights + self.masters + self.statistics + self.targets


def forecast(folder: Path, preset: Preset, *, dtype: str = "auto") -> Needs:
    """What editing the checkpoint in `folder` with `preset` will need, loaded in `dtype` (as `load_base`).

    Raises ModelError for models that `load_base` refuses by their configuration, and a preset with too many layers.
    """
    config, spec = read_config(folder)
    if preset.layers[-1] + 1 >= config.num_hidden_layers:
        raise ModelError(
            f"preset {preset.name}: layer {preset.layers[-1]} of {config.num_hidden_layers} (from 0)",
            hint="use the preset of this model",
        )
    served = _dtype(folder, config, dtype)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=served)  # type: ignore[no-untyped-call]
    d, f = _shape(network, spec)
    edited = len(preset.layers)
    return Needs(
        weights=sum(parameter.numel() * parameter.element_size() for parameter in network.parameters()),
        masters=edited * d * f * (_DOUBLE + served.itemsize),
        statistics=(2 * edited + 2) * _DOUBLE * f * f,
        targets=targets_bytes(config, (d, f), preset, served.itemsize),
    )


def assumed_preset(folder: Path) -> Preset:
    """Settings to reckon with where a model has no preset yet: five layers that end at a third of its depth, as those
    of GPT-J and GPT-2 XL do. For its memory only, never for an edit. Raises ModelError as `read_config` does."""
    top = max(1, read_config(folder)[0].num_hidden_layers // 3)
    return Preset(
        name=f"none yet: up to five layers that end at {top} assumed",
        layers=tuple(range(max(0, top - 4), top + 1)),
        covariance_weight=1,
        clamp=1,
        rate=1,
        steps=1,
        token_budget=2048,
        chat_context=False,
    )


def targets_bytes(config: Any, shape: tuple[int, int], preset: Preset, size: int) -> int:
    """The peak of one batch of target vectors, of T tokens (`token_budget`), in bytes.

    a counts the layers above L and one more, for what is in work. Kept for the gradient: T·a·(3f + 12d) numbers (the
    MLP's three inner states; norms, queries and the attention's output). Keys and values of the tokens before, three
    times (as stored, gathered, joined to the batch's own): 3·2·a·S·(T / suffix)·k, k being all key-value heads
    together. Logits of the predicting tokens in float32, a block at a time, three times (logits, log-probabilities,
    gradient): 3·4·0.3·T·vocabulary at most. What the KL term compares with, kept per fact and once more for the step:
    2·4·vocabulary·T / (suffix·texts).
    """
    d, f = shape
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or d // config.num_attention_heads
    tokens, above = preset.token_budget, config.num_hidden_layers - preset.layers[-1]
    states = tokens * above * (3 * f + 12 * d)
    past = 6 * above * _BEFORE * tokens // _SUFFIX * heads * width
    logits = 12 * min(_PREDICTED * tokens * config.vocab_size, max(BLOCK, config.vocab_size))
    essence = 8 * config.vocab_size * tokens / (_SUFFIX * _TEXTS) if preset.kl_weight else 0
    return int(states + past) * size + int(logits + essence)


def available(device: str) -> tuple[str, int]:
    """The name and the bytes of the memory that `device` of kbsync.yaml means: of one GPU, of all, or the machine's."""
    if device == "cpu" or not torch.cuda.is_available():
        return "memory of the machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device == "balanced":
        gpus = range(torch.cuda.device_count())
        return f"memory of {len(gpus)} GPUs", sum(torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus)
    properties = torch.cuda.get_device_properties("cuda" if device == "auto" else device)
    return f"memory of {properties.name}", int(properties.total_memory)


def _shape(network: Any, spec: ModelSpec) -> tuple[int, int]:
    """d and f of the edited matrices."""
    rows, columns = network.get_parameter(f"{spec.down_name(0)}.weight").shape
    return (columns, rows) if spec.orientation == "conv1d" else (rows, columns)


def _dtype(folder: Path, config: Any, wanted: str) -> torch.dtype:
    """What transformers will load: the one named, else the configuration's, else that of the first tensor on disk."""
    if wanted != "auto":
        found: torch.dtype = getattr(torch, wanted)
        return found
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                return _DTYPES.get(file.get_slice(name).get_dtype(), torch.float32)
    return torch.float32
