"""`kbsync aliases`, `promote`, `demote`: which version is served under which name. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from kbsync.cli.common import AsJson, Root, emit, say, table
from kbsync.cli.read import reading, required_model, short
from kbsync.cli.write import Reason, perform

if TYPE_CHECKING:
    from kbsync.aliases import AliasMove
    from kbsync.ledger import Reader

__all__ = ["app"]

app = typer.Typer()


@app.command()
def aliases(
    root: Root = Path(),
    past: Annotated[bool, typer.Option("--history", help="All that each ever named, newest first.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the names of versions: what each names, since when, by whom and why. `live` is what is served."""
    with reading(root) as (workspace, db):
        model = required_model(workspace, db)
        moves = _moves(db, model.id)
    shown = moves if past else [move for move in moves if move.until is None and move.version is not None]
    if as_json:
        return emit([asdict(move) for move in shown])
    title = f"aliases of {model.id} (HEAD is version {model.head})"
    columns = ("alias", "version", "since", *(("until",) if past else ()), "by", "how", "reason")
    table(title, columns, (_cells(move, past) for move in shown))
    return None


def _moves(db: Reader, model: str) -> list[AliasMove]:
    """The history of all aliases, by name, newest first."""
    from kbsync.aliases import history
    from kbsync.ledger.aliases import LIVE

    log, heads = db.promotions(model), db.head_moves(model)[::-1]
    found: list[AliasMove] = []
    for alias in sorted({LIVE, *(row.alias for row in log)}):
        own = [row for row in log if row.alias == alias]
        found += reversed(history(alias, own, heads if alias == LIVE else ()))
    return found


def _cells(move: AliasMove, past: bool) -> Sequence[object]:
    version = "none" if move.version is None else move.version
    until = (short(move.until),) if past else ()
    return (move.alias, version, short(move.since), *until, move.user, move.how, move.reason)


@app.command()
def promote(
    version: Annotated[str, typer.Argument(help="A number, an alias such as canary, or HEAD.", metavar="VERSION")],
    alias: Annotated[str, typer.Option("--as", help="The name to give it.", metavar="ALIAS")] = "live",
    root: Root = Path(),
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Let `live`, or another name, be this version from now on, whatever HEAD does."""
    done = perform("promote", {"version": version, "alias": alias, "reason": reason}, root)
    if as_json:
        return emit(done)
    was = "" if done["from"] in (None, done["version"]) else f" (was {done['from']})"
    said = f"{escape(done['alias'])} is version [bold]{done['version']}[/]{was}"
    say(said if done["moved"] else f"{said} already")
    return None


@app.command()
def demote(
    alias: Annotated[str, typer.Argument(help="The name: live, canary, …")],
    end: Annotated[bool, typer.Option("--end", help="Take all its promotions back; live then follows HEAD.")] = False,
    root: Root = Path(),
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Take the last promotion of a name back: it is what it was before."""
    done = perform("demote", {"alias": alias, "end": end, "reason": reason}, root)
    if as_json:
        return emit(done)
    if done["version"] is None:
        say(f"{escape(done['alias'])} names no version any more (was {done['from']})")
    else:
        follows = "" if done["pinned"] else ", it follows HEAD"
        say(f"{escape(done['alias'])} is version [bold]{done['version']}[/] (was {done['from']}){follows}")
    return None
