"""`kbsync recheck`: asks old facts again, or shows how many are still answered by their age."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from kbsync.cli.common import AsJson, Root, counted, emit, say, table
from kbsync.cli.read import reading, required_model, short
from kbsync.cli.write import perform

__all__ = ["app"]

app = typer.Typer()

SHOWN = 20
"""Facts that are listed for a person; `--json` has all."""


@app.command()
def recheck(
    everything: Annotated[bool, typer.Option("--all", help="All facts in the weights, due or not.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be asked.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Ask nothing; show how many facts were still answered at which age.")
    ] = False,
    root: Root = Path(),
    as_json: AsJson = False,
) -> None:
    """Ask the facts in the weights again that are due; the next sync edits those once more that have faded."""
    from kbsync.errors import UsageError

    if report and (everything or dry_run):
        raise UsageError("--report asks nothing", hint="kbsync recheck --report")
    if report:
        return _report(root, as_json)
    done = perform("recheck", {"everything": everything, "dry": dry_run}, root)
    if as_json:
        return emit(done)
    held, of = counted(done["facts"], "fact"), f"version {done['version']}"
    if dry_run:
        say(f"{counted(len(done['due']), 'fact')} would be asked, {of} holds {held}")
        return _facts("due", done["due"], ("served", "answered in a row"), _due)
    say(f"{counted(done['asked'], 'fact')} asked, {done['answered']} answered; {of} holds {held}")
    if done["missed"]:
        _facts("no longer answered", done["missed"], ("times", "evidence"), _missed)
    for relation, subject in done["held"]:
        say(f"[yellow]held[/] {escape(relation)} of {escape(subject)}: edits do not help")
    if done["faded"]:
        say(f"{counted(done['faded'], 'fact')} faded; `kbsync sync` edits them once more")
    return None


def _due(row: dict[str, Any]) -> tuple[object, ...]:
    return row["served"][:16].replace("T", " "), row["stage"]


def _missed(row: dict[str, Any]) -> tuple[object, ...]:
    return row["missed"], row["evidence"]


def _facts(title: str, rows: list[dict[str, Any]], columns: tuple[str, ...], more: Any) -> None:
    table(title, ("fact", "object", *columns), ((row["prompt"], row["target"], *more(row)) for row in rows[:SHOWN]))
    if len(rows) > SHOWN:
        say(f"… and {len(rows) - SHOWN} more (--json lists all)")


def _report(root: Path, as_json: bool) -> None:
    with reading(root) as (workspace, db):
        model = required_model(workspace, db)
        shares, standings = db.decay(model.id), db.standings(model.id, model.head)
    due = [workspace.settings.recheck.due_at(one) for one in standings]
    faded = sum(one.faded for one in standings)
    if as_json:
        decay = [asdict(share) for share in shares]
        return emit({"decay": decay, "facts": len(standings), "faded": faded, "next": min(due, default=None)})
    columns = ("relation", "age", "checks", "answered", "share")
    rows = (
        (
            one.relation,
            f"under {counted(one.until, 'day')}" if one.until else "older",
            one.checks,
            one.answered,
            f"{one.answered / one.checks:.1%}",
        )
        for one in shares
    )
    table("facts still answered, by age", columns, rows)
    say(f"{counted(len(standings), 'fact')} in the weights, {faded} faded, next due {short(min(due, default=None))}")
    return None
