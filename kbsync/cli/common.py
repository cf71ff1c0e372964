"""What every command shares: options, the progress bar, tables, JSON, and how an error is said."""

from __future__ import annotations

import getpass
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from kbsync.progress import Progress, silent
from kbsync.terminal import tame

if TYPE_CHECKING:
    from kbsync.config import Workspace
    from kbsync.ledger import Ledger

__all__ = [
    "MEASURED",
    "AsJson",
    "Root",
    "TameConsole",
    "bars",
    "console",
    "counted",
    "emit",
    "opened",
    "printing",
    "probe_line",
    "say",
    "share",
    "table",
    "user",
]

Root = Annotated[
    Path,
    typer.Option("--workspace", "-w", envvar="KBSYNC_WORKSPACE", help="The folder with kbsync.yaml.", metavar="DIR"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]

MEASURED = ("efficacy", "paraphrase", "specificity_drop", "drift")
"""The numbers of a probe report, in the order in which they are shown."""

NARROW = frozenset(
    {"at", "since", "until", "made", "started", "version", "versions", "kind", "subject", "weights", "P"}
)
"""Columns that are never broken: their cells are short, and a broken date or number is hard to read."""

GAP = 2
"""Terminal columns between two columns of a table."""
LONGEST_WORD = 24
"""Terminal columns up to which a word is not broken, however narrow the terminal."""


def _reader_gone() -> NoReturn:
    """Who read stdout has enough (`kbsync facts | head`): end as the shell's own tools do, with 128 + SIGPIPE."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(141)


class TameConsole(Console):
    """A console for what others wrote."""

    def on_broken_pipe(self) -> None:
        """Rich would end with 1."""
        _reader_gone()

    def render_str(self, text: str, **options: Any) -> Text:
        """Whatever is printed comes by here, cells of tables too: nothing in it is an order to the terminal."""
        return super().render_str(tame(text), **options)


console = TameConsole(highlight=False, soft_wrap=True)


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its noun: 1 edit, 2 edits; 1 policy, 2 policies."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


@contextmanager
def printing() -> Iterator[TextIO]:
    """stdout for what is no table; ends the command quietly where nobody reads on."""
    try:
        yield sys.stdout
        sys.stdout.flush()
    except BrokenPipeError:
        _reader_gone()


def user() -> str:
    """Who the audit log says it was."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def say(text: str = "") -> None:
    """One line for a person; rich markup is meant."""
    console.print(text)


def emit(value: object) -> None:
    """One JSON document on stdout: what `--json` prints, sorted keys, UTF-8."""
    with printing() as out:
        out.write(tame(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, default=_plain)) + "\n")


def _plain(value: object) -> str:
    """A time as ISO 8601, the form of every time that `--json` prints; anything else as its text."""
    return value.isoformat() if isinstance(value, datetime) else str(value)


@contextmanager
def bars() -> Iterator[Progress]:
    """A progress bar per phase on a terminal; nothing where stdout is none."""
    if not sys.stdout.isatty():
        yield silent
        return
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, transient=True) as drawn:
        tasks: dict[str, Any] = {}

        def progress(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = drawn.add_task(escape(phase), total=total)
            drawn.update(tasks[phase], completed=done, total=total)

        yield progress


@contextmanager
def opened(root: Path) -> Iterator[tuple[Workspace, Ledger]]:
    """The workspace at `root` and its ledger, for reading."""
    from kbsync.config import Workspace
    from kbsync.ledger import Ledger

    workspace = Workspace.load(root)
    ledger = Ledger.open(workspace.ledger_url)
    try:
        yield workspace, ledger
    finally:
        ledger.close()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; what sources wrote is never taken for markup. Says so where there is no row.

    Where it is wider than the terminal, what is the same in all rows is said once, in the title.
    """
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if not cells:
        return say(f"{title}: none")
    shown = [(name, [row[index] for row in cells]) for index, name in enumerate(columns)]
    if len(cells) > 1 and sum(_width(*column) + GAP for column in shown) - GAP > console.width:
        same = [(name, values[0]) for name, values in shown if len(set(values)) == 1]
        shown = [(name, values) for name, values in shown if len(set(values)) > 1] or shown
        said = ", ".join(f"{name} {value}" for name, value in same if value)
        title = f"{title} ({said})" if said else title
    console.print(f"[italic]{escape(title)}[/]", soft_wrap=False)
    drawn = Table(header_style="bold", box=None, pad_edge=False)
    for name, values in shown:
        words = [word for text in (name, *values) for word in text.split()]
        longest = max(map(cell_len, words), default=0)
        drawn.add_column(name, overflow="fold", no_wrap=name in NARROW, min_width=min(longest, LONGEST_WORD))
    for row in zip(*(values for _, values in shown), strict=True):
        drawn.add_row(*map(escape, row))
    console.print(drawn)
    return None


def _width(name: str, values: Sequence[str]) -> int:
    """Terminal columns that a column takes where nothing is broken."""
    return max(map(cell_len, (name, *values)))


def share(value: object) -> str:
    """A share or a number of a probe report, or – where it was not measured."""
    return f"{value:.3f}" if isinstance(value, float | int) else "–"


def probe_line(probe: Mapping[str, Any] | None) -> str:
    """The four numbers of a probe report in one line."""
    if not probe:
        return "not probed"
    return "  ".join(f"{name.replace('_', ' ')} {share(probe.get(name))}" for name in MEASURED)
