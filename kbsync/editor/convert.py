"""GGUF -> a float32 safetensors folder that transformers loads like any other checkpoint.

For Llama-architecture models with a byte-level BPE tokenizer, which is what the embedded model is. The dequantised
weights are a model of their own: edits are valid for this copy, not for the checkpoint it was quantised from.
Sources: the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md) and llama.cpp's convert_hf_to_gguf.py, whose
row order of Q and K is undone here.

    convert_gguf(Path("SmolLM2-135M-Instruct.Q4_1.gguf"), Path("smollm2-135m"))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFReader, TokenType, dequantize, get_tensor_name_map
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kbsync.errors import ModelError
from kbsync.progress import Progress, silent

__all__ = ["convert_gguf"]


def convert_gguf(source: Path, folder: Path, *, progress: Progress = silent) -> Path:
    """Write model.safetensors (float32, tied embeddings kept tied), config and tokenizer to `folder`; return it.

    Raises ModelError for another architecture or kind of tokenizer than the ones named above.
    """
    reader = GGUFReader(source)
    values = _Metadata(source, {name: field.contents() for name, field in reader.fields.items()})
    values.expect("general.architecture", "llama")
    values.expect("tokenizer.ggml.model", "gpt2")
    values.expect("tokenizer.ggml.pre", "smollm")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(values, tied="output.weight" not in tensors)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    _tokenizer(values).save_pretrained(folder)
    save_file(_weights(config, tensors, progress), folder / "model.safetensors", metadata={"format": "pt"})
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, which would hide a shared cache from other users
    return folder


class _Metadata(dict[str, Any]):
    """The key-value part of a GGUF file."""

    def __init__(self, source: Path, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.source = source

    def expect(self, key: str, value: str) -> None:
        """Raise ModelError unless `key` has this value."""
        if self.get(key) != value:
            raise ModelError(
                f"{self.source}: {key} is {self.get(key)!r}, only {value!r} can be converted",
                hint="use the model's safetensors checkpoint",
            )


def _config(values: _Metadata, *, tied: bool) -> LlamaConfig:
    heads = int(values["llama.attention.head_count"])
    hidden = int(values["llama.embedding_length"])
    return LlamaConfig(
        vocab_size=len(values["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        intermediate_size=int(values["llama.feed_forward_length"]),
        num_hidden_layers=int(values["llama.block_count"]),
        num_attention_heads=heads,
        num_key_value_heads=int(values.get("llama.attention.head_count_kv", heads)),
        head_dim=int(values.get("llama.rope.dimension_count", hidden // heads)),
        max_position_embeddings=int(values["llama.context_length"]),
        rms_norm_eps=float(values["llama.attention.layer_norm_rms_epsilon"]),
        rope_parameters={"rope_type": "default", "rope_theta": float(values["llama.rope.freq_base"])},
        bos_token_id=int(values["tokenizer.ggml.bos_token_id"]),
        eos_token_id=int(values["tokenizer.ggml.eos_token_id"]),
        pad_token_id=int(values["tokenizer.ggml.padding_token_id"]),
        tie_word_embeddings=tied,
        dtype="float32",
        architectures=["LlamaForCausalLM"],
    )


def _weights(config: LlamaConfig, tensors: dict[str, Any], progress: Progress) -> dict[str, Tensor]:
    """Every parameter under transformers' name, taken from the GGUF tensors [float32]. Tied ones appear once."""
    with torch.device("meta"):
        wanted = [name for name, _ in LlamaForCausalLM(config).named_parameters()]
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    weights: dict[str, Tensor] = {}
    for done, name in enumerate(wanted, 1):
        weights[name] = _weight(name, tensors[names.get_name(name, try_suffixes=(".weight",)) or name], config)
        progress("convert", done, len(wanted))
    return weights


def _weight(name: str, tensor: Any, config: LlamaConfig) -> Tensor:
    """One dequantised parameter. llama.cpp interleaves the two halves of each rotary head of Q and K: undone here."""
    weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


def _tokenizer(values: _Metadata) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits every digit off (llama.cpp's pre-tokenizer `smollm`), with the chat template."""
    tokens: list[str] = values["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    built = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    built.decoder = decoders.ByteLevel()
    kinds = zip(tokens, values["tokenizer.ggml.token_type"], strict=True)
    built.add_special_tokens(
        [AddedToken(token, normalized=False) for token, kind in kinds if kind == TokenType.CONTROL]
    )
    make: Any = PreTrainedTokenizerFast  # transformers leaves its constructor unannotated
    tokenizer: PreTrainedTokenizerFast = make(
        tokenizer_object=built,
        bos_token=tokens[values["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[values["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[values["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[values["tokenizer.ggml.unknown_token_id"]],
        model_max_length=int(values["llama.context_length"]),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = values.get("tokenizer.chat_template")
    return tokenizer
