"""Texts of facts as rows for the model: what the rows of a context begin with is run once, the rest is packed.

Every row of a context begins with the context's own tokens, so their keys and values are computed once per context
(`Beginnings`) and each row goes on from there. Under causal attention that is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kbsync.editor.layers import Layers, Packed, Past
from kbsync.editor.packing import pack, shared_length
from kbsync.editor.tokens import Tokens

__all__ = ["Beginnings", "Row", "read_rows"]


class Beginnings:
    """What the rows of each group begin with alike, up to their lookup tokens, and its states so far.

    `rows` and `groups` (0 to G - 1) describe every row that will be asked for. A group may have nothing in common.
    """

    def __init__(self, layers: Layers, rows: Sequence[Tokens], groups: Sequence[int]) -> None:
        members: list[list[Tokens]] = [[] for _ in range(max(groups) + 1)]
        for row, group in zip(rows, groups, strict=True):
            members[group].append(row)
        shared = [
            group[0].ids[: shared_length([one.ids for one in group], [one.lookup for one in group])] if group else ()
            for group in members
        ]
        self.layers = layers
        self.counts = [len(ids) for ids in shared]
        self.packed = Packed(self.counts, Past.nothing(len(shared), layers.base.device), layers.base.dtype)
        self.lengths = torch.tensor(self.counts, device=layers.base.device)
        self.hidden = layers.embed([token for ids in shared for token in ids], self.packed)

    def past(self, stretch: range) -> Past:
        """Their keys and values in the blocks of `stretch`, the next ones; the states stay where they are."""
        return self._read(stretch)[1]

    def advance(self, stretch: range) -> Past:
        """As `past`, and the states go on to the end of `stretch`."""
        self.hidden, past = self._read(stretch)
        return past

    def _read(self, stretch: range) -> tuple[Tensor, Past]:
        hidden, states = self.layers.read(self.hidden, stretch, self.packed)
        return hidden, Past.gather(states.split(self.counts, dim=2), stretch.start)


@dataclass(slots=True, eq=False)
class Row:
    """One text of a fact, in the group of its context. It is run up to token `end`, exclusive."""

    tokens: Tokens
    group: int
    end: int
    states: Tensor = field(init=False)
    """[suffix, d]: states after layer L from the lookup token on."""
    past: Tensor = field(init=False)
    """[layers above L, 2, lookup, heads, head_dim]: keys and values of the tokens before."""

    @property
    def suffix(self) -> int:
        """Tokens from the lookup token on: what every step of the optimisation runs."""
        return self.end - self.tokens.lookup

    def forget(self) -> None:
        """Let go of what was read."""
        self.states = self.past = torch.empty(0)


@torch.no_grad()
def read_rows(layers: Layers, rows: Sequence[Row], beginnings: Past, top: int, budget: int) -> None:
    """Fill in `states` before block `top` and `past` from there on, at most `budget` tokens at a time."""
    counts = beginnings.lengths.tolist()
    for batch in pack([row.end - counts[row.group] for row in rows], budget):
        chosen = [rows[index] for index in batch]
        own = [row.tokens.ids[counts[row.group] : row.end] for row in chosen]
        packed = _packed(layers, chosen, [len(ids) for ids in own], beginnings)
        hidden = layers.run(layers.embed([token for ids in own for token in ids], packed), range(top), packed)
        for row, states in zip(chosen, hidden.split([len(ids) for ids in own]), strict=True):
            row.states = states
        _read_past(layers, chosen, beginnings, top)


def _read_past(layers: Layers, rows: Sequence[Row], beginnings: Past, top: int) -> None:
    """Run the tokens before the lookup token through the layers above; keep the states from it on."""
    counts = beginnings.lengths.tolist()
    before = {id(row): row.tokens.lookup - counts[row.group] for row in rows}
    rows = sorted(rows, key=lambda row: -before[id(row)])
    lengths = [before[id(row)] for row in rows]
    hidden = torch.cat([row.states[:length] for row, length in zip(rows, lengths, strict=True)])
    packed = _packed(layers, rows, lengths, beginnings)
    _, read = layers.read(hidden, range(top, layers.base.layers), packed)
    for row, length, own in zip(rows, lengths, read.split(lengths, dim=2), strict=True):
        row.states = row.states[length:].clone()
        row.past = torch.cat((_beginning(beginnings, row.group, top), own), dim=2)


def _packed(layers: Layers, rows: Sequence[Row], lengths: Sequence[int], beginnings: Past) -> Packed:
    groups = torch.tensor([row.group for row in rows], device=layers.base.device)
    return Packed(lengths, beginnings.of(groups), layers.base.dtype)


def _beginning(beginnings: Past, group: int, top: int) -> Tensor:
    """Keys and values [layers above L, 2, tokens, heads, head_dim] of what the rows of a group begin with."""
    if beginnings.states is None:
        raise ValueError("the beginnings have not been read")
    return beginnings.states[top:, :, group, :, : int(beginnings.lengths[group])].transpose(2, 3)
