"""The command line. Each command is one function; none loads torch unless it touches a model.

`main` is the console script: it turns kbsync's errors into one line and a hint on stderr, and their exit code.
"""

from __future__ import annotations

import sys

import typer
from rich.markup import escape

from kbsync.cli import (
    aliases,
    backup,
    bench,
    bisect,
    blame,
    daemon,
    decide,
    demo,
    evaluate,
    facts,
    freshness,
    history,
    ledger,
    metrics,
    model,
    notices,
    read,
    recheck,
    setup,
    status,
    study,
    versions,
    write,
)
from kbsync.cli.common import TameConsole
from kbsync.errors import KbsyncError
from kbsync.log import configure
from kbsync.references import hidden

__all__ = ["app", "main"]

app = typer.Typer(
    name="kbsync",
    help="Keeps the facts inside a language model fresh: sources, fact ledger, MEMIT edits, versions.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
operations = (setup, write, aliases, decide, status, metrics, model, ledger, notices, backup, daemon)
questions = (versions, facts, history, blame, bisect, freshness, recheck, read)
for part in (*operations, *questions, demo, bench, study, evaluate):
    app.add_typer(part.app)


def main() -> None:
    """Run the command line."""
    configure(level="warning")
    try:
        app()
    except KbsyncError as error:
        fail(error)
    except BrokenPipeError:
        sys.exit(1)


def fail(error: KbsyncError) -> None:
    """Say what went wrong in one line, what to do in the next, and end with the error's exit code."""
    stderr = TameConsole(stderr=True, highlight=False, soft_wrap=True)
    stderr.print(f"[red]error:[/] {escape(hidden(error.message))}")
    if error.hint:
        stderr.print(f"[bold]hint:[/] {escape(hidden(error.hint))}")
    sys.exit(error.exit_code)
