"""Rebase: the pristine base with all live facts, inserted in one go; on the line's own base, or on another one.

A rebase changes how the weights hold the facts, not which: what HEAD holds, frozen by holds or not. Target vectors are
cached, so it costs the insertion alone; on another base they are computed anew.

The rule for facts that do not take: one that HEAD does not answer either is taken out and held with the evidence, as
any edit that fails; one that HEAD answers stays in the system and is named, and a rebase that loses more of those than
`strategy.min_retention` allows is rejected. So no live fact is lost without a word.

    forecast(line)                              # what it would hold and cost
    rebase(line, judge, controls)
    take_over(old, new, judge, controls, skipping=())
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kbsync.config import Workspace
from kbsync.cost import measured, missing_targets, seconds_of
from kbsync.edit import Edit
from kbsync.editor.job import ControlFile
from kbsync.errors import Cancelled, GateRejected, KbsyncError, UsageError
from kbsync.facts import Applied, FactKey
from kbsync.ledger.reader import Reader
from kbsync.line import Judge, Line
from kbsync.plan import Plan, Retraction, carried
from kbsync.plan_document import document_of
from kbsync.serving import Versions
from kbsync.strategy import facts_left, rebase_due, warnings

__all__ = ["forecast", "forecast_onto", "make_as_run", "rebase", "take_over"]


def rebase(line: Line, judge: Judge, controls: Sequence[ControlFile] = (), reason: str = "") -> dict[str, Any]:
    """A new version of kind `rebase` that holds the facts of HEAD.

    Raises UsageError where HEAD holds none, GateRejected, and what editing raises; then HEAD is as it was.
    """
    keep = _live(line)
    edit = Edit("rebase", 0, keep, controls=controls, reason=reason or "rebase")
    return make_as_run(line, edit, judge, trigger="rebase")


def take_over(
    old: Line,
    new: Line,
    judge: Judge,
    controls: Sequence[ControlFile] = (),
    skipping: Collection[str] = (),
    reason: str = "",
) -> dict[str, Any]:
    """A new version of the line `new`, another base, that holds the facts of the old line's HEAD, which stays.

    Facts of the relations `skipping` that the new base knows by itself take no edit. Holds go along, so that what was
    rolled back stays so; but not those of facts that the old model did not take, which the new one may, nor those of
    facts that the new one did not take before. Raises UsageError where both are one model, HEAD holds nothing, or the
    new line has facts or undos of its own that would be lost; GateRejected; and what editing raises.
    """
    if new.model == old.model:
        raise UsageError(f"{old.model} is the model that kbsync.yaml names already", hint="kbsync rebase")
    live = _live(old)
    with old.ledger.read() as db:
        edits = carried(live, db.facts())
        holds = [hold for hold in db.holds(old.model).values() if hold.reason != "probe"]
        before, standing = db.applied(new.model, db.head(new.model)), db.holds(new.model)
    copied = {hold.key for hold in holds}
    _check_own(old, new, before.keys() - live.keys(), f"that HEAD of {old.model} lacks")
    own = {key for key, hold in standing.items() if hold.reason != "probe"}
    _check_own(old, new, (own & live.keys()) - copied, "rolled back or reverted")
    edit = Edit(
        "rebase",
        0,
        {},
        edits=edits,
        skip_known=[planned.request.digest for planned in edits if planned.request.key.relation in skipping],
        controls=controls,
        holds=holds,
        releases=standing.keys() & live.keys(),
        reason=reason or f"rebase of {old.model} onto {new.model}",
    )
    done = make_as_run(new, edit, judge, trigger="rebase")
    return done | {"model": new.model, "from": old.model, "change": _change(new.workspace)}


def _check_own(old: Line, new: Line, keys: Collection[FactKey], what: str) -> None:
    """Raise UsageError where the line that is to take over another one's facts has some (`keys`) that it would lose."""
    if not keys:
        return
    relation, subject = min(keys)
    raise UsageError(
        f"{new.model} has {len(keys)} facts {what}, such as {relation} of {subject}: taking over those of {old.model} "
        "would undo that",
        hint=f"go on with that line: `model: {new.workspace.settings.model}` in kbsync.yaml; or, there, first kbsync "
        "rollback --to 0 and kbsync release --all",
    )


