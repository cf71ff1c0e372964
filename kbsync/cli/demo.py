"""`kbsync demo`: see it work, on a real model, in a few minutes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from kbsync.cli.common import AsJson, bars, console, emit, say

__all__ = ["app"]

app = typer.Typer()


@app.command()
def demo(
    keep: Annotated[
        Path | None, typer.Option("--keep", help="Keep the workspace in this empty folder.", metavar="DIR")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Watch a real model learn a feed, learn a change of it, and lose it in a rollback."""
    from kbsync.demo import MODEL, Demo, prepare
    from kbsync.hub import pull

    console.quiet = as_json
    with tempfile.TemporaryDirectory(prefix="kbsync-demo-") as scratch:
        root = keep if keep is not None else Path(scratch) / "workspace"
        prepare(root)
        with bars() as progress:
            pull(MODEL, progress=progress)
        results = Demo(root).run()
    if as_json:
        emit(results)
    elif keep is not None:
        say(f"The workspace lies in {escape(str(keep))}: cd {escape(str(keep))}, then for example kbsync status.")
    else:
        say("The workspace is gone; `kbsync demo --keep DIR` leaves it for exploring.")
