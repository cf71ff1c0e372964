"""Every family whole: what it answers in batches, and what of a family is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kbsync.editor.answers import answers, log_probabilities
from kbsync.editor.contexts import sample_contexts
from kbsync.editor.memit import insert
from kbsync.editor.model import Base, base_of, load_base
from kbsync.editor.targets import compute_targets
from kbsync.errors import ModelError
from tests.tiny import CONTEXTS, FACTS, VARIANTS, save, tiny, tiny_preset, tiny_statistics

EVERY = pytest.mark.parametrize("variant", VARIANTS)


@EVERY
def test_answers_of_a_batch_are_those_of_each_prompt_alone(variant: str, device: str) -> None:
    """Prompts of unequal length are padded on the left; neither that nor a window nor the cache changes an answer."""
    base = tiny(variant, device=device)
    prompts = [fact.prompt for fact in FACTS]
    alone = [answers(base, [prompt], tokens=4)[0] for prompt in prompts]
    for together, one in zip(answers(base, prompts, tokens=4), alone, strict=True):
        assert together.text == one.text
        assert together.probability == pytest.approx(one.probability, rel=1e-3)


@EVERY
def test_scores_are_those_of_the_unmodified_models_logits(variant: str, device: str) -> None:
    """Softcap and head as the model itself applies them."""
    base = tiny(variant, device=device)
    pairs = [(fact.prompt, fact.target) for fact in FACTS[:3]]
    for (prompt, target), scored in zip(pairs, log_probabilities(base, pairs), strict=True):
        ids = base.tokenizer(f"{prompt} {target}")["input_ids"]
        start = len(base.tokenizer(prompt)["input_ids"])
        log_probs = base.network(torch.tensor([ids], device=device)).logits[0].log_softmax(-1)
        expected = sum(float(log_probs[at - 1, ids[at]]) for at in range(start, len(ids)))
        assert scored.log_probability == pytest.approx(expected, rel=1e-4)


@EVERY
def test_contexts_are_sampled_by_every_family(variant: str) -> None:
    base = tiny(variant)
    assert sample_contexts(base, 0) == sample_contexts(base, 0)
    assert sample_contexts(base, 0)[0] == "{}"


@pytest.mark.parametrize("variant", ["llama", "gemma2", "opt"])
def test_an_edit_leaves_tied_embeddings_and_head_as_they_are(variant: str) -> None:
    """`named_parameters` names a tied matrix once: here it is asked for by both of its names."""
    base = tiny(variant)
    head, embedding = base.network.get_output_embeddings().weight, base.network.get_input_embeddings().weight
    assert head is embedding
    before = embedding.clone()
    name = base.spec.down_name(2)
    base.set_weight(name, torch.randn(base.weight(name).shape))
    assert torch.equal(head, before)


def changed(base: Base, folder: Path, **settings: Any) -> Path:
    """The saved model with other settings in its config.json."""
    save(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


def test_a_mixture_of_experts_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="mixture of experts") as caught:
        load_base(changed(tiny("qwen3"), tmp_path, num_experts=8), fingerprint="x")
    assert "dense model" in caught.value.hint


@pytest.mark.parametrize("family", ["bloom", "of-tomorrow"])
def test_a_family_that_is_unknown_here_or_to_transformers_is_refused(family: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=family) as caught:
        load_base(changed(tiny("llama"), tmp_path, model_type=family), fingerprint="x")
    assert "gpt_neox" in caught.value.hint


def test_attention_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="looks ahead"):
        load_base(changed(tiny("gemma3"), tmp_path, use_bidirectional_attention=True), fingerprint="x")


def test_a_variant_without_a_final_norm_is_refused() -> None:
    """OPT-350m norms after its blocks and has none at the end."""
    with pytest.raises(ModelError, match="final_layer_norm"):
        tiny("opt", do_layer_norm_before=False)


def test_a_matrix_of_a_kind_of_its_own_is_refused() -> None:
    """A subclass of Linear may hold quantised numbers or an adapter: what it computes is not its weight alone."""

    class Wrapped(nn.Linear):
        pass

    base = tiny("llama")
    base.layer(2).mlp.down_proj = Wrapped(48, 32, bias=False)
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.down_proj is a Wrapped") as caught:
        base_of(base.network, base.tokenizer, base.spec, "x")
    assert "merge" in caught.value.hint


def test_with_longrope_a_text_ends_where_the_angles_would_change() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "partial_rotary_factor": 1.0}
    base = tiny("phi3", rope_parameters=rope | factors, original_max_position_embeddings=64)
    assert base.network.config.max_position_embeddings == 128
    assert base.max_tokens == 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EVERY
def test_half_precision_is_edited_from_float64_masters(variant: str, dtype: torch.dtype, device: str) -> None:
    """Served weights stay in their dtype and come back; targets are float32; the delta is not rounded to the dtype."""
    base, preset = tiny(variant, dtype=dtype, device=device), tiny_preset(steps=2)
    names = [base.spec.down_name(layer) for layer in preset.layers]
    before = {name: base.weight(name).clone() for name in names}
    targets = compute_targets(base, FACTS[:2], CONTEXTS, preset)
    insertion = insert(base, FACTS[:2], targets, tiny_statistics(base, preset), preset)
    assert {target.z.dtype for target in targets.values()} == {torch.float32}
    for name, factors in insertion.delta.factors.items():
        assert torch.equal(base.weight(name), before[name])
        delta = factors.left @ factors.right
        assert delta.isfinite().all()
        assert not torch.equal(delta, delta.to(dtype).float())
