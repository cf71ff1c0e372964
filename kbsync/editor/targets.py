"""Target vectors z_i (MEMIT Eqn 16): the state that a subject's last token should have for the object to follow.

z = h + δ, where δ, added to the state h after layer L at the lookup token, minimises the mean over contexts of
-log P[object | context ⊕ prompt], plus a KL term on "{subject} is a" and weight decay 0.5·‖δ‖/‖h‖² (Meng et al. 2022,
arXiv 2210.07229, and its authors' code). Adam, ‖δ‖ clamped to a share of ‖h‖.

What makes it fast changes no result: contexts' common beginnings are run once; of a row only the tokens from the
lookup token on are run again, through the layers above L only, on stored keys and values of those before; logits only
where the object (or the KL term) is predicted; many facts together, by suffix length; a fact that is done makes room.

    found = compute_targets(base, requests, statistics.contexts, preset)
    found[request.digest].z                  # [d]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from kbsync.editor.layers import Layers, Packed, Past
from kbsync.editor.model import Base
from kbsync.editor.preset import Preset
from kbsync.editor.rows import Beginnings, Row, read_rows
from kbsync.editor.tokens import BARE, encode, encode_subject
from kbsync.errors import EditError
from kbsync.facts import EditRequest
from kbsync.progress import Progress, silent

__all__ = ["Target", "compute_targets", "stream_targets"]

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8
"""Adam's constants as in torch.optim.Adam; every fact counts its own steps."""


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """z [d] on the CPU, float32 (float64 for a float64 model); its loss; how many losses were computed to find it.
    `clamped`: δ was cut to the clamp at its last update."""

    z: Tensor
    loss: float
    steps: int
    clamped: bool


def compute_targets(
    base: Base,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    preset: Preset,
    *,
    progress: Progress = silent,
    done: Callable[[EditRequest, Target], None] | None = None,
) -> dict[str, Target]:
    """z of each request by its digest, on the weights that `base` holds, which are not changed.

    `contexts` are templates that end in `{}`, the bare one among them. `done` is called for each fact as soon as it is
    finished. Raises EditError for a request that cannot be placed in its tokens and for a loss that is not finite.
    """
    wanted = {request.digest: request for request in requests}
    found: dict[str, Target] = {}
    for request, target in stream_targets(base, list(wanted.values()), contexts, preset):
        found[request.digest] = target
        if done is not None:
            done(request, target)
        progress("targets", len(found), len(wanted))
    return {digest: found[digest] for digest in wanted}


def stream_targets(
    base: Base, requests: Sequence[EditRequest], contexts: Sequence[str], preset: Preset
) -> Generator[tuple[EditRequest, Target], None, None]:
    """As `compute_targets`, for distinct requests: each with its target as soon as it is finished, in any order."""
    if requests:
        yield from _Search(base, requests, contexts, preset).run()


@dataclass(slots=True, eq=False)
class _Fact:
    """A request with one row per context, and the KL term's row."""

    request: EditRequest
    rows: list[Row]
    bare: Row
    essence: Row | None

    @property
    def all_rows(self) -> list[Row]:
        return [*self.rows, self.essence] if self.essence else self.rows

    @property
    def tokens(self) -> int:
        """Tokens that every step runs."""
        return sum(row.suffix for row in self.all_rows)


