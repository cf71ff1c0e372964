"""FT-W: the down-projection of one layer fine-tuned on the facts with weight decay.

Adam, 25 epochs, rate 5e-4, weight decay n^-0.87 · e^0.156 for n facts, layer 21 of GPT-J's 28: the authors' settings
(kmeng01/memit, hparams/FT). Otherwise than in their code, which trains the whole block and predicts all tokens of an
object from the prompt's end, only the down-projection is trained and every token is predicted after those before it.

    deltas = finetune(base, requests, FineTuning(layer=22))          # {"model.layers.22.mlp.down_proj": Δ [d, f]}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from kbsync.editor.model import Base
from kbsync.editor.tokens import Tokens, encode
from kbsync.facts import EditRequest
from kbsync.progress import Progress, silent

__all__ = ["FineTuning", "finetune"]

_LAYER_SHARE = 21 / 28
_DECAY_POWER, _DECAY_LOG = -0.87028798, 0.15589562


@dataclass(frozen=True, slots=True)
class FineTuning:
    """Settings. `layer` counts from 0; `weight_decay` None: by the authors' power law of the number of facts."""

    layer: int
    steps: int = 25
    rate: float = 5e-4
    weight_decay: float | None = None
    batch: int = 64
    stop_loss: float = 1e-2

    @classmethod
    def of(cls, base: Base) -> FineTuning:
        """The authors' settings, at the layer that is as deep as GPT-J's layer 21."""
        return cls(layer=round(_LAYER_SHARE * base.layers))

    def decay(self, facts: int) -> float:
        """Weight decay for so many facts."""
        return facts**_DECAY_POWER * math.exp(_DECAY_LOG) if self.weight_decay is None else self.weight_decay


def finetune(
    base: Base, requests: Sequence[EditRequest], settings: FineTuning, *, progress: Progress = silent
) -> dict[str, Tensor]:
    """Δ [d, f] float64 of the trained matrix by its module. The network is not changed.

    Raises EditError for a request that cannot be placed in its tokens.
    """
    name = base.spec.down_name(settings.layer)
    stored: Tensor = base.network.get_parameter(f"{name}.weight").detach()
    master = stored.to(torch.promote_types(stored.dtype, torch.float32), copy=True).requires_grad_()
    adam = torch.optim.Adam([master], lr=settings.rate, weight_decay=settings.decay(len(requests)))
    texts = [encode(base, request) for request in requests]
    for step in range(settings.steps):
        total = 0.0
        for start in range(0, len(texts), settings.batch):
            batch = texts[start : start + settings.batch]
            loss = _loss(base, {f"{name}.weight": master.to(stored.dtype)}, batch)
            total += float(loss.detach()) * len(batch)
            if loss >= settings.stop_loss:
                adam.zero_grad()
                loss.backward()
                adam.step()
        progress("fine-tune", step + 1, settings.steps)
        if total / len(texts) < settings.stop_loss:
            break
    delta = (master.detach() - stored).double()
    return {name: delta.T if base.spec.orientation == "conv1d" else delta}


def _loss(base: Base, weights: dict[str, Tensor], texts: Sequence[Tokens]) -> Tensor:
    """-log P of the objects, the mean over facts of the mean over tokens, with `weights` in the network's place."""
    longest = max(len(text.ids) for text in texts)
    ids = torch.tensor([[*text.ids, *[0] * (longest - len(text.ids))] for text in texts], device=base.device)
    mask = torch.tensor([[at < len(text.ids) for at in range(longest)] for text in texts], device=base.device)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
    logits: Tensor = functional_call(base.network, weights, kwargs=given).logits
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = []
    for row, text in zip(logits, texts, strict=True):
        predicted = row[text.prompt - 1 : len(text.ids) - 1].to(wide).log_softmax(dim=-1)
        expected = torch.tensor(text.ids[text.prompt :], device=base.device)
        losses.append(-predicted.gather(1, expected[:, None]).mean())
    return torch.stack(losses).mean()
