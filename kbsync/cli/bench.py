"""The commands that measure the engine: `kbsync bench …`. Results as a table, as JSON, as a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from kbsync.cli.common import AsJson, bars, emit, say, table
from kbsync.errors import UsageError

if TYPE_CHECKING:
    from kbsync.bench.lab import Laboratory
    from kbsync.bench.points import Point

__all__ = ["app"]

app = typer.Typer()
bench_app = typer.Typer(help="Measure the engine on a data set.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

MODEL = "smollm2-135m"

Dataset = Annotated[str, typer.Option("--dataset", help="The facts.", metavar="counterfact:FILE")]
Facts = Annotated[int, typer.Option("--facts", min=1, help="Facts in all.")]
Model = Annotated[str, typer.Option("--model", "-m", help="A model that was pulled, or a folder.")]
PresetName = Annotated[str, typer.Option("--preset", help="A preset or a YAML file. Default: the model's own.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="Another value for a key of the preset; repeatable.", metavar="KEY=V")
]
Text = Annotated[Path | None, typer.Option("--text", help="A text file to measure drift on, beside the held-out text.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:0 …")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw the result there, as PNG and SVG.")]
Points = Annotated[
    list[str] | None,
    typer.Option("--point", help="A point instead of the default ones; repeatable.", metavar="NAME: KEY=V,KEY=V"),
]
Evaluate = Annotated[int | None, typer.Option("--evaluate", min=1, help="Score so many of the facts. Default: all.")]

Result = Mapping[str, Any]
Table = tuple[Sequence[str], list[Sequence[object]]]


@bench_app.command()
def edit(
    dataset: Dataset,
    facts: Facts = 32,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Also by the plain algorithm, at most 32 of the facts.")
    ] = False,
    model: Model = MODEL,
    preset: PresetName = "",
    changes: Changes = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """What an edit costs: z, insertion and statistics, beside the plain algorithm in the same process."""
    from kbsync.bench.conditions import document
    from kbsync.bench.data import counterfact_records
    from kbsync.bench.edit import measure
    from kbsync.bench.report import edit_table

    records = counterfact_records(dataset, facts)
    with _laboratory(model, preset, changes, device) as lab:
        records = lab.placeable(records, facts)
        found = measure(lab, records, baseline=min(facts, MOST_PLAIN) if baseline else 0)
    result = document("edit", lab, dataset, facts=facts) | found.to_json()
    _show(result, edit_table, None, None, as_json)
    if not as_json:
        table("rates", ("what", "value"), [(name, f"{value:.2f}") for name, value in _rates(result)])


MOST_PLAIN = 32
"""Facts that the plain algorithm is given at most: it takes many seconds for each."""


def _rates(result: Result) -> Iterator[tuple[str, float]]:
    yield from result["statistics"].items()
    for name in ("z_gflop", "gflops_matrix_product", "z_share_of_matrix_rate", "peak_memory_gb"):
        yield name, result[name]


@bench_app.command()
def sequential(
    dataset: Dataset,
    facts: Facts = 200,
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
    from kbsync.bench.report import sequential_table
    from kbsync.bench.sequential import STRATEGIES, measure
    from kbsync.plots.bench import draw_sequential

    records, chosen = counterfact_records(dataset, facts), _chosen(_split(strategy), STRATEGIES, "strategy")
    with _laboratory(model, preset, changes, device) as lab:
        records = lab.placeable(records, facts)
        found = measure(lab, records, batch=batch, strategies=chosen, texts=lab.held_out(text))
    result = document("sequential", lab, dataset, facts=facts, batch=batch) | found.to_json()
    _show(result, sequential_table, draw_sequential, plot, as_json)


@bench_app.command()
def frontier(
    dataset: Dataset,
    facts: Facts = 400,
    point: Points = None,
    evaluate: Evaluate = None,
    text: Text = None,
    model: Model = MODEL,
    preset: PresetName = "",
    changes: Changes = None,
    device: Device = "auto",
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """S against drift over λ, clamp, steps, stopping, null space and layers; what no other point beats is marked."""
    from kbsync.bench.conditions import document
    from kbsync.bench.data import counterfact_records
    from kbsync.bench.grids import frontier_points
    from kbsync.bench.points import measure

    records, named = counterfact_records(dataset, facts), _points(point)
    with _laboratory(model, preset, changes, device) as lab:
        points = named or frontier_points(lab.preset)
        records = lab.placeable(records, facts)
        found = measure(lab, points, records, evaluate=evaluate, texts=lab.held_out(text))
    _show_points(document("frontier", lab, dataset, facts=facts) | found.to_json(), plot, as_json)


@bench_app.command()
def ablation(
    dataset: Dataset,
    facts: Facts = 100,
    point: Points = None,
    evaluate: Evaluate = None,
    text: Text = None,
    model: Model = MODEL,
    preset: PresetName = "",
    changes: Changes = None,
    device: Device = "auto",
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """What matters: layers early, middle or late, one or many, attention instead of the MLP, λ (Appendix F)."""
    from kbsync.bench.conditions import document
    from kbsync.bench.data import counterfact_records
    from kbsync.bench.grids import ablation_points
    from kbsync.bench.points import measure

    records, named = counterfact_records(dataset, facts), _points(point)
    with _laboratory(model, preset, changes, device) as lab:
        points = named or ablation_points(lab.preset, lab.base.layers)
        records = lab.placeable(records, facts)
        found = measure(lab, points, records, evaluate=evaluate, texts=lab.held_out(text))
    _show_points(document("ablation", lab, dataset, facts=facts) | found.to_json(), plot, as_json)


@bench_app.command()
def scaling(
    dataset: Dataset,
    facts: Annotated[str, typer.Option("--facts", help="Numbers of facts.", metavar="N,N,…")] = "1,3,10,32,100,316",
    method: Annotated[list[str] | None, typer.Option(help="memit, rome, ft-w; repeatable. Default: memit.")] = None,
    text: Text = None,
    model: Model = MODEL,
    preset: PresetName = "",
    changes: Changes = None,
    device: Device = "auto",
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Scores over the number of facts inserted (Figure 5 of the paper), by MEMIT, ROME and FT-W."""
    from kbsync.bench.conditions import document
    from kbsync.bench.data import counterfact_records
    from kbsync.bench.methods import METHODS
    from kbsync.bench.report import scaling_table
    from kbsync.bench.scaling import measure
    from kbsync.plots.bench import draw_scaling

    counts, chosen = _counts(facts), _chosen(_split(method) or ["memit"], METHODS, "method")
    records = counterfact_records(dataset, max(counts))
    with _laboratory(model, preset, changes, device) as lab:
        records = lab.placeable(records, max(counts))
        found = measure(lab, records, counts, methods=chosen, texts=lab.held_out(text))
    result = document("scaling", lab, dataset, facts=max(counts), counts=counts) | found.to_json()
    _show(result, scaling_table, draw_scaling, plot, as_json)


