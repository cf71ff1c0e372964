"""Models whose blocks are spread over devices by accelerate: the same targets, deltas and answers as in one place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model

from kbsync.editor.answers import answers
from kbsync.editor.memit import insert
from kbsync.editor.model import Base, base_of, load_base
from kbsync.editor.statistics import collect
from kbsync.editor.targets import compute_targets
from kbsync.errors import ModelError
from tests.tiny import CONTEXTS, FACTS, LAYERS, save, tiny, tiny_preset, tiny_statistics

FACT = FACTS[1:3]


def spread(base: Base, places: list[str], folder: Path) -> Base:
    """The model in the hands of accelerate: embeddings and first blocks in the first place, the rest in the last."""
    spec = base.spec
    above = {spec.layer.format(layer): places[layer * len(places) // LAYERS] for layer in range(LAYERS)}
    others = {name: places[0] for name, _ in base.network.named_modules() if name.endswith(("rotary_emb", "wpe"))}
    ends = {spec.embedding: places[0], spec.final_norm: places[-1], "lm_head": places[-1]}
    if spec.family == "opt":
        others["model.decoder.embed_positions"] = places[0]
    network = dispatch_model(base.network, above | others | ends, offload_dir=str(folder), force_hooks=True)
    return base_of(network, base.tokenizer, spec, base.fingerprint)


@pytest.fixture(params=["cpu and cpu", "cuda:0 and cuda:1"])
def places(request: pytest.FixtureRequest) -> list[str]:
    """Two places; with the CPU twice, accelerate's hooks are real and only the copies between devices are not."""
    found = str(request.param).split(" and ")
    if "cuda:1" in found and torch.cuda.device_count() < 2:
        pytest.skip("fewer than two CUDA devices on this machine; ends on a machine that has two")
    return found


@pytest.mark.parametrize("variant", ["llama", "gemma3", "gpt2", "gptj", "opt"])
def test_targets_and_delta_are_those_of_the_model_in_one_place(variant: str, places: list[str], tmp_path: Path) -> None:
    preset = tiny_preset(steps=3)
    whole, apart = (tiny(variant, dtype=torch.float64) for _ in range(2))
    apart = spread(apart, places, tmp_path)
    statistics = tiny_statistics(whole, preset)
    expected, found = (compute_targets(base, FACT, CONTEXTS, preset) for base in (whole, apart))
    for digest, target in expected.items():
        assert torch.allclose(found[digest].z, target.z, rtol=0, atol=1e-10)
    deltas = [insert(base, FACT, expected, statistics, preset).delta for base in (whole, apart)]
    for name, factors in deltas[0].factors.items():
        other = deltas[1].factors[name]
        assert torch.allclose(other.left @ other.right, factors.left @ factors.right, rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", ["llama", "opt"])
def test_statistics_and_answers_are_those_of_the_model_in_one_place(
    variant: str, places: list[str], tmp_path: Path
) -> None:
    whole, apart = tiny(variant), spread(tiny(variant), places, tmp_path)
    names = [whole.spec.down_name(layer) for layer in (1, 4)]
    blocks = [torch.arange(1, 20), torch.arange(30, 42)]
    expected, found = (collect(base, names, blocks)[0] for base in (whole, apart))
    for name in names:
        assert torch.allclose(found[name], expected[name], rtol=1e-4)
    prompts = [fact.prompt for fact in FACTS]
    assert [one.text for one in answers(apart, prompts)] == [one.text for one in answers(whole, prompts)]


def test_balanced_is_the_cpu_where_there_is_no_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device; runs where there is none")
    base = load_base(save(tiny("llama"), tmp_path / "model"), fingerprint="x", device="balanced")
    assert base.device.type == "cpu"
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in base.network.parameters())


def test_a_model_that_would_be_offloaded_is_refused(tmp_path: Path) -> None:
    """What lies on the disk between its uses cannot be edited; the error names what to do."""
    with pytest.raises(ModelError, match="offloaded") as caught:
        spread(tiny("llama"), ["cpu", "disk"], tmp_path)
    assert "dtype: bfloat16" in caught.value.hint
