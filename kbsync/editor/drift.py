"""Drift: how far edited weights have moved from the base on text that has nothing to do with the edits.

KL(base || edited) of the next token in nats per token, and perplexity, both over fixed windows of held-out text. The
change of the perplexity is taken window by window against the base, so what is hard in the text cancels out.

    gauge = Gauge(base, [HeldOut("self", statistics.holdout)])         # on the pristine weights
    gauge.measure()["self"].kl                                         # on the weights that base holds now
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kbsync.editor.answers import TOKENS_PER_BATCH, final_states, logit_chunks
from kbsync.editor.model import Base
from kbsync.errors import EditError, UsageError

__all__ = ["Drift", "Gauge", "HeldOut", "windows"]

WINDOW = 256
"""Tokens of one window of running text: enough before most tokens that they are not guessed at, and cheap attention."""
_NORMAL = 1.96
"""Standard errors on each side of a mean that hold 95 % of a normal distribution."""


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """A text's name and its tokens [m, T] int64."""

    name: str
    ids: Tensor

    def first(self, tokens: int) -> HeldOut:
        """Its first windows, about so many tokens."""
        return HeldOut(self.name, self.ids[: max(1, tokens // self.ids.shape[1])])


@dataclass(frozen=True, slots=True)
class Drift:
    """`kl` in nats per token; perplexity of the base and now; its `change` in per cent with a 95 % interval (normal,
    over windows; None where there is only one)."""

    tokens: int
    kl: float
    base_perplexity: float
    perplexity: float
    change: float
    low: float | None
    high: float | None


@dataclass(slots=True, eq=False)
class _Reading:
    """What the base said: final states [m, T, d] and, for each window, the mean loss of its tokens but the first."""

    states: Tensor
    losses: Tensor


class Gauge:
    """Compares the weights that `base` holds with those that it held when this was made."""

    def __init__(self, base: Base, texts: Sequence[HeldOut]) -> None:
        self.base, self.texts = base, list(texts)
        self.before = {text.name: self._read(text.ids) for text in self.texts}

    def measure(self) -> dict[str, Drift]:
        """The drift by text. Raises EditError where the model's probabilities are not numbers."""
        return {text.name: self._drift(text, self.before[text.name]) for text in self.texts}

    def _read(self, ids: Tensor) -> _Reading:
        states = _states(self.base, ids)
        losses = [_losses(logits.log_softmax(1), kept) for kept, logits in self._logits(ids, states)]
        return _Reading(states, torch.cat(losses).view(len(ids), -1).mean(1))

    def _drift(self, text: HeldOut, before: _Reading) -> Drift:
        states = _states(self.base, text.ids)
        losses, kl = [], 0.0
        pairs = zip(self._logits(text.ids, before.states), self._logits(text.ids, states), strict=True)
        for (kept, old), (_, new) in pairs:
            old, new = old.log_softmax(1), new.log_softmax(1)
            losses.append(_losses(new, kept))
            kl += float((old.exp() * (old - new)).sum(dtype=torch.float64))
        if math.isnan(kl):
            raise EditError("the edited model's probabilities are not numbers", hint="kbsync verify")
        after = torch.cat(losses).view(len(text.ids), -1).mean(1)
        return _compare(before.losses, after, kl / (text.ids.shape[1] - 1) / len(text.ids), text.ids.numel())

    def _logits(self, ids: Tensor, states: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """In chunks: the tokens that follow [c], and the logits [c, vocabulary] where they are predicted."""
        following = ids[:, 1:].flatten().to(self.base.device)
        at = 0
        for logits in logit_chunks(self.base, states[:, :-1].flatten(0, 1)):
            yield following[at : at + len(logits)], logits
            at += len(logits)


def _states(base: Base, ids: Tensor) -> Tensor:
    rows = max(1, TOKENS_PER_BATCH // ids.shape[1])
    return torch.cat([final_states(base, part.tolist()) for part in torch.split(ids, rows)])


def _losses(log_probs: Tensor, following: Tensor) -> Tensor:
    """Loss in nats of each token [c] float64."""
    return -log_probs.gather(1, following[:, None])[:, 0].double().cpu()


def _compare(before: Tensor, after: Tensor, kl: float, tokens: int) -> Drift:
    """Of the mean losses of each window, [m] each."""
    moved = after - before
    spread = _NORMAL * float(moved.std()) / math.sqrt(len(moved)) if len(moved) > 1 else None
    mean = float(moved.mean())
    return Drift(
        tokens=tokens,
        kl=kl,
        base_perplexity=math.exp(float(before.mean())),
        perplexity=_exp(float(after.mean())),
        change=100 * (_exp(mean) - 1),
        low=None if spread is None else 100 * (_exp(mean - spread) - 1),
        high=None if spread is None else 100 * (_exp(mean + spread) - 1),
    )


def _exp(value: float) -> float:
    """e^value; a model that was ruined has a perplexity beyond what a float holds."""
    return math.exp(min(value, 700.0))


def windows(base: Base, path: Path, *, tokens: int) -> HeldOut:
    """The first `tokens` tokens of a text file in windows of 256 (or of what the model reads), named after the file.

    Raises UsageError where the file cannot be read or has not one window of text.
    """
    width = min(WINDOW, base.max_tokens)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(20 * tokens)  # characters: few tokens are longer
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: no text to read: {error}", hint="give a UTF-8 text file as --text") from error
    ids = torch.tensor(base.tokenizer(text, verbose=False).input_ids[:tokens], dtype=torch.long)
    if len(ids) < width:
        raise UsageError(f"{path}: {len(ids)} tokens of text, fewer than {width}", hint="give a longer text as --text")
    return HeldOut(path.name, ids[: len(ids) // width * width].view(-1, width))
