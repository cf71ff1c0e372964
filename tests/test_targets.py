"""Target vectors: what each setting means, facts that come and go, what is handed over when, refusals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kbsync.editor import targets
from kbsync.editor.layers import Layers
from kbsync.editor.plain import plain_targets
from kbsync.editor.rows import Row
from kbsync.editor.targets import Target, compute_targets
from kbsync.errors import EditError
from kbsync.facts import EditRequest
from tests.tiny import CONTEXTS, FACTS, VOCABULARY, request, tiny_llama, tiny_preset

pytestmark = pytest.mark.usefixtures("device")


def difference(one: dict[str, Target], other: dict[str, Target]) -> float:
    """The largest difference of two sets of z of the same facts."""
    assert list(one) == list(other)
    return max(float((one[digest].z - other[digest].z).abs().max()) for digest in one)


@pytest.mark.parametrize("changes", [
    {"kl_weight": 0.0},
    {"weight_decay": 0.0, "kl_weight": 2.0},
    {"clamp": 0.2},
    {"clamp": 0.2, "diverged_loss": 5.5},
    {"clamp": 100.0, "rate": 0.1},
    {"layers": (0,)},
    {"layers": (4,)},
    {"steps": 1},
    {"steps": 12, "stop_loss": 4.0},
    {"rate": 1.0, "rate_decay": 0.2},
    {"betas": (0.5, 0.9)},
    {"steps": 20, "stop_top": True},
    {"early_contexts": 2, "early_steps": 3},
    {"early_contexts": 1, "early_steps": 5, "stop_loss": 4.5},
], ids=str)  # fmt: skip
def test_every_setting_means_the_same_to_the_oracle(changes: dict[str, Any]) -> None:
    """Each term of the loss, the clamp, the layer, one step only, and facts that stop at different steps."""
    base = tiny_llama(dtype=torch.float64)
    preset = tiny_preset(token_budget=120, **changes)
    found, plain = compute_targets(base, FACTS, CONTEXTS, preset), plain_targets(base, FACTS, CONTEXTS, preset)
    assert difference(found, plain) < 1e-8
    for name in ("steps", "clamped", "diverged"):
        assert [getattr(one, name) for one in found.values()] == [getattr(one, name) for one in plain.values()]


def test_facts_that_are_done_make_room() -> None:
    """With an early stop facts leave at different steps, others enter, and each z is as if it were alone."""
    base = tiny_llama(dtype=torch.float64)
    preset = tiny_preset(steps=20, stop_loss=4.0, token_budget=60)
    together = compute_targets(base, FACTS, CONTEXTS, preset)
    alone: dict[str, Target] = {}
    for fact in FACTS:
        alone |= compute_targets(base, [fact], CONTEXTS, preset)
    assert len({target.steps for target in together.values()}) > 1
    assert difference(together, alone) < 1e-8


def test_bfloat16_model_has_float32_targets(device: str) -> None:
    """δ and Adam's moments are float32 whatever the model's dtype, so that small steps are not lost."""
    base = tiny_llama(dtype=torch.bfloat16, device=device)
    found = compute_targets(base, FACTS[:2], CONTEXTS, tiny_preset(clamp=100.0, rate=0.01, steps=3))
    assert all(target.z.dtype == torch.float32 and target.z.isfinite().all() for target in found.values())


def test_loss_is_the_models_own() -> None:
    """With z in place of the state, the unmodified model gives the object the probability that the loss says."""
    base = tiny_llama(dtype=torch.float64)
    preset = tiny_preset(kl_weight=0.0, weight_decay=0.0, clamp=100.0)
    fact = FACTS[1]
    (target,) = compute_targets(base, [fact], ["{}"], preset).values()
    encoded = base.tokenizer(f"{fact.prompt} {fact.target}", return_offsets_mapping=True)
    lookup = max(
        index for index, (start, _) in enumerate(encoded["offset_mapping"]) if start < len("The capital of France")
    )
    first = next(index for index, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(fact.prompt))

    def replace(_module: object, _inputs: object, hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[0, lookup] = target.z
        return hidden

    handle = base.layer(preset.layers[-1]).register_forward_hook(replace)
    log_probs = base.network(torch.tensor([encoded["input_ids"]]).to(base.device)).logits[0].log_softmax(dim=1)
    handle.remove()
    each = [log_probs[at - 1, encoded["input_ids"][at]] for at in range(first, len(encoded["input_ids"]))]
    assert target.loss == pytest.approx(-float(torch.stack(each).mean()), abs=1e-9)


def test_done_is_called_as_facts_finish() -> None:
    """Each finished fact is handed over before the next one is computed, and progress counts them."""
    base = tiny_llama()
    seen: list[EditRequest] = []
    counted: list[tuple[str, int, int]] = []
    found = compute_targets(
        base, FACTS, CONTEXTS, tiny_preset(token_budget=1, steps=2),
        progress=lambda *now: counted.append(now), done=lambda fact, _: seen.append(fact),
    )  # fmt: skip
    assert sorted(fact.digest for fact in seen) == sorted(found)
    assert counted == [("targets", done, len(FACTS)) for done in range(1, len(FACTS) + 1)]
    assert list(found) == [fact.digest for fact in FACTS]


def test_interrupted_search_keeps_what_was_done() -> None:
    """An exception from `done` (a full disk, a cancel) passes through; the facts before it were handed over."""
    seen: list[EditRequest] = []

    def stop(fact: EditRequest, _: Target) -> None:
        seen.append(fact)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute_targets(tiny_llama(), FACTS, CONTEXTS, tiny_preset(token_budget=1, steps=2), done=stop)
    assert len(seen) == 2


def test_same_request_twice_is_computed_once() -> None:
    """Requests are told apart by their digest."""
    calls: list[EditRequest] = []
    twice = [FACTS[0], FACTS[1], FACTS[0]]
    found = compute_targets(
        tiny_llama(), twice, CONTEXTS, tiny_preset(steps=1), done=lambda fact, _: calls.append(fact)
    )
    assert len(found) == len(calls) == 2


def test_logits_are_made_a_block_at_a_time_and_that_changes_no_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the objects' tokens and for the KL term alike."""
    base = tiny_llama(dtype=torch.float64)
    whole = compute_targets(base, FACTS, CONTEXTS, tiny_preset(kl_weight=1.0))
    logits, rows = Layers.logits, list[int]()

    def counted(layers: Layers, states: Tensor) -> Tensor:
        rows.append(len(states))
        return logits(layers, states)

    monkeypatch.setattr(Layers, "logits", counted)
    monkeypatch.setattr("kbsync.editor.objective.BLOCK", 2 * VOCABULARY)
    assert difference(compute_targets(base, FACTS, CONTEXTS, tiny_preset(kl_weight=1.0)), whole) < 1e-9
    assert max(rows) == 2


