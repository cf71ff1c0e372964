"""`kbsync demo`: see it work, on a real model, in a few minutes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from kbsync.cli.common import AsJson, console, emit, say

__all__ = ["app"]

app = typer.Typer()


@app.command()
def demo(
    keep: Annotated[
        Path | None, typer.Option("--keep", help="Keep the workspace in this folder.", metavar="DIR")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Watch a real model learn a feed, learn a change of it, and lose it in a rollback."""
    from kbsync.demo import MODEL, Demo
    from kbsync.hub import pull

    console.quiet = as_json
    pull(MODEL)
    with tempfile.TemporaryDirectory(prefix="kbsync-demo-") as scratch:
        results = Demo(keep if keep is not None else Path(scratch) / "workspace").run()
    if as_json:
        emit(results)
    if keep is not None:
        say(f"the workspace lies in {keep}: try kbsync status --workspace {keep}")
