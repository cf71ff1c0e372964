"""Tiny real models built in code in a fraction of a second: random weights, a real fast tokenizer, no download.

base = tiny_llama()                              # 6 layers, grouped-query attention
base = tiny_llama(square=True)                   # d == f: orientation cannot be guessed from the shape
base = tiny_gpt2(dtype=torch.float64)            # Conv1D orientation
base = tiny("gemma2", dtype=torch.float64)       # any family of VARIANTS
folder = save(base, tmp_path / "model")          # a folder that `load_base` reads
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.masking_utils import eager_mask

from kbsync.editor.model import FAMILIES, Base, base_of
from kbsync.editor.preset import Preset
from kbsync.editor.statistics import Statistics
from kbsync.facts import EditRequest, FactKey

DEVICE = "cpu"
"""Where models are made unless it is said: the `device` fixture sets it, so every test that has it runs there."""
LAYERS = 6
WIDTH = 32
VOCABULARY = 384
END = "<|endoftext|>"
TEXT = [
    "Betelgeuse belongs to the constellation of Orion. Vega belongs to the constellation of Lyra.",
    "The capital of France is Paris. The capital of Italy is Rome. The mother tongue of Danielle is French.",
    "Therefore the people of the city went home, because it was late. I think that you are a star.",
]
CONTEXTS = (
    "{}",
    "The people of the city. {}",
    "Therefore it was late and they went home. {}",
    "I think that you {a} star. {}",
)


def request(prompt: str, subject: str, target: str) -> EditRequest:
    """An edit request as the planner would make it."""
    return EditRequest(FactKey("relation", subject), prompt, subject, target)


FACTS = [
    request("Betelgeuse belongs to the constellation of", "Betelgeuse", "Lyra"),
    request("The capital of France is", "France", "Rome"),
    request("The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "English"),
    request("Vega", "Vega", "Orion"),
    request("In the city of Zürich people speak", "Zürich", "日本語"),
]
"""The subject first, in the middle and last; objects of one token and of many; letters beyond ASCII."""


_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GROUPED = {"num_key_value_heads": 2}
_NEOX = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
_LOCAL = {"sliding_window": 5}
"""Shorter than most texts of the tests."""
_GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 20, **_GROUPED, **_LOCAL}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True, **_GROUPED},
    "llama, with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, **_GROUPED},
    "mistral": {"model_type": "mistral", **_GROUPED, **_LOCAL},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, **_GROUPED},
    "qwen2, sliding from layer 3": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "max_window_layers": 3,
        **_GROUPED,
        **_LOCAL,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 12, **_GROUPED},
    "gemma2": {
        "model_type": "gemma2",
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 4.0,
        "tie_word_embeddings": True,
        **_GEMMA,
    },
    "gemma3": {"model_type": "gemma3_text", "sliding_window_pattern": 3, "tie_word_embeddings": True, **_GEMMA},
    "phi3": {"model_type": "phi3", "partial_rotary_factor": 0.5, **_GROUPED, **_LOCAL},
    "gpt2": {"model_type": "gpt2", "n_inner": 64},
    "gptj": {"model_type": "gptj", "rotary_dim": 4, "n_inner": 64, "tie_word_embeddings": False},
    "gpt_neox": {"model_type": "gpt_neox", **_NEOX},
    "gpt_neox, not parallel": {"model_type": "gpt_neox", "use_parallel_residual": False, **_NEOX},
    "opt": {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": WIDTH, "tie_word_embeddings": True},
}
"""What is particular to each model: every family of the editor, each with what it alone has."""


def tiny(
    variant: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    bos: bool = False,
    seed: int = 0,
    **changes: Any,
) -> Base:
    """A random model of VARIANTS, of transformers' own class: 6 layers, d 32, f 48 or 64; biases and norms random too.

    `changes` go into its configuration.
    """
    settings = _SHAPE | VARIANTS[variant] | changes
    family = settings.pop("model_type")
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:  # biases begin as zeros, norms as ones
                parameter += 0.15 * torch.randn(parameter.shape)
    if dtype == torch.float64:
        _exact(network)
    return _base(network, family, dtype, device, bos)


@cache
def _tokenizer_json(bos: bool) -> str:
    """A byte-level BPE trained on TEXT; with `bos` every text begins with the special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    byte_level = processors.ByteLevel(trim_offsets=True)
    begin = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    tokenizer.post_processor = processors.Sequence([byte_level, begin]) if bos else byte_level
    return tokenizer.to_str()


