"""A language model as the editor sees it: where its parts are (`ModelSpec`) and the loaded thing (`Base`).

Orientation is carried by the spec and never guessed from shapes: a Linear stores [d, f], GPT-2's Conv1D [f, d];
everything in kbsync speaks of an edited matrix as [d, f] = [d_out, d_in].

    base = load_base(folder, fingerprint=fingerprint(folder), device="balanced")     # over all GPUs
    base.weight(base.spec.down_name(4))                                              # [d, f], where layer 4 is
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from kbsync.errors import EditError, ModelError

__all__ = [
    "BALANCED",
    "FAMILIES",
    "Base",
    "ModelSpec",
    "base_of",
    "choose_device",
    "load_base",
    "read_config",
    "spec_of",
    "weights_in",
]

Orientation = Literal["linear", "conv1d"]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Module paths of one architecture. `layer` and `down` have one `{}` for the layer index, counted from 0."""

    family: str
    layer: str
    down: str
    embedding: str
    final_norm: str
    orientation: Orientation

    def down_name(self, layer: int) -> str:
        """The module path of the MLP's down-projection W_l at `layer`."""
        return self.down.format(layer)


_LLAMA = ("model.layers.{}", "model.layers.{}.mlp.down_proj", "model.embed_tokens", "model.norm")
_GPT = ("transformer.wte", "transformer.ln_f")
_NEOX = ("gpt_neox.layers.{}", "gpt_neox.layers.{}.mlp.dense_4h_to_h", "gpt_neox.embed_in", "gpt_neox.final_layer_norm")
_OPT = ("model.decoder.layers.{}", "model.decoder.layers.{}.fc2", "model.decoder.embed_tokens")
FAMILIES: dict[str, ModelSpec] = {
    "llama": ModelSpec("llama", *_LLAMA, "linear"),
    "mistral": ModelSpec("mistral", *_LLAMA, "linear"),
    "qwen2": ModelSpec("qwen2", *_LLAMA, "linear"),
    "qwen3": ModelSpec("qwen3", *_LLAMA, "linear"),
    "gemma2": ModelSpec("gemma2", *_LLAMA, "linear"),
    "gemma3_text": ModelSpec("gemma3_text", *_LLAMA, "linear"),
    "phi3": ModelSpec("phi3", *_LLAMA, "linear"),
    "gpt2": ModelSpec("gpt2", "transformer.h.{}", "transformer.h.{}.mlp.c_proj", *_GPT, "conv1d"),
    "gptj": ModelSpec("gptj", "transformer.h.{}", "transformer.h.{}.mlp.fc_out", *_GPT, "linear"),
    "gpt_neox": ModelSpec("gpt_neox", *_NEOX, "linear"),
    "opt": ModelSpec("opt", *_OPT, "model.decoder.final_layer_norm", "linear"),
}
"""Model families by `config.model_type`. Others are refused: a wrong guess would damage the model silently."""
BALANCED = "balanced"
"""The device that is all GPUs together; accelerate's name for it."""
_DEVICES = "`device: auto`, cpu, cuda, cuda:1 or balanced (or --device)"
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_USE_ONE = f"use a dense model of one of these families: {', '.join(sorted(FAMILIES))}"


@dataclass(slots=True)
class Base:
    """A loaded model with its tokenizer. Weights are those of the checkpoint unless `versions` put others in.

    `device` is where the final norm is: what is computed between the blocks lives there. A model that is spread over
    GPUs has its other blocks elsewhere; whatever is done with a weight is done where that weight is.
    """

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
        """The longest text that the model reads in one way: beyond it, longrope (Phi-3) would turn every angle."""
        config = self.network.config
        rope = getattr(config, "rope_parameters", None) or {}
        longest = rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else None
        return int(longest or config.max_position_embeddings)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights are served in."""
        return self.weight(self.spec.down_name(0)).dtype

    @property
    def cache_name(self) -> str:
        """What transformers calls the keys and values of earlier tokens: `past_key_values` up to 5.23, then `cache`."""
        taken = inspect.signature(type(self.network.base_model).forward).parameters
        return "cache" if "cache" in taken else "past_key_values"

    def logits(self, states: Tensor) -> Tensor:
        """Logits [..., vocabulary] of states [..., d] after the final norm, with the family's softcap: in float32, or
        float64 where the model is."""
        found: Tensor = self.network.get_output_embeddings()(states).to(self.device)
        found = found if found.dtype == torch.float64 else found.float()
        limit = getattr(self.network.config, "final_logit_softcapping", None)
        return limit * torch.tanh(found / limit) if limit else found

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
    """`auto` is cuda where there is one, else cpu. Raises ModelError for a device that is not known or not there."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ModelError(f"device {wanted!r} is not known", hint=_DEVICES) from error
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"device {wanted!r} is not supported", hint=_DEVICES)
    if device.type == "cuda" and (device.index or 0) >= (there := torch.cuda.device_count()):
        raise ModelError(f"device {wanted}: this machine has {there} CUDA devices", hint=_DEVICES)
    return device


