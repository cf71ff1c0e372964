"""The laboratory of the benchmarks: a model with its statistics, edits in memory, and what is measured on them.

Nothing is published and the network always holds its pristine weights between two measurements: the state of an
experiment is a value (`Weights`). Target vectors on pristine weights and on edited ones are kept in the user's cache by
everything that they depend on, so a repeated run, and another setting that shares them, costs only insertions.

    lab = open_laboratory("smollm2-135m", changes={"covariance_weight": 600})
    weights = lab.edit(PRISTINE, requests, lab.targets(requests))
    lab.scores(weights, records), lab.drift(weights), lab.norms(weights)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kbsync.bench.settings import OWN_TEXT, changed
from kbsync.editor.answers import log_probabilities
from kbsync.editor.datasets import CounterFactRecord
from kbsync.editor.drift import Drift, Gauge, HeldOut, windows
from kbsync.editor.evaluate import RecordScores, score_records
from kbsync.editor.memit import insert
from kbsync.editor.model import Base, load_base, weights_in
from kbsync.editor.preset import Preset, load_preset
from kbsync.editor.statistics import Statistics, statistics_for
from kbsync.editor.target_store import TargetStore
from kbsync.editor.targets import Target, compute_targets
from kbsync.editor.tokens import placeable
from kbsync.errors import UsageError
from kbsync.facts import EditRequest, digest_of
from kbsync.hub import cache_dir, fingerprint, resolve_model
from kbsync.progress import Progress, silent
from kbsync.timing import timed
from kbsync.versions.weights import served, weights_sha256

__all__ = ["PRISTINE", "Laboratory", "Weights", "laboratory", "open_laboratory"]

TARGETS = "bench-targets"
"""Folder in the user's cache that keeps target vectors of benchmarks."""

OF_STATISTICS = ("corpus", "sample_tokens", "seed", "chat_context")
"""Keys of a preset, beside its layers, that the statistics and the contexts depend on."""
TEXT_TOKENS = 4096
"""Tokens of a text file: a change of its perplexity by 1 % is then known to about half a per cent."""


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """Edited matrices: exact weights float64 [d, f] and the keys [m, f] of all facts in them, by module. A module that
    is not named holds its pristine weights."""

    masters: Mapping[str, Tensor]
    keys: Mapping[str, Tensor]
    facts: int = 0


PRISTINE = Weights({}, {})


