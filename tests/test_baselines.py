"""FT-W and ROME on tiny real models, against the same written plainly."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kbsync.editor import plain
from kbsync.editor.answers import log_probabilities
from kbsync.editor.baselines import FineTuning, finetune, rome, rome_settings
from kbsync.editor.model import Base, weights_in
from kbsync.editor.targets import compute_targets
from kbsync.errors import UsageError
from tests.tiny import CONTEXTS, FACTS, tiny_gpt2, tiny_llama, tiny_preset, tiny_statistics

both = pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
SETTINGS = rome_settings(tiny_preset(), layer=2)


def weights(base: Base) -> dict[str, Tensor]:
    """All that the network holds."""
    return {name: one.clone() for name, one in base.network.state_dict().items()}


def loss(base: Base) -> float:
    """Mean over the facts of -log P per token of the object."""
    scored = log_probabilities(base, [(fact.prompt, fact.target) for fact in FACTS])
    return -sum(one.mean_log_probability for one in scored) / len(scored)


@both
def test_fine_tuning_lowers_the_loss_in_one_matrix_and_leaves_the_network_alone(
    make: Callable[..., Base], device: str
) -> None:
    base = make(device=device)
    before, kept = loss(base), weights(base)
    deltas = finetune(base, FACTS, FineTuning(layer=3, rate=2e-2, weight_decay=0.0))
    assert all(torch.equal(kept[name], one) for name, one in weights(base).items())
    ((name, delta),) = deltas.items()
    assert name == base.spec.down_name(3)
    assert delta.dtype == torch.float64
    with weights_in(base, {name: base.weight(name).double() + delta}):
        assert loss(base) < 0.7 * before


@both
def test_fine_tuning_is_adam_with_weight_decay_on_whole_sequences(make: Callable[..., Base]) -> None:
    """The same steps with the network's own parameter, one fact at a time, losses added up."""
    base, settings = make(dtype=torch.float64), FineTuning(layer=2, steps=4, rate=1e-3, batch=3)
    found = finetune(base, FACTS, settings)
    parameter = base.network.get_parameter(f"{base.spec.down_name(2)}.weight").requires_grad_(True)
    before = base.weight(base.spec.down_name(2)).clone()
    decay = 5**-0.87028798 * math.exp(0.15589562)
    adam = torch.optim.Adam([parameter], lr=1e-3, weight_decay=decay)
    for _ in range(4):
        for group in (FACTS[:3], FACTS[3:]):
            adam.zero_grad()
            for fact in group:
                start = len(base.tokenizer(fact.prompt).input_ids)
                ids = base.tokenizer(f"{fact.prompt} {fact.target}", return_tensors="pt").input_ids
                logs = base.network(ids).logits[0].log_softmax(-1)
                terms = [-logs[at - 1, ids[0, at]] for at in range(start, ids.shape[1])]
                (sum(terms) / len(terms) / len(group)).backward()  # type: ignore[union-attr]
            adam.step()
    expected = base.weight(base.spec.down_name(2)) - before
    assert torch.allclose(found[base.spec.down_name(2)], expected, atol=1e-7)


def test_fine_tuning_stops_where_the_loss_is_low() -> None:
    steps: list[int] = []
    base = tiny_llama()
    nothing = finetune(
        base, FACTS, FineTuning(3, stop_loss=100.0), progress=lambda _phase, done, _all: steps.append(done)
    )
    assert steps == [1]
    assert not nothing[base.spec.down_name(3)].any()


def test_the_default_layer_is_as_deep_as_the_authors_and_decay_falls_with_the_facts() -> None:
    assert FineTuning.of(tiny_llama()).layer == round(6 * 21 / 28)
    assert FineTuning(3).decay(1) == pytest.approx(math.exp(0.15589562))
    assert FineTuning(3).decay(10_000) == pytest.approx(0.000387, rel=0.01)
    assert FineTuning(3, weight_decay=0.2).decay(10_000) == 0.2


def plainly(base: Base, count: int) -> Tensor:
    """ROME's Δ after `count` facts by its own equation: k, h and v from whole sequences, a dense solve."""
    statistics = tiny_statistics(base, SETTINGS)
    name = base.spec.down_name(2)
    C = statistics.covariance[name]
    W = before = base.weight(name).clone()
    for fact in FACTS[:count]:
        with weights_in(base, {name: W}):
            text = plain._text(base, "{}", fact.prompt, fact.subject, "")
            z = compute_targets(base, [fact], CONTEXTS, SETTINGS)[fact.digest].z
            residual = z - plain._after(base, text, 2)
            texts = [plain._text(base, context, fact.prompt, fact.subject, "") for context in CONTEXTS]
            k = torch.stack([plain._key(base, text, 2) for text in texts]).mean(0)
        v = W @ k + residual
        direction = torch.linalg.solve(C, k)
        W = W + torch.outer(v - W @ k, direction) / (k @ direction)
        assert torch.allclose(W @ k, v, atol=1e-9)
    return W - before


@both
@pytest.mark.parametrize("count", [1, 3])
def test_rome_sets_each_key_to_its_value_one_fact_after_the_other(make: Callable[..., Base], count: int) -> None:
    base = make(dtype=torch.float64)
    kept = weights(base)
    found = rome(base, FACTS[:count], tiny_statistics(base, SETTINGS), SETTINGS)
    assert found.keys() == {base.spec.down_name(2)}
    expected = plainly(base, count)
    assert torch.allclose(found[base.spec.down_name(2)], expected, atol=1e-6 * float(expected.norm()))
    assert all(torch.equal(kept[name], one) for name, one in weights(base).items())


def test_rome_makes_the_object_more_probable(device: str) -> None:
    base = tiny_llama(device=device)
    before = loss(base)
    found = rome(base, FACTS, tiny_statistics(base, SETTINGS), SETTINGS)
    with weights_in(base, {name: base.weight(name).double() + delta for name, delta in found.items()}):
        assert loss(base) < before


def test_rome_takes_the_authors_settings_at_the_middle_layer() -> None:
    shortened = {"betas": (0.5, 0.9), "rate_decay": 0.2, "early_contexts": 1, "early_steps": 5, "stop_top": True}
    settings = rome_settings(tiny_preset(null_space=0.1, **shortened))
    assert (settings.layers, settings.steps, settings.clamp, settings.key_average) == ((2,), 20, 4.0, "mean")
    assert settings.null_space is None
    assert (settings.betas, settings.rate_decay, settings.stop_loss) == ((0.9, 0.999), 1.0, 0.05)
    assert (settings.early_contexts, settings.early_steps, settings.stop_top) == (None, 0, False)


def test_rome_of_several_layers_is_refused() -> None:
    base = tiny_llama()
    with pytest.raises(UsageError, match=r"one layer, not \[1, 2, 3\]"):
        rome(base, FACTS[:1], tiny_statistics(base, tiny_preset()), tiny_preset())