@bench_app.command()
def mix(
    dataset: Dataset,
    facts: Annotated[int, typer.Option("--facts", min=2, help="Facts of each relation.")] = 20,
    pair: Annotated[
        list[str] | None, typer.Option(help="Two relations; repeatable. Default: the largest.", metavar="A:B")
    ] = None,
    model: Model = MODEL,
    preset: PresetName = "",
    changes: Changes = None,
    device: Device = "auto",
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Facts of two relations: each relation alone and both together (Section 5.4 of the paper)."""
    from kbsync.bench.conditions import document
    from kbsync.bench.data import counterfact_records
    from kbsync.bench.mix import measure, pairs
    from kbsync.bench.report import mix_table
    from kbsync.plots.bench import draw_mix

    wanted = pairs(counterfact_records(dataset), count=PAIRS, facts=facts, named=_pairs(pair))
    with _laboratory(model, preset, changes, device) as lab:
        found = measure(lab, [(lab.placeable(one), lab.placeable(other)) for one, other in wanted])
    _show(document("mix", lab, dataset, facts=facts) | found.to_json(), mix_table, draw_mix, plot, as_json)


@bench_app.command()
def ledger(
    rows: Annotated[int, typer.Option(min=100, help="Rows of the feed.")] = 100_000,
    scale: Annotated[bool, typer.Option("--scaling", help="Also with a tenth and a hundredth of the rows.")] = False,
    url: Annotated[str | None, typer.Option(help="An empty database instead of a SQLite file.")] = None,
    as_json: AsJson = False,
) -> None:
    """What the ledger costs: a feed loaded, unchanged, changed, shortened, and questions, beside plain tables."""
    from tempfile import TemporaryDirectory

    from kbsync.bench.ledger import measure

    if scale and url:
        raise UsageError("--scaling needs a new database for each size", hint="leave out --url")
    counts = [count for count in (rows // 100, rows // 10, rows) if scale or count == rows]
    found = []
    with bars() as progress:
        for count in counts:
            with TemporaryDirectory() as folder:
                found.append(measure(count, Path(folder), url=url, progress=progress))
    if as_json:
        return emit({"bench": "ledger", "sizes": found})
    for one in found:
        shown = ("phase", "seconds", "rows_per_second", "ms", "peak_mb", "skipped")
        lines = [[_cell(phase.get(name, "")) for name in shown] for phase in one["phases"]]
        table(f"{one['rows']} rows, {one['database']}", ("phase", "seconds", "rows/s", "ms", "peak MB", ""), lines)
    return None


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


PAIRS = 3
"""Pairs of relations that `mix` takes by itself."""


@contextmanager
def _laboratory(model: str, preset: str, changes: Sequence[str] | None, device: str) -> Iterator[Laboratory]:
    """The laboratory, with a progress bar while it is used."""
    from kbsync.bench.lab import open_laboratory
    from kbsync.bench.settings import typed

    values = typed(changes or ())
    with bars() as progress:
        yield open_laboratory(model, preset=preset, changes=values, device=device, progress=progress)


def _points(texts: Sequence[str] | None) -> list[Point]:
    from kbsync.bench.points import Point
    from kbsync.bench.settings import points

    return [Point(name, changes) for name, changes in points(texts or ()).items()]


def _split(texts: Sequence[str] | None) -> list[str]:
    """The names of an option that may be repeated or hold several, parted by commas."""
    return [name.strip() for text in texts or () for name in text.split(",") if name.strip()]


def _chosen(wanted: Sequence[str], known: Mapping[str, object], what: str) -> list[str]:
    """Those asked for, or all. Raises UsageError for one that is not known."""
    for name in wanted:
        if name not in known:
            raise UsageError(f"{what} {name!r} is not known", hint=f"one of: {', '.join(known)}")
    return list(wanted or known)


def _counts(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UsageError(f"--facts {text!r}: not a list of numbers", hint="--facts 1,10,100")
    return [int(part) for part in parts]


def _pairs(texts: Sequence[str] | None) -> list[tuple[str, str]]:
    found = [(one.strip(), other.strip()) for one, _, other in (text.partition(":") for text in texts or ())]
    if not all(one and other for one, other in found):
        raise UsageError("a pair needs two relations", hint="--pair P37:P495")
    return found


def _show_points(result: Result, plot: Path | None, as_json: bool) -> None:
    from kbsync.bench.report import points_table
    from kbsync.plots.bench import draw_points

    _show(result, points_table, draw_points, plot, as_json)


def _show(
    result: Result,
    rows: Callable[[Result], Table],
    draw: Callable[[Result, Path], None] | None,
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
        if result["left_out"]:
            say(f"left out: {result['left_out']} facts that cannot be placed in their tokens")
    if plot is not None and draw is not None:
        draw(result, plot)
        for file in files(plot) if not as_json else ():
            say(f"wrote {escape(str(file))}")