def _change(workspace: Workspace) -> str:
    """What a person has to write into kbsync.yaml to follow the new line."""
    settings = workspace.settings
    preset = f"preset: {settings.preset}" if settings.preset else "# and no preset: the model has its own"
    return f"model: {settings.model}\n{preset}"


def forecast(line: Line) -> dict[str, Any]:
    """What a rebase would hold and cost, and how far the line is from one by itself. Changes nothing.

    `targets` is how many target vectors are to be computed; `seconds` is scaled from what the newest version took,
    None where none was measured.
    """
    live, odometer = _live(line), line.odometer()
    with line.ledger.read() as db:
        head = db.head(line.model)
        requests = {applied.request.digest: applied.request for applied in live.values()}
    manifests = measured(line)
    missing = missing_targets(line, list(requests.values()), manifests)
    return {
        "model": line.model,
        "head": head,
        "facts": len(live),
        "targets": missing,
        "seconds": seconds_of(manifests, len(requests), missing),
        "due": rebase_due(line.strategy, odometer, live=len(live)),
        "since": odometer.since,
        "anchor": odometer.anchor,
        "capacity": asdict(odometer.now) if odometer.now else None,
        "facts_left": facts_left(line.strategy, odometer.now),
        "warnings": warnings(line.strategy, odometer.now),
        "strategy": line.strategy.model_dump(mode="json"),
    }


def forecast_onto(line: Line, workspace: Workspace) -> dict[str, Any]:
    """The same for another base, that of `workspace`: all target vectors are computed there. `seconds` is scaled by the
    sizes of the two models, and no more than an order of magnitude. Raises ModelError where it is not here or has no
    preset."""
    new = Versions.open(workspace, line.ledger)
    workspace.preset(new.folder.name)
    found = forecast(line)
    manifests = measured(line)
    seconds = seconds_of(manifests, found["facts"], found["facts"])
    scale = _size(new.folder.path) / _size(line.folder.path)
    return {
        "model": new.model,
        "from": line.model,
        "head": found["head"],
        "facts": found["facts"],
        "targets": found["facts"],
        "seconds": None if seconds is None else seconds * scale,
        "change": _change(workspace),
    }


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _live(line: Line) -> Mapping[FactKey, Applied]:
    with line.ledger.read() as db:
        head = db.head(line.model)
        keep = db.applied(line.model, head)
    if not keep:
        raise UsageError(f"version {head} of {line.model} holds no facts: nothing to rebase", hint="kbsync sync")
    return keep


def _plan_of(db: Reader, line: Line, edit: Edit) -> Plan:
    """The edit as a plan on HEAD: what it inserts, the kept facts of a rebase too, and what it takes out."""
    head = db.head(line.model)
    now = db.applied(line.model, head)
    again = carried(edit.keep, db.facts()) if edit.kind == "rebase" else []
    edits = sorted([*again, *edit.edits], key=lambda planned: planned.request.key)
    going = now.keys() - edit.keep.keys() - {planned.request.key for planned in edits}
    retractions = tuple(Retraction(key, now[key]) for key in sorted(going))
    return Plan(line.model, head, edits=tuple(edits), retractions=retractions)


def make_as_run(line: Line, edit: Edit, judge: Judge | None, *, trigger: str) -> dict[str, Any]:
    """Make a version as a run of its own. Raises GateRejected where it falls short, and what editing raises; the run's
    end is recorded either way."""
    with line.ledger.write() as db:
        run_id = db.start_run(None, model=line.model, trigger=trigger, user=line.user)
        plan = _plan_of(db, line, edit)
        db.note_plan(run_id, line.model, plan.head, plan.digest, document_of(plan, None).model_dump(mode="json"))
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
            hint=f"kbsync runs --json shows run {run_id}; HEAD is as it was",
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