def test_gradients_are_not_kept() -> None:
    """The search leaves no gradient in the model."""
    base = tiny_llama()
    compute_targets(base, FACTS[:1], CONTEXTS, tiny_preset(steps=2))
    assert all(parameter.grad is None for parameter in base.network.parameters())


def test_nothing_asked_nothing_done() -> None:
    """No requests, no targets."""
    assert compute_targets(tiny_llama(), [], CONTEXTS, tiny_preset()) == {}


def test_refusals() -> None:
    """The last layer, contexts without the bare prompt, a fact that cannot be placed."""
    base = tiny_llama()
    with pytest.raises(EditError, match="layer 5 is the last"):
        compute_targets(base, FACTS, CONTEXTS, tiny_preset(layers=(5,)))
    with pytest.raises(EditError, match="bare prompt"):
        compute_targets(base, FACTS, CONTEXTS[1:], tiny_preset())
    with pytest.raises(EditError, match="not in the prompt"):
        compute_targets(base, [FACTS[0], request("The sky is", "Vega", "blue")], CONTEXTS, tiny_preset())


def test_a_search_that_is_not_finite_is_marked_and_ends_at_once() -> None:
    """A broken layer above L gives no number: nothing to write, and no reason to go on for all steps."""
    base = tiny_llama()
    base.set_weight(base.spec.down_name(4), torch.full((32, 48), torch.nan))
    for target in compute_targets(base, FACTS, CONTEXTS, tiny_preset()).values():
        assert target.diverged
        assert target.steps == 1


