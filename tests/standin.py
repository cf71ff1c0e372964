"""An editor that remembers instead of computing: what the decisions around an edit are tested with.

It keeps and leaves out columns just as the real worker does and writes a real (random) delta file for the new ones, so
that versions, rollbacks, reverts and verification work on it; nothing is ever optimised.

    engine = StandIn()
    reconciler.run_edit = engine
    engine.failing = {"Orion"}      # no request with this target is learned
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kbsync.editor.job import AskJob, AskResult, EditJob, EditResult, FailedFact
from kbsync.errors import Cancelled, EditError
from kbsync.facts import EditRequest, digest_of
from kbsync.progress import Progress, silent
from kbsync.versions.delta import Delta, read_delta, write_delta
from kbsync.versions.manifest import ActiveDelta
from tests.deltas import random_factors

MODULE = "model.layers.1.mlp.down_proj"
PRISTINE = digest_of("the pristine base")


@dataclass(slots=True)
class StandIn:
    """How the next edits go: which targets are never learned, what the probe says, whether the child dies."""

    failing: set[str] = field(default_factory=set)
    drift: float = 0.0
    drifts: dict[str, float] = field(default_factory=dict)
    """Target -> what a live fact with it adds to the drift of the version."""
    dies: bool = False
    forgotten: set[str] = field(default_factory=set)
    """Targets that no version answers when it is asked again."""
    asked: list[str] = field(default_factory=list)
    """The targets that were asked again, in order."""
    shape: tuple[int, int] = (4, 9)
    """Of the edited matrix: a delta of many facts is stored whole where that is smaller."""
    edits: int = 0

    def __call__(
        self, job: EditJob, *, progress: Progress = silent, cancelled: threading.Event | None = None
    ) -> EditResult:
        """The edit. Raises EditError where it is to die, Cancelled where it was cancelled."""
        if cancelled is not None and cancelled.is_set():
            raise Cancelled("cancelled")
        if self.dies:
            raise EditError("the edit's process died", hint="kbsync sync")
        progress("targets", 1, 1)
        self.edits += 1
        failed = [request for request in job.edit_requests() if request.target in self.failing]
        learned = list(self._learned(job))
        delta = self._write(job, learned) if learned else None
        active = self._active(job, delta, learned)
        return EditResult(
            active=active,
            modules=(MODULE,),
            dtype="float32",
            weights_sha256=_weights(active),
            base_weights_sha256=PRISTINE,
            delta=delta,
            columns=tuple(request.digest for request in learned),
            failed=tuple(FailedFact(digest=request.digest, evidence="not learned") for request in failed),
            known=dict.fromkeys(job.skip_known, False),
            probe=_probe(learned, self.drift + self._drift(job, learned)),
            numerics={"capacity": {}},
            seconds={"targets": 0.0, "insert": 1.0},
            libraries={},
        )

    def ask(self, job: AskJob, *, progress: Progress = silent, cancelled: threading.Event | None = None) -> AskResult:
        """What stands for `child.run_ask`: all is answered but what is `forgotten`."""
        if cancelled is not None and cancelled.is_set():
            raise Cancelled("cancelled")
        requests = job.ask_requests()
        progress("score", len(requests), len(requests))
        self.asked += [request.target for request in requests]
        lost = [request for request in requests if request.target in self.forgotten]
        return AskResult(
            answered=tuple(request.digest for request in requests if request not in lost),
            failed=tuple(FailedFact(digest=request.digest, evidence="the model answers 'no'") for request in lost),
        )

    def _learned(self, job: EditJob) -> Iterator[EditRequest]:
        """The requests that get a column: those that do not fail, and what a rebase inserts in the place of others."""
        instead = job.replaced_requests()
        seen = set()
        for request in job.edit_requests():
            for one in [request] if request.target not in self.failing else instead.get(request.digest, []):
                if one.digest not in seen:
                    seen.add(one.digest)
                    yield one

    def _drift(self, job: EditJob, learned: list[EditRequest]) -> float:
        """What the facts of the version add, those that stay (`retained`) and those that are new."""
        return sum(self.drifts.get(request.target, 0.0) for request in (*job.retained_requests(), *learned))

    def _write(self, job: EditJob, learned: list[EditRequest]) -> str:
        (d, f) = self.shape
        seed = int(digest_of([job.live, [request.digest for request in learned]])[:12], 16)
        return write_delta(Path(job.deltas), Delta({MODULE: random_factors(len(learned), d=d, f=f, seed=seed)}))

    def _active(self, job: EditJob, delta: str | None, learned: list[EditRequest]) -> tuple[ActiveDelta, ...]:
        if delta is None and job.same is not None and not job.supersedes:
            return job.same
        new = {request.digest for request in learned}
        leaving = {column for digest, columns in job.supersedes.items() if digest in new for column in columns}
        found = []
        for name, columns in job.live:
            total = read_delta(Path(job.deltas), name).columns
            staying = {column for column in columns if (name, column) not in leaving}
            if staying:
                found.append(ActiveDelta(delta=name, excluded=tuple(sorted(set(range(total)) - staying))))
        if delta is not None:
            found = [entry for entry in found if entry.delta != delta]
            found.append(ActiveDelta(delta=delta))
        return tuple(found)


def _weights(active: tuple[ActiveDelta, ...]) -> str:
    """The hash of the weights that these deltas give: equal for equal contents."""
    if not active:
        return PRISTINE
    return digest_of([[entry.delta, list(entry.excluded)] for entry in active])


def _probe(learned: list[EditRequest], drift: float) -> dict[str, object]:
    facts = [
        {"digest": request.digest, "efficacy": 1.0, "hits": 0, "paraphrases": 0, "probability": 0.9}
        for request in learned
    ]
    return {"efficacy": 1.0, "paraphrase": None, "specificity_drop": 0.0, "drift": drift, "facts": facts}
