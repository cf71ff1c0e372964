"""Insertion: what Δ does to the model, exact masters, low precision, restoring, refusals. Agreement with the oracle is
in test_oracle.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kbsync.editor import memit
from kbsync.editor.memit import Insertion, insert
from kbsync.editor.model import Base, weights_in
from kbsync.editor.plain import plain_insert
from kbsync.editor.targets import Target
from kbsync.errors import EditError
from kbsync.versions.delta import read_delta, write_delta
from tests.tiny import FACTS, tiny_gpt2, tiny_llama, tiny_preset, tiny_statistics

pytestmark = pytest.mark.usefixtures("device")


def random_targets(seed: int = 1) -> dict[str, Target]:
    """Some z for each fact."""
    generator = torch.Generator().manual_seed(seed)
    return {
        fact.digest: Target(torch.randn(32, dtype=torch.float64, generator=generator).float(), 0.0, 1, False)
        for fact in FACTS
    }


def products(insertion: Insertion) -> dict[str, Tensor]:
    return {name: one.left.double() @ one.right.double() for name, one in insertion.delta.factors.items()}


def edited(base: Base, insertion: Insertion) -> dict[str, Tensor]:
    return {name: base.weight(name).double().cpu() + change for name, change in products(insertion).items()}


def state(base: Base, text: str, layer: int) -> Tensor:
    """The unmodified forward's state after `layer` at the last token."""
    ids = torch.tensor([base.tokenizer(text)["input_ids"]]).to(base.device)
    found: Tensor = base.network(ids, output_hidden_states=True).hidden_states[layer + 1][0, -1]
    return found.cpu()


@pytest.mark.parametrize("layers", [(2,), (1, 2, 3), (0, 2, 3)], ids=str)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_weightless_covariance_brings_the_states_to_z(make: Callable[..., Base], layers: tuple[int, ...]) -> None:
    """As λ goes to 0 the edited model, run plainly, has z as its state at each subject, in layers with gaps too."""
    base = make(dtype=torch.float64, square=True)
    preset = tiny_preset(layers=layers, covariance_weight=1e-9)
    targets = random_targets()
    insertion = insert(base, FACTS, targets, tiny_statistics(base, preset, contexts=["{}"]), preset)
    with weights_in(base, edited(base, insertion)):
        for fact in FACTS:
            text = fact.prompt[: fact.prompt.index(fact.subject) + len(fact.subject)]
            assert torch.allclose(state(base, text, layers[-1]), targets[fact.digest].z.double(), atol=1e-4)


def test_column_is_the_requests_in_order() -> None:
    """Column j belongs to request j: without its target, its left column alone is smaller than the others'."""
    base = tiny_llama(dtype=torch.float64)
    preset = tiny_preset(layers=(2,))
    statistics, targets = tiny_statistics(base, preset), random_targets()
    text = FACTS[2].prompt[: FACTS[2].prompt.index(FACTS[2].subject) + len(FACTS[2].subject)]
    targets[FACTS[2].digest] = replace(targets[FACTS[2].digest], z=state(base, text, 2))
    (factors,) = insert(base, FACTS, targets, statistics, preset).delta.factors.values()
    assert factors.left[:, 2].norm() < 1e-12
    assert all(factors.left[:, column].norm() > 1 for column in (0, 1, 3, 4))
    assert factors.left.shape == (32, 5)
    assert factors.right.shape == factors.keys.shape == (5, 48)


def test_small_batches_with_keys_kept_are_one_batch() -> None:
    """On one layer, with keys and states read in the same text, batches one after the other with the earlier keys
    protected equal one batch of all (recursive least squares)."""
    base = tiny_llama(dtype=torch.float64)
    preset = tiny_preset(layers=(2,))
    statistics, targets = tiny_statistics(base, preset, contexts=["{}"]), random_targets()
    (name,) = statistics.covariance
    whole = products(insert(base, FACTS, targets, statistics, preset))[name]
    masters, keys = base.weight(name).double().cpu(), torch.empty(0, 48)
    for fact in FACTS:
        with weights_in(base, {name: masters}):
            step = insert(base, [fact], targets, statistics, preset, masters={name: masters}, protected={name: keys})
        masters = masters + products(step)[name]
        keys = torch.cat((keys, step.delta.factors[name].keys))
    assert torch.allclose(masters - base.weight(name).cpu(), whole, atol=1e-10)


