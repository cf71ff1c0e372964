"""The child process that edits: one job in on stdin, events out on stdout (`kbsync.child` is the other end).

    pristine base ─▶ targets z (cached) ─▶ weights of the live columns ─▶ insert ─▶ delta file ─▶ rebuild it ─▶ probe

Facts that fail their own probe are taken out and the rest is inserted once more. A rebase keeps no live column and has
all live facts among its requests; of these it takes out only what the version left behind does not answer either.
Nothing is published here: the outcome is files named by their content, and a report.
"""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel
from torch import Tensor

from kbsync.editor.answers import log_probabilities
from kbsync.editor.controls import NO_CONTROLS, Controls, shipped_controls, subject_controls
from kbsync.editor.evidence import no_target, no_way_back, unanswered
from kbsync.editor.job import EditJob, EditResult, FailedFact, ModelJob, ReplicaJob
from kbsync.editor.memit import Insertion, insert
from kbsync.editor.model import Base
from kbsync.editor.probe import ProbeReport, probe, readable_paraphrases, weights_in
from kbsync.editor.replica import libraries, open_base
from kbsync.editor.statistics import Statistics, statistics_for
from kbsync.editor.target_store import TargetStore
from kbsync.editor.targets import Target
from kbsync.editor.tokens import BARE, placeable
from kbsync.errors import EditError, KbsyncError, StoreError
from kbsync.executor import open_executor
from kbsync.facts import EditRequest
from kbsync.progress import Progress
from kbsync.timing import timed
from kbsync.versions.delta import Delta, read_delta, write_delta
from kbsync.versions.manifest import ActiveDelta
from kbsync.versions.weights import hold, live_columns, live_keys, rebuild, served, weights_sha256

__all__ = ["main", "perform", "serve"]

NO_TEXT = torch.empty(0, 0, dtype=torch.long)
"""Held-out text of a probe that asks only for the facts."""
_NO_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
JobT = TypeVar("JobT", bound=ModelJob)
LIBRARIES = ("kbsync", "torch", "transformers", "safetensors", "numpy")


@dataclass(slots=True)
class _Attempt:
    """One insertion, written and rebuilt from what was written."""

    requests: list[EditRequest]
    active: tuple[ActiveDelta, ...]
    delta: str | None
    matrices: dict[str, Tensor]
    norms: dict[str, float]
    insertion: Insertion | None


