"""Runs stretches of a model's blocks on packed rows: no padding, and each row after tokens that were read before.

transformers' own blocks do the work on all tokens of all rows as one sequence [1, N, d]; only the attention, which
must keep rows apart, is replaced through transformers' AttentionInterface. Causal attention makes it exact to cut a
row anywhere, so earlier tokens enter as stored keys and values. A family is a small adapter: how tokens are embedded,
what a block takes.

    layers = Layers(base)
    packed = Packed([3, 3, 2], Past.nothing(3, base.device), base.dtype)      # N = 8 tokens of three rows
    hidden, read = layers.read(layers.embed(ids, packed), range(0, 4), packed)
    logits = layers.logits(layers.run(hidden, range(4, base.layers), packed))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from kbsync.editor.model import Base
from kbsync.errors import ModelError

__all__ = ["ADAPTERS", "Layers", "Packed", "Past", "inputs_of"]

_ATTENTION = "kbsync_packed"
"""The name that `_attend` is registered under."""
_NEVER = 2**62
"""The position of padding: after every token, so that none attends to it."""


@dataclass(frozen=True, slots=True)
class Past:
    """Tokens that were read before. Each row of a batch goes on from one of G beginnings.

    `lengths` [G] counts their tokens. `states` [layers, 2, G, heads, S, head_dim] holds keys and values from block
    `first` on, padded on the right; None before anything was read. `rows` [B] names each row's beginning; None: row b
    goes on from beginning b.
    """

    lengths: Tensor
    states: Tensor | None = None
    first: int = 0
    rows: Tensor | None = None

    @classmethod
    def nothing(cls, rows: int, device: torch.device) -> Past:
        """The past of `rows` rows that begin at the beginning."""
        return cls(torch.zeros(rows, dtype=torch.long, device=device))

    @classmethod
    def gather(cls, parts: Sequence[Tensor], first: int) -> Past:
        """Beginnings of these keys and values from block `first` on, each [layers, 2, tokens, heads, head_dim]."""
        counts = [part.shape[2] for part in parts]
        layers, both, _, heads, size = parts[0].shape
        states = parts[0].new_zeros(layers, both, len(parts), heads, max(counts), size)
        for index, part in enumerate(parts):
            states[:, :, index, :, : counts[index]] = part.transpose(2, 3)
        return cls(torch.tensor(counts, device=states.device), states, first)

    def of(self, rows: Tensor) -> Past:
        """The past of a batch whose rows [B] go on from these beginnings."""
        return Past(self.lengths, self.states, self.first, rows)

    def part(self, start: int, stop: int) -> Past:
        """The past of the batch's rows from `start` to `stop`."""
        if self.rows is not None:
            return self.of(self.rows[start:stop])
        states = None if self.states is None else self.states[:, :, start:stop]
        return Past(self.lengths[start:stop], states, self.first)

    @property
    def counts(self) -> Tensor:
        """How many tokens each row of the batch has behind it, [B]."""
        return self.lengths if self.rows is None else self.lengths[self.rows]

    @property
    def width(self) -> int:
        """S, the padded number of earlier tokens."""
        return 0 if self.states is None else int(self.states.shape[4])

    def at(self, layer: int) -> Tensor | None:
        """Keys and values [2, B, heads, S, head_dim] for block `layer`; None without any."""
        if self.states is None or not self.width:
            return None
        found = self.states[layer - self.first]
        return found if self.rows is None else found[:, self.rows]


@dataclass(frozen=True, slots=True)
class _Scoring:
    """How an attention scores: times `scaling`, bent to ±`softcap`, only the last `window` tokens."""

    scaling: float | None
    softcap: float | None
    window: int | None


