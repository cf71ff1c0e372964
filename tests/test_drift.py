"""Perplexity and KL on held-out text, against the whole model run plainly."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kbsync.editor import answers
from kbsync.editor.drift import HeldOut
from kbsync.editor.model import Base, weights_in
from kbsync.errors import EditError
from tests.tiny import VOCABULARY, tiny_gpt2, tiny_llama

TEXT = torch.randint(1, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(2))


def moved(base: Base) -> dict[str, Tensor]:
    """Another down-projection of layer 2."""
    weight = base.weight(name := base.spec.down_name(2))
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(weight)
    return {name: weight + 0.2 * noise}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_drift_is_kl_and_perplexity_of_the_whole_model(
    make: Callable[..., Base], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the text takes several blocks of logits and several forward passes."""
    monkeypatch.setattr(answers, "LOGITS_PER_CHUNK", 7 * VOCABULARY)
    monkeypatch.setattr("kbsync.editor.drift.TOKENS_PER_BATCH", 24)
    base = make(device=device)
    ids = TEXT.to(device)
    text = HeldOut(base, TEXT)
    before = base.network(ids).logits.double().log_softmax(-1)
    with weights_in(base, moved(base)):
        after = base.network(ids).logits.double().log_softmax(-1)
        found = text.drift()
    assert found is not None
    kl = functional.kl_div(after, before, log_target=True, reduction="sum") / TEXT.numel()
    assert found.kl == pytest.approx(float(kl), rel=1e-4)
    for value, logs in ((found.before, before), (found.after, after)):
        loss = functional.nll_loss(logs[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert value == pytest.approx(math.exp(float(loss)), rel=1e-4)
    assert found.tokens == TEXT.numel()
    assert found.kl > 0.001


def test_the_same_weights_have_no_drift() -> None:
    base = tiny_llama()
    found = HeldOut(base, TEXT).drift()
    assert found is not None
    assert found.kl == 0
    assert found.before == found.after
    assert found.to_json().keys() == {"kl", "before", "after", "tokens"}


def test_no_text_has_no_drift() -> None:
    assert HeldOut(tiny_llama(), torch.empty(0, 0, dtype=torch.long)).drift() is None


def test_probabilities_that_are_no_numbers_are_refused() -> None:
    base = tiny_llama()
    text = HeldOut(base, TEXT)
    base.set_weight(base.spec.down_name(1), torch.full_like(base.weight(base.spec.down_name(1)), math.nan))
    with pytest.raises(EditError, match="not numbers"):
        text.drift()
