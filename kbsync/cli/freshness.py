"""`kbsync freshness`: how long changes take from their source to the model that answers them. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from kbsync.cli.common import AsJson, Root, emit, say, table
from kbsync.cli.read import moment, reading

if TYPE_CHECKING:
    from kbsync.catalog import Catalog
    from kbsync.ledger import Reader

__all__ = ["app", "freshness_json", "say_freshness"]

app = typer.Typer()

BAR = 40
"""Characters of the longest bar of a histogram."""


@app.command()
def freshness(
    root: Root = Path(),
    since: Annotated[
        str | None, typer.Option("--since", help="What arrived from then on; default: each policy's `freshness.over`.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how long changes took from their source to the model (an upper bound), and what still waits, and why."""
    from kbsync.catalog import load_catalog

    with reading(root) as (workspace, db):
        found = freshness_json(db, load_catalog(workspace), moment(since) if since else None)
    if as_json:
        return emit(found)
    say_freshness(found)
    for row in found:
        if row["seconds"]:
            _say_histogram(row)
    return None


def freshness_json(db: Reader, catalog: Catalog, since: datetime | None = None) -> list[dict[str, Any]]:
    """The rows as JSON values, as of now, with the seconds of every change that arrived."""
    from kbsync.freshness import freshness_rows

    now = datetime.now(UTC)
    over = (now - since).total_seconds() if since else None
    return [row.to_json(now) | {"seconds": list(row.seconds)} for row in freshness_rows(db, catalog, now, over)]


def say_freshness(found: Sequence[Mapping[str, Any]]) -> None:
    """A table of the rows, and why targets are missed."""
    columns = ("source", "relation", "arrived", "p50", "p95", "target", "waiting", "oldest", "why")
    rows = (
        (
            row["source"],
            row["relation"],
            row["count"],
            *(_said(row[name]) for name in ("p50", "p95", "target")),
            row["waiting"],
            _said(row["oldest"]),
            row["oldest_why"],
        )
        for row in found
    )
    table("freshness", columns, rows)
    for row in found:
        for reason in row["missed"]:
            say(f"[yellow]stale:[/] {escape(row['source'])} {escape(row['relation'])}: {escape(reason)}")


def _said(seconds: float | None) -> str:
    from kbsync.freshness import duration

    return "–" if seconds is None else duration(seconds)


def _say_histogram(row: Mapping[str, Any]) -> None:
    """How many changes took how long, in steps that double."""
    from kbsync.freshness import duration, histogram

    steps = histogram(row["seconds"])
    most = max(count for _, count in steps)
    say(f"{escape(row['source'])} {escape(row['relation'])}, seconds from change to model:")
    for limit, count in steps:
        say(f"  up to {duration(limit):<8} {'█' * round(BAR * count / most):<{BAR}} {count}")
