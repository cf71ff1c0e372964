"""Insertion (MEMIT Algorithm 1): spread what the facts' targets ask for over the edited layers, in ascending order.

For each edited layer l: keys k_i read over all contexts (Eqn 19), residuals r_i = (z_i - h_i) / (layers still to do) on
the bare prompt (Eqn 20), both on the weights edited so far; Δ_l = R Kᵀ (λC + K_p K_pᵀ + K Kᵀ)^-1 (Eqn 14). Meng et al.
2022, arXiv 2210.07229. Everything that makes Δ is float64; the delta keeps float32 factors, and the weights that the
next layer is read on are those that will be served.

    insertion = insert(base, requests, targets, statistics, preset)
    insertion.delta.factors["model.layers.4.mlp.down_proj"].left          # [d, n], column j = request j
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kbsync.editor.layers import Layers, Packed, Past, inputs_of
from kbsync.editor.model import Base, weights_in
from kbsync.editor.packing import pack
from kbsync.editor.preset import Preset
from kbsync.editor.rows import Beginnings
from kbsync.editor.solve import Normal, NullSpace
from kbsync.editor.targets import Target
from kbsync.editor.tokens import BARE, encode_prompt
from kbsync.errors import EditError
from kbsync.facts import EditRequest
from kbsync.progress import Progress, silent
from kbsync.versions.delta import Delta, Factors
from kbsync.versions.weights import served

if TYPE_CHECKING:
    from kbsync.editor.statistics import Statistics

__all__ = ["Insertion", "insert"]


@dataclass(frozen=True, slots=True, eq=False)
class Insertion:
    """A delta (column j = request j) and, by module, how accurate it is: the solve's relative residual, what was added
    to the system's diagonal, and ‖cast(W + Δ) - W - Δ‖ / ‖Δ‖, the share of Δ that the served dtype cannot hold."""

    delta: Delta
    residual: dict[str, float]
    jitter: dict[str, float]
    effective: dict[str, float]


def insert(
    base: Base,
    requests: Sequence[EditRequest],
    targets: Mapping[str, Target],
    statistics: Statistics,
    preset: Preset,
    *,
    masters: Mapping[str, Tensor] | None = None,
    protected: Mapping[str, Tensor] | None = None,
    progress: Progress = silent,
) -> Insertion:
    """The delta that brings `requests` to their `targets` (by request digest), as one batch.

    `masters` are the exact weights float64 [d, f] by module of which `base` holds the served cast; default: what it
    holds. `protected` are keys [m, f] by module of earlier edits that are to keep their values. The network's weights
    are afterwards what they were before. Raises EditError where a request cannot be placed in its tokens, a target or
    a covariance is missing, or the numbers are not finite or not accurate enough.
    """
    names = [base.spec.down_name(layer) for layer in preset.layers]
    _require(requests, targets, statistics, names)
    wanted = torch.stack([targets[request.digest].z for request in requests], dim=1)
    z = wanted.to(base.device, torch.float64)  # [d, n]
    exact = {name: base.weight(name) if masters is None else masters[name] for name in names}
    insertion = Insertion(Delta({}), {}, {}, {})
    factors: dict[str, Factors] = {}
    with torch.no_grad(), weights_in(base, {name: base.weight(name) for name in names}):
        texts = _Texts(base, requests, statistics.contexts, preset)
        for done, (layer, name) in enumerate(zip(preset.layers, names, strict=True)):
            texts.advance(layer)
            K, h = texts.read(preset.layers[-1])  # [f, n], [d, n]
            K = K.to(base.weight(name).device)  # the solve runs where the matrix is
            earlier = protected[name].to(K).T if protected and name in protected else None  # [f, m]
            weight = preset.weight_at(len(requests) + (0 if earlier is None else earlier.shape[1]))
            system = _system(base, statistics, name, preset.null_space)
            solution = system.solve(K, weight=weight, protected=earlier)
            R = (z - h) / (len(names) - done)  # [d, n]
            factors[name] = _factors(base, R, solution.U, K)
            insertion.residual[name], insertion.jitter[name] = solution.residual, solution.jitter
            insertion.effective[name] = _put(base, name, exact[name], factors[name])
            progress("insert", done + 1, len(names))
    return replace(insertion, delta=Delta(factors))


def _require(
    requests: Sequence[EditRequest], targets: Mapping[str, Target], statistics: Statistics, names: Sequence[str]
) -> None:
    """Raise EditError unless everything that the insertion reads is there and finite."""
    if not requests:
        raise EditError("there is nothing to insert", hint="kbsync plan")
    for request in requests:
        if request.digest not in targets or not targets[request.digest].z.isfinite().all():
            raise EditError(f"{request.prompt!r}: no target vector, or one that is not finite", hint="kbsync verify")
    for name in names:
        if name not in statistics.covariance:
            raise EditError(f"{name}: the statistics do not cover it", hint="kbsync statistics build")


def _system(base: Base, statistics: Statistics, name: str, null_space: float | None) -> Normal | NullSpace:
    """The system of a matrix, with its factor kept beside the statistics that it belongs to."""
    device = base.weight(name).device
    key = (name, str(device), null_space)
    if key not in statistics.factors:
        C = statistics.covariance[name].double()
        new = Normal(C, device) if null_space is None else NullSpace(C, device, null_space)
        statistics.factors[key] = new
    found: Normal | NullSpace = statistics.factors[key]
    return found


