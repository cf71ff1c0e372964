"""Rebase: the pristine base with all live facts, inserted in one go; on the line's own base, or on another one.

A rebase changes how the weights hold the facts, not which: what HEAD holds, frozen by holds or not. Target vectors are
cached, so it costs the insertion alone; on another base they are computed anew.

The rule for facts that do not take: one that HEAD does not answer either is taken out and held with the evidence, as
any edit that fails; one that HEAD answers stays in the system and is named, and a rebase that loses more of those than
`strategy.min_retention` allows is rejected. So no live fact is lost without a word.

    forecast(line)                              # what it would hold and cost
    rebase(line, judge, controls)
    take_over(old, new, judge, controls)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kbsync.edit import Edit
from kbsync.editor.job import ControlFile
from kbsync.errors import Cancelled, GateRejected, KbsyncError, UsageError
from kbsync.facts import Applied, FactKey
from kbsync.line import Judge, Line

__all__ = ["make_as_run", "rebase"]


def rebase(line: Line, judge: Judge, controls: Sequence[ControlFile] = (), reason: str = "") -> dict[str, Any]:
    """A new version of kind `rebase` that holds the facts of HEAD.

    Raises UsageError where HEAD holds none, GateRejected, and what editing raises; then HEAD is as it was.
    """
    keep = _live(line)
    edit = Edit("rebase", 0, keep, controls=controls, reason=reason or "rebase")
    return make_as_run(line, edit, judge, trigger="rebase")


def _live(line: Line) -> Mapping[FactKey, Applied]:
    with line.ledger.read() as db:
        head = db.head(line.model)
        keep = db.applied(line.model, head)
    if not keep:
        raise UsageError(f"version {head} of {line.model} holds no facts: nothing to rebase", hint="kbsync sync")
    return keep


def make_as_run(line: Line, edit: Edit, judge: Judge | None, *, trigger: str) -> dict[str, Any]:
    """Make a version as a run of its own. Raises GateRejected where it falls short, and what editing raises; the run's
    end is recorded either way."""
    with line.ledger.write() as db:
        run_id = db.start_run(None, model=line.model, trigger=trigger, user=line.user)
    try:
        outcome = line.make(replace(edit, run_id=run_id), judge)
    except KbsyncError as error:
        with line.ledger.write() as db:
            db.finish_run(run_id, "cancelled" if isinstance(error, Cancelled) else "failed", error.message)
        raise
    result = outcome.result
    if outcome.rejected:
        with line.ledger.write() as db:
            db.note_probe(line.model, None, dict(result.probe), run_id=run_id)
            db.finish_run(run_id, "rejected", "; ".join(outcome.rejected))
        raise GateRejected(
            f"{edit.reason}: the version is not good enough: {'; '.join(outcome.rejected)}",
            hint=f"kbsync runs --json shows run {run_id}; the live version is as it was",
        )
    with line.ledger.write() as db:
        db.finish_run(run_id, "done", edit.reason)
    return {
        "run": run_id,
        "version": outcome.version,
        "facts": len(result.columns),
        "failed": [fact.model_dump() for fact in result.failed],
        "lost": [fact.model_dump() for fact in result.lost],
        "weights_sha256": result.weights_sha256,
        "probe": result.probe,
        "capacity": result.numerics["capacity"],
        "seconds": result.seconds,
    }
