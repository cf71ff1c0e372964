"""How commands ask the ledger, and those that list what was done and what is held. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kbsync.cli.common import AsJson, Root, emit, opened, table

if TYPE_CHECKING:
    from kbsync.config import Workspace
    from kbsync.facts import FactKey
    from kbsync.ledger import ModelRow, Reader, VerdictRow

__all__ = [
    "Relation",
    "app",
    "iso",
    "model_row",
    "moment",
    "one_subject",
    "reading",
    "required_model",
    "short",
]

app = typer.Typer()

Relation = Annotated[str | None, typer.Option("--relation", help="Only this relation.")]


@contextmanager
def reading(root: Path) -> Iterator[tuple[Workspace, Reader]]:
    """The workspace and one reading of its ledger."""
    with opened(root) as (workspace, ledger), ledger.read() as db:
        yield workspace, db


def model_row(workspace: Workspace, db: Reader) -> ModelRow | None:
    """The model that kbsync.yaml names, as the ledger knows it; it need not be on this machine."""
    return db.model_named(workspace.settings.model)


def required_model(workspace: Workspace, db: Reader) -> ModelRow:
    """The same; raises UsageError where it was never synced."""
    from kbsync.errors import UsageError

    if (model := model_row(workspace, db)) is None:
        raise UsageError(f"model {workspace.settings.model} was never synced here", hint="kbsync sync")
    return model


def one_subject(db: Reader, text: str) -> str:
    """The id of what a person calls `text`. Raises UsageError where that is nothing, or more than one thing."""
    from kbsync.errors import UsageError

    found = db.subjects(text)
    if not found:
        raise UsageError(f"{text!r}: the ledger has nothing of that id or label", hint="kbsync facts --search TEXT")
    if len(found) > 1:
        listed = ", ".join(f"{one.id} ({one.label})" for one in found[:10])
        more = f" and {len(found) - 10} more" if len(found) > 10 else ""
        raise UsageError(f"{text!r} is a label of {len(found)} subjects: {listed}{more}", hint="give the id")
    return found[0].id


def moment(text: str) -> datetime:
    """A date or time as a person writes it: ISO 8601; without a zone it is UTC. Raises UsageError."""
    from kbsync.errors import UsageError

    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{text!r} is no date", hint="2026-11-22 or 2026-11-22T18:30") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def short(time: datetime | None) -> str:
    """A time as a table shows it, to the minute (UTC); `--json` has it in full."""
    return f"{time:%Y-%m-%d %H:%M}" if time else ""


def iso(time: datetime | None) -> str | None:
    """A time as `--json` has it."""
    return time.isoformat() if time else None


@app.command()
def runs(
    run: Annotated[int | None, typer.Argument(help="One run: its counts, its phases' seconds.")] = None,
    root: Root = Path(),
    limit: Annotated[int, typer.Option("--limit", "-n", help="How many.", min=1)] = 20,
    policy: Annotated[str | None, typer.Option("--policy", help="Only this policy.")] = None,
    as_json: AsJson = False,
) -> None:
    """List passes, newest first, or show one."""
    if run is not None:
        return _show_run(root, run, as_json)
    with reading(root) as (_, db):
        found = db.runs(limit, policy=policy)
    if as_json:
        return emit([asdict(run) for run in found])
    columns = ("run", "policy", "by", "trigger", "status", "started", "seconds", "message")
    table(
        "runs",
        columns,
        (
            (run.id, run.policy, run.user, run.trigger, run.status, short(run.started_at), _seconds(run), run.message)
            for run in found
        ),
    )
    return None


def _show_run(root: Path, number: int, as_json: bool) -> None:
    with reading(root) as (_, db):
        found, phases = db.run(number), db.phases(number)
    seconds = {phase: took.seconds for phase, took in phases.items()}
    if as_json:
        return emit(asdict(found) | {"seconds": seconds})
    shown = {"policy": found.policy, "by": found.user, "trigger": found.trigger, "status": found.status}
    shown |= {"message": found.message, "started": short(found.started_at), "finished": short(found.finished_at)}
    table(f"run {number}", ("what", "found"), [*shown.items(), *found.counts.items()])
    return table("phases", ("phase", "seconds"), ((phase, f"{took:.3f}") for phase, took in seconds.items()))


def _seconds(run: Any) -> str:
    return f"{(run.finished_at - run.started_at).total_seconds():.1f}" if run.finished_at else ""


def _local(object_id: str | None) -> str | None:
    """An object id without its space."""
    return object_id and (object_id.partition(":")[2] or object_id)


@app.command()
def holds(root: Root = Path(), as_json: AsJson = False) -> None:
    """List the facts that are frozen in the weights, and the runs that wait for approval, row by row."""
    with reading(root) as (workspace, db):
        model = model_row(workspace, db)
        rows = db.hold_rows(model.id) if model else []
        staged, labels = db.staged_plans(), db.names(row.hold.key for row in rows)
        verdicts = {plan.run_id: db.verdicts(plan.run_id) for plan in staged}
    if as_json:
        runs = [asdict(plan) | {"verdicts": list(map(asdict, verdicts[plan.run_id].values()))} for plan in staged]
        return emit({"holds": [asdict(row) for row in rows], "runs": runs})
    table(
        "held facts",
        ("since", "relation", "subject", "weights keep", "held out", "why", "evidence"),
        (
            (
                short(row.since),
                row.hold.key.relation,
                labels.get(row.hold.key.subject, row.hold.key.subject),
                row.hold.frozen.request.target if row.hold.frozen else "nothing",
                _local(row.hold.held_out) or "its retraction",
                row.hold.reason,
                row.hold.evidence,
            )
            for row in rows
        ),
    )
    columns = ("run", "policy", "since", "plan", "edits", "reasons")
    table(
        "runs held for approval",
        columns,
        (
            (
                plan.run_id,
                plan.policy,
                short(plan.staged_at),
                plan.plan_digest[:12],
                sum(len(plan.plan.get(kind, ())) for kind in EDITS),
                "; ".join(plan.reasons),
            )
            for plan in staged
        ),
    )
    for plan in staged:
        rows_of = _rows_of(plan.plan, verdicts[plan.run_id])
        table(f"rows of run {plan.run_id}", ("kind", "relation", "subject", "id", "was", "becomes", "verdict"), rows_of)
    return None


EDITS = ("adds", "changes", "re_rendered", "faded", "retractions")
"""The lists of a plan document that change the weights."""
LEDGER_ONLY = "the ledger only: stands or falls with the run"
"""Verdict of a change that leaves the weights as they are: no hold could keep it out."""


def _rows_of(plan: Mapping[str, Any], verdicts: Mapping[FactKey, VerdictRow]) -> Iterator[tuple[object, ...]]:
    """What a held plan would do, a row each, and what was said of it; nothing where an older kbsync held it."""
    from kbsync.facts import FactKey

    found = [(part, row) for part in EDITS for row in plan.get(part, ())]
    for part, row in found:
        said = verdicts.get(FactKey(row["relation"], row["subject_id"]))
        verdict = "" if said is None else f"{'approved' if said.approved else 'refused'} by {said.user} {said.reason}"
        gone = part == "retractions"
        was, becomes = (row["target"], "nothing") if gone else (row["before"], row["target"])
        yield part, row["relation"], row["subject"], row["subject_id"], was, becomes, verdict.strip()
    edited = {(row["relation"], row["subject_id"]) for _, row in found}
    for row in plan.get("ledger", ()):
        if (row["relation"], row["subject_id"]) not in edited:
            names = (row["kind"], row["relation"], row["subject"], row["subject_id"])
            yield *names, row["before"], row["after"], LEDGER_ONLY