@dataclass(slots=True, eq=False)
class _State:
    """The optimisation's state of the facts in flight, one row per fact."""

    h: Tensor
    """[n, d]: the state after layer L at the lookup token of the bare prompt."""
    delta: Tensor
    mean: Tensor
    square: Tensor
    """[n, d]: δ and Adam's moments."""
    steps: Tensor
    """[n]: losses computed."""
    clamped: Tensor
    """[n]: whether the last update cut δ."""
    essence: Tensor
    """[n, vocabulary]: log-probabilities after "{subject} is a" without δ; [n, 0] where there is no KL term."""

    @classmethod
    def begin(cls, h: Tensor, vocabulary: int) -> _State:
        """No δ yet."""
        zero = torch.zeros_like(h)
        steps = torch.zeros(len(h), dtype=torch.long, device=h.device)
        return cls(h, zero, zero, zero, steps, steps.bool(), h.new_zeros(len(h), vocabulary))

    def take(self, keep: Tensor) -> _State:
        """The facts with these indices."""
        return _State(*(value[keep] for value in self._values()))

    def join(self, other: _State) -> _State:
        """These facts, then the other's."""
        return _State(*(torch.cat(pair) for pair in zip(self._values(), other._values(), strict=True)))

    def update(self, gradient: Tensor, preset: Preset, more: Tensor) -> None:
        """One step of Adam on the δ [n, d] of the facts that go on (`more` [n]), then the clamp."""
        taken = self.steps[:, None].to(gradient.dtype)
        self.mean = torch.lerp(self.mean, gradient, 1 - _BETAS[0])
        self.square = _BETAS[1] * self.square + (1 - _BETAS[1]) * gradient**2
        scale = (self.square / (1 - _BETAS[1] ** taken)).sqrt() + _EPSILON
        delta = self.delta - preset.rate * self.mean / (1 - _BETAS[0] ** taken) / scale
        limit = preset.clamp * self.h.norm(dim=1, keepdim=True)
        norm = delta.norm(dim=1, keepdim=True)
        clamped = norm > limit
        self.clamped = torch.where(more, clamped[:, 0], self.clamped)
        self.delta = torch.where(more[:, None], torch.where(clamped, delta * (limit / norm), delta), self.delta)

    def _values(self) -> list[Tensor]:
        return [getattr(self, one.name) for one in fields(self)]


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """All rows of the facts in flight from their lookup tokens on, packed for the layers above L."""

    packed: Packed
    states: Tensor
    """[N, d] after layer L, without δ."""
    lookup: Tensor
    """[B]: each row's lookup token."""
    owner: Tensor
    """[B]: each row's fact."""
    places: Tensor
    """[m]: the tokens that predict one of an object's."""
    places_owner: Tensor
    """[m]: the fact of each."""
    expected: Tensor
    """[m]: the token that should follow."""
    share: Tensor
    """[m]: its weight in its fact's loss, 1 / (object tokens x contexts)."""
    essence: Tensor
    """[e]: the lookup tokens of the KL term's rows."""
    essence_owner: Tensor
    """[e]: the fact of each."""


