"""Many syncs one after the other: does quality after the last one depend on how many there were?

The same facts go into the same model by several strategies, a batch at a time (in all but one). After each batch a
fixed sample of the facts, the first batch and the drift are measured; at the end all facts, and how much each
strategy's scores differ from those of one batch, fact by fact.

    result = measure(lab, records, batch=10, strategies=list(STRATEGIES))
    result.runs["rebase"].difference.score          # against one-batch, with its interval
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from kbsync.bench.lab import PRISTINE, Laboratory, Weights
from kbsync.editor.datasets import CounterFactRecord
from kbsync.editor.drift import Drift, HeldOut
from kbsync.editor.evaluate import CounterFactScores, RecordScores, paired_difference, summarise
from kbsync.errors import EditError
from kbsync.facts import EditRequest

__all__ = ["REFERENCE", "STRATEGIES", "Run", "Sequential", "Step", "Strategy", "measure", "trajectory"]


@dataclass(frozen=True, slots=True)
class Strategy:
    """How a batch goes in. `whole`: all facts as one batch. `anew`: all facts so far into the pristine base, every
    time. `own_targets`: z on the weights edited so far instead of on the base. `protect`: earlier facts' keys stay in
    the system."""

    says: str
    whole: bool = False
    anew: bool = False
    own_targets: bool = False
    protect: bool = True


REFERENCE = "one-batch"
STRATEGIES: dict[str, Strategy] = {
    REFERENCE: Strategy("all facts at once", whole=True),
    "incremental": Strategy("z of the base, earlier keys kept in the system"),
    "rebase": Strategy("all facts so far into the pristine base after every batch", anew=True),
    "plain-z0": Strategy("z of the base, earlier keys not kept", protect=False),
    "plain": Strategy(
        "z of the edited model, earlier keys not kept: the authors' way", own_targets=True, protect=False
    ),
}


@dataclass(frozen=True, slots=True)
class Step:
    """After one batch: scores of those of the sample that the weights hold by now, the share in per cent of the first
    batch whose whole object is still said, drift by text, ‖ΔW‖/‖W‖ by module."""

    facts: int
    sample: CounterFactScores
    first_batch: float
    drift: Mapping[str, Drift]
    norms: Mapping[str, float]


@dataclass(slots=True)
class Run:
    """One strategy: its steps, the scores of all facts at the end (record by record in `records`), drift there, how far
    the scores are from those of one batch, seconds by phase. `stopped`: why it could not go on, where it could not."""

    strategy: str
    steps: list[Step] = field(default_factory=list)
    records: list[RecordScores] = field(default_factory=list)
    scores: CounterFactScores | None = None
    drift: Mapping[str, Drift] = field(default_factory=dict)
    difference: CounterFactScores | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    stopped: str = ""


@dataclass(frozen=True, slots=True)
class Sequential:
    """Scores before any edit, drift texts' names, and a run per strategy."""

    unedited: CounterFactScores
    sample: int
    runs: Mapping[str, Run]

    def to_json(self) -> dict[str, Any]:
        """A JSON value, without the outcomes record by record."""
        runs = {name: {k: v for k, v in asdict(run).items() if k != "records"} for name, run in self.runs.items()}
        return {"unedited": self.unedited.to_json(), "sample": self.sample, "strategies": runs}


def trajectory(lab: Laboratory, strategy: Strategy, requests: Sequence[EditRequest], batch: int) -> Iterator[Weights]:
    """The weights after each batch. Raises EditError as the engine does."""
    weights, size = PRISTINE, len(requests) if strategy.whole else batch
    for start in range(0, len(requests), size):
        fresh = requests[start : start + size]
        if strategy.anew:
            weights, fresh = PRISTINE, requests[: start + size]
        targets = lab.targets(fresh, weights if strategy.own_targets else PRISTINE)
        weights = lab.edit(weights, fresh, targets, protect=strategy.protect)
        yield weights


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is measured: after each batch `sample` (indices of records) and little text, by `between`; everything at the
    end, by `after`."""

    records: Sequence[CounterFactRecord]
    batch: int
    sample: Sequence[int]
    between: Laboratory
    after: Laboratory


def measure(
    lab: Laboratory,
    records: Sequence[CounterFactRecord],
    *,
    batch: int,
    strategies: Sequence[str],
    texts: Sequence[HeldOut] = (),
    probe: int = 40,
) -> Sequential:
    """All strategies on the same facts. One batch always runs, first: the others are compared with it.

    The sample is drawn from all facts with the preset's seed; facts that are not edited yet are left out of it.
    Between batches it is scored with three neighborhood prompts of each fact, and drift is measured on the first 512
    tokens of the last text only.
    """
    drawn = random.Random(lab.preset.seed).sample(range(len(records)), min(probe, len(records)))  # noqa: S311
    few = [text.first(FEW_TOKENS) for text in texts[-1:]]
    plan = _Plan(records, batch, sorted(drawn), lab.watching(few), lab.watching(texts))
    unedited = summarise(lab.scores(PRISTINE, records))
    runs = {name: _run(name, plan) for name in dict.fromkeys((REFERENCE, *strategies))}
    for name, run in runs.items():
        if name != REFERENCE and run.records and runs[REFERENCE].records:
            run.difference = paired_difference(runs[REFERENCE].records, run.records)
    return Sequential(unedited, len(drawn), runs)


FEW_TOKENS, FEW_NEIGHBORS = 512, 3
"""Tokens and neighborhood prompts of a fact between batches: a curve's worth, the same ones every time; the end is
measured on all."""


def _run(name: str, plan: _Plan) -> Run:
    lab = plan.between
    run, weights, before = Run(name), PRISTINE, dict(lab.seconds)
    total = len(plan.records)
    try:
        for weights in trajectory(lab, STRATEGIES[name], [record.request for record in plan.records], plan.batch):
            run.steps.append(_step(weights, plan))
            lab.progress(name, weights.facts, total)
        run.records = lab.scores(weights, plan.records)
        run.scores, run.drift = summarise(run.records), plan.after.drift(weights)
    except EditError as error:  # a strategy that ruins the model is a result, not a failure of the benchmark
        run.stopped = f"after {weights.facts} facts: {error.message}"
    run.seconds = lab.since(before)
    return run


def _step(weights: Weights, plan: _Plan) -> Step:
    lab = plan.between
    held = [_few(plan.records[index]) for index in plan.sample if index < weights.facts]
    first = [record.request for record in plan.records[: plan.batch]]
    return Step(
        facts=weights.facts,
        sample=summarise(lab.scores(weights, held)),
        first_batch=100 * lab.known(weights, first),
        drift=lab.drift(weights),
        norms=lab.norms(weights),
    )


def _few(record: CounterFactRecord) -> CounterFactRecord:
    return replace(record, neighborhood=record.neighborhood[:FEW_NEIGHBORS])
