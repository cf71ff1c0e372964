"""Runs stretches of a model's blocks on hidden states, after tokens whose keys and values are known already.

transformers' own blocks do the work; what they need beside hidden states (rotary angles, the mask, earlier keys and
values) is given explicitly, so a row can be cut anywhere: causal attention makes that exact. A family is a small
adapter: how tokens are embedded, what a block takes.

    layers = Layers(base)
    hidden = layers.embed(ids, past)                         # [B, T, d]
    hidden, read = layers.read(hidden, range(0, 4), past)    # also the keys and values of these tokens
    logits = layers.logits(layers.run(hidden, range(4, base.layers), past)[:, -1])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kbsync.editor.model import Base
from kbsync.errors import ModelError

__all__ = ["ADAPTERS", "Layers", "Past", "inputs_of", "padded"]


@dataclass(frozen=True, slots=True)
class Past:
    """Tokens read before a batch. Each row of the batch goes on from one of G beginnings.

    `lengths` [G] counts their tokens. `states` [layers, 2, G, heads, S, head_dim] holds keys and values from block
    `first` on, padded on the right; None where no beginning has a token. `rows` [B] names each row's beginning; None:
    row b goes on from beginning b.
    """

    lengths: Tensor
    states: Tensor | None = None
    first: int = 0
    rows: Tensor | None = None

    @classmethod
    def nothing(cls, rows: int, device: torch.device) -> Past:
        """The past of `rows` rows that begin at the beginning."""
        return cls(torch.zeros(rows, dtype=torch.long, device=device))

    def of(self, rows: Tensor) -> Past:
        """The past of a batch whose rows [B] go on from these beginnings."""
        return Past(self.lengths, self.states, self.first, rows)

    @property
    def counts(self) -> Tensor:
        """How many tokens each row of the batch has behind it, [B]."""
        return self.lengths if self.rows is None else self.lengths[self.rows]

    @property
    def width(self) -> int:
        """S, the padded number of earlier tokens."""
        return 0 if self.states is None else int(self.states.shape[4])

    def at(self, layer: int) -> Tensor | None:
        """Keys and values [2, B, heads, S, head_dim] for block `layer`."""
        if self.states is None:
            return None
        found = self.states[layer - self.first]
        return found if self.rows is None else found[:, self.rows]


class Adapter(Protocol):
    """What differs between families in running their blocks."""

    past_argument: str
    """The block's parameter that takes the cache."""

    def embed(self, base: Base, ids: Tensor, positions: Tensor) -> Tensor:
        """The states [B, T, d] before block 0."""

    def arguments(self, base: Base, hidden: Tensor, positions: Tensor) -> dict[str, Any]:
        """What each block takes beside states, mask and cache."""


class _Rotary:
    """Llama's shape: positions enter as rotary angles, which the model computes once for all blocks."""

    past_argument = "past_key_values"

    def __init__(self, angles: str) -> None:
        self.angles = angles

    def embed(self, base: Base, ids: Tensor, positions: Tensor) -> Tensor:  # noqa: ARG002 - positions enter later
        found: Tensor = base.module(base.spec.embedding)(ids)
        return found

    def arguments(self, base: Base, hidden: Tensor, positions: Tensor) -> dict[str, Any]:
        angles = base.module(self.angles)(hidden, position_ids=positions)
        return {"position_embeddings": angles, "position_ids": positions}


class _Learned:
    """GPT-2's shape: positions are embedded like tokens."""

    past_argument = "past_key_values"

    def __init__(self, positions: str) -> None:
        self.positions = positions

    def embed(self, base: Base, ids: Tensor, positions: Tensor) -> Tensor:
        found: Tensor = base.module(base.spec.embedding)(ids) + base.module(self.positions)(positions)
        return found

    def arguments(self, base: Base, hidden: Tensor, positions: Tensor) -> dict[str, Any]:  # noqa: ARG002 - needs none
        return {}


