"""The engine against the oracle: MEMIT written plainly (`plain.py`), on the same model, settings and facts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from kbsync.editor.memit import insert
from kbsync.editor.model import Base
from kbsync.editor.plain import plain_insert, plain_targets
from kbsync.editor.preset import Preset
from kbsync.editor.targets import Target, compute_targets
from kbsync.errors import EditError
from kbsync.versions.delta import Delta
from tests.tiny import CONTEXTS, FACTS, VARIANTS, tiny, tiny_gpt2, tiny_llama, tiny_preset, tiny_statistics

MODELS: dict[str, Callable[..., Base]] = {
    "llama, grouped queries": tiny_llama,
    "llama, square": lambda **given: tiny_llama(square=True, **given),
    "llama, BOS": lambda **given: tiny_llama(bos=True, **given),
    "gpt2": tiny_gpt2,
    "gpt2, square": lambda **given: tiny_gpt2(square=True, **given),
    "gemma2, BOS": lambda **given: tiny("gemma2", bos=True, **given),
    **{variant: partial(tiny, variant) for variant in VARIANTS},
}
EVERY = pytest.mark.parametrize("model", MODELS)
SOME = pytest.mark.parametrize("model", ["llama, grouped queries", "gpt2, square", "gemma2, BOS", "gpt_neox"])
"""What does not depend on the family is tested on a few."""


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64."""
    return float((found.cpu().double() - expected.cpu().double()).norm() / expected.double().norm())


def products(delta: Delta) -> dict[str, Tensor]:
    """Δ [d, f] by module, in float64."""
    return {name: factors.left.double() @ factors.right.double() for name, factors in delta.factors.items()}


def worst(found: dict[str, Target], expected: dict[str, Target]) -> float:
    """The largest relative difference between target vectors."""
    assert found.keys() == expected.keys()
    return max(relative(found[digest].z, expected[digest].z) for digest in expected)


def arbitrary_targets(base: Base) -> dict[str, Target]:
    """Target vectors that nothing was optimised for: the insertion is the same function of any."""
    generator = torch.Generator().manual_seed(5)
    d = base.network.config.hidden_size
    return {
        fact.digest: Target(torch.randn(d, dtype=torch.float64, generator=generator), 1.0, 1, False) for fact in FACTS
    }


def assert_delta_is_the_oracles(base: Base, preset: Preset, protected: dict[str, Tensor] | None = None) -> None:
    statistics, targets = tiny_statistics(base, preset), arbitrary_targets(base)
    expected = plain_insert(base, FACTS[2:], targets, statistics, preset, protected=protected)
    found = insert(base, FACTS[2:], targets, statistics, preset, protected=protected)
    for name, delta in products(found.delta).items():
        assert relative(delta, expected[name]) < 1e-8
    assert max(found.residual.values()) < 1e-10


@EVERY
def test_in_float64_the_targets_are_the_oracles_to_1e_8(model: str, device: str) -> None:
    base = MODELS[model](dtype=torch.float64, device=device)
    preset = tiny_preset(steps=4)
    found = compute_targets(base, FACTS, CONTEXTS, preset)
    expected = plain_targets(base, FACTS, CONTEXTS, preset)
    assert worst(found, expected) < 1e-8
    assert all(abs(found[key].loss - expected[key].loss) < 1e-8 for key in expected)
    assert all(found[key].steps == preset.steps for key in expected)


@EVERY
def test_for_given_targets_delta_is_the_oracles(model: str, device: str) -> None:
    base = MODELS[model](dtype=torch.float64, device=device)
    assert_delta_is_the_oracles(base, tiny_preset())


@SOME
def test_delta_is_the_oracles_with_keys_averaged_as_in_the_paper(model: str, device: str) -> None:
    base = MODELS[model](dtype=torch.float64, device=device)
    assert_delta_is_the_oracles(base, tiny_preset(key_average="mean"))


@SOME
def test_earlier_keys_are_protected_as_in_the_oracle(model: str, device: str) -> None:
    base = MODELS[model](dtype=torch.float64, device=device)
    preset = tiny_preset()
    earlier = insert(base, FACTS[:2], arbitrary_targets(base), tiny_statistics(base, preset), preset).delta
    keys = {name: factors.keys for name, factors in earlier.factors.items()}
    assert_delta_is_the_oracles(base, preset, keys)


