"""`kbsync bench edit`: what an edit costs, beside the plain algorithm in the same process, and whether it is as good.

Three ways to the same facts: `exact` follows the plain algorithm's path step by step, `preset` takes the path that the
preset allows (another rate, fewer contexts at first), `baseline` is editor/plain.py: one fact at a time, whole
sequences, the whole model. Nothing is taken from a cache. MEMIT, arXiv 2210.07229, Algorithm 1.

    found = measure(lab, records, baseline=4)
    found.to_json()["speedup_z"]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from kbsync.bench.lab import PRISTINE, Laboratory, Weights
from kbsync.bench.settings import changed
from kbsync.editor.datasets import CounterFactRecord
from kbsync.editor.evaluate import RecordScores, paired_difference, summarise
from kbsync.editor.plain import plain_insert, plain_targets
from kbsync.editor.preset import AUTHORS
from kbsync.editor.statistics import collect
from kbsync.editor.targets import Target, compute_targets
from kbsync.facts import EditRequest

__all__ = ["EditCost", "PathCost", "matrix_rate", "measure"]

TEXT_TOKENS = 8192
"""Tokens that the pass of the statistics is timed on."""
_RATE_WIDTH, _RATE_SECONDS = 2048, 1.0

Targets = Mapping[str, Target]


@dataclass(frozen=True, slots=True)
class PathCost:
    """One way: seconds of z and of the insertion for `facts` facts, its steps, and its scores in per cent."""

    facts: int
    z_seconds: float
    insert_seconds: float
    steps: float
    diverged: int
    scores: Mapping[str, Any]


@dataclass(slots=True)
class EditCost:
    """What was measured. Rates are of plain matrix products where the model is, in its dtype; GFLOP of z on the exact
    path."""

    paths: dict[str, PathCost] = field(default_factory=dict)
    differences: dict[str, Any] = field(default_factory=dict)
    statistics: dict[str, float] = field(default_factory=dict)
    gflop: float = 0.0
    gflops: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """A JSON value, with the speedups per fact worked out."""
        exact, preset, plain = (self.paths.get(name) for name in ("exact", "preset", "baseline"))
        found: dict[str, Any] = {"paths": {name: asdict(path) for name, path in self.paths.items()}}
        found |= {"differences": self.differences, "statistics": self.statistics, "gflops_matrix_product": self.gflops}
        if exact is not None:
            found |= {"z_seconds": exact.z_seconds, "insert_seconds": exact.insert_seconds, "z_gflop": self.gflop}
            found["z_share_of_matrix_rate"] = self.gflop / exact.z_seconds / self.gflops
        if exact is not None and plain is not None:
            found |= {"baseline_z_seconds": plain.z_seconds, "baseline_insert_seconds": plain.insert_seconds}
            found["speedup_z"] = _ratio(plain, exact, "z_seconds")
            found["speedup_insert"] = _ratio(plain, exact, "insert_seconds")
            found["speedup_z_preset"] = _ratio(plain, preset, "z_seconds") if preset else None
        return found


def _ratio(slow: PathCost, fast: PathCost, phase: str) -> float:
    """How many times as long `slow` takes per fact."""
    return float(getattr(slow, phase) / slow.facts / (getattr(fast, phase) / fast.facts))


def measure(lab: Laboratory, records: Sequence[CounterFactRecord], *, baseline: int = 0) -> EditCost:
    """The cost of editing `records` at once; the first `baseline` of them by the plain algorithm too."""
    found = EditCost(gflops=matrix_rate(lab.base.device, lab.base.dtype))
    exact = replace(lab, preset=changed(lab.preset, AUTHORS))
    requests = [record.request for record in records]
    _engine(lab, requests[:1])  # the first call of every kernel costs more
    scored: dict[str, list[RecordScores]] = {}
    ways: dict[str, Laboratory] = {"exact": exact}
    if exact.preset.digest != lab.preset.digest:
        ways["preset"] = lab
    for name, way in ways.items():
        found.paths[name], scored[name] = _measured(way, records, _engine)
    if baseline:
        found.paths["baseline"], scored["baseline"] = _measured(exact, records[:baseline], _plain)
    found.gflop = _gflop(exact, requests)
    found.gflops = max(found.gflops, matrix_rate(lab.base.device, lab.base.dtype))
    found.statistics = _statistics(lab)
    for name, scores in scored.items():
        if name != "exact" and len(scores) == len(records):  # else other facts would be in the weights, too
            found.differences[name] = paired_difference(scored["exact"], scores).to_json()
    return found


Way = Callable[[Laboratory, Sequence[EditRequest]], tuple[Targets, Weights, float, float]]


def _measured(lab: Laboratory, records: Sequence[CounterFactRecord], way: Way) -> tuple[PathCost, list[RecordScores]]:
    lab.statistics.factors.clear()  # each way pays for its own
    targets, weights, z_seconds, insert_seconds = way(lab, [record.request for record in records])
    scored = lab.scores(weights, records)
    cost = PathCost(
        facts=len(records),
        z_seconds=round(z_seconds, 3),
        insert_seconds=round(insert_seconds, 3),
        steps=sum(target.steps for target in targets.values()) / len(targets),
        diverged=sum(target.diverged for target in targets.values()),
        scores=summarise(scored).to_json(),
    )
    return cost, scored


def _engine(lab: Laboratory, requests: Sequence[EditRequest]) -> tuple[Targets, Weights, float, float]:
    start = time.perf_counter()
    targets = compute_targets(lab.base, requests, lab.statistics.contexts, lab.preset, progress=lab.progress)
    _settle()
    middle = time.perf_counter()
    weights = lab.edit(PRISTINE, requests, targets)
    _settle()
    return targets, weights, middle - start, time.perf_counter() - middle


def _plain(lab: Laboratory, requests: Sequence[EditRequest]) -> tuple[Targets, Weights, float, float]:
    start = time.perf_counter()
    targets: dict[str, Target] = {}
    for done, request in enumerate(requests, start=1):
        targets |= plain_targets(lab.base, [request], lab.statistics.contexts, lab.preset)
        lab.progress("baseline", done, len(requests))
    _settle()
    middle = time.perf_counter()
    deltas = plain_insert(lab.base, requests, targets, lab.statistics, lab.preset)
    _settle()
    end = time.perf_counter()
    masters = {name: lab.base.weight(name).double() + delta for name, delta in deltas.items()}
    return targets, Weights(masters, {}, len(requests)), middle - start, end - middle


def _gflop(lab: Laboratory, requests: Sequence[EditRequest]) -> float:
    """10⁹ floating-point operations of the matrix products in a search for z, counted as they are called."""
    counter = _Operations()
    with counter:
        compute_targets(lab.base, requests, lab.statistics.contexts, lab.preset)
    return counter.total / 1e9


class _Operations(TorchDispatchMode):
    """Counts floating-point operations by torch's own formulae (its FlopCounterMode also wants to know the modules, and
    refuses gradients by their inputs)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def _statistics(lab: Laboratory) -> dict[str, float]:
    """Tokens per second of one pass for all edited layers, and of a truncated pass per layer, on held-out text."""
    names = [lab.base.spec.down_name(layer) for layer in lab.preset.layers]
    rows = list(lab.statistics.holdout)
    blocks = rows * max(1, TEXT_TOKENS // sum(map(len, rows)))
    tokens = sum(map(len, blocks))
    collect(lab.base, names[:1], blocks[:2])
    start = time.perf_counter()
    collect(lab.base, names, blocks)
    middle = time.perf_counter()
    for name in names:
        collect(lab.base, [name], blocks)
    end = time.perf_counter()
    return {
        "tokens_per_second": tokens / (middle - start),
        "baseline_tokens_per_second": tokens / (end - middle),
        "speedup_statistics": (end - middle) / (middle - start),
    }


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """10⁹ floating-point operations per second of a product of two 2048 x 2048 matrices on `device` in `dtype`."""
    one, other = (torch.randn(_RATE_WIDTH, _RATE_WIDTH, device=device).to(dtype) for _ in range(2))
    torch.mm(one, other)
    _settle()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < _RATE_SECONDS:
        torch.mm(one, other)
        _settle()
        count += 1
    return count * 2 * _RATE_WIDTH**3 / (time.perf_counter() - start) / 1e9


def _settle() -> None:
    """CUDA works on after a call has returned: wait for it before the clock is read."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
