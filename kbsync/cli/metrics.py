"""`kbsync metrics`: what /metrics of the daemon says, without a server. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kbsync.cli.common import AsJson, Root, emit, opened, printing

__all__ = ["app"]

app = typer.Typer()

MODE = 0o644
"""What is written for node_exporter, another user can read."""


@app.command()
def metrics(
    root: Root = Path(),
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Write it there, whole or not at all: for node_exporter's textfile collector."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the metrics in Prometheus' text format, read from the ledger as it is now."""
    from kbsync.catalog import load_catalog
    from kbsync.metrics import Exposition, measure, to_json
    from kbsync.versions.files import write_durably

    with opened(root) as (workspace, ledger):
        catalog = load_catalog(workspace)
        if as_json:
            return emit(to_json(measure(workspace, catalog, ledger)))
        text = Exposition(ledger, lambda: catalog)()
    if out is not None:
        write_durably(out.absolute(), text, mode=MODE)
        return None
    with printing() as stdout:
        stdout.write(text.decode())
    return None
