"""Tiny real models built in code in a fraction of a second: random weights, a real fast tokenizer, no download.

base = tiny_llama()                              # 6 layers, grouped-query attention
base = tiny_llama(square=True)                   # d == f: orientation cannot be guessed from the shape
base = tiny_gpt2(dtype=torch.float64)            # Conv1D orientation
folder = save(base, tmp_path / "model")          # a folder that `load_base` reads
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kbsync.editor.model import FAMILIES, Base
from kbsync.editor.preset import Preset
from kbsync.editor.statistics import Statistics
from kbsync.facts import EditRequest, FactKey

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
    device: str = "cpu",
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
        _exact_norms(network)
    return _base(network, "llama", dtype, device, bos)


def tiny_gpt2(
    *, square: bool = False, dtype: torch.dtype = torch.float32, device: str = "cpu", bos: bool = False, seed: int = 0
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


def _base(network: Any, family: str, dtype: torch.dtype, device: str, bos: bool) -> Base:
    network.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return Base(
        network=network,
        tokenizer=tiny_tokenizer(bos=bos),
        spec=FAMILIES[family],
        fingerprint=f"tiny-{family}",
        device=torch.device(device),
    )


def _exact_norms(network: nn.Module) -> None:
    """transformers' RMSNorm computes in float32 whatever the dtype: in float64 that would hide what is compared."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                norm.load_state_dict(child.state_dict())
                setattr(parent, name, norm)