def _factors(base: Base, R: Tensor, U: Tensor, K: Tensor) -> Factors:
    """Δ = R Uᵀ as it is kept: float32 (float64 for a float64 model) on the CPU."""
    if not (R.isfinite().all() and U.isfinite().all()):
        raise EditError("the edit is not finite", hint="kbsync verify")
    dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
    left, right, keys = (matrix.to("cpu", dtype).contiguous() for matrix in (R, U.T, K.T))
    return Factors(left=left, right=right, keys=keys)


def _put(base: Base, name: str, exact: Tensor, factors: Factors) -> float:
    """Put W + Δ into the network as it will be served. The answer: ‖cast(W + Δ) - W - Δ‖ / ‖Δ‖."""
    device = base.weight(name).device
    left, right = (matrix.to(device, torch.float64) for matrix in (factors.left, factors.right))
    change = left @ right
    wanted = exact.to(device, torch.float64) + change
    base.set_weight(name, served(wanted, base.dtype))
    size = float(change.norm())
    return float((base.weight(name).double() - wanted).norm()) / size if size else 0.0


@dataclass(slots=True, eq=False)
class _Batch:
    """Rows up to their lookup tokens, without what they share with others of their context."""

    rows: Sequence[tuple[int, int]]
    """[B]: context (the group of beginnings) and request."""
    lengths: Sequence[int]
    hidden: Tensor
    """[N, d] before the next block to run."""

    @property
    def last(self) -> Tensor:
        """[B]: the lookup tokens."""
        return torch.tensor(self.lengths, device=self.hidden.device).cumsum(0) - 1

    def only(self, context: int) -> _Batch:
        """Its rows of one context."""
        kept = [row for row, (group, _) in enumerate(self.rows) if group == context]
        chosen = torch.tensor([group == context for group, _ in self.rows], device=self.hidden.device)
        tokens = chosen.repeat_interleave(torch.tensor(self.lengths, device=self.hidden.device))
        return _Batch([self.rows[row] for row in kept], [self.lengths[row] for row in kept], self.hidden[tokens])


class _Texts:
    """All contexts of all prompts, read up to one block, and on from there after that block's weights have changed."""

    def __init__(self, base: Base, requests: Sequence[EditRequest], contexts: Sequence[str], preset: Preset) -> None:
        if BARE not in contexts:
            raise EditError("the contexts lack the bare prompt", hint="kbsync statistics build")
        self.layers, self.at = Layers(base), 0
        self.count, self.bare = len(requests), list(contexts).index(BARE)
        self.weights = _context_weights(contexts, preset, base.device)
        rows = [(group, column) for group in range(len(contexts)) for column in range(len(requests))]
        tokens = [encode_prompt(base, requests[column], contexts[group]) for group, column in rows]
        self.beginnings = Beginnings(self.layers, tokens, [group for group, _ in rows])
        own = [
            one.ids[self.beginnings.counts[group] : one.lookup + 1]
            for one, (group, _) in zip(tokens, rows, strict=True)
        ]
        batches = pack([len(ids) for ids in own], preset.token_budget)
        self.batches = [self._batch([rows[row] for row in batch], [own[row] for row in batch]) for batch in batches]

    def _batch(self, rows: Sequence[tuple[int, int]], own: Sequence[Sequence[int]]) -> _Batch:
        batch = _Batch(rows, [len(ids) for ids in own], torch.empty(0))
        ids = [token for one in own for token in one]
        batch.hidden = self.layers.embed(ids, self._packed(batch, Past(self.beginnings.lengths)))
        return batch

    def _packed(self, batch: _Batch, beginnings: Past) -> Packed:
        base = self.layers.base
        groups = torch.tensor([group for group, _ in batch.rows], dtype=torch.long, device=base.device)
        return Packed(batch.lengths, beginnings.of(groups), base.dtype)

    def advance(self, layer: int) -> None:
        """Go on to just before block `layer`, on the weights of now."""
        if layer == self.at:
            return
        stretch = range(self.at, layer)
        past = self.beginnings.advance(stretch)
        for batch in self.batches:
            batch.hidden = self.layers.run(batch.hidden, stretch, self._packed(batch, past))
        self.at = layer

    def read(self, top: int) -> tuple[Tensor, Tensor]:
        """K [f, n] at the next block (Eqn 19) and h [d, n] after block `top` on the bare prompts, both float64."""
        base = self.layers.base
        past = self.beginnings.past(range(self.at, top + 1))
        d, f = base.weight(base.spec.down_name(self.at)).shape
        K = torch.zeros(self.count, f, dtype=torch.float64, device=base.device)
        h = torch.zeros(self.count, d, dtype=torch.float64, device=base.device)
        for batch in self.batches:
            packed = self._packed(batch, past)
            with inputs_of(base.module(base.spec.down_name(self.at))) as seen:
                after = self.layers.run(batch.hidden, range(self.at, self.at + 1), packed)
            group, column = torch.tensor(batch.rows, device=base.device).T
            K.index_add_(0, column, seen[0][0].to(base.device)[batch.last].double() * self.weights[group, None])
            bare = replace(batch, hidden=after).only(self.bare)
            if bare.rows:
                states = self.layers.run(bare.hidden, range(self.at + 1, top + 1), self._packed(bare, past))
                h[[column for _, column in bare.rows]] = states[bare.last].double()
        return K.T, h.T


def _context_weights(contexts: Sequence[str], preset: Preset, device: torch.device) -> Tensor:
    """What each context counts in a key, [P]: all alike, or the bare prompt as much as the others together."""
    share = torch.full((len(contexts),), 1 / len(contexts), dtype=torch.float64, device=device)
    if preset.key_average == "half_empty" and len(contexts) > 1:
        share[:] = 0.5 / (len(contexts) - 1)
        share[list(contexts).index(BARE)] = 0.5
    return share
