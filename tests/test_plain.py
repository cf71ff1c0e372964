"""The oracle itself, checked against what can be computed by hand."""

from __future__ import annotations

import pytest
import torch

from kbsync.editor.plain import plain_insert, plain_targets
from kbsync.editor.targets import Target
from tests.tiny import CONTEXTS, FACTS, tiny_gpt2, tiny_llama, tiny_preset, tiny_statistics


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_search_lowers_the_loss(make: type) -> None:
    """More steps, less loss: the gradient points where it should."""
    base = make(dtype=torch.float64)
    losses = [
        plain_targets(base, FACTS[:1], CONTEXTS, tiny_preset(clamp=100.0, rate=0.1, steps=steps))[FACTS[0].digest].loss
        for steps in (1, 10, 30)
    ]
    assert losses[0] > losses[1] > losses[2]


def test_first_step_leaves_the_state() -> None:
    """One step is one loss and no update: z is the state itself, and its loss the unmodified model's."""
    base = tiny_llama(dtype=torch.float64)
    (target,) = plain_targets(base, FACTS[1:2], ["{}"], tiny_preset(steps=1)).values()
    ids = base.tokenizer("The capital of France is Rome")["input_ids"]
    prompt = len(base.tokenizer("The capital of France is")["input_ids"])
    output = base.network(torch.tensor([ids]), output_hidden_states=True)
    log_probs = output.logits[0].log_softmax(dim=1)
    each = [log_probs[at - 1, ids[at]] for at in range(prompt, len(ids))]
    lookup = len(base.tokenizer("The capital of France")["input_ids"]) - 1
    assert target.steps == 1
    assert target.loss == pytest.approx(-float(torch.stack(each).mean()), abs=1e-12)
    assert torch.allclose(target.z, output.hidden_states[4][0, lookup], atol=1e-12)  # [0] is the embedding


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_weightless_covariance_brings_the_state_to_z(make: type, square: bool) -> None:
    """As λ goes to 0 a single layer does all that is asked: the edited model's state is z. Square matrices too, where a
    transposed Δ would fit and be wrong."""
    base = make(dtype=torch.float64, square=square)
    preset = tiny_preset(layers=(2,), covariance_weight=1e-9)
    statistics = tiny_statistics(base, preset, contexts=["{}"])
    generator = torch.Generator().manual_seed(1)
    facts = FACTS[:3]
    targets = {
        fact.digest: Target(torch.randn(32, dtype=torch.float64, generator=generator), 0.0, 1, False) for fact in facts
    }
    (delta,) = plain_insert(base, facts, targets, statistics, preset).values()
    name = base.spec.down_name(2)
    base.set_weight(name, base.weight(name) + delta)
    for fact in facts:
        ids = base.tokenizer(fact.prompt[: fact.prompt.index(fact.subject) + len(fact.subject)])["input_ids"]
        state = base.network(torch.tensor([ids]), output_hidden_states=True).hidden_states[3][0, -1]
        assert torch.allclose(state, targets[fact.digest].z, atol=1e-5)


def test_weights_are_put_back() -> None:
    """Insertion returns the change and leaves the model as it was."""
    base = tiny_gpt2()
    preset = tiny_preset()
    before = {name: value.clone() for name, value in base.network.state_dict().items()}
    targets = plain_targets(base, FACTS[:2], CONTEXTS, tiny_preset(steps=2))
    deltas = plain_insert(base, FACTS[:2], targets, tiny_statistics(base, preset), preset)
    assert all(torch.equal(value, before[name]) for name, value in base.network.state_dict().items())
    assert [tuple(delta.shape) for delta in deltas.values()] == [(32, 64)] * 3