def spec_of(model_type: str) -> ModelSpec:
    """The spec of a `config.model_type`. Raises ModelError for an unknown family."""
    if model_type not in FAMILIES:
        raise ModelError(f"model family {model_type!r} is not known to the editor", hint=_USE_ONE)
    return FAMILIES[model_type]


def read_config(folder: Path) -> tuple[Any, ModelSpec]:
    """A checkpoint's configuration and its family. Raises ModelError where the editor could not edit such a model:
    quantised weights, a mixture of experts, attention that looks ahead, a family that is unknown here or there."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'}: {error}".splitlines()[0], hint=_USE_ONE) from error
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{folder}: the weights are quantised", hint="use the unquantised checkpoint of this model")
    if any((getattr(config, name, None) or 0) > 1 for name in _EXPERTS):
        raise ModelError(f"{folder}: a mixture of experts has no single down-projection in a layer", hint=_USE_ONE)
    if getattr(config, "use_bidirectional_attention", False):
        raise ModelError(f"{folder}: its attention looks ahead, so it is no causal language model", hint=_USE_ONE)
    return config, spec_of(config.model_type)


def load_base(folder: Path, *, fingerprint: str, device: str = "auto", dtype: str = "auto") -> Base:
    """Load a checkpoint folder (safetensors only, no remote code) in eval mode without gradients.

    `device`: as `choose_device`, or `balanced`: the blocks are spread over all GPUs by accelerate. `dtype`: auto (the
    checkpoint's), float32, bfloat16, float16, float64. Raises ModelError for what `read_config` refuses, files that
    cannot be read, a slow tokenizer (its offsets cannot be trusted), down-projections that are fused or of a kind of
    their own, and a model that does not fit the GPUs.
    """
    place = None if device == BALANCED else choose_device(device)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # kbsync draws its own, where wanted
    config, spec = read_config(folder)
    network: Any
    tokenizer: Any
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, use_fast=True)
        network = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            device_map=device if device == BALANCED else None,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{folder}: cannot be read: {error}".splitlines()[0], hint="bring the model's files there anew"
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(f"{folder}: no fast tokenizer", hint="add tokenizer.json to the model's folder")
    if place is not None:
        network.to(place)
    return base_of(network, tokenizer, spec, fingerprint)


def base_of(network: Any, tokenizer: Any, spec: ModelSpec, fingerprint: str) -> Base:
    """The base of a network that is in its place. Raises ModelError where a part that the editor needs is missing, is
    of another kind than the family's, or is offloaded (its weights are not there to be edited)."""
    network.eval().requires_grad_(False)
    kind = Conv1D if spec.orientation == "conv1d" else nn.Linear
    for layer in range(network.config.num_hidden_layers):
        module = _part(network, spec, spec.down_name(layer))
        if type(module) is not kind or not module.weight.dtype.is_floating_point:  # a subclass may be quantised
            raise ModelError(
                f"{spec.down_name(layer)} is a {type(module).__name__} in {module.weight.dtype}, not a plain matrix",
                hint="use the model's unquantised checkpoint without adapters (merge them first)",
            )
    if any(parameter.is_meta for parameter in network.parameters()) or _offloaded(network):
        raise ModelError(
            "the model does not fit the GPUs: some of its blocks would be offloaded",
            hint="`dtype: bfloat16`, more GPUs, or `device: cpu`; kbsync doctor --model says what it needs",
        )
    norm = _part(network, spec, spec.final_norm)
    return Base(network, tokenizer, spec, fingerprint, next(norm.parameters()).device)


def _part(network: Any, spec: ModelSpec, name: str) -> nn.Module:
    try:
        found: nn.Module = network.get_submodule(name)
    except AttributeError as error:
        raise ModelError(
            f"this {spec.family} model has no {name}: a variant that is not known", hint=_USE_ONE
        ) from error
    return found


def _offloaded(network: Any) -> bool:
    """Whether accelerate put blocks on the CPU beside GPUs, or on disk."""
    places = {str(place) for place in getattr(network, "hf_device_map", {}).values()}
    return "disk" in places or (len(places) > 1 and "cpu" in places)
