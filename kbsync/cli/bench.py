"""The commands that measure the engine: `kbsync bench …`. Results as a table, as JSON, as a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from kbsync.cli.common import AsJson, bars, emit, say, table
from kbsync.errors import UsageError

__all__ = ["app"]

app = typer.Typer()
bench_app = typer.Typer(help="Measure the engine on a data set.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

Dataset = Annotated[str, typer.Option("--dataset", help="The facts.", metavar="counterfact:FILE")]
Model = Annotated[str, typer.Option("--model", "-m", help="A model that was pulled, or a folder.")]
PresetName = Annotated[str, typer.Option("--preset", help="A preset or a YAML file. Default: the model's own.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="Another value for a key of the preset; repeatable.", metavar="KEY=V")
]
Text = Annotated[Path | None, typer.Option("--text", help="A text file to measure drift on, beside the held-out text.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:0 …")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw the result there, as PNG and SVG.")]
MODEL = "smollm2-135m"

Table = tuple[Sequence[str], list[Sequence[object]]]


@bench_app.command()
def sequential(
    dataset: Dataset,
    facts: Annotated[int, typer.Option(min=1, help="Facts in all.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Facts in a batch.")] = 10,
    strategy: Annotated[list[str] | None, typer.Option(help="A strategy; repeatable. Default: all.")] = None,
    text: Text = None,
    model: Model = MODEL,
    preset: PresetName = "",
    changes: Changes = None,
    device: Device = "auto",
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Many syncs one after the other, by strategy: one-batch, incremental, rebase, plain-z0, plain."""
    from kbsync.bench.conditions import document
    from kbsync.bench.data import counterfact_records
    from kbsync.bench.lab import open_laboratory
    from kbsync.bench.report import sequential_table
    from kbsync.bench.sequential import STRATEGIES, measure
    from kbsync.bench.settings import typed
    from kbsync.plots.bench import draw_sequential

    records = counterfact_records(dataset, facts)
    chosen = _chosen(strategy, STRATEGIES, "strategy")
    with bars() as progress:
        lab = open_laboratory(model, preset=preset, changes=typed(changes or ()), device=device, progress=progress)
        found = measure(lab, records, batch=batch, strategies=chosen, texts=lab.held_out(text))
    result = document("sequential", lab, dataset, facts=facts, batch=batch) | found.to_json()
    _show(result, sequential_table, draw_sequential, plot, as_json)


def _chosen(wanted: Sequence[str] | None, known: Mapping[str, object], what: str) -> list[str]:
    """Those asked for, or all. Raises UsageError for one that is not known."""
    for name in wanted or ():
        if name not in known:
            raise UsageError(f"{what} {name!r} is not known", hint=f"one of: {', '.join(known)}")
    return list(wanted or known)


def _show(
    result: Mapping[str, Any],
    rows: Callable[[Mapping[str, Any]], Table],
    draw: Callable[[Mapping[str, Any], Path], None],
    plot: Path | None,
    as_json: bool,
) -> None:
    """Print the result, then draw it where asked: what took an hour to measure is not lost for want of matplotlib."""
    from kbsync.bench.report import title
    from kbsync.plots import files

    if as_json:
        emit(result)
    else:
        table(title(result), *rows(result))
    if plot is not None:
        draw(result, plot)
        for file in files(plot) if not as_json else ():
            say(f"wrote {escape(str(file))}")