@SOME
def test_in_float32_delta_agrees_to_1e_4_and_the_loss_to_1e_2(model: str, device: str) -> None:
    base = MODELS[model](device=device)
    preset = tiny_preset()
    statistics = tiny_statistics(base, preset)
    expected = plain_targets(base, FACTS, CONTEXTS, preset)
    found = compute_targets(base, FACTS, CONTEXTS, preset)
    for digest, target in expected.items():
        assert found[digest].loss == pytest.approx(target.loss, abs=1e-2)
    deltas = plain_insert(base, FACTS, expected, statistics, preset)
    for name, delta in products(insert(base, FACTS, expected, statistics, preset).delta).items():
        assert relative(delta, deltas[name]) < 1e-4


@pytest.mark.parametrize("model", ["llama, grouped queries", "gemma2, BOS"])
def test_a_fact_that_stops_early_is_stopped_where_the_oracle_stops_it(model: str, device: str) -> None:
    base = MODELS[model](dtype=torch.float64, device=device)
    preset = tiny_preset(stop_loss=4.0, steps=20)
    found = compute_targets(base, FACTS, CONTEXTS, preset)
    expected = plain_targets(base, FACTS, CONTEXTS, preset)
    assert {key: target.steps for key, target in found.items()} == {key: t.steps for key, t in expected.items()}
    assert len({target.steps for target in expected.values()}) > 1
    assert worst(found, expected) < 1e-8


@pytest.mark.parametrize("budget", [64, 200, 100_000])
def test_how_facts_are_packed_changes_no_target(budget: int, device: str) -> None:
    base = tiny_llama(dtype=torch.float64, device=device)
    whole = compute_targets(base, FACTS, CONTEXTS, tiny_preset())
    assert worst(compute_targets(base, FACTS, CONTEXTS, tiny_preset(token_budget=budget)), whole) < 1e-10


def test_one_fact_alone_with_the_bare_prompt_only_is_the_oracles(device: str) -> None:
    base = tiny_llama(dtype=torch.float64, device=device)
    preset = tiny_preset()
    for fact in FACTS:
        found = compute_targets(base, [fact], ("{}",), preset)
        assert worst(found, plain_targets(base, [fact], ("{}",), preset)) < 1e-8


@SOME
def test_the_models_weights_are_bit_for_bit_what_they_were(model: str, device: str) -> None:
    base = MODELS[model](device=device)
    preset = tiny_preset()
    before = {name: value.clone() for name, value in base.network.state_dict().items()}
    insert(base, FACTS, compute_targets(base, FACTS, CONTEXTS, preset), tiny_statistics(base, preset), preset)
    assert all(torch.equal(value, before[name]) for name, value in base.network.state_dict().items())


def test_each_finished_fact_is_handed_over_at_once(device: str) -> None:
    base = tiny_llama(device=device)
    seen: list[str] = []
    found = compute_targets(base, FACTS, CONTEXTS, tiny_preset(), done=lambda request, _: seen.append(request.digest))
    assert sorted(seen) == sorted(found)


def test_the_same_facts_give_the_same_delta_twice(device: str) -> None:
    base = tiny_llama(device=device)
    preset = tiny_preset()
    deltas = []
    for _ in range(2):
        targets = compute_targets(base, FACTS, CONTEXTS, preset)
        deltas.append(insert(base, FACTS, targets, tiny_statistics(base, preset), preset).delta)
    for name, factors in deltas[0].factors.items():
        assert torch.equal(factors.left, deltas[1].factors[name].left)
        assert torch.equal(factors.right, deltas[1].factors[name].right)


def test_a_target_that_is_not_finite_is_refused(device: str) -> None:
    base = tiny_llama(device=device)
    preset = tiny_preset()
    targets = compute_targets(base, FACTS, CONTEXTS, preset)
    spoilt = targets[FACTS[0].digest]
    targets[FACTS[0].digest] = Target(spoilt.z * float("nan"), spoilt.loss, spoilt.steps, spoilt.clamped)
    with pytest.raises(EditError, match="not finite"):
        insert(base, FACTS, targets, tiny_statistics(base, preset), preset)