@dataclass(slots=True)
class _Editor:
    """What the steps of one job share."""

    job: EditJob
    progress: Progress
    base: Base
    statistics: Statistics
    seconds: dict[str, float] = field(default_factory=dict)
    computed: int = 0
    skipped: frozenset[str] = frozenset()
    """Digests of requests that the base answers: they get no column, and what they supersede leaves all the same."""
    deltas: dict[str, Delta] = field(default_factory=dict)

    def timed(self, phase: str) -> AbstractContextManager[None]:
        """Add the block's wall-clock seconds to `phase`."""
        return timed(self.seconds, phase)

    def read(self, sha256: str) -> Delta:
        """A delta of the store, checked and kept."""
        if sha256 not in self.deltas:
            self.deltas[sha256] = read_delta(Path(self.job.deltas), sha256)
        return self.deltas[sha256]

    def modules(self, active: Sequence[ActiveDelta]) -> tuple[str, ...]:
        """The edited matrices in layer order: those of the preset and those that live deltas change."""
        edited = {self.base.spec.down_name(layer) for layer in self.job.preset.layers}
        for entry in active:
            edited.update(self.read(entry.delta).factors)
        order = [self.base.spec.down_name(layer) for layer in range(self.base.layers)]
        return tuple(name for name in order if name in edited)

    def masters(self, active: Sequence[ActiveDelta]) -> dict[str, Tensor]:
        """The exact weights, float64 [d, f] by module, of a version with these deltas. The base must be pristine."""
        pristine = {name: self.base.weight(name) for name in self.modules(active)}
        return rebuild(pristine, active, self.read)

    def served(self, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights as they are served, by module."""
        return {name: served(matrix, self.base.dtype) for name, matrix in masters.items()}

    def keep(self, live: Sequence[tuple[str, Sequence[int]]]) -> tuple[ActiveDelta, ...]:
        """The active deltas with just the `live` columns, and the corrections that taking the others out needs."""
        if self.job.same is not None:
            return self.job.same
        write = partial(write_delta, Path(self.job.deltas), compact=False)
        return hold(self.job.active, dict(live), self.read, write)

    def targets(self, requests: Sequence[EditRequest]) -> dict[str, Target]:
        """z of every request, from the cache where it is there. The base must be pristine."""
        store = TargetStore(
            Path(self.job.targets),
            fingerprint=self.base.fingerprint,
            dtype=str(self.base.dtype),
            preset=self.job.preset,
            contexts=self.statistics.contexts,
        )
        found = {request.digest: target for request in requests if (target := store.get(request)) is not None}
        missing = [request for request in requests if request.digest not in found]
        if not missing:
            return found
        with self.timed("targets"):
            executor = open_executor(self.job.executor, self.base, self._replica())
            with closing(executor.map(missing)) as stream:
                for count, (request, target) in enumerate(stream, start=1):
                    store.put(request, target)
                    found[request.digest] = target
                    self.computed += 1
                    self.progress("targets", count, len(missing))
        return found

    def _replica(self) -> ReplicaJob:
        """What other workers need to know to compute the same."""
        shared = self.job.model_dump(include=set(ModelJob.model_fields))
        return ReplicaJob(**shared, contexts=self.statistics.contexts, libraries=libraries())

    def attempt(self, requests: list[EditRequest], targets: Mapping[str, Target]) -> _Attempt:
        """Insert `requests` beside the columns that stay, write the delta, rebuild the weights from the file."""
        kept = self.keep(self._live(requests))
        insertion, sha256, active = None, None, kept
        if requests:
            masters = self.masters(kept)
            with self.timed("insert"), weights_in(self.base, self.served(masters)):
                insertion = insert(
                    self.base,
                    requests,
                    targets,
                    self.statistics,
                    self.job.preset,
                    masters=masters,
                    protected=live_keys(kept, self.read),
                    progress=self.progress,
                )
            sha256 = write_delta(Path(self.job.deltas), insertion.delta)
            active = (*kept, ActiveDelta(delta=sha256))
        masters = self.masters(active)
        return _Attempt(requests, active, sha256, self.served(masters), self.norms(masters), insertion)

    def norms(self, masters: Mapping[str, Tensor]) -> dict[str, float]:
        """‖ΔW‖/‖W‖ by module, of exact weights against the pristine base."""
        found = {}
        for name, matrix in masters.items():
            pristine = self.base.weight(name).to(matrix)
            found[name] = float((matrix - pristine).norm() / pristine.norm())
        return found

    def without(
        self,
        failed: Sequence[FailedFact],
        requests: Sequence[EditRequest],
        targets: Mapping[str, Target],
        before: Collection[str],
    ) -> tuple[list[FailedFact], list[EditRequest], dict[str, Target]]:
        """All that is out now, the requests without it, and their targets.

        What a rebase has in the place of one that failed goes back in; where there is no way back, it is out as well.
        """
        out = {fact.digest for fact in failed}
        kept = {request.digest: request for request in requests if request.digest not in out}
        olds = {old.digest: old for old in self.replaced(failed) if old.digest not in out | kept.keys()}
        back, reasons = placeable(self.base, list(olds.values()), self.statistics.contexts)
        found = {**targets, **self.targets(back)}
        for old in back:
            reason = no_way_back(old, found[old.digest], kept.values(), answered=old.digest in before)
            if reason is None:
                kept[old.digest] = old
            else:
                reasons[old.digest] = reason
        gone = [FailedFact(digest=digest, evidence=reason) for digest, reason in reasons.items()]
        return [*failed, *gone], sorted(kept.values(), key=lambda request: request.key), found

    def diverged(self, requests: Sequence[EditRequest], targets: Mapping[str, Target]) -> list[FailedFact]:
        """Those without a target vector, which are not written."""
        found = [(request, targets[request.digest]) for request in requests]
        return [
            FailedFact(digest=request.digest, evidence=no_target(request, target))
            for request, target in found
            if target.diverged
        ]

    def replaced(self, failed: Sequence[FailedFact]) -> list[EditRequest]:
        """The live facts that these edits were to replace, in a rebase."""
        olds = self.job.replaced_requests()
        return [old for fact in failed for old in olds.get(fact.digest, ())]

    def failing(self, attempt: _Attempt) -> list[FailedFact]:
        """The facts that the attempt's weights do not answer."""
        with self.timed("probe"):
            report = probe(self.base, attempt.matrices, attempt.requests, controls=NO_CONTROLS, holdout=NO_TEXT)
        return [FailedFact(digest=fact.digest, evidence=unanswered(fact)) for fact in report.failed]

    def answered(self, requests: Sequence[EditRequest], matrices: Mapping[str, Tensor]) -> set[str]:
        """The digests of the requests that these weights answer; of what the model cannot read, it answers nothing."""
        requests, _ = placeable(self.base, requests, [BARE])
        with self.timed("probe"), weights_in(self.base, matrices):
            scored = log_probabilities(self.base, [(request.prompt, request.target) for request in requests])
        return {request.digest for request, one in zip(requests, scored, strict=True) if one.greedy}

    def answered_before(self) -> set[str]:
        """The live facts that the version left behind answers: those that stay and those that are to be replaced."""
        settled = [request for request in self.job.edit_requests() if request.digest in self.job.settled]
        replaced = [old for olds in self.job.replaced_requests().values() for old in olds]
        live = [*settled, *replaced]
        return self.answered(live, self.served(self.masters(self.job.active))) if live else set()

    def report(self, attempt: _Attempt) -> ProbeReport:
        """All that the gate judges, on the attempt's weights."""
        with self.timed("probe"):
            return probe(
                self.base,
                attempt.matrices,
                attempt.requests,
                controls=self._controls(),
                holdout=self.statistics.holdout,
                progress=self.progress,
            )

    def _live(self, requests: Sequence[EditRequest]) -> list[tuple[str, tuple[int, ...]]]:
        """The columns to keep, without those that `requests`, or what the base answers, supersede."""
        new = {request.digest for request in requests} | self.skipped
        leaving = {column for digest, columns in self.job.supersedes.items() if digest in new for column in columns}
        kept = [
            (delta, tuple(column for column in columns if (delta, column) not in leaving))
            for delta, columns in self.job.live
        ]
        return [(delta, columns) for delta, columns in kept if columns]

    def _controls(self) -> Controls:
        synced = self.job.synced_subjects
        controls = NO_CONTROLS
        for entry in self.job.controls:
            controls = controls + subject_controls(Path(entry.path), entry.prompt, synced)
        return controls if controls.prompts else shipped_controls(synced)

    def capacity(self, attempt: _Attempt, drift: float | None) -> dict[str, Any]:
        """The odometer: ‖ΔW‖/‖W‖, columns held, the share of the sample of earlier facts still answered, drift."""
        sample = self.job.retained_requests()
        answered = self.answered(sample, attempt.matrices) if sample else set()
        return {
            "norms": attempt.norms,
            "facts": sum(len(live_columns(entry, self.read(entry.delta))) for entry in attempt.active),
            "retention": {"facts": len(sample), "share": len(answered) / len(sample) if sample else None},
            "drift": drift,
        }

    def known(self, requests: Sequence[EditRequest]) -> dict[str, bool]:
        """Whether the pristine base already answers those that may be skipped for it, paraphrases too."""
        asked = [request for request in requests if request.digest in self.job.skip_known]
        return self._answers_all(asked)

    def still_known(self, matrices: Mapping[str, Tensor]) -> dict[str, bool]:
        """Whether these weights answer what the base answers by itself: what is skipped, and what is watched."""
        skipped = [request for request in self.job.edit_requests() if request.digest in self.skipped]
        with weights_in(self.base, matrices):
            return self._answers_all([*skipped, *self.job.watched_requests()])

    def _answers_all(self, requests: Sequence[EditRequest]) -> dict[str, bool]:
        """Whether the weights of now go on with the object, after the prompt and after all paraphrases that the model
        can read."""
        asked = list(zip(requests, readable_paraphrases(self.base, requests), strict=True))
        pairs = [(prompt, request.target) for request, others in asked for prompt in (request.prompt, *others)]
        if not pairs:
            return {}
        with self.timed("probe"):
            scored = iter(log_probabilities(self.base, pairs))
        found = {}
        for request, others in asked:
            hits = [next(scored).greedy for _ in (request.prompt, *others)]
            found[request.digest] = all(hits)
        return found


def perform(job: EditJob, progress: Progress) -> EditResult:
    """Do the job in this process. Raises StoreError where the recorded weights do not come out, EditError and
    ModelError as the engine does."""
    editor = _open(job, progress)
    base_hash = weights_sha256(editor.served(editor.masters(())))
    _check_start(editor)
    placed, reasons = placeable(editor.base, job.edit_requests(), editor.statistics.contexts)
    failed = [FailedFact(digest=digest, evidence=reason) for digest, reason in reasons.items()]
    known = editor.known(placed)
    editor.skipped = frozenset(digest for digest, answered in known.items() if answered)
    requests = [request for request in placed if request.digest not in editor.skipped]
    targets = editor.targets(requests)
    before = editor.answered_before()
    failed += editor.diverged(requests, targets)
    if failed:
        failed, requests, targets = editor.without(failed, requests, targets, before)
    attempt = editor.attempt(requests, targets)
    failing = editor.failing(attempt)
    if refused := [fact for fact in failing if fact.digest not in before]:
        failed, requests, targets = editor.without([*failed, *refused], requests, targets, before)
        attempt = editor.attempt(requests, targets)
        failing = editor.failing(attempt) if before else []
    due = {*job.settled, *(old.digest for old in editor.replaced(failed))}
    report = editor.report(attempt)
    still = editor.still_known(attempt.matrices)
    return EditResult(
        active=attempt.active,
        modules=tuple(attempt.matrices),
        dtype=str(editor.base.dtype).removeprefix("torch."),
        weights_sha256=weights_sha256(attempt.matrices),
        base_weights_sha256=base_hash,
        delta=attempt.delta,
        columns=tuple(request.digest for request in attempt.requests),
        failed=tuple(failed),
        answered=len(before & due),
        lost=tuple(fact for fact in (*failed, *failing) if fact.digest in before),
        known=known,
        remembered=tuple(sorted(digest for digest, right in still.items() if right)),
        forgotten=tuple(sorted(digest for digest, right in still.items() if not right)),
        probe=report.to_json(),
        numerics=_numerics(attempt, targets)
        | {"capacity": editor.capacity(attempt, report.drift), "contexts": editor.statistics.contexts}
        | _gpu_peak(),
        seconds={phase: round(value, 3) for phase, value in editor.seconds.items()},
        computed=editor.computed,
        libraries={name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
    )


def _open(job: EditJob, progress: Progress) -> _Editor:
    start = time.perf_counter()
    base = open_base(job)
    loaded = time.perf_counter()
    statistics = statistics_for(base, job.preset, progress=progress)
    seconds = {"load": loaded - start, "statistics": time.perf_counter() - loaded}
    return _Editor(job=job, progress=progress, base=base, statistics=statistics, seconds=seconds)


def _check_start(editor: _Editor) -> None:
    """The version to start from must come out as it was recorded: else a file or the base is not what it was."""
    recorded = editor.job.weights_sha256
    if recorded and weights_sha256(editor.served(editor.masters(editor.job.active))) != recorded:
        raise StoreError(
            "the live version's weights do not come out as recorded", hint="kbsync verify names the file that changed"
        )


def _numerics(attempt: _Attempt, targets: Mapping[str, Target]) -> dict[str, Any]:
    """What the edit measured of itself."""
    found: dict[str, Any] = {
        "targets": {
            digest: {
                "loss": target.loss if math.isfinite(target.loss) else None,
                "steps": target.steps,
                "clamped": target.clamped,
            }
            for digest, target in sorted(targets.items())
        }
    }
    if attempt.insertion is not None:
        found["residual"] = attempt.insertion.residual
        found["jitter"] = attempt.insertion.jitter
        found["effective"] = attempt.insertion.effective
    return found


def _gpu_peak() -> dict[str, int]:
    """The most memory, in bytes, that this process had allocated on one GPU; nothing where there is none."""
    if not torch.cuda.is_available():
        return {}
    return {"gpu_peak_bytes": max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))}


def main() -> None:
    """One edit: the job comes in on stdin."""
    serve(EditJob, perform)


def serve(kind: type[JobT], act: Callable[[JobT, Progress], BaseModel]) -> None:
    """Read the job, do it, say what came of it. Ends at once when the parent's end of stdin closes."""
    job = kind.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _say({"result": act(job, _progress).model_dump(mode="json", by_alias=True)})
    except KbsyncError as error:
        _say({"error": error.to_json()})
    except torch.OutOfMemoryError as error:
        _say({"error": EditError(f"out of memory: {error}", hint="lower batch.max_facts or token_budget").to_json()})
    except OSError as error:
        _say({"error": _refused(error).to_json()})


def _refused(error: OSError) -> StoreError:
    """What the system would not do, and with which file."""
    what = "cannot write" if error.errno in _NO_WRITING else "the system refuses"
    place = f"{error.filename}: " if error.filename else ""
    return StoreError(f"{place}{what}: {error.strerror or error}", hint="kbsync doctor")


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _progress(phase: str, done: int, total: int) -> None:
    _say({"phase": phase, "done": done, "total": total})


def _say(event: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