class _Run:
    """Rows of equal length that lie one after the other: their attention is one batch, without padding."""

    def __init__(self, shape: tuple[int, int], past: Past, dtype: torch.dtype) -> None:
        self.shape = shape
        self.past = past
        self.dtype = dtype
        own = past.counts[:, None] + torch.arange(shape[1], device=past.counts.device)  # [B, T]
        self.positions = own.flatten()
        self._masks: dict[tuple[Any, ...], Tensor] = {}
        self._moved: dict[int, Tensor] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer: int, scoring: _Scoring) -> Tensor:
        """Of this run's tokens, query [B·T, H, size] on key and value [B·T, heads, size] and the past: [B·T, H, size].

        The H / heads queries of one key-value head stand below each other as more queries: nothing is repeated.
        """
        (rows, length), (heads, size) = self.shape, key.shape[1:]
        share = query.shape[1] // heads
        query = query.view(rows, length, heads, share, size).permute(0, 2, 3, 1, 4).flatten(2, 3)
        key, value = (one.view(rows, length, heads, size).transpose(1, 2) for one in (key, value))
        if (past := self._past(layer, query.device)) is not None:
            key, value = torch.cat((past[0], key), dim=2), torch.cat((past[1], value), dim=2)
        found = _mix(query, key, value, self._mask(share, scoring.window, query.device), scoring)
        parted: Tensor = found.unflatten(2, (share, length))
        return parted.permute(0, 3, 1, 2, 4).reshape(rows * length, heads * share, size)

    def _past(self, layer: int, device: torch.device) -> Tensor | None:
        """Keys and values of earlier tokens, on the block's device (moved there once)."""
        if layer in self._moved:
            return self._moved[layer]
        past = self.past.at(layer)
        if past is not None and past.device != device:
            past = self._moved[layer] = past.to(device)
        return past

    def _mask(self, share: int, window: int | None, device: torch.device) -> Tensor:
        """What is added to the scores, [B, 1, share·T, S + T]: 0 where a token may attend, else the dtype's least."""
        if (key := (share, window, device)) not in self._masks:
            own = self.positions.view(self.shape)  # [B, T]
            earlier = torch.arange(self.past.width, device=own.device).expand(len(own), -1)  # [B, S]
            earlier = earlier.masked_fill(earlier >= self.past.counts[:, None], _NEVER)
            distance = own[:, :, None] - torch.cat((earlier, own), dim=1)[:, None]  # [B, T, S + T]
            hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
            mask = torch.zeros(hidden.shape, dtype=self.dtype, device=own.device)
            mask = mask.masked_fill_(hidden, torch.finfo(self.dtype).min)
            self._masks[key] = mask.repeat(1, share, 1)[:, None].to(device)
        return self._masks[key]


def _mix(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scoring: _Scoring) -> Tensor:
    """softmax(scores + mask) · value. A softcap rules out the fused kernel; then the softmax is at least float32."""
    if scoring.softcap is None:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scoring.scaling)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scoring.scaling is None else scoring.scaling)
    scores = scoring.softcap * torch.tanh(scores / scoring.softcap) + mask
    return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype) @ value


class Packed:
    """N tokens of B rows that lie one after the other, and what each row goes on from.

    Neighbouring rows of equal length are attended together, so rows should come sorted by length. `starts` are the
    rows' first tokens.
    """

    def __init__(self, lengths: Sequence[int], past: Past, dtype: torch.dtype) -> None:
        self.starts: list[int] = []
        self.runs: list[_Run] = []
        token = row = 0
        for length, group in groupby(lengths):
            count = len(list(group))
            if length:
                self.runs.append(_Run((count, length), past.part(row, row + count), dtype))
            self.starts += [token + length * index for index in range(count)]
            token, row = token + count * length, row + count
        self.sizes = [run.shape[0] * run.shape[1] for run in self.runs]
        nothing = torch.empty(0, dtype=torch.long, device=past.lengths.device)
        self.positions = torch.cat([nothing, *(run.positions for run in self.runs)])
        """[N]: each token's place in its whole text."""


class _Attention:
    """What one run through the blocks asks of each attention, and what it keeps of it."""

    def __init__(self, packed: Packed, *, keep: bool) -> None:
        self.packed = packed
        self.kept: list[Tensor] | None = [] if keep else None
        self.calls = 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: int, scoring: _Scoring) -> Tensor:
        self.calls += 1
        query, key, value = (one[0].transpose(0, 1) for one in (query, key, value))  # [N, heads, size]
        if self.kept is not None:
            self.kept.append(torch.stack((key, value)).to(self.packed.positions.device))
        # split, not slices: the gradient of a slice is a whole tensor of zeros for each of them.
        parts = zip(*(one.split(self.packed.sizes) for one in (query, key, value)), strict=True)
        found = [
            run.attend(query, key, value, layer, scoring)
            for run, (query, key, value) in zip(self.packed.runs, parts, strict=True)
        ]
        return torch.cat(found)[None] if found else query[None]  # [1, N, H, size]


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: object, **given: Any) -> tuple[Tensor, None]:
    """An attention function as transformers calls it: query, key and value are [1, heads, N, size]."""
    attention: _Attention = given["packed_attention"]
    scoring = _Scoring(given.get("scaling"), given.get("softcap"), given.get("sliding_window"))
    return attention(query, key, value, module.layer_idx, scoring), None


AttentionInterface.register(_ATTENTION, _attend)


class Adapter(Protocol):
    """What differs between families in running their blocks."""

    def embed(self, base: Base, ids: Tensor, positions: Tensor) -> Tensor:
        """The states [1, N, d] before block 0 of ids and positions [1, N]."""

    def arguments(self, base: Base, hidden: Tensor, positions: Tensor, kind: str) -> dict[str, Any]:
        """What each block of a kind (of `config.layer_types`; "" where all are alike) takes beside the states."""


