"""A converted GGUF is the model that was put into it, with its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from kbsync.editor.convert import convert_gguf
from kbsync.editor.model import load_base
from kbsync.errors import ModelError
from tests.tiny import END, TEXT, tiny_llama
from tests.tiny_gguf import CHAT_TEMPLATE, write_tiny_gguf


def test_converted_model_gives_the_logits_of_the_original_without_a_warning(tmp_path: Path) -> None:
    original = tiny_llama(seed=3)
    folder = convert_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", original), tmp_path / "model")
    converted = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)  # warnings are errors here
    ids = torch.arange(24).view(2, 12)
    torch.testing.assert_close(converted(ids).logits, original.network(ids).logits, rtol=0, atol=1e-6)
    assert converted.dtype == torch.float32
    assert converted.lm_head.weight is converted.model.embed_tokens.weight


def test_converted_folder_is_a_base_that_the_editor_takes(tmp_path: Path) -> None:
    folder = convert_gguf(write_tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "model")
    assert load_base(folder, fingerprint="x", device="cpu").spec.family == "llama"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_quantised_matrices_become_what_gguf_itself_makes_of_them(tmp_path: Path) -> None:
    original, kind = tiny_llama(square=True), GGMLQuantizationType.Q8_0
    folder = convert_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", original, kind=kind), tmp_path / "model")
    name = "model.layers.2.mlp.gate_proj.weight"
    found = AutoModelForCausalLM.from_pretrained(folder).get_parameter(name)
    expected = dequantize(quantize(original.network.get_parameter(name).numpy(), kind), kind)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=0, atol=0)


def test_tokenizer_is_the_one_in_the_file_with_special_tokens_and_chat_template(tmp_path: Path) -> None:
    original = tiny_llama()
    folder = convert_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", original), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in [*TEXT, "Łódź  is\n\nold", f"one{END}two"]:
        assert tokenizer(text).input_ids == original.tokenizer(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.eos_token, tokenizer.chat_template) == (END, CHAT_TEMPLATE)
    assert tokenizer.is_fast


def test_every_digit_is_a_token_of_its_own(tmp_path: Path) -> None:
    folder = convert_gguf(write_tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "model")
    assert AutoTokenizer.from_pretrained(folder).tokenize("in 1984")[-4:] == list("1984")


@pytest.mark.parametrize("wrong", [{"architecture": "qwen3"}, {"pre": "llama-bpe"}])
def test_other_architectures_and_tokenizers_are_refused(tmp_path: Path, wrong: dict[str, str]) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", **wrong)  # type: ignore[arg-type]  # only text is overridden
    with pytest.raises(ModelError, match=r"tiny\.gguf: .* can be converted"):
        convert_gguf(path, tmp_path / "model")
    assert not (tmp_path / "model").exists()
