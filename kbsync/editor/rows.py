"""Texts of facts as rows for the model: what many rows begin with is run once, the rest is packed by token budget.

Every row of a context begins with the context's own tokens, so their keys and values are computed once per context
(`Beginnings`) and each row goes on from there. Under causal attention that is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kbsync.editor.layers import Layers, Past, padded
from kbsync.editor.packing import pack, shared_length
from kbsync.editor.tokens import Tokens

__all__ = ["Beginnings", "Row", "joined_past", "read_rows"]


class Beginnings:
    """What the rows of each group begin with alike, up to their lookup tokens: tokens, and their states so far.

    `rows` and `groups` (0 to G - 1) describe every row that will be asked for. A group may have nothing in common.
    """

    def __init__(self, layers: Layers, rows: Sequence[Tokens], groups: Sequence[int]) -> None:
        members: list[list[Tokens]] = [[] for _ in range(max(groups) + 1)]
        for row, group in zip(rows, groups, strict=True):
            members[group].append(row)
        ids = [
            group[0].ids[: shared_length([one.ids for one in group], [one.lookup for one in group])] if group else ()
            for group in members
        ]
        self.layers = layers
        self.device = layers.base.device
        self.counts = [len(one) for one in ids]
        self.lengths = torch.tensor(self.counts, device=self.device)
        self.hidden = layers.embed(padded(ids, self.device), self._nothing())  # [G, S, d], before the next block

    def past(self, stretch: range) -> Past:
        """Their keys and values in the blocks of `stretch`, the next ones; the states stay where they are."""
        return self._read(stretch)[1]

    def advance(self, stretch: range) -> Past:
        """As `past`, and the states go on to the end of `stretch`."""
        self.hidden, past = self._read(stretch)
        return past

    def _read(self, stretch: range) -> tuple[Tensor, Past]:
        hidden, states = self.layers.read(self.hidden, stretch, self._nothing())
        return hidden, Past(self.lengths, states, stretch.start)

    def _nothing(self) -> Past:
        return Past.nothing(len(self.counts), self.device)


@dataclass(slots=True, eq=False)
class Row:
    """One text of a fact, in the group of its context. It is run up to token `end`, exclusive."""

    tokens: Tokens
    group: int
    end: int
    states: Tensor = field(init=False)
    """[suffix, d]: states after layer L from the lookup token on."""
    past: Tensor | None = field(init=False)
    """[layers above L, 2, heads, lookup, head_dim]: keys and values of the tokens before; None without any."""

    @property
    def suffix(self) -> int:
        """Tokens from the lookup token on: what every step of the optimisation runs."""
        return self.end - self.tokens.lookup


@torch.no_grad()
def read_rows(layers: Layers, rows: Sequence[Row], beginnings: Past, top: int, budget: int) -> None:
    """Fill in `states` before block `top` and `past` from there on, at most `budget` tokens at a time."""
    counts = beginnings.lengths.tolist()
    for batch in pack([row.end - counts[row.group] for row in rows], budget):
        chosen = [rows[index] for index in batch]
        device = layers.base.device
        past = beginnings.of(torch.tensor([row.group for row in chosen], device=device))
        ids = padded([row.tokens.ids[counts[row.group] : row.end] for row in chosen], device)
        hidden = layers.run(layers.embed(ids, past), range(top), past)
        before = max(row.tokens.lookup - counts[row.group] for row in chosen)
        _, own = layers.read(hidden[:, :before], range(top, layers.base.layers), past)
        for index, row in enumerate(chosen):
            count = counts[row.group]
            row.states = hidden[index, row.tokens.lookup - count : row.end - count].clone()
            row.past = _joined(beginnings, own, row, index, top)


def _joined(beginnings: Past, own: Tensor | None, row: Row, index: int, top: int) -> Tensor | None:
    """Keys and values of all tokens before the lookup token: the beginning's, then the row's own."""
    count = int(beginnings.lengths[row.group])
    parts = []
    if beginnings.states is not None:
        parts.append(beginnings.states[top:, :, row.group, :, :count])
    if own is not None:
        parts.append(own[:, :, index, :, : row.tokens.lookup - count])
    return torch.cat(parts, dim=3) if parts else None


def joined_past(rows: Sequence[Row], top: int) -> Past:
    """The past of a batch of these rows from block `top` on, padded on the right."""
    counts = [row.tokens.lookup for row in rows]
    device = rows[0].states.device
    lengths = torch.tensor(counts, device=device)
    known = [row.past for row in rows if row.past is not None]
    if not known or not max(counts):
        return Past(lengths, None, top)
    layers, both, heads, _, size = known[0].shape
    states = known[0].new_zeros(layers, both, len(rows), heads, max(counts), size)
    for index, row in enumerate(rows):
        if row.past is not None:
            states[:, :, index, :, : counts[index]] = row.past
    return Past(lengths, states, top)