def test_masters_are_what_the_cast_is_measured_on(device: str) -> None:
    """In bfloat16 the exact weights go in beside the network's cast, and the share of Δ that is lost is reported."""
    base = tiny_llama(dtype=torch.bfloat16, device=device)
    preset = tiny_preset()
    statistics = tiny_statistics(base, preset)
    generator = torch.Generator().manual_seed(3)
    noise = {
        name: 1e-4 * torch.randn(32, 48, dtype=torch.float64, generator=generator) for name in statistics.covariance
    }
    masters = {name: base.weight(name).double().cpu() + one for name, one in noise.items()}
    found = insert(base, FACTS, random_targets(), statistics, preset, masters=masters)
    for name, change in products(found).items():
        cast = (masters[name] + change).float().bfloat16().double()
        expected = float((cast - masters[name] - change).norm() / change.norm())
        assert found.effective[name] == pytest.approx(expected, rel=1e-3)
        assert 0 < found.effective[name] < 0.1
        assert found.delta.factors[name].left.dtype == torch.float32


def test_statistics_keep_the_factor_for_the_next_edit() -> None:
    """The second insertion with the same statistics factors no covariance again, and gives the same delta."""
    base = tiny_llama()
    preset = tiny_preset()
    statistics = tiny_statistics(base, preset)
    first = insert(base, FACTS[:2], random_targets(), statistics, preset)
    kept = dict(statistics.factors)
    second = insert(base, FACTS[:2], random_targets(), statistics, preset)
    assert len(kept) == 3
    assert all(statistics.factors[key] is value for key, value in kept.items())
    assert all(torch.equal(products(first)[name], change) for name, change in products(second).items())


def test_delta_can_be_written_and_read(tmp_path: Path) -> None:
    """What insertion makes is what the version store takes."""
    base = tiny_llama()
    preset = tiny_preset()
    made = insert(base, FACTS, random_targets(), tiny_statistics(base, preset), preset).delta
    read = read_delta(tmp_path, write_delta(tmp_path, made))
    assert all(torch.equal(factors.right, made.factors[name].right) for name, factors in read.factors.items())


def test_progress_counts_layers() -> None:
    """One unit of progress per edited layer."""
    base, seen = tiny_llama(), []
    preset = tiny_preset()
    insert(base, FACTS, random_targets(), tiny_statistics(base, preset), preset, progress=lambda *now: seen.append(now))
    assert seen == [("insert", done, 3) for done in (1, 2, 3)]


def test_weights_are_back_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure at the second layer leaves no trace of the first."""
    base = tiny_llama()
    preset = tiny_preset()
    before = {name: value.clone() for name, value in base.network.state_dict().items()}
    put, calls = memit._put, []

    def fail(*arguments: object) -> float:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return put(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(memit, "_put", fail)
    with pytest.raises(KeyboardInterrupt):
        insert(base, FACTS, random_targets(), tiny_statistics(base, preset), preset)
    assert all(torch.equal(value, before[name]) for name, value in base.network.state_dict().items())


def test_oracle_averages_keys_alike_with_the_bare_prompt_only() -> None:
    """With one context, both ways of averaging are that context's key."""
    base = tiny_llama(dtype=torch.float64)
    for average in ("half_empty", "mean"):
        preset = tiny_preset(key_average=average)
        statistics = tiny_statistics(base, preset, contexts=["{}"])
        found = products(insert(base, FACTS, random_targets(), statistics, preset))
        expected = plain_insert(base, FACTS, random_targets(), statistics, preset)
        assert all(torch.allclose(found[name], expected[name].cpu(), atol=1e-8) for name in expected)


def test_refusals() -> None:
    """Nothing to insert, no target, no statistics, no bare prompt, keys that are not finite."""
    base = tiny_llama()
    preset = tiny_preset()
    statistics, targets = tiny_statistics(base, preset), random_targets()
    with pytest.raises(EditError, match="nothing to insert"):
        insert(base, [], targets, statistics, preset)
    with pytest.raises(EditError, match="no target vector"):
        insert(base, FACTS, {}, statistics, preset)
    with pytest.raises(EditError, match=r"layers\.4\.mlp.*statistics"):
        insert(base, FACTS, targets, statistics, tiny_preset(layers=(3, 4)))
    with pytest.raises(EditError, match="bare prompt"):
        insert(base, FACTS, targets, tiny_statistics(base, preset, contexts=["So. {}"]), preset)
    base.set_weight(base.spec.down_name(0), torch.full((32, 48), torch.nan))
    with pytest.raises(EditError, match="not finite"):
        insert(base, FACTS, targets, statistics, preset)
