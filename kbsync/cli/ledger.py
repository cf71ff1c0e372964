"""The commands about the ledger as a database: copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from kbsync.cli.common import AsJson, Root, bars, counted, emit, say, table

__all__ = ["app"]

app = typer.Typer()
ledger = typer.Typer(help="The ledger as a database: copy it to another one.", no_args_is_help=True)
app.add_typer(ledger, name="ledger")

_URL = "sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE; PGPASSWORD holds the password."


@ledger.command()
def copy(
    source: Annotated[str, typer.Argument(help=f"The ledger to copy: {_URL}")],
    target: Annotated[str, typer.Argument(help="The copy: a new file, or a database without tables.")],
    root: Root = Path(),
    as_json: AsJson = False,
) -> None:
    """Copy a whole ledger between SQLite and PostgreSQL, verified by counts and hashes before it counts."""
    from kbsync.ledger.copy import copy_ledger
    from kbsync.ledger.database import parsed, place_of

    with _nobody_writes(root, source), bars() as progress:
        copied = copy_ledger(source, target, progress)
    place = place_of(parsed(target))
    if as_json:
        return emit({"ledger": place, "tables": [asdict(one) for one in copied]})
    table("copied", ("table", "rows", "sha256"), [(one.name, one.rows, one.sha256[:12]) for one in copied])
    rows = counted(sum(one.rows for one in copied), "row")
    say(f"{rows}, the same on both sides. To use the copy, write in kbsync.yaml:")
    return say(f"ledger: {escape(place.replace(':***@', ':${PGPASSWORD}@'))}")


@contextmanager
def _nobody_writes(root: Path, source: str) -> Iterator[None]:
    """Where `source` is the ledger of the workspace at `root`: hold its writer's lock, so that nothing is written to
    the old ledger while it is copied. Raises Busy where the daemon runs."""
    from kbsync.config import CONFIG, Workspace
    from kbsync.ledger.database import database_file, parsed
    from kbsync.lock import writer_lock

    if not (root / CONFIG).exists():
        yield
        return
    workspace = Workspace.load(root)
    theirs, ours = parsed(source), parsed(workspace.ledger_url)
    one, other = database_file(theirs), database_file(ours)
    same = one.resolve() == other.resolve() if one is not None and other is not None else theirs == ours
    if not same:
        yield
        return
    with writer_lock(workspace.lock):
        yield
