"""How far a model has moved from its base on ordinary text: perplexity before and after, and KL(base || edited).

    text = HeldOut(base, statistics.holdout)       # read on the weights to compare with
    with weights_in(base, matrices):
        moved = text.drift()                       # moved.kl in nats per token, moved.before, moved.after

Edits leave the head alone, so it turns both readings' final states into logits, block by block.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kbsync.editor.answers import TOKENS_PER_BATCH, final_states, logit_chunks
from kbsync.editor.model import Base
from kbsync.errors import EditError

__all__ = ["Drift", "HeldOut"]

_NOTHING = -100
"""What follows the last token of a row: nothing that could be predicted. As in torch's cross entropy."""


@dataclass(frozen=True, slots=True)
class Drift:
    """Mean KL(base || edited) of the next token in nats, over `tokens` tokens of held-out text; the text's perplexity
    `before` and `after`."""

    kl: float
    before: float
    after: float
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return asdict(self)


class HeldOut:
    """Rows [m, T] of token ids of a text that nothing was learned from, read on the weights that `base` holds."""

    def __init__(self, base: Base, ids: Tensor) -> None:
        self.base, self.ids = base, ids
        self.states = self._read()

    def drift(self) -> Drift | None:
        """The weights that the base holds now against those that the text was read on; None without any text.

        Raises EditError where the probabilities are not numbers.
        """
        if not self.ids.numel():
            return None
        following = torch.full_like(self.ids, _NOTHING)
        following[:, :-1] = self.ids[:, 1:]
        kl, losses = 0.0, [0.0, 0.0]
        chunks = zip(logit_chunks(self.base, self.states), logit_chunks(self.base, self._read()), strict=True)
        at = 0
        for old, new in chunks:
            kept, moved = old.log_softmax(1), new.log_softmax(1)  # [chunk, vocabulary]
            kl += float((kept.exp() * (kept - moved)).sum(dtype=torch.float64))
            expected = following.flatten()[at : at + len(old)].to(old.device)
            losses = [loss + _missing(one, expected) for loss, one in zip(losses, (kept, moved), strict=True)]
            at += len(old)
        if math.isnan(kl):
            raise EditError("the edited model's probabilities are not numbers", hint="kbsync verify")
        predicted = int((following != _NOTHING).sum())
        before, after = (math.exp(loss / predicted) if predicted else math.nan for loss in losses)
        return Drift(kl=kl / self.ids.numel(), before=before, after=after, tokens=self.ids.numel())

    def _read(self) -> Tensor:
        """Final states [m * T, d]."""
        if not self.ids.numel():
            return torch.empty(0, 0)
        rows = max(1, TOKENS_PER_BATCH // self.ids.shape[1])
        parts = torch.split(self.ids, rows)
        return torch.cat([final_states(self.base, part.tolist()).flatten(0, 1) for part in parts])


def _missing(log_probs: Tensor, expected: Tensor) -> float:
    """-log P summed over the tokens [chunk] that are expected, of log-probabilities [chunk, vocabulary]."""
    rows = (expected != _NOTHING).nonzero()[:, 0]
    return -float(log_probs[rows, expected[rows]].sum(dtype=torch.float64))
