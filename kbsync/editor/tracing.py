"""Causal tracing: which states and modules carry a fact from its subject to its answer.

The subject's embeddings are blurred with noise of 3σ, so that the answer becomes improbable; then, in one run each, the
clean value of one thing is put back at one token, and the answer's probability is read again. The average indirect
effect is the mean gain over facts. What is put back: the state after one layer; the outputs of the MLPs, or of the
attentions, of a window of layers; the state after one layer while the MLPs, or the attentions, above it are severed at
that token, that is, held at their corrupted values. Sources: ROME, arXiv 2202.05262, section 2; MEMIT, arXiv
2210.07229, Figure 3 and Appendix A. Unlike in the authors' notebook, corrupted values and the run that they are put
into have the same noise.

All restorations at a token are one sweep through the layers: a restoration enters the batch at the layer where it
begins, from the corrupted run's states, and only tokens from the restored one on are run, on the corrupted run's keys
and values of those before. Exact: causal attention makes everything else equal to the corrupted run.

    tracer = Tracer(base, subject_deviation(base, facts), Settings())
    tracer.trace(fact).effects["last_subject"]["mlp"][4]         # of the window of layers around 4
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kbsync.editor.known import KnownFact
from kbsync.editor.layers import Layers, Packed, Past
from kbsync.editor.model import Base
from kbsync.editor.tokens import encode
from kbsync.errors import EditError, ModelError

__all__ = [
    "KINDS",
    "SITES",
    "FactTrace",
    "Grid",
    "Kind",
    "Settings",
    "Site",
    "Tracer",
    "placeable",
    "subject_deviation",
    "window",
]

Kind = Literal["state", "mlp", "attention", "mlp_severed", "attention_severed"]
KINDS: tuple[Kind, ...] = ("state", "mlp", "attention", "mlp_severed", "attention_severed")
"""What is restored: a state, a window of MLPs or attentions, a state with the MLPs or attentions above it severed."""
Site = Literal["last_subject", "last_token"]
SITES: dict[Site, tuple[Kind, ...]] = {"last_subject": KINDS, "last_token": ("state", "mlp", "attention")}
"""Where something is restored, and what: severing says what becomes of the subject's state, so it is done there."""
_GRID: tuple[Kind, ...] = ("state", "mlp", "attention")
_WINDOWED: tuple[Kind, ...] = ("mlp", "attention")

