"""`kbsync facts`: what the ledger holds true. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kbsync.cli.common import AsJson, Root, emit, table
from kbsync.cli.read import Relation, iso, moment, reading, short

__all__ = ["app", "print_facts"]

app = typer.Typer()


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
    print_facts("facts", rows, as_json)


def print_facts(
    title: str,
    rows: Sequence[Any],
    as_json: bool,
    holding: Mapping[tuple[str, str, str], Sequence[int]] | None = None,
) -> None:
    """A table of facts or one JSON document."""
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
    brief = [row | {"since": short(at.since), "until": short(at.until)} for row, at in zip(found, rows, strict=True)]
    table(title, columns, ([row[column] for column in columns] for row in brief))
    return None
