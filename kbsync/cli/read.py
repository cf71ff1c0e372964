"""The commands that ask the ledger: what is true, what changed, what is held, what each version is. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from kbsync.cli.common import MEASURED, AsJson, Root, emit, opened, probe_line, say, share, table

if TYPE_CHECKING:
    from kbsync.config import Workspace
    from kbsync.facts import Applied, FactKey
    from kbsync.ledger import ModelRow, Reader, VersionRow

__all__ = ["app", "iso", "model_row", "moment", "reading"]

app = typer.Typer()
conflicts_app = typer.Typer(help="Claims that cannot all be true; each blocks only its own fact.", no_args_is_help=True)
app.add_typer(conflicts_app, name="conflicts")

Relation = Annotated[str | None, typer.Option("--relation", help="Only this relation.")]


@contextmanager
def reading(root: Path) -> Iterator[tuple[Workspace, Reader]]:
    """The workspace and one reading of its ledger."""
    with opened(root) as (workspace, ledger), ledger.read() as db:
        yield workspace, db


def model_row(workspace: Workspace, db: Reader) -> ModelRow | None:
    """The model that kbsync.yaml names, as the ledger knows it; it need not be on this machine."""
    name = workspace.settings.model
    names = {name, name.partition("@")[0], Path(name).name}
    found = [model for model in db.models() if model.name in names]
    return found[-1] if found else None


def _required_model(workspace: Workspace, db: Reader) -> ModelRow:
    from kbsync.errors import UsageError

    if (model := model_row(workspace, db)) is None:
        raise UsageError(f"model {workspace.settings.model} was never synced here", hint="kbsync sync")
    return model


def moment(text: str) -> datetime:
    """A date or time as a person writes it: ISO 8601; without a zone it is UTC. Raises UsageError."""
    from kbsync.errors import UsageError

    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{text!r} is no date", hint="2026-11-22 or 2026-11-22T18:30") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _short(time: datetime | None) -> str:
    """A time as a table shows it, to the minute (UTC); `--json` has it in full."""
    return f"{time:%Y-%m-%d %H:%M}" if time else ""


def iso(time: datetime | None) -> str | None:
    """A time as `--json` has it."""
    return time.isoformat() if time else None


@app.command()
def runs(
    root: Root = Path(),
    limit: Annotated[int, typer.Option("--limit", "-n", help="How many.", min=1)] = 20,
    policy: Annotated[str | None, typer.Option("--policy", help="Only this policy.")] = None,
    as_json: AsJson = False,
) -> None:
    """List passes, newest first."""
    with reading(root) as (_, db):
        found = db.runs(limit, policy=policy)
    if as_json:
        return emit([asdict(run) for run in found])
    columns = ("run", "policy", "by", "trigger", "status", "started", "seconds", "message")
    table(
        "runs",
        columns,
        (
            (run.id, run.policy, run.user, run.trigger, run.status, _short(run.started_at), _seconds(run), run.message)
            for run in found
        ),
    )
    return None


def _seconds(run: Any) -> str:
    return f"{(run.finished_at - run.started_at).total_seconds():.1f}" if run.finished_at else ""


@app.command()
def log(root: Root = Path(), as_json: AsJson = False) -> None:
    """List the versions of the model, newest first, and which one is live."""
    with reading(root) as (workspace, db):
        model = _required_model(workspace, db)
        found = sorted(db.versions(model.id), key=lambda version: -version.number)
        holding = {version.number: len(db.applied(model.id, version.number)) for version in found}
    if as_json:
        return emit([_version_json(version, holding[version.number], model.head) for version in found])
    table(
        f"versions of {model.id}",
        ("", "version", "on", "facts", "new", "made", "weights", "effic.", "para.", "spec. drop", "drift", "reason"),
        (
            (
                "live" if version.number == model.head else "",
                version.number,
                version.parent,
                holding[version.number],
                version.facts,
                f"{version.created_at:%m-%d %H:%M}",
                (version.weights_sha256 or "")[:8],
                *(share((version.probe or {}).get(name)) for name in MEASURED),
                version.reason,
            )
            for version in found
        ),
    )
    return None


def _version_json(version: VersionRow, holding: int, head: int) -> dict[str, Any]:
    probe = {name: value for name, value in (version.probe or {}).items() if name != "facts"}
    return asdict(version) | {"probe": probe, "holds": holding, "live": version.number == head}


@app.command()
def show(
    version: Annotated[int, typer.Argument(help="Its number.", min=0)], root: Root = Path(), as_json: AsJson = False
) -> None:
    """Show one version: what it put in, what its probe measured, its files."""
    with reading(root) as (workspace, db):
        model = _required_model(workspace, db)
        row, held = db.version(model.id, version), db.applied(model.id, version)
        before = db.applied(model.id, row.parent) if row.parent is not None else {}
        active = [entry.model_dump(by_alias=True) for entry in db.active(model.id, version)]
    difference = _difference(before, held)
    if as_json:
        return emit(asdict(row) | {"active": active, "changes": difference, "holds": len(held)})
    say(f"[bold]version {row.number}[/] of {escape(model.id)}: {row.kind} on {row.parent}, {_short(row.created_at)}")
    say(f"  {escape(row.reason)}  by {escape(row.user)}  run {row.run_id}")
    say(f"  weights {row.weights_sha256}")
    say(f"  {probe_line(row.probe)}")
    for entry in active:
        say(f"  delta {entry['delta'][:12]}" + (f" without columns {entry['except']}" if entry["except"] else ""))
    _say_difference(f"against version {row.parent}", difference)
    return None


@app.command()
def diff(
    one: Annotated[int, typer.Argument(metavar="V1", min=0, help="From this version")],
    other: Annotated[int, typer.Argument(metavar="V2", min=0, help="to this one.")],
    root: Root = Path(),
    as_json: AsJson = False,
) -> None:
    """Show in which facts two versions differ."""
    with reading(root) as (workspace, db):
        model = _required_model(workspace, db)
        for number in (one, other):
            db.version(model.id, number)
        difference = _difference(db.applied(model.id, one), db.applied(model.id, other))
    if as_json:
        return emit(difference)
    _say_difference(f"version {one} -> {other}", difference)
    return None


def _difference(before: Mapping[FactKey, Applied], after: Mapping[FactKey, Applied]) -> list[dict[str, Any]]:
    """Facts that only one of two versions holds, or that they hold differently."""
    found = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if (old.request.digest if old else None) != (new.request.digest if new else None):
            request = (new or old).request  # type: ignore[union-attr]  # one of them has the key
            found.append(
                {
                    "relation": key.relation,
                    "subject_id": key.subject,
                    "subject": request.subject,
                    "before": old.request.target if old else None,
                    "after": new.request.target if new else None,
                }
            )
    return found


def _say_difference(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = ("relation", "subject", "before", "after")
    table(title, columns, ([row[column] for column in columns] for row in rows))


@app.command()
def facts(
    root: Root = Path(),
    as_of: Annotated[str | None, typer.Option("--as-of", help="As kbsync knew it then (ISO date or time).")] = None,
    relation: Relation = None,
    as_json: AsJson = False,
) -> None:
    """List the facts that the ledger holds true, now or at an earlier time."""
    with reading(root) as (_, db):
        rows = db.fact_rows([relation] if relation else None, moment(as_of) if as_of else None)
    _print_facts("facts", rows, as_json)


@app.command()
def history(
    subject: Annotated[str, typer.Argument(help="Subject: its id, or any label that it has had.")],
    relation: Annotated[str | None, typer.Argument(help="Only this relation.")] = None,
    root: Root = Path(),
    as_json: AsJson = False,
) -> None:
    """Show every fact that there ever was about a subject, with its source and the versions that hold it."""
    with reading(root) as (workspace, db):
        rows = db.history(subject, relation)
        holding = _holding(workspace, db)
    _print_facts(f"history of {subject}", rows, as_json, holding)


def _holding(workspace: Workspace, db: Reader) -> dict[tuple[str, str, str], list[int]]:
    """(relation, subject id, object id) -> the versions whose weights hold it."""
    found: dict[tuple[str, str, str], list[int]] = {}
    model = model_row(workspace, db)
    for version in db.versions(model.id) if model else []:
        for key, applied in db.applied(version.model, version.number).items():
            found.setdefault((*key, applied.object_id), []).append(version.number)
    return found


def _print_facts(
    title: str,
    rows: Sequence[Any],
    as_json: bool,
    holding: Mapping[tuple[str, str, str], Sequence[int]] | None = None,
) -> None:
    found = []
    for row in rows:
        fact = row.fact
        shown = {
            "relation": fact.relation,
            "subject": fact.subject.label,
            "subject_id": fact.subject.id,
            "object": fact.object.label,
            "object_id": fact.object.id,
            "status": fact.status,
            "source": fact.source,
            "origin": fact.origin,
            "since": iso(row.since),
            "until": iso(row.until),
            "run": row.run_id,
        }
        if holding is not None:
            shown["versions"] = list(holding.get((*fact.key, fact.object.id), ()))
        found.append(shown)
    if as_json:
        return emit(found)
    columns = ["relation", "subject", "object", "status", "source", "origin", "since", "until"]
    columns += ["versions"] if holding is not None else []
    short = [row | {"since": _short(at.since), "until": _short(at.until)} for row, at in zip(found, rows, strict=True)]
    table(title, columns, ([row[column] for column in columns] for row in short))
    return None


@app.command()
def changes(
    since: Annotated[str, typer.Option("--since", help="A date, a time, or the number of a version.")],
    until: Annotated[str | None, typer.Option("--until", help="A date or a time.")] = None,
    relation: Relation = None,
    source: Annotated[str | None, typer.Option("--source", help="Only what this source said.")] = None,
    root: Root = Path(),
    as_json: AsJson = False,
) -> None:
    """Show what changed since a date or a version, with the source and the version of each change."""
    with reading(root) as (workspace, db):
        start = _since(since, workspace, db)
        found = db.changes(start, moment(until) if until else None, relation=relation, source=source)
        holding = _holding(workspace, db)
    rows = []
    for change in found:
        row = change.to_json()
        numbers = holding.get((*change.key, str(row["after_id"])), ()) if change.after else ()
        rows.append(row | {"version": min(numbers, default=None)})
    if as_json:
        return emit(rows)
    table(
        f"changes since {since}",
        ("at", "kind", "relation", "subject", "before", "after", "source", "origin", "version"),
        (
            (
                _short(change.at),
                *(row[name] for name in ("kind", "relation", "subject", "before", "after", "source", "origin")),
                row["version"],
            )
            for change, row in zip(found, rows, strict=True)
        ),
    )
    return None


def _since(text: str, workspace: Workspace, db: Reader) -> datetime:
    """When a version was made, or the moment that the text says."""
    if text.isdecimal() and len(text) < 7:
        return db.version(_required_model(workspace, db).id, int(text)).created_at
    return moment(text)


@conflicts_app.command("list")
def list_conflicts(
    root: Root = Path(),
    everything: Annotated[bool, typer.Option("--all", help="Those that are resolved, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show both sides of each conflict with their origins, and the rows in quarantine."""
    with reading(root) as (_, db):
        found, rows = db.conflicts(open_only=not everything), db.quarantined()
    if as_json:
        return emit({"conflicts": [asdict(row) for row in found], "quarantined": [asdict(row) for row in rows]})
    table(
        "conflicts",
        ("since", "relation", "subject", "kind", "claim", "source", "origin"),
        (
            (
                _short(row.opened_at),
                row.conflict.key.relation,
                claim.subject.label,
                row.conflict.kind,
                claim.object.label,
                claim.source,
                claim.origin,
            )
            for row in found
            for claim in row.conflict.claims
        ),
    )
    columns = ("since", "source", "origin", "reason", "row")
    table(
        "quarantine",
        columns,
        ((_short(row.since), row.source, row.row.origin, row.row.reason, row.row.raw[:80]) for row in rows),
    )
    return None


def _local(object_id: str | None) -> str | None:
    """An object id without its space."""
    return object_id and (object_id.partition(":")[2] or object_id)


@app.command()
def holds(root: Root = Path(), as_json: AsJson = False) -> None:
    """List the facts that are frozen in the weights, and the runs that wait for approval."""
    with reading(root) as (workspace, db):
        model = model_row(workspace, db)
        rows = db.hold_rows(model.id) if model else []
        staged, labels = db.staged_plans(), {key.subject: fact.subject.label for key, fact in db.facts().items()}
    if as_json:
        return emit({"holds": [asdict(row) for row in rows], "runs": [asdict(plan) for plan in staged]})
    table(
        "held facts",
        ("since", "relation", "subject", "weights keep", "held out", "why", "evidence"),
        (
            (
                _short(row.since),
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
    columns = ("run", "policy", "since", "edits", "reasons")
    table(
        "runs held for approval",
        columns,
        (
            (plan.run_id, plan.policy, _short(plan.staged_at), len(plan.plan.get("edits", ())), "; ".join(plan.reasons))
            for plan in staged
        ),
    )
    return None
