"""What happened: `history` of a subject, `changes` of a time. No torch."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kbsync.cli.common import AsJson, Root, emit, table
from kbsync.cli.facts import print_facts
from kbsync.cli.read import Relation, model_row, moment, reading, required_model, short

if TYPE_CHECKING:
    from kbsync.config import Workspace
    from kbsync.ledger import Reader

__all__ = ["app"]

app = typer.Typer()


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
    print_facts(f"history of {subject}", rows, as_json, holding)


def _holding(workspace: Workspace, db: Reader) -> dict[tuple[str, str, str], list[int]]:
    """(relation, subject id, object id) -> the versions whose weights hold it."""
    found: dict[tuple[str, str, str], list[int]] = {}
    model = model_row(workspace, db)
    for version in db.versions(model.id) if model else []:
        for key, applied in db.applied(version.model, version.number).items():
            found.setdefault((*key, applied.object_id), []).append(version.number)
    return found


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
                short(change.at),
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
        return db.version(required_model(workspace, db).id, int(text)).created_at
    return moment(text)
