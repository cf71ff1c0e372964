"""The child process that asks a version about facts that it holds: one job in on stdin, events out on stdout.

`kbsync.child.run_ask` is the other end. The weights are rebuilt from the delta files and checked byte for byte; nothing
is written.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from kbsync.editor.evidence import unanswered
from kbsync.editor.job import AskJob, AskResult, FailedFact
from kbsync.editor.probe import NO_CONTROLS, probe
from kbsync.editor.replica import open_base
from kbsync.editor.worker import NO_TEXT, serve
from kbsync.progress import Progress
from kbsync.versions.delta import read_delta
from kbsync.versions.export import version_matrices

__all__ = ["ask", "main"]


def ask(job: AskJob, progress: Progress) -> AskResult:
    """Which facts the version answers, by the probe's rule: the greedy answer starts with the object. Raises StoreError
    where the weights do not come out as recorded, EditError and ModelError as the engine does."""
    base = open_base(job)
    matrices = version_matrices(base, job.manifest, partial(read_delta, Path(job.deltas)))
    report = probe(base, matrices, job.ask_requests(), controls=NO_CONTROLS, holdout=NO_TEXT, progress=progress)
    return AskResult(
        answered=tuple(fact.digest for fact in report.facts if fact.efficacy),
        failed=tuple(FailedFact(digest=fact.digest, evidence=unanswered(fact)) for fact in report.failed),
    )


def main() -> None:
    """One question: the job comes in on stdin."""
    serve(AskJob, ask)


if __name__ == "__main__":
    main()
