"""`kbsync evaluate`: what a version knows, or what an edit would do, measured on facts or on a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from kbsync.cli.common import AsJson, Root, bars, emit, opened, say, table
from kbsync.errors import UsageError

if TYPE_CHECKING:
    from kbsync.evaluation import Subject
    from kbsync.progress import Progress

__all__ = ["app"]

app = typer.Typer()

METRICS = {
    "score": "score",
    "efficacy": "efficacy",
    "paraphrase": "paraphrase",
    "neighborhood": "neighborhood",
    "specificity": "specificity",
    "accuracy": "whole object",
    "paraphrase_accuracy": "whole object, paraphrased",
    "chat_accuracy": "whole object, in a chat",
    "generation_entropy": "generation entropy (GE)",
    "reference_score": "reference score (RS)",
}
"""Metrics in the order of the table, and what it calls them."""
COUNTERFACT = {"score": "S", "efficacy": "ES", "paraphrase": "PS", "neighborhood": "NS"}
"""What the paper calls CounterFact's own; other data sets measure efficacy otherwise."""
MOST_RELATIONS = 30
"""Relations with a row of their own: a table is to be read. `--json` has all."""


@app.command()
def evaluate(
    of: Annotated[
        str | None,
        typer.Option("--version", help="The version: live (the default), a number, an alias, HEAD."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Records instead of the version's facts.", metavar="counterfact:FILE|zsre:FILE|csv:FILE"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first records of the data set.")] = None,
    edit: Annotated[bool, typer.Option("--edit", help="Edit the records first, in memory, on the base.")] = False,
    method: Annotated[
        str | None, typer.Option(help="With --edit: memit (the default), or a baseline: ft-w, rome.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="With --edit: another value for a setting; repeatable.", metavar="KEY=V"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="A model instead of the workspace's version.")] = None,
    preset: Annotated[str | None, typer.Option(help="With --model: a preset or a YAML file.")] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Also let it write texts: GE, RS (minutes).")] = False,
    references: Annotated[Path | None, typer.Option(help="CounterFact's attribute_snippets.json, for RS.")] = None,
    text: Annotated[Path | None, typer.Option(help="Measure drift on this text too, beside the held-out one.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the texts and of the intervals.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw the result there, as PNG and SVG.")] = None,
    root: Root = Path(),
    as_json: AsJson = False,
) -> None:
    """Measure a version's facts by relation, or a data set, against the base: before, after, difference."""
    from kbsync.bench.settings import typed
    from kbsync.editor.assess import Dataset, Options
    from kbsync.evaluation import edit as insert
    from kbsync.evaluation import evaluate as measure
    from kbsync.evaluation import read_dataset, watch

    if edit and not dataset:
        raise UsageError("--edit needs records to edit", hint="--dataset counterfact:FILE, zsre:FILE or csv:FILE")
    if not edit and (method is not None or changes):
        raise UsageError("--method and --set are for --edit", hint="a version is measured as it is")
    if of is not None and (model or edit):
        raise UsageError("--version goes neither with --model nor with --edit", hint="an edit is made on the base")
    records = read_dataset(dataset, limit=limit, references=references) if dataset else None
    with bars() as progress:
        subject = _subject(root, "0" if edit else of or "live", model, preset, progress)
        chosen = records or Dataset("facts", subject.facts[:limit], len(subject.facts))
        if not chosen.records:
            raise UsageError("there are no facts to measure", hint="kbsync sync, or --dataset kind:FILE")
        if edit:
            insert(subject, chosen.requests, method=method or "memit", changes=typed(changes or ()), progress=progress)
        if text is not None:
            watch(subject, text)
        options = Options(write=generate or references is not None, seed=seed)
        result = {"dataset": dataset} | measure(subject, chosen, options=options, progress=progress)
    _show(result, plot, as_json)


def _subject(root: Path, of: str, model: str | None, preset: str | None, progress: Progress) -> Subject:
    from kbsync.evaluation import open_model, open_version

    if model:
        return open_model(model, preset)
    if preset:
        raise UsageError("--preset goes with --model: a workspace names its own", hint="`preset:` in kbsync.yaml")
    with opened(root) as (workspace, ledger):
        return open_version(workspace, ledger, of, progress=progress)


def _show(result: Mapping[str, Any], plot: Path | None, as_json: bool) -> None:
    """Print the result, then draw it where asked: what took long to measure is not lost for want of matplotlib."""
    from kbsync.plots import files

    if as_json:
        emit(result)
    else:
        _tables(result)
    if plot is not None:
        from kbsync.plots.evaluate import draw

        draw(result, plot)
        for file in files(plot) if not as_json else ():
            say(f"wrote {escape(str(file))}")


def _tables(result: Mapping[str, Any]) -> None:
    states = [name for name in ("before", "after", "difference") if name in result["all"]]
    measured = [name for name in METRICS if result["all"]["before"].get(name)]
    labels = _labels(measured)
    rows = [
        (labels[name], *(_cell(result["all"][state][name], sign=state == "difference") for state in states))
        for name in measured
    ]
    for name, drift in result["drift"].items():
        rows.append(
            (f"perplexity ({name})", f"{drift['base_perplexity']:.2f}", f"{drift['perplexity']:.2f}", _change(drift))
        )
        rows.append((f"KL to the base ({name})", "", f"{drift['kl']:.4f}", ""))
    table(_title(result), ("metric", *states), rows)
    _relations(result, measured, states[1] if len(states) > 1 else "before")
    say(f"{escape(result['protocol']['metrics'])}")
    say(f"intervals: {escape(result['protocol']['intervals'])}; settings {str(result['settings'])[:12]}")
    speed = result["speed"]
    say(f"{speed['tokens']} tokens read in {speed['seconds']:.0f} s, {speed['tokens_per_second']} a second")
    for problem in result.get("left_out", ()):
        say(f"[yellow]not edited:[/] {escape(problem)}")


def _labels(measured: Sequence[str]) -> dict[str, str]:
    """Each metric with its name in the table."""
    short = COUNTERFACT if "neighborhood" in measured else {}
    return {name: METRICS[name] + (f" ({short[name]})" if name in short else "") for name in measured}


def _title(result: Mapping[str, Any]) -> str:
    what = result["dataset"] or f"facts of version {result['version']}"
    batch = f", {result['batch']} edited by {result['method']}" if "batch" in result else ""
    return f"{result['model']} ({result['dtype']}): {result['records']} of {result['total']} {what}{batch}"


def _relations(result: Mapping[str, Any], measured: Sequence[str], state: str) -> None:
    relations = list(result["relations"].items())
    if not relations:
        return
    rows = [
        (name, own["records"], *(_cell(own[state][metric]) for metric in measured))
        for name, own in relations[:MOST_RELATIONS]
    ]
    table(f"by relation, {state}", ("relation", "records", *_labels(measured).values()), rows)
    if len(relations) > MOST_RELATIONS:
        say(f"and {len(relations) - MOST_RELATIONS} relations more: --json has all")


def _cell(interval: Mapping[str, float] | None, *, sign: bool = False) -> str:
    """`83.2 (78.1 to 87.5)`; – where nothing was measured."""
    if interval is None:
        return "–"
    rounded = round(interval["value"], 1) + 0.0  # no -0.0
    value = f"{rounded:+.1f}" if sign else f"{rounded:.1f}"
    return f"{value} ({interval['low']:.1f} to {interval['high']:.1f})"


def _change(drift: Mapping[str, Any]) -> str:
    if drift["low"] is None:
        return f"{drift['change']:+.1f} %"
    return f"{drift['change']:+.1f} % ({drift['low']:.1f} to {drift['high']:.1f})"