def tiny_tokenizer(*, bos: bool = False) -> Any:
    """A real fast tokenizer with 384 tokens that covers every byte."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json(bos)), bos_token=END, eos_token=END, pad_token=END
    )


def tiny_llama(
    *,
    square: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    bos: bool = False,
    seed: int = 0,
) -> Base:
    """A random Llama: 6 layers, d 32, f 48 (32 with `square`), 4 heads on 2 key-value heads, tied embeddings."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=WIDTH if square else 48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.15,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    network = LlamaForCausalLM(config)
    if dtype == torch.float64:
        _exact(network)
    return _base(network, "llama", dtype, device, bos)


def tiny_gpt2(
    *,
    square: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    bos: bool = False,
    seed: int = 0,
) -> Base:
    """A random GPT-2: 6 layers, d 32, f 64 (32 with `square`), 4 heads, Conv1D, tied embeddings."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_inner=WIDTH if square else 64,
        n_layer=LAYERS,
        n_head=4,
        n_positions=128,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return _base(GPT2LMHeadModel(config), "gpt2", dtype, device, bos)


def tiny_preset(**changes: Any) -> Preset:
    """Settings under which a tiny model moves: a fixed number of steps unless `stop_loss` is given."""
    settings: dict[str, Any] = {
        "name": "tiny",
        "layers": (1, 2, 3),
        "covariance_weight": 3.0,
        "clamp": 1.5,
        "rate": 0.5,
        "steps": 8,
        "stop_loss": 0.0,
        "token_budget": 512,
        "chat_context": False,
    }
    return Preset.model_validate(settings | changes)


def tiny_statistics(base: Base, preset: Preset, *, contexts: Sequence[str] = CONTEXTS, rows: int = 500) -> Statistics:
    """Statistics with random covariances of about the size of real ones, from `rows` random keys."""
    generator = torch.Generator().manual_seed(7)
    covariance = {}
    for layer in preset.layers:
        name = base.spec.down_name(layer)
        keys = torch.randn(rows, base.weight(name).shape[1], dtype=torch.float64, generator=generator)
        covariance[name] = 0.01 * keys.T @ keys / rows
    return Statistics(
        contexts=tuple(contexts),
        covariance=covariance,
        tokens=rows,
        error=dict.fromkeys(covariance, 0.1),
        holdout=torch.randint(1, VOCABULARY, (4, 16), generator=generator),
        fingerprint=base.fingerprint,
    )


def save(base: Base, folder: Path) -> Path:
    """Write the model and its tokenizer as a checkpoint folder (safetensors) and return it."""
    base.network.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


def _base(network: Any, family: str, dtype: torch.dtype, device: str | None, bos: bool) -> Base:
    network.to(device=device or DEVICE, dtype=dtype)
    return base_of(network, tiny_tokenizer(bos=bos), FAMILIES[family], f"tiny-{family}")


def _exact(network: Any) -> None:
    """transformers' norms and softcapped attention compute in float32 whatever the dtype: in float64 that would hide
    what is compared. Both are replaced by the same formulae without the casts."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, _rms_norm(child))
    if network.config._attn_implementation == "eager":
        network.set_attn_implementation("tests_exact")


def _rms_norm(module: Any) -> nn.RMSNorm:
    """Gemma's norms multiply by 1 + their weight."""
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    norm = nn.RMSNorm(module.weight.shape[0], eps=eps)
    norm.weight.data = module.weight.data + (1 if type(module).__name__.startswith("Gemma") else 0)
    return norm


def _exact_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scaling: float, softcap: float, **_: Any
) -> tuple[Tensor, None]:
    key, value = (one.repeat_interleave(module.num_key_value_groups, dim=1) for one in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scaling / softcap) + mask
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("tests_exact", _exact_attention)
AttentionMaskInterface.register("tests_exact", eager_mask)