def test_a_fact_that_ends_at_the_clamp_with_a_high_loss_is_marked() -> None:
    """What a tight clamp keeps from being learned has diverged; what stays inside of it has not."""
    tight = compute_targets(tiny_llama(), FACTS, CONTEXTS, tiny_preset(clamp=0.01, diverged_loss=1.0))
    assert all(target.diverged and target.clamped for target in tight.values())
    wide = compute_targets(tiny_llama(), FACTS, CONTEXTS, tiny_preset(clamp=100.0, diverged_loss=1.0))
    assert not any(target.diverged for target in wide.values())


@pytest.mark.parametrize("room", [120, 250, 1000])
def test_out_of_memory_halves_the_budget_and_loses_no_fact(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fits at a time, each fact gets the target that it has with memory for all of them."""
    base = tiny_llama(dtype=torch.float64)
    whole = compute_targets(base, FACTS, CONTEXTS, tiny_preset(token_budget=4096))
    run, refused = Layers._run, []

    def short_of_memory(layers: Layers, hidden: Tensor, *rest: Any) -> Tensor:
        if len(hidden) > room:
            refused.append(len(hidden))
            raise torch.OutOfMemoryError("no room")
        return run(layers, hidden, *rest)

    monkeypatch.setattr(Layers, "_run", short_of_memory)
    found = compute_targets(base, FACTS, CONTEXTS, tiny_preset(token_budget=4096))
    assert difference(found, whole) < 1e-10
    assert {digest: target.steps for digest, target in found.items()} == {d: t.steps for d, t in whole.items()}
    assert refused or room == 1000


def rows_read(monkeypatch: pytest.MonkeyPatch, refused: Callable[[int, int], bool]) -> list[int]:
    """Refuse to read rows where `refused` (number of the reading, rows) says so. The answer: rows by reading."""
    read, seen = targets.read_rows, list[int]()

    def short_of_memory(layers: Layers, rows: Sequence[Row], *rest: Any) -> None:
        seen.append(len(rows))
        read(layers, rows, *rest)
        if refused(len(seen), len(rows)):
            raise torch.OutOfMemoryError("no room for what is kept of them")

    monkeypatch.setattr(targets, "read_rows", short_of_memory)
    return seen


ROWS = len(CONTEXTS) + 1
"""Of a fact."""


@pytest.mark.parametrize("facts", [1, 2, 3])
def test_what_is_kept_of_fresh_facts_may_not_fit_either(facts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller passes do not help there: fewer facts are let in, down to one."""
    base, preset = tiny_llama(dtype=torch.float64), tiny_preset(token_budget=4096)
    whole = compute_targets(base, FACTS, CONTEXTS, preset)
    seen = rows_read(monkeypatch, lambda _, rows: rows > facts * ROWS)
    assert difference(compute_targets(base, FACTS, CONTEXTS, preset), whole) < 1e-10
    assert seen[0] == len(FACTS) * ROWS
    assert 0 < sum(rows <= facts * ROWS for rows in seen) <= len(FACTS)


def test_facts_in_flight_go_on_where_no_other_fits_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were to come in go back to the queue, all of them, and lose nothing."""
    base, preset = tiny_llama(dtype=torch.float64), tiny_preset(token_budget=60, steps=20, stop_loss=4.0)
    whole = compute_targets(base, FACTS, CONTEXTS, preset)
    seen = rows_read(monkeypatch, lambda reading, _: reading in (2, 3))
    assert difference(compute_targets(base, FACTS, CONTEXTS, preset), whole) < 1e-10
    assert sum(seen) > len(FACTS) * ROWS  # some were read again


def test_without_room_for_what_is_kept_of_one_fact_the_search_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rows_read(monkeypatch, lambda *_: True)
    with pytest.raises(EditError, match=r"out of memory: not even '.+' alone fits"):
        compute_targets(tiny_llama(), FACTS, CONTEXTS, tiny_preset())


def test_without_room_for_one_fact_the_search_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halving ends where one fact does not fit."""

    def no_memory(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    base, preset = tiny_llama(), tiny_preset()
    monkeypatch.setattr("kbsync.editor.targets.missing_tokens", no_memory)
    with pytest.raises(EditError, match="out of memory"):
        compute_targets(base, FACTS, CONTEXTS, preset)