_TOKENS = 16_384
"""Tokens in one sweep at the last layer: bounds memory and does not change the result."""
_ROWS = 128
"""Rows that are turned into logits at once: of a large vocabulary all of a sweep's would take gigabytes."""
_ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")
"""What transformers calls the attention inside a block."""
_WINDOW, _WINDOW_SHARE = 10, 3
"""Layers of a window: 10 as in the paper (of 28 to 48 layers), at most a third of a smaller model's."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Noise in units of σ, runs per fact with noise of their own, layers of a window, the seed of the noise."""

    noise: float = 3.0
    samples: int = 10
    window: int | None = None
    seed: int = 0

    def window_of(self, layers: int) -> int:
        """Layers of a window in a model with so many: what was asked for, or 10 and at most a third of the model."""
        return self.window or max(1, min(_WINDOW, layers // _WINDOW_SHARE))


@dataclass(frozen=True, slots=True, eq=False)
class FactTrace:
    """One fact: the answer's probability on the clean and on the corrupted prompt, and its gain by what is restored.

    `effects[site][kind]` is [layers], in probability; a window belongs to the layer in its middle.
    """

    clean: float
    corrupted: float
    effects: dict[Site, dict[Kind, Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """One fact at every token: `effects[kind]` is [tokens, layers]. Tokens before the subject have no effect: there the
    corrupted run is the clean one. `subject` is the range of the subject's tokens."""

    fact: KnownFact
    tokens: list[str]
    subject: range
    clean: float
    corrupted: float
    effects: dict[Kind, Tensor]


@dataclass(frozen=True, slots=True)
class _Text:
    """A prompt's tokens, the range of the subject's, and the answer's first token."""

    ids: list[int]
    subject: range
    answer: int


@torch.no_grad()
def subject_deviation(base: Base, facts: Iterable[KnownFact]) -> float:
    """σ: the standard deviation over all numbers of the embeddings of the facts' subject tokens."""
    texts = [text for fact in facts if (text := _placed(base, fact))]
    tokens = [text.ids[index] for text in texts for index in text.subject]
    if not tokens:
        raise EditError("no fact can be placed in its tokens: there is nothing to trace", hint="look at the facts file")
    embedded = base.module(base.spec.embedding)(torch.tensor(tokens, device=base.device))
    return float(embedded.double().std(correction=0))


def placeable(base: Base, facts: Iterable[KnownFact]) -> list[KnownFact]:
    """The facts whose subject and attribute can be told apart in the model's tokens: the others cannot be traced."""
    return [fact for fact in facts if _placed(base, fact)]


class Tracer:
    """Traces facts on the weights that `base` holds, with noise of `settings.noise` · `sigma`.

    Raises ModelError for a block whose attention is not found; tracing raises EditError for a fact that cannot be
    placed in its tokens.
    """

    def __init__(self, base: Base, sigma: float, settings: Settings) -> None:
        self.base, self.layers, self.settings = base, Layers(base), settings
        self.scale = settings.noise * sigma
        self.window = settings.window_of(base.layers)
        self.width = base.network.get_input_embeddings().weight.shape[1]
        self.mlps = [base.module(base.spec.down_name(layer)) for layer in range(base.layers)]
        self.attentions = [_attention(base, layer) for layer in range(base.layers)]

    def trace(self, fact: KnownFact) -> FactTrace:
        """The fact's last subject token and the prompt's last token, over all layers."""
        text = _text(self.base, fact)
        record = self._record(fact, text)
        tokens: dict[Site, int] = {"last_subject": text.subject[-1], "last_token": len(text.ids) - 1}
        clean, corrupted = record.probability
        effects = {site: self._effects(record, tokens[site], kinds) for site, kinds in SITES.items()}
        return FactTrace(clean, corrupted, effects)

    def grid(self, fact: KnownFact) -> Grid:
        """The fact at all of its tokens, over all layers."""
        text = _text(self.base, fact)
        record = self._record(fact, text)
        unmoved = {kind: torch.zeros(self.base.layers, dtype=torch.float64) for kind in _GRID}
        rows = [
            unmoved if token < text.subject[0] else self._effects(record, token, _GRID)
            for token in range(len(text.ids))
        ]
        tokens = [self.base.tokenizer.decode([token]) for token in text.ids]
        clean, corrupted = record.probability
        effects = {kind: torch.stack([row[kind] for row in rows]) for kind in _GRID}
        return Grid(fact, tokens, text.subject, clean, corrupted, effects)

    def noise(self, fact: KnownFact, text: _Text) -> Tensor:
        """[samples, subject tokens, d] float32: of the fact alone, so that it does not depend on the others' order."""
        key = hashlib.sha256(f"{self.settings.seed}\n{fact.prompt}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7]))
        width = self.base.network.get_input_embeddings().weight.shape[1]
        return self.scale * torch.randn(self.settings.samples, len(text.subject), width, generator=generator)

    @torch.no_grad()
    def _record(self, fact: KnownFact, text: _Text) -> _Record:
        """The clean run and the corrupted ones, as one batch."""
        rows, length = self.settings.samples + 1, len(text.ids)
        packed = Packed([length] * rows, Past.nothing(rows, self.base.device), self.base.dtype)
        at = torch.arange(rows * length, device=self.base.device).view(rows, length)
        blurred = at[1:, text.subject[0] : text.subject[-1] + 1].flatten()
        with _changed(
            self.base.module(self.base.spec.embedding), blurred, self.noise(fact, text).flatten(0, 1), add=True
        ):
            hidden = self.layers.embed(text.ids * rows, packed)
        blocks = [self.base.layer(layer) for layer in range(self.base.layers)]
        with self._kept(blocks) as states, self._kept(self.mlps) as mlps, self._kept(self.attentions) as attentions:
            last, keys = self.layers.read(hidden, range(self.base.layers), packed)
        answer = _probability(self.layers, last[at[:, -1]], text.answer)

        def apart(flat: Sequence[Tensor]) -> list[Tensor]:
            return [one.view(rows, length, -1) for one in flat]

        return _Record(
            answer=text.answer,
            probability=(float(answer[0]), float(answer[1:].mean())),
            states=apart([hidden, *states]),
            outputs={"mlp": apart(mlps), "attention": apart(attentions)},
            keys=keys.unflatten(2, (rows, length)),
        )

    @contextmanager
    def _kept(self, modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
        """What the modules compute while the context lasts, [N, d] call by call."""
        seen: list[Tensor] = []

        def keep(_module: nn.Module, _arguments: object, output: Any) -> None:
            seen.append(_first(output).flatten(0, -2).to(self.base.device))

        with ExitStack() as hooks:
            for module in modules:
                hooks.callback(module.register_forward_hook(keep).remove)
            yield seen

    @torch.no_grad()
    def _effects(self, record: _Record, token: int, kinds: Sequence[Kind]) -> dict[Kind, Tensor]:
        """The gain in probability [layers] of each kind of restoration at `token`."""
        suffix = record.length - token
        at_once = max(1, _TOKENS // (len(kinds) * self.base.layers * suffix))
        gained = torch.zeros(len(kinds), self.base.layers, dtype=torch.float64)
        for samples in torch.arange(self.settings.samples).split(at_once):
            sweep = _Sweep(self, record, token, samples + 1)
            for (kind, layer), probability in sweep.run(kinds).items():
                gained[kinds.index(kind), layer] += probability
        gained = gained / self.settings.samples - record.probability[1]
        return dict(zip(kinds, gained, strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class _Record:
    """What the clean run (row 0) and the corrupted runs (the others) of a fact left behind."""

    answer: int
    probability: tuple[float, float]
    """Of the answer: clean, and corrupted (mean over the samples)."""
    states: list[Tensor]
    """[rows, T, d] before block 0, 1, … and after the last one."""
    outputs: dict[str, list[Tensor]]
    """[rows, T, d] of the MLP and of the attention of each block."""
    keys: Tensor
    """[layers, 2, rows, T, heads, head_dim]: keys and values."""

    @property
    def length(self) -> int:
        """T, the prompt's tokens."""
        return int(self.states[0].shape[1])


Restoration = tuple[Kind, int]
"""What is restored, and the layer that it belongs to."""


class _Sweep:
    """All restorations at one token for some of the samples, in one pass through the layers."""

    def __init__(self, tracer: Tracer, record: _Record, token: int, samples: Tensor) -> None:
        self.tracer, self.record, self.token, self.samples = tracer, record, token, samples
        self.past = Past.gather([record.keys[:, :, row, :token] for row in samples.tolist()], 0)
        self.suffix = record.length - token
        self.inside: list[Restoration] = []
        """What has begun: [samples, suffix] rows each in `hidden`."""

    def run(self, kinds: Sequence[Kind]) -> dict[Restoration, float]:
        """The answer's probability, summed over the samples, under each restoration."""
        states, samples, count = self.record.states, self.samples, self.tracer.base.layers
        hidden = states[0].new_empty(0, len(samples), self.suffix, states[0].shape[2])
        for layer in range(count):
            starting = [at for at in range(count) if window(at, self.tracer.window, count).start == layer]
            windows = [(kind, at) for kind in kinds if kind in _WINDOWED for at in starting]
            hidden = self._enter(hidden, states[layer][samples, self.token :], windows)
            hidden = self._block(hidden, layer)
            restored = states[layer + 1][samples, self.token :].clone()
            restored[:, 0] = states[layer + 1][0, self.token]
            hidden = self._enter(hidden, restored, [(kind, layer) for kind in kinds if kind not in _WINDOWED])
        found = _probability(self.tracer.layers, hidden[:, :, -1].flatten(0, 1), self.record.answer)
        return dict(zip(self.inside, found.view(-1, len(samples)).sum(dim=1).tolist(), strict=True))

    def _enter(self, hidden: Tensor, states: Tensor, beginning: Sequence[Restoration]) -> Tensor:
        """`hidden` with the restorations that begin here, from these states [samples, suffix, d]."""
        self.inside += beginning
        return torch.cat([hidden, states.expand(len(beginning), *states.shape)])

    def _block(self, hidden: Tensor, layer: int) -> Tensor:
        """The rows after block `layer`, what is restored or severed in it changed."""
        if not len(hidden):
            return hidden
        rows = torch.arange(len(self.samples), device=hidden.device).repeat(len(self.inside))
        packed = Packed([self.suffix] * len(rows), self.past.of(rows), self.tracer.base.dtype)
        modules = {"mlp": self.tracer.mlps[layer], "attention": self.tracer.attentions[layer]}
        with ExitStack() as changes:
            for name, module in modules.items():
                changes.enter_context(_changed(module, *self._values(name, layer)))
            after = self.tracer.layers.run(hidden.flatten(0, 2), range(layer, layer + 1), packed)
        return after.view_as(hidden)

    def _values(self, name: str, layer: int) -> tuple[Tensor, Tensor]:
        """Which of the packed tokens get another output of module `name` [k], and which [k, d]."""
        outputs = self.record.outputs[name][layer][:, self.token]  # [rows, d]
        clean, corrupted = outputs[:1].expand(len(self.samples), -1), outputs[self.samples]
        first = torch.arange(len(self.samples), device=outputs.device) * self.suffix
        places, values = [first[:0]], [outputs[:0]]
        for index, (kind, at) in enumerate(self.inside):
            severed = kind == f"{name}_severed"
            if severed or (kind == name and layer in window(at, self.tracer.window, self.tracer.base.layers)):
                places.append(first + index * len(self.samples) * self.suffix)
                values.append(corrupted if severed else clean)
        return torch.cat(places), torch.cat(values)


def window(layer: int, width: int, layers: int) -> range:
    """The `width` layers around `layer`, as far as the model has them (the authors' choice for an even width)."""
    return range(max(0, layer - width // 2), min(layers, layer + (width + 1) // 2))


def _text(base: Base, fact: KnownFact) -> _Text:
    """Raises EditError where the fact cannot be placed in its tokens."""
    tokens = encode(base, fact.request)
    start = fact.prompt.find(fact.subject)
    spans = base.tokenizer(fact.prompt, return_offsets_mapping=True)["offset_mapping"]
    first = next(index for index, (left, right) in enumerate(spans) if right > start and right > left)
    return _Text(list(tokens.ids[: tokens.prompt]), range(first, tokens.lookup + 1), tokens.ids[tokens.prompt])


def _placed(base: Base, fact: KnownFact) -> _Text | None:
    try:
        return _text(base, fact)
    except EditError:
        return None


def _attention(base: Base, layer: int) -> nn.Module:
    children = dict(base.layer(layer).named_children())
    for name in _ATTENTIONS:
        if name in children:
            return children[name]
    raise ModelError(
        f"the attention of a {base.spec.family} block is none of {', '.join(_ATTENTIONS)}",
        hint="trace a model of another family",
    )


def _probability(layers: Layers, hidden: Tensor, answer: int) -> Tensor:
    """The answer's probability [m] after last-block states [m, d], float64 on the CPU."""
    found = []
    for part in hidden.split(_ROWS):
        logits = layers.logits(part)
        found.append((logits[:, answer] - logits.logsumexp(dim=1)).exp().double().cpu())
    return torch.cat(found)


def _first(output: Any) -> Tensor:
    """What a module computes, without what it says beside it."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


@contextmanager
def _changed(module: nn.Module, places: Tensor, values: Tensor, *, add: bool = False) -> Iterator[None]:
    """While the context lasts, the module's output at the tokens `places` [k] is `values` [k, d], or that is added."""

    def change(_module: nn.Module, _arguments: object, output: Any) -> Any:
        flat = _first(output).flatten(0, -2)
        index, new = places.to(flat.device), values.to(flat)
        changed = (flat.index_add(0, index, new) if add else flat.index_copy(0, index, new)).view_as(_first(output))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(change) if len(places) else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