class _Rotary:
    """Llama's shape: positions enter as rotary angles, which the model computes once for all blocks."""

    def __init__(self, angles: str, *, by_kind: bool = False) -> None:
        self.angles = angles
        self.by_kind = by_kind

    def embed(self, base: Base, ids: Tensor, positions: Tensor) -> Tensor:  # noqa: ARG002 - positions enter later
        found: Tensor = base.module(base.spec.embedding)(ids)
        return found

    def arguments(self, base: Base, hidden: Tensor, positions: Tensor, kind: str) -> dict[str, Any]:
        chosen = {"layer_type": kind} if self.by_kind else {}
        angles = base.module(self.angles)(hidden, position_ids=positions, **chosen)
        return {"position_embeddings": angles, "position_ids": positions}


class _Learned:
    """GPT-2's shape: positions are embedded like tokens, by a table that begins with `skipped` rows of its own."""

    def __init__(self, positions: str, skipped: int = 0) -> None:
        self.positions = positions
        self.skipped = skipped

    def embed(self, base: Base, ids: Tensor, positions: Tensor) -> Tensor:
        table: Tensor = base.network.get_parameter(f"{self.positions}.weight")
        placed = table[positions.to(table.device) + self.skipped]
        found: Tensor = base.module(base.spec.embedding)(ids)
        return found + placed.to(found.device)

    def arguments(self, base: Base, hidden: Tensor, positions: Tensor, kind: str) -> dict[str, Any]:  # noqa: ARG002
        return {}


_LLAMA = _Rotary("model.rotary_emb")
ADAPTERS: dict[str, Adapter] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _Rotary("model.rotary_emb", by_kind=True),
    "phi3": _LLAMA,
    "gpt2": _Learned("transformer.wpe"),
    "gptj": _Rotary("transformer.rotary_emb"),
    "gpt_neox": _Rotary("gpt_neox.rotary_emb"),
    "opt": _Learned("model.decoder.embed_positions", skipped=2),
}
"""How the blocks of each family (`ModelSpec.family`) are run."""


class Layers:
    """The blocks of a base model, run by stretches. Hidden states are [N, d] in the model's dtype, on its device; a
    block that is elsewhere gets them there (accelerate's hooks carry what it is called with).

    Running raises ModelError where the blocks attend in a way of their own.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        self.adapter = ADAPTERS[base.spec.family]

    def embed(self, ids: Sequence[int], packed: Packed) -> Tensor:
        """The states before block 0 of the packed tokens."""
        tokens = torch.tensor(ids, dtype=torch.long, device=self.base.device)
        return self.adapter.embed(self.base, tokens[None], packed.positions[None])[0].to(self.base.device)

    def run(self, hidden: Tensor, stretch: range, packed: Packed) -> Tensor:
        """The states after the blocks of `stretch`."""
        return self._run(hidden, stretch, _Attention(packed, keep=False))

    def read(self, hidden: Tensor, stretch: range, packed: Packed) -> tuple[Tensor, Tensor]:
        """As `run`, and these tokens' own keys and values [layers, 2, N, heads, head_dim]."""
        attention = _Attention(packed, keep=True)
        hidden = self._run(hidden, stretch, attention)
        return hidden, torch.stack(attention.kept) if attention.kept else self._nothing(len(stretch), hidden)

    def _nothing(self, layers: int, hidden: Tensor) -> Tensor:
        """The keys and values [layers, 2, 0, heads, head_dim] of no tokens."""
        config = self.base.network.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return hidden.new_zeros(layers, 2, 0, heads, width)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [m, vocabulary] after last-block states [m, d]: in float32, or float64 where the model is."""
        return self.base.logits(self.base.module(self.base.spec.final_norm)(hidden))

    def _run(self, hidden: Tensor, stretch: range, attention: _Attention) -> Tensor:
        if not stretch or not len(hidden):  # a text may begin with its subject: no token comes before
            return hidden
        hidden = hidden[None]
        positions = attention.packed.positions[None]
        kinds = getattr(self.base.network.config, "layer_types", None)
        arguments: dict[str, dict[str, Any]] = {}
        with self._packed_attention():
            for index in stretch:
                kind = kinds[index] if kinds else ""
                if kind not in arguments:
                    arguments[kind] = self.adapter.arguments(self.base, hidden, positions, kind)
                found = self.base.layer(index)(hidden, **arguments[kind], packed_attention=attention)
                hidden = found[0] if isinstance(found, tuple) else found
        if attention.calls != len(stretch):
            # A block that attends in its own way would have mixed the rows without a word.
            raise ModelError(
                f"the attention of {self.base.spec.family} models cannot keep packed rows apart",
                hint="use a transformers version in which this family has an attention interface",
            )
        return hidden[0].to(self.base.device)

    @contextmanager
    def _packed_attention(self) -> Iterator[None]:
        config = self.base.network.config
        usual = config._attn_implementation
        config._attn_implementation = _ATTENTION
        try:
            yield
        finally:
            config._attn_implementation = usual


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the module is called with while the context lasts: its first argument [rows, N, f], call by call.

    OPT calls its down-projection with [N, f] of all rows; that is seen as one row.
    """
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0] if arguments[0].ndim > 2 else arguments[0][None])
    )
    try:
        yield seen
    finally:
        handle.remove()
