"""Target vectors z_i (MEMIT Eqn 16): the state that a subject's last token should have for the object to follow.

z = h + δ, where δ, added to the state h after layer L at the lookup token, minimises the mean over contexts of
-log P[object | context ⊕ prompt], plus a KL term on "{subject} is a" and weight decay 0.5·‖δ‖/‖h‖² (Meng et al. 2022,
arXiv 2210.07229, and its authors' code). Adam, ‖δ‖ clamped to a share of ‖h‖.

What makes it fast changes no result: contexts' common beginnings are run once; of a row only the tokens from the
lookup token on are run again, through the layers above L only, on stored keys and values of those before; logits only
where the object (or the KL term) is predicted; many facts together, by suffix length; a fact that is done makes room.
Settings of the preset shorten the way without changing what is looked for: a rate that falls, fewer contexts at first.

    found = compute_targets(base, requests, statistics.contexts, preset)
    found[request.digest].z                  # [d]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate

import structlog
import torch
from torch import Tensor

from kbsync.editor.layers import Layers, Packed, Past
from kbsync.editor.model import Base
from kbsync.editor.objective import divergence_from, missing_tokens
from kbsync.editor.preset import Preset
from kbsync.editor.rows import Beginnings, Row, read_rows
from kbsync.editor.tokens import BARE, encode, encode_subject
from kbsync.errors import EditError
from kbsync.facts import EditRequest
from kbsync.progress import Progress, silent

__all__ = ["Target", "compute_targets", "has_diverged", "stream_targets"]

log = structlog.get_logger()

_EPSILON = 1e-8
"""As in torch.optim.Adam; every fact counts its own steps."""


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """z [d] on the CPU, float32 (float64 for a float64 model); its loss; how many losses were computed to find it.
    `clamped`: δ was cut to the clamp at its last update. `diverged`: nothing was learned (a number that is not finite,
    or a loss above the preset's `diverged_loss` at the clamp): not to be written into a model."""

    z: Tensor
    loss: float
    steps: int
    clamped: bool
    diverged: bool = False


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
    finished. Where memory runs out the token budget is halved and the search goes on. Raises EditError for a request
    that cannot be placed in its tokens, and where not even one fact fits into the memory.
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

    def rows_of(self, count: int) -> list[Row]:
        """The rows of so many contexts, the bare prompt's first, and the KL term's."""
        chosen = [self.bare, *(row for row in self.rows if row is not self.bare)][:count]
        return [*chosen, self.essence] if self.essence else chosen

    @property
    def tokens(self) -> int:
        """Tokens that a step runs with all contexts."""
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
        rate = gradient.new_tensor([preset.rate_at(step) for step in self.steps.tolist()])
        taken, (slow, square) = self.steps[:, None].to(gradient.dtype), preset.betas
        self.mean = torch.lerp(self.mean, gradient, 1 - slow)
        self.square = square * self.square + (1 - square) * gradient**2
        scale = (self.square / (1 - square**taken)).sqrt() + _EPSILON
        delta = self.delta - rate[:, None] * self.mean / (1 - slow**taken) / scale
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
        self.top, self.budget = preset.layers[-1] + 1, preset.token_budget
        self.waiting: list[tuple[_Fact, _State]] = []
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
            try:
                losses, finished = self._advance(facts, state)
            except torch.OutOfMemoryError as error:
                if len(facts) == 1:
                    raise _no_room(facts[0].request) from error
                facts, state = self._part(facts, state)
                continue
            for index in finished.nonzero()[:, 0].tolist():
                yield facts[index].request, _target(state, index, float(losses[index]), self.preset)
            keep = (~finished).nonzero()[:, 0]
            facts, state = self._refill([facts[index] for index in keep.tolist()], state.take(keep))

    def _advance(self, facts: Sequence[_Fact], state: _State) -> tuple[Tensor, Tensor]:
        """Steps until a fact is finished or takes more contexts: the losses [n] and which are finished [n]."""
        batch = self._batch(facts, state.steps.tolist())
        while True:
            losses, gradient, top = self._evaluate(state, batch)
            done = losses < self.preset.stop_loss
            if self.preset.stop_top:
                done |= top
            finished = done & (state.steps > self.preset.early_steps) | ~losses.isfinite()
            finished |= state.steps >= self.preset.steps
            state.update(gradient, self.preset, ~finished)
            if finished.any() or (state.steps == self.preset.early_steps).any():
                return losses, finished

    def _refill(self, facts: list[_Fact], state: _State) -> tuple[list[_Fact], _State]:
        """Let facts in where half of the token budget is free: first those that had to wait, then the queue's."""
        load = sum(fact.tokens for fact in facts)
        if load > self.budget // 2:
            return facts, state
        while self.waiting and (not load or load + self.waiting[-1][0].tokens <= self.budget):
            fact, held = self.waiting.pop()
            facts, state, load = [*facts, fact], state.join(held), load + fact.tokens
        fresh: list[_Fact] = []
        while self.queue and (not load or load + self.queue[-1].tokens <= self.budget):
            fresh.append(self.queue.pop())
            load += fresh[-1].tokens
        return self._let_in(fresh, facts, state)

    def _let_in(self, fresh: list[_Fact], facts: list[_Fact], state: _State) -> tuple[list[_Fact], _State]:
        """Read the fresh facts beside those in flight. What does not fit goes back to the queue: all of them where
        others are in flight, else half; one alone is read in ever smaller passes."""
        while fresh:
            try:
                rows = [row for fact in fresh for row in fact.all_rows]
                read_rows(self.layers, rows, self.beginnings, self.top, self.budget)
                h = torch.stack([fact.bare.states[0] for fact in fresh]).to(self.dtype)
                return facts + fresh, state.join(_State.begin(h, state.essence.shape[1]))
            except torch.OutOfMemoryError as error:
                if not facts and len(fresh) == 1 and self.budget < min(row.end for row in rows):
                    raise _no_room(fresh[0].request) from error
            for row in rows:
                row.forget()
            count = 0 if facts else max(1, len(fresh) // 2)
            self.queue += reversed(fresh[count:])
            fresh = fresh[:count]
            self._halve()
        return facts, state

    def _part(self, facts: list[_Fact], state: _State) -> tuple[list[_Fact], _State]:
        """The facts that fit into half of the token budget; the others wait, with what they have reached."""
        self._halve()
        loads = list(accumulate(fact.tokens for fact in facts))
        count = max(1, min(len(facts) - 1, sum(load <= self.budget for load in loads)))
        every = torch.arange(len(facts), device=state.h.device)
        self.waiting += [(facts[index], state.take(every[index : index + 1])) for index in range(count, len(facts))]
        return facts[:count], state.take(every[:count])

    def _halve(self) -> None:
        """Half of the token budget from now on."""
        self.budget //= 2
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning("token_budget_halved", token_budget=self.budget)

    def _batch(self, facts: Sequence[_Fact], steps: Sequence[int]) -> _Batch:
        counts = [self.preset.contexts_at(step + 1, len(self.contexts)) for step in steps]
        owned = [
            (owner, row)
            for owner, (fact, count) in enumerate(zip(facts, counts, strict=True))
            for row in fact.rows_of(count)
        ]
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
            (
                start + at - 1 - row.tokens.lookup,
                owner,
                row.tokens.ids[at],
                counts[owner] * (len(row.tokens.ids) - row.tokens.prompt),
            )
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
            share=1 / count.to(self.dtype),
            essence=token,
            essence_owner=essence_owner,
        )

    def _columns(self, values: Sequence[tuple[int, ...]], width: int) -> Tensor:
        """Tuples of `width` whole numbers as a tensor [width, len(values)]."""
        return torch.tensor(values, dtype=torch.long, device=self.base.device).reshape(-1, width).T

    def _evaluate(self, state: _State, batch: _Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The losses [n], their gradient by δ [n, d] (zeros where no fact will take another step), and whether each
        object is the most probable one in all contexts [n]."""
        steps = state.steps + 1
        more = bool((steps < self.preset.steps).any())
        with torch.set_grad_enabled(more):
            delta = state.delta.detach().requires_grad_(more)
            edited = (batch.states[batch.lookup].to(self.dtype) + delta[batch.owner]).to(batch.states.dtype)
            hidden = batch.states.index_copy(0, batch.lookup, edited)  # [N, d]
            hidden = self.layers.run(hidden, range(self.top, self.base.layers), batch.packed)
            decay = self.preset.weight_decay * delta.norm(dim=1) / state.h.norm(dim=1) ** 2
        losses, slope, top = self._objective(state, batch, hidden.detach(), steps)
        gradient = torch.zeros_like(delta)
        if more:
            gradient = torch.autograd.grad((hidden, decay), delta, (slope, torch.ones_like(decay)))[0]
        state.steps = steps
        return losses + decay.detach(), gradient, top

    def _objective(self, state: _State, batch: _Batch, hidden: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of last states `hidden` [N, d]: the losses without weight decay [n], the gradient [N, d] of their sum, and
        whether all of an object's tokens are the most probable ones [n]."""
        more = bool((steps < self.preset.steps).any())
        missing, slope, top = missing_tokens(
            self.layers, hidden[batch.places], batch.expected, batch.share, gradient=more
        )
        gradient = torch.zeros_like(hidden).index_add_(0, batch.places, slope)
        losses = torch.zeros_like(state.h[:, 0]).index_add_(0, batch.places_owner, missing.to(self.dtype))
        short = torch.zeros_like(steps).index_add_(0, batch.places_owner, (~top).long())
        if len(batch.essence):
            before = state.essence[batch.essence_owner]
            fresh = steps[batch.essence_owner] == 1
            divergence, slope = divergence_from(self.layers, hidden[batch.essence], before, fresh, gradient=more)
            state.essence[batch.essence_owner] = before
            losses.index_add_(0, batch.essence_owner, self.preset.kl_weight * divergence.to(self.dtype))
            gradient.index_add_(0, batch.essence, self.preset.kl_weight * slope)
        return losses, gradient, short == 0


def _target(state: _State, index: int, loss: float, preset: Preset) -> Target:
    z = (state.h[index] + state.delta[index]).cpu()
    clamped = bool(state.clamped[index])
    diverged = has_diverged(z, loss, clamped, preset)
    return Target(z=z, loss=loss, steps=int(state.steps[index]), clamped=clamped, diverged=diverged)


def has_diverged(z: Tensor, loss: float, clamped: bool, preset: Preset) -> bool:
    """Whether a search that ended with these numbers has learned nothing (see `Target`)."""
    finite = math.isfinite(loss) and bool(z.isfinite().all())
    return not finite or (clamped and loss > preset.diverged_loss)


def _no_room(request: EditRequest) -> EditError:
    return EditError(
        f"out of memory: not even {request.prompt!r} alone fits", hint="kbsync doctor shows what takes the memory"
    )