class _Search:
    """The optimisation of many facts, a token budget's worth at a time."""

    def __init__(self, base: Base, requests: Sequence[EditRequest], contexts: Sequence[str], preset: Preset) -> None:
        self.base, self.contexts, self.preset = base, contexts, preset
        self.top = preset.layers[-1] + 1
        if self.top >= base.layers:
            raise EditError(f"layer {self.top - 1} is the last one: none above it tells what its state should be")
        if BARE not in contexts:
            raise EditError("the contexts lack the bare prompt", hint="kbsync statistics build")
        self.layers = Layers(base)
        self.dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
        self.queue = sorted((self._fact(request) for request in requests), key=lambda fact: fact.tokens)
        rows = [row for fact in self.queue for row in fact.all_rows]
        with torch.no_grad():
            beginnings = Beginnings(self.layers, [row.tokens for row in rows], [row.group for row in rows])
            self.beginnings = beginnings.past(range(base.layers))

    def _fact(self, request: EditRequest) -> _Fact:
        texts = [encode(self.base, request, context) for context in self.contexts]
        rows = [Row(tokens, group, len(tokens.ids) - 1) for group, tokens in enumerate(texts)]  # the last is predicted
        essence = None
        if self.preset.kl_weight:
            tokens = encode_subject(self.base, request)
            essence = Row(tokens, len(rows), tokens.lookup + 1)
        return _Fact(request, rows, rows[list(self.contexts).index(BARE)], essence)

    def run(self) -> Iterator[tuple[EditRequest, Target]]:
        """Every request with its target, as they are finished."""
        vocabulary = self.base.network.config.vocab_size if self.preset.kl_weight else 0
        empty = torch.empty(0, self.base.network.config.hidden_size, dtype=self.dtype, device=self.base.device)
        facts, state = self._refill([], _State.begin(empty, vocabulary))
        while facts:
            batch = self._batch(facts)
            finished = torch.zeros(len(facts), dtype=torch.bool)
            while not finished.any():
                losses, gradient = self._evaluate(state, batch)
                finished = (losses < self.preset.stop_loss) | (state.steps >= self.preset.steps)
                state.update(gradient, self.preset, ~finished)
            for index in finished.nonzero()[:, 0].tolist():
                yield facts[index].request, _target(state, index, facts[index], float(losses[index]))
            keep = (~finished).nonzero()[:, 0]
            facts, state = self._refill([facts[index] for index in keep.tolist()], state.take(keep))

    def _refill(self, facts: list[_Fact], state: _State) -> tuple[list[_Fact], _State]:
        """Let facts of the queue in where half of the token budget is free."""
        budget, load = self.preset.token_budget, sum(fact.tokens for fact in facts)
        fresh: list[_Fact] = []
        if load <= budget // 2:
            while self.queue and (not load or load + self.queue[-1].tokens <= budget):
                fresh.append(self.queue.pop())
                load += fresh[-1].tokens
        if not fresh:
            return facts, state
        rows = [row for fact in fresh for row in fact.all_rows]
        read_rows(self.layers, rows, self.beginnings, self.top, budget)
        h = torch.stack([fact.bare.states[0] for fact in fresh]).to(self.dtype)
        return facts + fresh, state.join(_State.begin(h, state.essence.shape[1]))

    def _batch(self, facts: Sequence[_Fact]) -> _Batch:
        owned = [(owner, row) for owner, fact in enumerate(facts) for row in fact.all_rows]
        owned.sort(key=lambda pair: -pair[1].suffix)
        rows = [row for _, row in owned]
        past = Past.gather([row.past for row in rows], self.top)
        packed = Packed([row.suffix for row in rows], past, self.base.dtype)
        essence = [
            (start, owner)
            for start, (owner, row) in zip(packed.starts, owned, strict=True)
            if row.group == len(self.contexts)
        ]
        places = [
            (start + at - 1 - row.tokens.lookup, owner, row.tokens.ids[at], len(row.tokens.ids) - row.tokens.prompt)
            for start, (owner, row) in zip(packed.starts, owned, strict=True)
            if row.group < len(self.contexts)
            for at in range(row.tokens.prompt, len(row.tokens.ids))
        ]
        place, place_owner, expected, count = self._columns(places, 4)
        token, essence_owner = self._columns(essence, 2)
        return _Batch(
            packed=packed,
            states=torch.cat([row.states for row in rows]),
            lookup=torch.tensor(packed.starts, device=self.base.device),
            owner=torch.tensor([owner for owner, _ in owned], device=self.base.device),
            places=place,
            places_owner=place_owner,
            expected=expected,
            share=1 / (count.to(self.dtype) * len(self.contexts)),
            essence=token,
            essence_owner=essence_owner,
        )

    def _columns(self, values: Sequence[tuple[int, ...]], width: int) -> Tensor:
        """Tuples of `width` whole numbers as a tensor [width, len(values)]."""
        return torch.tensor(values, dtype=torch.long, device=self.base.device).reshape(-1, width).T

    def _evaluate(self, state: _State, batch: _Batch) -> tuple[Tensor, Tensor]:
        """The losses [n] and their gradient by δ [n, d]; zeros where no fact will take another step."""
        state.steps = state.steps + 1
        more = bool((state.steps < self.preset.steps).any())
        with torch.set_grad_enabled(more):
            delta = state.delta.detach().requires_grad_(more)
            losses = self._losses(batch, delta, state)
        gradient = torch.autograd.grad(losses.sum(), delta)[0] if more else torch.zeros_like(delta)
        return losses.detach(), gradient

    def _losses(self, batch: _Batch, delta: Tensor, state: _State) -> Tensor:
        """The loss of each fact, [n]."""
        edited = (batch.states[batch.lookup].to(self.dtype) + delta[batch.owner]).to(batch.states.dtype)
        hidden = batch.states.index_copy(0, batch.lookup, edited)  # [N, d]
        hidden = self.layers.run(hidden, range(self.top, self.base.layers), batch.packed)
        log_probs = self.layers.logits(hidden[torch.cat((batch.places, batch.essence))]).log_softmax(dim=1)
        predicted, essence = log_probs[: len(batch.places)], log_probs[len(batch.places) :]
        missing = -predicted.gather(1, batch.expected[:, None])[:, 0] * batch.share
        losses: Tensor = self.preset.weight_decay * delta.norm(dim=1) / state.h.norm(dim=1) ** 2
        losses = losses.index_add(0, batch.places_owner, missing)
        if not len(essence):
            return losses
        fresh = state.steps[batch.essence_owner] == 1
        state.essence[batch.essence_owner[fresh]] = essence[fresh].detach()
        before = state.essence[batch.essence_owner]
        kl = functional.kl_div(before, essence, reduction="none", log_target=True).sum(dim=1)
        return losses.index_add(0, batch.essence_owner, self.preset.kl_weight * kl)


def _target(state: _State, index: int, fact: _Fact, loss: float) -> Target:
    z = (state.h[index] + state.delta[index]).cpu()
    if not (math.isfinite(loss) and z.isfinite().all()):
        raise EditError(f"{fact.request.prompt!r}: the loss is not finite", hint="kbsync verify")
    return Target(z=z, loss=loss, steps=int(state.steps[index]), clamped=bool(state.clamped[index]))