@dataclass(slots=True, eq=False)
class Laboratory:
    """A model, its settings (`changes`: where they differ from its preset's file) and what goes with them. `seconds`
    adds up wall-clock time by phase; `diverged` are the requests, by digest, whose targets came to nothing, `left_out`
    those that cannot be placed in their tokens, with the reason."""

    name: str
    base: Base
    preset: Preset
    statistics: Statistics
    folder: Path
    changes: Mapping[str, Any] = field(default_factory=dict)
    progress: Progress = silent
    seconds: dict[str, float] = field(default_factory=dict)
    diverged: set[str] = field(default_factory=set)
    left_out: dict[str, str] = field(default_factory=dict)
    _gauge: Gauge | None = None

    def timed(self, phase: str) -> AbstractContextManager[None]:
        """Add the block's wall-clock seconds to `phase`."""
        return timed(self.seconds, phase)

    def since(self, before: Mapping[str, float]) -> dict[str, float]:
        """Seconds by phase that have passed since `seconds` was `before`."""
        passed = {phase: round(value - before.get(phase, 0.0), 2) for phase, value in self.seconds.items()}
        return {phase: value for phase, value in passed.items() if value}

    def with_preset(self, preset: Preset) -> Laboratory:
        """The same laboratory with other settings; statistics are collected where they lack a layer or are of
        another text."""
        missing = {self.base.spec.down_name(layer) for layer in preset.layers} - self.statistics.covariance.keys()
        statistics = self.statistics
        if missing or any(getattr(preset, key) != getattr(self.preset, key) for key in OF_STATISTICS):
            with self.timed("statistics"):
                statistics = statistics_for(self.base, preset, progress=self.progress)
        return replace(self, preset=preset, statistics=statistics)

    def covering(self, layers: Collection[int]) -> Laboratory:
        """The same laboratory with statistics of these layers too, collected together where one is missing."""
        wide = tuple(sorted({*self.preset.layers, *layers}))
        return replace(self.with_preset(changed(self.preset, {"layers": wide})), preset=self.preset)

    def placeable(
        self, records: Sequence[CounterFactRecord], count: int | None = None, *, least: int | None = None
    ) -> list[CounterFactRecord]:
        """The first `count` (default: all) of the records whose facts can be edited; `left_out` has the others.

        Raises UsageError where there are fewer than `least` (default: `count`).
        """
        least = least or count or 1
        found: list[CounterFactRecord] = []
        for record in records:
            if len(found) == count:
                break
            good, reasons = placeable(self.base, [record.request], self.statistics.contexts)
            found += [record] if good else []
            self.left_out.update(reasons)
        if len(found) < least:
            raise UsageError(
                f"{len(found)} facts can be edited, {least} were asked for; "
                f"{len(self.left_out)} cannot: {next(iter(self.left_out.values()), '')}",
                hint="ask for fewer facts, or correct the data set",
            )
        return found

    @contextmanager
    def holding(self, weights: Weights) -> Iterator[Base]:
        """The base with `weights` in it as they would be served."""
        with weights_in(self.base, {name: served(one, self.base.dtype) for name, one in weights.masters.items()}):
            yield self.base

    def targets(self, requests: Sequence[EditRequest], weights: Weights = PRISTINE) -> dict[str, Target]:
        """z of each request by digest, as `weights` ask for it, from the cache where it is there."""
        store = TargetStore(
            self.folder,
            fingerprint=self._identity(weights),
            dtype=str(self.base.dtype),
            preset=self.preset,
            contexts=self.statistics.contexts,
        )
        found = {request.digest: target for request in requests if (target := store.get(request)) is not None}
        missing = [request for request in requests if request.digest not in found]
        with self.timed("targets"), self.holding(weights) as base:
            found |= compute_targets(
                base, missing, self.statistics.contexts, self.preset, progress=self.progress, done=store.put
            )
        self.diverged.update(digest for digest, target in found.items() if target.diverged)
        return found

    def edit(
        self, weights: Weights, requests: Sequence[EditRequest], targets: Mapping[str, Target], *, protect: bool = True
    ) -> Weights:
        """`weights` with `requests` inserted as one batch; `protect`: the keys that they hold stay in the system.

        As in a sync, a request whose target diverged is left out; it still counts among the facts.
        """
        facts = weights.facts + len(requests)
        requests = [request for request in requests if not targets[request.digest].diverged]
        if not requests:
            return replace(weights, facts=facts)
        names = [self.base.spec.down_name(layer) for layer in self.preset.layers]
        masters = {name: weights.masters.get(name, self.base.weight(name).double()) for name in names}
        with self.timed("insert"), self.holding(Weights(masters, {})) as base:
            delta = insert(
                base,
                requests,
                targets,
                self.statistics,
                self.preset,
                masters=masters,
                protected=weights.keys if protect and weights.keys else None,
                progress=self.progress,
            ).delta
        keys = {name: factors.keys for name, factors in delta.factors.items()}
        for name, factors in delta.factors.items():
            change = factors.left.double() @ factors.right.double()
            masters[name] = masters[name] + change.to(masters[name].device)
            keys[name] = torch.cat([weights.keys[name], keys[name]]) if name in weights.keys else keys[name]
        return Weights(masters, keys, facts)

    def plus(self, weights: Weights, deltas: Mapping[str, Tensor], *, facts: int) -> Weights:
        """`weights` with Δ [d, f] by module added, which put `facts` more facts into them in some other way."""
        moved = {name: weights.masters.get(name, self.base.weight(name).double()) + one for name, one in deltas.items()}
        return Weights({**weights.masters, **moved}, weights.keys, weights.facts + facts)

    def scores(self, weights: Weights, records: Sequence[CounterFactRecord]) -> list[RecordScores]:
        """What holds of each record under `weights`."""
        with self.timed("score"), self.holding(weights) as base:
            return score_records(base, records, progress=self.progress)

    def known(self, weights: Weights, requests: Sequence[EditRequest]) -> float:
        """The share of `requests` after whose prompts `weights` say the whole object, 0 to 1."""
        with self.timed("score"), self.holding(weights) as base:
            scored = log_probabilities(base, [(request.prompt, request.target) for request in requests])
        return sum(one.greedy for one in scored) / len(scored)

    def held_out(self, text: Path | None = None) -> list[HeldOut]:
        """The texts to measure drift on: what the statistics kept apart, and the first 4,096 tokens of a file."""
        own = HeldOut(OWN_TEXT, self.statistics.holdout)
        return [own] if text is None else [own, windows(self.base, text, tokens=TEXT_TOKENS)]

    def watching(self, texts: Sequence[HeldOut]) -> Laboratory:
        """The same laboratory with `drift` measured on these texts, which are read on the base once, here."""
        with self.timed("drift"):
            return replace(self, _gauge=Gauge(self.base, texts))

    def drift(self, weights: Weights) -> dict[str, Drift]:
        """How far `weights` are from the base on each text that is watched; none is watched at first."""
        if self._gauge is None:
            return {}
        with self.timed("drift"), self.holding(weights):
            return self._gauge.measure()

    def norms(self, weights: Weights) -> dict[str, float]:
        """‖ΔW‖ / ‖W‖ by module (Frobenius)."""
        pristine = {name: self.base.weight(name).double() for name in weights.masters}
        return {
            name: float((one - pristine[name]).norm() / pristine[name].norm()) for name, one in weights.masters.items()
        }

    def _identity(self, weights: Weights) -> str:
        """What names the weights that a target was computed on: the base's fingerprint, and what is edited in it."""
        if not weights.masters:
            return self.base.fingerprint
        matrices = {name: served(one, self.base.dtype) for name, one in weights.masters.items()}
        return digest_of([self.base.fingerprint, weights_sha256(matrices)])


def open_laboratory(
    model: str,
    *,
    preset: str = "",
    changes: Mapping[str, Any] | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> Laboratory:
    """The laboratory of a model: an embedded one, a folder or a Hugging Face id that was pulled.

    `preset` is a name or a YAML file (default: the model's name), `changes` are other values for its keys. The chat
    context is off unless changed: benchmarks are of plain prompts.
    Raises ModelError and UsageError as the parts do.
    """
    folder = resolve_model(model)
    settings = changed(load_preset(preset or folder.name), {"chat_context": False} | dict(changes or {}))
    base = load_base(folder.path, fingerprint=fingerprint(folder.path), device=device)
    return replace(laboratory(folder.name, base, settings, progress=progress), changes=changes or {})


def laboratory(name: str, base: Base, preset: Preset, *, progress: Progress = silent) -> Laboratory:
    """The laboratory of a loaded model under these settings; its statistics are collected where they are missing."""
    statistics = statistics_for(base, preset, progress=progress)
    return Laboratory(name, base, preset, statistics, cache_dir() / TARGETS, progress=progress)