_LLAMA = _Rotary("model.rotary_emb")
ADAPTERS: dict[str, Adapter] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "gpt2": _Learned("transformer.wpe"),
}
"""How the blocks of each family (`ModelSpec.family`) are run."""


class _Memory:
    """The cache as transformers' attention asks for it: it appends to the past and keeps only what is to be read."""

    def __init__(self, past: Past, *, keep: bool) -> None:
        self.past = past
        self.kept: list[Tensor] | None = [] if keep else None

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, S + T, head_dim] of all tokens so far at this block."""
        if self.kept is not None:
            self.kept.append(torch.stack((keys, values)))
        if (past := self.past.at(layer_idx)) is None:
            return keys, values
        return torch.cat((past[0], keys), dim=2), torch.cat((past[1], values), dim=2)


class Layers:
    """The blocks of a base model. Raises ModelError for an attention implementation that takes no explicit mask."""

    def __init__(self, base: Base) -> None:
        kind = base.network.config._attn_implementation
        if kind not in ("sdpa", "eager"):
            raise ModelError(f"attention {kind!r} cannot be run in parts", hint="load the model with sdpa attention")
        self.base = base
        self.adapter = ADAPTERS[base.spec.family]

    def embed(self, ids: Tensor, past: Past) -> Tensor:
        """The states [B, T, d] before block 0 of token ids [B, T] that follow `past`."""
        return self.adapter.embed(self.base, ids, _positions(ids, past))

    def run(self, hidden: Tensor, stretch: range, past: Past) -> Tensor:
        """The states [B, T, d] after the blocks of `stretch`; padding may only stand right of a row's tokens."""
        return self._run(hidden, stretch, _Memory(past, keep=False))

    def read(self, hidden: Tensor, stretch: range, past: Past) -> tuple[Tensor, Tensor | None]:
        """As `run`, and these tokens' own keys and values [layers, 2, B, heads, T, head_dim] (None without any)."""
        memory = _Memory(past, keep=True)
        hidden = self._run(hidden, stretch, memory)
        return hidden, torch.stack(memory.kept) if memory.kept else None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [m, vocabulary] after last-block states [m, d]: in float32, or float64 where the model is."""
        normed = self.base.module(self.base.spec.final_norm)(hidden)
        found: Tensor = self.base.module(self.base.spec.head)(normed)
        return found if found.dtype == torch.float64 else found.float()

    def _run(self, hidden: Tensor, stretch: range, memory: _Memory) -> Tensor:
        if not len(stretch) or not hidden.shape[1]:
            return hidden
        arguments = self.adapter.arguments(self.base, hidden, _positions(hidden, memory.past))
        arguments |= {"attention_mask": _mask(hidden, memory.past), self.adapter.past_argument: memory}
        for index in stretch:
            found = self.base.layer(index)(hidden, **arguments)
            hidden = found[0] if isinstance(found, tuple) else found
        return hidden


def _positions(rows: Tensor, past: Past) -> Tensor:
    """Positions [B, T] of tokens that follow `past`."""
    return past.counts[:, None] + torch.arange(rows.shape[1], device=rows.device)


def _mask(hidden: Tensor, past: Past) -> Tensor:
    """Additive mask [B, 1, T, S + T]: every earlier token that is not padding, then causally the own ones."""
    rows, length = hidden.shape[:2]
    earlier = torch.arange(past.width, device=hidden.device) < past.counts[:, None]  # [B, S]
    own = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()  # [T, T]
    allowed = torch.cat(
        (earlier[:, None, None].expand(rows, 1, length, -1), own.expand(rows, 1, length, length)), dim=3
    )
    mask = torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device)
    return mask.masked_fill_(~allowed, torch.finfo(hidden.dtype).min)


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids [B, longest], padded with 0 on the right."""
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long, device=device)


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the module is called with while the context lasts: its first argument, call by call."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        yield seen
    finally:
        handle.remove()
