"""A language model as the editor sees it: where its parts are (`ModelSpec`) and the loaded thing (`Base`).

Orientation is carried by the spec and never guessed from shapes: a Linear stores [d, f], GPT-2's Conv1D [f, d];
everything in kbsync speaks of an edited matrix as [d, f] = [d_out, d_in].
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from kbsync.errors import EditError, ModelError

__all__ = ["FAMILIES", "Base", "ModelSpec", "choose_device", "load_base", "spec_of", "weights_in"]

Orientation = Literal["linear", "conv1d"]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Module paths of one architecture. `layer` and `down` have one `{}` for the layer index, counted from 0."""

    family: str
    layer: str
    down: str
    embedding: str
    final_norm: str
    head: str
    orientation: Orientation

    def down_name(self, layer: int) -> str:
        """The module path of the MLP's down-projection W_l at `layer`."""
        return self.down.format(layer)


_LLAMA = ("model.layers.{}", "model.layers.{}.mlp.down_proj", "model.embed_tokens", "model.norm", "lm_head")
FAMILIES: dict[str, ModelSpec] = {
    "llama": ModelSpec("llama", *_LLAMA, "linear"),
    "mistral": ModelSpec("mistral", *_LLAMA, "linear"),
    "qwen2": ModelSpec("qwen2", *_LLAMA, "linear"),
    "gpt2": ModelSpec(
        "gpt2",
        "transformer.h.{}",
        "transformer.h.{}.mlp.c_proj",
        "transformer.wte",
        "transformer.ln_f",
        "lm_head",
        "conv1d",
    ),
}
"""Model families by `config.model_type`. Others are refused: a wrong guess would damage the model silently."""


@dataclass(slots=True)
class Base:
    """A loaded model with its tokenizer. Weights are those of the checkpoint unless `versions` put others in."""

    network: Any
    tokenizer: Any
    spec: ModelSpec
    fingerprint: str
    device: torch.device

    @property
    def layers(self) -> int:
        """Number of transformer blocks."""
        return int(self.network.config.num_hidden_layers)

    @property
    def max_tokens(self) -> int:
        """The longest text that every block reads whole: the context length, or a shorter sliding window."""
        config = self.network.config
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        return min(int(config.max_position_embeddings), int(window or config.max_position_embeddings))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights are served in."""
        return self.weight(self.spec.down_name(0)).dtype

    @property
    def cache_name(self) -> str:
        """What transformers calls the keys and values of earlier tokens: `past_key_values` up to 5.23, then `cache`."""
        taken = inspect.signature(type(self.network.base_model).forward).parameters
        return "cache" if "cache" in taken else "past_key_values"

    def module(self, name: str) -> nn.Module:
        """The module at a dotted path. Raises AttributeError where there is none."""
        found: nn.Module = self.network.get_submodule(name)
        return found

    def layer(self, index: int) -> nn.Module:
        """Transformer block `index`, counted from 0."""
        return self.module(self.spec.layer.format(index))

    def weight(self, name: str) -> Tensor:
        """The matrix of module `name` as a view [d_out, d_in], whatever way round it is stored."""
        stored: Tensor = self.network.get_parameter(f"{name}.weight").detach()
        return stored.T if self.spec.orientation == "conv1d" else stored

    @torch.no_grad()
    def set_weight(self, name: str, matrix: Tensor) -> None:
        """Put `matrix` [d_out, d_in] (cast to the stored dtype and device) into module `name`, in place."""
        self.weight(name).copy_(matrix)


@contextmanager
def weights_in(base: Base, matrices: Mapping[str, Tensor]) -> Iterator[Base]:
    """The base with `matrices` (module name -> [d_out, d_in], cast to the served dtype) put in; at the end the former
    weights of these modules are back bit for bit, whatever happened.

    Raises AttributeError for an unknown module and EditError for a wrong shape or a weight that is not finite, before
    anything is changed.
    """
    saved = {name: base.weight(name).clone() for name in matrices}
    for name, matrix in matrices.items():
        if matrix.shape != saved[name].shape:
            raise EditError(f"{name}: weights are {list(matrix.shape)}, the model's {list(saved[name].shape)}")
        if not torch.isfinite(matrix.to(base.dtype)).all():
            raise EditError(f"{name}: weights are not finite in {base.dtype}")
    try:
        for name, matrix in matrices.items():
            base.set_weight(name, matrix)
        yield base
    finally:
        for name, matrix in saved.items():
            base.set_weight(name, matrix)


def choose_device(wanted: str) -> torch.device:
    """`auto` is cuda where there is one, else cpu. Raises ModelError for a device that is not there."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {wanted}: no CUDA device on this machine", hint="set `device: auto` in kbsync.yaml")
    return device


def spec_of(model_type: str) -> ModelSpec:
    """The spec of a `config.model_type`. Raises ModelError for an unknown family."""
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(
            f"model family {model_type!r} is not known to the editor",
            hint=f"use one of these families: {known}",
        )
    return FAMILIES[model_type]


def load_base(folder: Path, *, fingerprint: str, device: str = "auto", dtype: str = "auto") -> Base:
    """Load a checkpoint folder (safetensors only, no remote code) in eval mode without gradients.

    `dtype`: auto (the checkpoint's), float32, bfloat16, float16, float64. Raises ModelError for quantised weights,
    a slow tokenizer (its offsets cannot be trusted) and unknown families.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # kbsync draws its own, where wanted
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{folder}: the weights are quantised", hint="use the unquantised checkpoint of this model")
    spec = spec_of(config.model_type)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, use_fast=True)
    if not tokenizer.is_fast:
        raise ModelError(f"{folder}: no fast tokenizer", hint="add tokenizer.json to the model's folder")
    network: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        use_safetensors=True,
        trust_remote_code=False,
    )
    where = choose_device(device)
    network.to(where).eval().requires_grad_(False)
    return Base(network=network, tokenizer=tokenizer, spec=spec, fingerprint=fingerprint, device=where)
