"""`kbsync daemon`: passes on schedule until it is told to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kbsync.cli.common import Root

__all__ = ["app"]

app = typer.Typer()


@app.command()
def daemon(
    root: Root = Path(),
    level: Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")] = "info",
) -> None:
    """Keep the model in line with its sources: passes on schedule, commands through the control socket."""
    from kbsync.daemon import run_daemon
    from kbsync.log import configure

    configure(level=level)
    run_daemon(root)
