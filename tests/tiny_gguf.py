"""A tiny real GGUF file, written by the gguf library from the tiny Llama as llama.cpp's converter would."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, TokenType, get_tensor_name_map, quantize
from numpy.typing import NDArray

from kbsync.editor.model import Base
from tests.tiny import END, tiny_llama

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_tiny_gguf(
    path: Path,
    base: Base | None = None,
    *,
    architecture: str = "llama",
    pre: str = "smollm",
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
) -> Path:
    """Write `base` (default: the tiny Llama) to `path`, its matrices quantised as `kind`."""
    base = base or tiny_llama()
    writer = GGUFWriter(path, architecture)
    _write_shape(writer, base)
    _write_tokenizer(writer, base, pre)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, base.layers)
    for name, parameter in base.network.named_parameters():
        weight = _rotary_order(name, parameter.numpy(), base)
        stored = GGMLQuantizationType.F32 if weight.ndim == 1 else kind
        target = names.get_name(name, try_suffixes=(".weight",))
        assert target is not None
        writer.add_tensor(target, quantize(weight, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_shape(writer: GGUFWriter, base: Base) -> None:
    config = base.network.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _write_tokenizer(writer: GGUFWriter, base: Base, pre: str) -> None:
    model = json.loads(base.tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=lambda token: model["vocab"][token])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token == END else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id):
        add(0)
    writer.add_chat_template(CHAT_TEMPLATE)


def _rotary_order(name: str, weight: NDArray[np.float32], base: Base) -> NDArray[np.float32]:
    """llama.cpp's `permute`: the rows of each head of Q and K, pairwise instead of half by half."""
    config = base.network.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
