"""Causal tracing against an oracle: the unmodified model run whole for each restoration, with plain hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kbsync.editor import tracing
from kbsync.editor.known import KnownFact
from kbsync.editor.model import Base
from kbsync.editor.tracing import KINDS, SITES, FactTrace, Kind, Settings, Tracer, subject_deviation, window
from kbsync.errors import EditError
from tests.tiny import VARIANTS, tiny, tiny_gpt2, tiny_llama

FACTS = [
    KnownFact("Betelgeuse", "Betelgeuse belongs to the constellation of", "Orion", "constellation"),
    KnownFact("Danielle Darrieux", "The mother tongue of Danielle Darrieux is", "French", "language"),
    KnownFact("Zürich", "In the city of Zürich people speak", "日本語", "language"),
]
"""The subject first and in the middle, of one token and of many."""
SETTINGS = Settings(samples=3, seed=5)
SIGMA = 0.4
ATTENTION = {"gpt2": "attn", "gptj": "attn", "gpt_neox": "attention"}
MLP = {"opt": "fc2"}
"""How families name what others call self_attn and mlp."""

Change = Callable[[Tensor], Tensor]


@contextmanager
def output_changed(module: nn.Module, change: Change) -> Iterator[None]:
    def hook(_module: nn.Module, _inputs: object, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class Oracle:
    """One fact, one whole forward pass of the unmodified model per restoration."""

    def __init__(self, base: Base, fact: KnownFact, settings: Settings) -> None:
        self.base, self.width = base, settings.window_of(base.layers)
        encoded = base.tokenizer(fact.prompt, return_offsets_mapping=True)
        start, end = fact.prompt.index(fact.subject), fact.prompt.index(fact.subject) + len(fact.subject)
        inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > start]
        self.subject = range(inside[0], inside[-1] + 1)
        self.ids = torch.tensor([encoded["input_ids"]] * settings.samples)
        self.answer = base.tokenizer(f"{fact.prompt} {fact.attribute}").input_ids[self.ids.shape[1]]
        tracer = Tracer(base, SIGMA, settings)
        self.noise = tracer.noise(
            fact, tracing._text(base, fact)
        )  # the same draws; what is done with them is not shared
        self.clean = self.run(noisy=False)
        self.corrupted = self.run(noisy=True)

    def modules(self, layer: int) -> dict[str, nn.Module]:
        block = self.base.layer(layer)
        return {
            "state": block,
            "mlp": block.get_submodule(MLP.get(self.base.spec.family, "mlp")),
            "attention": block.get_submodule(ATTENTION.get(self.base.spec.family, "self_attn")),
        }

    def run(self, *, noisy: bool, changes: dict[tuple[str, int], Change] | None = None) -> dict[Any, Tensor]:
        """Every module's output, and under "answer" the answer's mean probability, with `changes` to some outputs."""
        seen: dict[Any, Tensor] = {}

        def blur(embedded: Tensor) -> Tensor:
            blurred = embedded.clone()
            blurred[:, self.subject.start : self.subject.stop] += self.noise.to(embedded)
            return blurred

        def keep(name: str, layer: int) -> Change:
            def change(output: Tensor) -> Tensor:
                output = (changes or {}).get((name, layer), lambda same: same)(output)
                seen[name, layer] = output.clone()
                return output

            return change

        with ExitStack() as hooks:
            if noisy:
                hooks.enter_context(output_changed(self.base.module(self.base.spec.embedding), blur))
            for layer in range(self.base.layers):
                for name, module in self.modules(layer).items():
                    hooks.enter_context(output_changed(module, keep(name, layer)))
            logits = self.base.network(self.ids).logits[:, -1]
        seen["answer"] = logits.softmax(1)[:, self.answer].mean()
        return seen

    def put(self, source: dict[Any, Tensor], name: str, layer: int, token: int) -> Change:
        def change(output: Tensor) -> Tensor:
            rows = output.reshape(*self.ids.shape, -1).clone()  # OPT's MLP sees all rows as one
            rows[:, token] = source[name, layer].reshape(rows.shape)[:, token]
            return rows.view_as(output)

        return change

    def effect(self, kind: Kind, layer: int, token: int) -> float:
        """What restoring gains: the definition, word for word."""
        changes: dict[tuple[str, int], Change] = {}
        if kind in ("mlp", "attention"):
            first = max(0, layer - self.width // 2)
            for at in range(first, min(self.base.layers, layer + -(-self.width // 2))):
                changes[kind, at] = self.put(self.clean, kind, at, token)
        else:
            changes["state", layer] = self.put(self.clean, "state", layer, token)
        if kind.endswith("_severed"):
            name = kind.removesuffix("_severed")
            for at in range(self.base.layers):
                changes[name, at] = self.put(self.corrupted, name, at, token)
        gained = self.run(noisy=True, changes=changes)["answer"] - self.corrupted["answer"]
        return float(gained)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_restoration_is_that_of_a_whole_run(variant: str) -> None:
    """State, windows and severed variants at both sites and all layers, in float64, in every family."""
    compare(tiny(variant, dtype=torch.float64), FACTS[1])


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.subject)
@pytest.mark.parametrize(("make", "bos"), [(tiny_llama, False), (tiny_gpt2, True)])
def test_wherever_the_subject_stands(make: Callable[..., Base], bos: bool, fact: KnownFact) -> None:
    compare(make(dtype=torch.float64, bos=bos), fact)


def test_on_each_device(device: str) -> None:
    """In float32 the same within rounding."""
    reference = Tracer(tiny_llama(), SIGMA, SETTINGS).trace(FACTS[0])
    found = Tracer(tiny_llama(device=device), SIGMA, SETTINGS).trace(FACTS[0])
    assert torch.allclose(found.effects["last_subject"]["mlp"], reference.effects["last_subject"]["mlp"], atol=1e-5)


def compare(base: Base, fact: KnownFact) -> None:
    """All that `Tracer.trace` gives against the oracle."""
    oracle = Oracle(base, fact, SETTINGS)
    found = Tracer(base, SIGMA, SETTINGS).trace(fact)
    assert found.clean == pytest.approx(float(oracle.clean["answer"]), abs=1e-10)
    assert found.corrupted == pytest.approx(float(oracle.corrupted["answer"]), abs=1e-10)
    tokens = {"last_subject": oracle.subject[-1], "last_token": oracle.ids.shape[1] - 1}
    for site, kinds in SITES.items():
        for kind in kinds:
            expected = [oracle.effect(kind, layer, tokens[site]) for layer in range(base.layers)]
            assert found.effects[site][kind].tolist() == pytest.approx(expected, abs=1e-10), (site, kind)


def test_the_grid_is_that_of_whole_runs() -> None:
    """Every token; nothing happens before the subject."""
    base, fact = tiny_llama(dtype=torch.float64), FACTS[1]
    oracle = Oracle(base, fact, SETTINGS)
    found = Tracer(base, SIGMA, SETTINGS).grid(fact)
    assert found.subject == oracle.subject
    assert "".join(found.tokens) == fact.prompt
    for kind, effects in found.effects.items():
        expected = [
            [oracle.effect(kind, layer, token) for layer in range(base.layers)] for token in range(len(found.tokens))
        ]
        assert torch.allclose(effects, torch.tensor(expected, dtype=torch.float64), atol=1e-12), kind
        assert not effects[: oracle.subject.start].any()
        assert effects[oracle.subject.start :].any()


def test_how_samples_are_batched_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_llama(dtype=torch.float64)
    whole = Tracer(base, SIGMA, SETTINGS).trace(FACTS[1])
    monkeypatch.setattr(tracing, "_TOKENS", 1)
    parts = Tracer(base, SIGMA, SETTINGS).trace(FACTS[1])
    assert same(whole, parts)


def test_noise_is_the_facts_own() -> None:
    """Neither the other facts nor their order matter; another seed gives other noise."""
    base = tiny_gpt2(dtype=torch.float64)
    tracer = Tracer(base, SIGMA, SETTINGS)
    forwards = [tracer.trace(fact) for fact in FACTS]
    backwards = [tracer.trace(fact) for fact in FACTS[::-1]][::-1]
    assert all(same(one, other) for one, other in zip(forwards, backwards, strict=True))
    other = Tracer(base, SIGMA, Settings(samples=3, seed=6)).trace(FACTS[0])
    assert other.corrupted != forwards[0].corrupted


def test_without_noise_nothing_is_gained() -> None:
    base = tiny_llama(dtype=torch.float64)
    found = Tracer(base, 0.0, SETTINGS).trace(FACTS[0])
    assert found.corrupted == pytest.approx(found.clean)
    assert all(effect.abs().max() < 1e-12 for kinds in found.effects.values() for effect in kinds.values())


def test_the_last_state_of_the_last_token_restores_everything() -> None:
    """After the last block nothing lies between the state and the answer."""
    base = tiny_llama(dtype=torch.float64)
    found = Tracer(base, SIGMA, SETTINGS).trace(FACTS[0])
    gained = found.effects["last_token"]["state"][-1]
    assert float(gained) == pytest.approx(found.clean - found.corrupted)
    assert float(found.effects["last_subject"]["state"][-1]) == pytest.approx(0)


def test_deviation_is_that_of_the_subjects_embeddings() -> None:
    base = tiny_llama()
    ids = [base.tokenizer(" Danielle Darrieux").input_ids, base.tokenizer("Betelgeuse").input_ids]
    weights = base.network.model.embed_tokens.weight[[token for row in ids for token in row]]
    found = subject_deviation(base, [FACTS[1], FACTS[0], KnownFact("Rome", "Rome is not Rome but", "Paris")])
    assert found == pytest.approx(float(weights.std(correction=0)), rel=1e-6)


def test_facts_that_cannot_be_placed_are_refused() -> None:
    base, lost = tiny_llama(), KnownFact("Vega", "Sirius is in", "Lyra")
    with pytest.raises(EditError, match="not in the prompt"):
        Tracer(base, SIGMA, SETTINGS).trace(lost)
    with pytest.raises(EditError, match="nothing to trace"):
        subject_deviation(base, [lost])


@pytest.mark.parametrize(
    ("layers", "asked", "width"), [(48, None, 10), (30, None, 10), (12, None, 4), (2, None, 1), (12, 7, 7)]
)
def test_windows_are_smaller_in_small_models(layers: int, asked: int | None, width: int) -> None:
    assert Settings(window=asked).window_of(layers) == width


def test_windows_end_where_the_model_ends() -> None:
    """As the authors' code has it: an even width has one layer more below than above its middle."""
    assert [list(window(at, 4, 6)) for at in (0, 3, 5)] == [[0, 1], [1, 2, 3, 4], [3, 4, 5]]
    assert list(window(2, 3, 6)) == [1, 2, 3]


def test_the_model_is_as_before() -> None:
    base = tiny_llama()
    Tracer(base, SIGMA, SETTINGS).trace(FACTS[0])
    assert not any(module._forward_hooks for module in base.network.modules())


def test_all_kinds_are_measured_at_the_subject() -> None:
    assert SITES["last_subject"] == KINDS


def same(one: FactTrace, other: FactTrace) -> bool:
    return one.clean == pytest.approx(other.clean) and all(
        torch.allclose(one.effects[site][kind], other.effects[site][kind], atol=1e-12)
        for site, kinds in SITES.items()
        for kind in kinds
    )
