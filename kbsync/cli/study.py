"""The commands that look into a model and find its settings: trace, calibrate. No workspace is needed."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from kbsync.cli.common import AsJson, bars, emit, say, table

if TYPE_CHECKING:
    from kbsync.editor.calibrate import Trial
    from kbsync.editor.datasets import CounterFactRecord
    from kbsync.editor.model import Base
    from kbsync.progress import Progress

__all__ = ["app"]

app = typer.Typer()

Model = Annotated[str, typer.Argument(help="An embedded model, a folder of safetensors, or a Hugging Face id.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (the checkpoint's), float32, bfloat16, float16.")]

DTYPES = ("auto", "float32", "bfloat16", "float16")
RUNGS = "8,24,72"
TRACED, TRACED_SAMPLES = 40, 4
"""Facts and noise samples of the trace that a calibration makes itself: facts differ more than samples of one fact."""
SHOWN = 5
"""Settings of a round that are shown; --json has all."""
_LIBRARIES = ("kbsync", "torch", "transformers")


@app.command()
def trace(
    model: Model,
    facts: Annotated[Path, typer.Option("--facts", help="JSON list of facts, as known_1000.json or CounterFact.")],
    limit: Annotated[int, typer.Option("--limit", min=1, help="Trace so many facts that the model knows.")] = 100,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Noise samples per fact.")] = 10,
    grid: Annotated[int, typer.Option("--grid", min=0, help="Also trace so many facts at every token.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for trace.json and plots (PNG, SVG).")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Causal tracing: which layers carry a fact from its subject to its answer."""
    from kbsync.editor.effects import study
    from kbsync.editor.known import load_known
    from kbsync.editor.tracing import Settings

    known = load_known(facts)
    name, base = _load(model, device, dtype)
    start = time.perf_counter()
    with bars() as progress:
        report = study(base, known, Settings(samples=samples), limit=limit, grids=grid, progress=progress)
    found = _described(name, base, facts, time.perf_counter() - start) | report.to_json()
    written = _write(found, out) if out else []
    if as_json:
        return emit(found)
    _show(found)
    for path in written:
        say(f"wrote {escape(str(path))}")
    return None


@app.command()
def calibrate(
    model: Model,
    facts: Annotated[
        Path, typer.Option("--facts", help="Facts to try settings on: CounterFact, or as known_1000.json.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="The preset to write. Default: NAME.yaml here.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace that file.")] = False,
    layers: Annotated[str, typer.Option("--layers", help="Layers to edit, such as 4-8. Default: traced.")] = "",
    traced: Annotated[Path | None, typer.Option("--trace", help="A trace.json to take the layers from.")] = None,
    rungs: Annotated[
        str, typer.Option("--rungs", help="Facts of each round; a third of the settings goes on.")
    ] = RUNGS,
    drift_weight: Annotated[float, typer.Option("--drift-weight", min=0, help="Points of S per nat of drift.")] = 100,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Find a model's editing settings by measuring them, and write them as its preset."""
    from kbsync.bench.lab import laboratory
    from kbsync.bench.trials import Trials, search
    from kbsync.editor.calibrate import calibrated, candidates, preset_yaml, start
    from kbsync.hub import resolve_model
    from kbsync.versions.files import write_durably

    path = _free(out or Path(f"{resolve_model(model).name.rpartition('/')[2].lower()}.yaml"), force)
    sizes = _sizes(rungs)
    records = _records(facts, sizes[-1])
    name, base = _load(model, device, dtype)
    began = time.perf_counter()
    with bars() as progress:
        chosen, why = _layers(base, layers, traced, facts, progress)
        width = base.weight(base.spec.down_name(0)).shape[1]
        lab = laboratory(name, base, start(path.stem, chosen, width=width), progress=progress)
        records = lab.placeable(records, 2 * sizes[-1], least=sizes[-1])
        found = search(Trials(lab, records), candidates(lab.preset), sizes, drift_weight=drift_weight)
    described = _described(name, base, facts, time.perf_counter() - began)
    result = described | found.to_json() | {"layers": {"chosen": list(chosen), "why": why}, "preset": str(path)}
    result |= {"left_out": list(lab.left_out.values())}
    preset = calibrated(found.best, _scores(result, found.best, lab.statistics.tokens), f"Layers {why}.")
    write_durably(path, preset_yaml(preset), mode=0o644)
    if as_json:
        return emit(result)
    _show_search(result)
    say(f"wrote {escape(str(path))}; to use it: `preset: {escape(str(path))}` in kbsync.yaml")
    return None


def _free(path: Path, force: bool) -> Path:
    """The path, if it may be written. Raises UsageError."""
    from kbsync.errors import UsageError

    if path.suffix != ".yaml":
        raise UsageError(f"{path}: a preset's file ends in .yaml", hint="--out NAME.yaml")
    if path.exists() and not force:
        raise UsageError(f"{path}: is there already", hint="--force to replace it, or --out another name")
    return path


def _sizes(rungs: str) -> list[int]:
    """The facts of each rung, ascending. Raises UsageError."""
    from kbsync.errors import UsageError

    parts = [part.strip() for part in rungs.split(",")]
    sizes = [int(part) for part in parts if part.isdecimal() and int(part)]
    if len(sizes) != len(parts) or sizes != sorted(sizes):
        raise UsageError(f"--rungs {rungs!r} are no ascending numbers of facts", hint=f"--rungs {RUNGS}")
    return sizes


def _records(path: Path, least: int) -> list[CounterFactRecord]:
    """Counterfactual records about different subjects. Raises UsageError where the file has fewer than `least`."""
    from kbsync.bench.data import distinct
    from kbsync.editor.datasets import load_counterfact
    from kbsync.editor.known import counterfactuals, is_counterfact, load_known
    from kbsync.errors import UsageError

    found = distinct(load_counterfact(path) if is_counterfact(path) else counterfactuals(load_known(path)))
    if len(found) < least:
        raise UsageError(f"{path}: {len(found)} facts to try settings on, {least} wanted", hint="smaller --rungs")
    return found


def _layers(
    base: Base, typed_layers: str, traced: Path | None, facts: Path, progress: Progress
) -> tuple[tuple[int, ...], str]:
    """The layers to edit and where they are from: as typed, from a trace of this model, or traced now."""
    from kbsync.bench.settings import changed, typed
    from kbsync.editor.calibrate import start
    from kbsync.editor.effects import RULE, study
    from kbsync.editor.known import load_known
    from kbsync.editor.tracing import Settings

    if typed_layers:
        return changed(start("", (0,)), typed([f"layers={typed_layers}"])).layers, "as given"
    if traced is not None:
        return _traced(base, traced)
    report = study(base, load_known(facts), Settings(samples=TRACED_SAMPLES), limit=TRACED, progress=progress)
    return report.layers, f"traced on {report.traced} facts, {TRACED_SAMPLES} noise samples: {RULE}"


def _traced(base: Base, path: Path) -> tuple[tuple[int, ...], str]:
    """The layers of a trace.json. Raises ConfigError where it is none, or one of another model."""
    from kbsync.errors import ConfigError

    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        chosen, why = tuple(map(int, report["suggested"]["layers"])), str(report["suggested"]["rule"])
        traced, fingerprint = int(report["facts"]["traced"]), report["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"not a trace: {error}", file=path, hint="kbsync trace MODEL --facts FILE --out DIR"
        ) from error
    if fingerprint != base.fingerprint:
        raise ConfigError("is the trace of another model", file=path, key="fingerprint", hint="trace this model")
    return chosen, f"traced on {traced} facts: {why}"


def _scores(result: dict[str, Any], best: Trial, tokens: int) -> dict[str, Any]:
    """What a calibrated preset says that it measured, and how."""
    measured = result["confirmed"]
    chosen = (
        "which the settings were not chosen on" if measured["fresh"] else "the same that the settings were chosen on"
    )
    edited = {"drift": round(measured["drift"], 4)} if measured["scores"] else {"stopped": measured["stopped"]}
    return {
        "data": f"{best.facts} facts of {result['file']['name']} as one batch, {chosen}; {result['dtype']}",
        "date": result["date"],
        "libraries": result["libraries"],
        "statistics": f"{best.candidate.corpus}, {tokens} tokens",
        "unedited": result["unedited"],
        "edited": (measured["scores"] or {}) | edited,
        "search": {
            "objective": f"S - {result['drift_weight']:g} x drift (KL to the base, nats per token)",
            "value": round(best.worth, 2),
            "candidates": [rung["candidates"] for rung in result["rungs"]],
            "facts": [rung["facts"] for rung in result["rungs"]],
        },
    }


def _show_search(result: dict[str, Any]) -> None:
    say(f"layers {result['layers']['chosen']}: {escape(result['layers']['why'])}")
    names = ("lambda", "clamp", "rate", "steps")
    for rung in result["rungs"]:
        rows = [
            (
                *(f"{trial[name]:g}" for name in names),
                "yes" if trial["stop_top"] else "no",
                *((trial["scores"] or {}).get(score, "–") for score in ("ES", "PS", "NS", "S")),
                f"{trial['drift']:.4f}",
                trial["stopped"] or f"{trial['worth']:.2f}",
            )
            for trial in rung["trials"][:SHOWN]
        ]
        title = f"best of {rung['candidates']} settings on {rung['facts']} facts"
        table(title, (*names, "stop_top", "ES", "PS", "NS", "S", "drift", "worth"), rows)
    say(f"worth = S - {result['drift_weight']:g} x drift; {result['seconds']} s")
    confirmed = result["confirmed"]
    facts = "as many fresh facts" if confirmed["fresh"] else "the same facts, for the file has no more"
    say(f"the best on {facts}: {confirmed['scores'] or confirmed['stopped']}; unedited {result['unedited']}")
    for problem in result["left_out"]:
        say(f"[yellow]left out:[/] {escape(problem)}")


def _load(name: str, device: str, dtype: str) -> tuple[str, Base]:
    """The pristine model and what it is called. Raises UsageError for an unknown dtype."""
    from kbsync.editor.model import load_base
    from kbsync.errors import UsageError
    from kbsync.hub import fingerprint, resolve_model

    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype} is not known", hint=f"one of {', '.join(DTYPES)}")
    folder = resolve_model(name)
    return folder.name, load_base(folder.path, fingerprint=fingerprint(folder.path), device=device, dtype=dtype)


def _described(name: str, base: Base, facts: Path, seconds: float) -> dict[str, Any]:
    """What was studied, with what."""
    from kbsync.versions.files import sha256_of

    return {
        "model": name,
        "fingerprint": base.fingerprint,
        "dtype": str(base.dtype).removeprefix("torch."),
        "file": {"name": facts.name, "sha256": sha256_of(facts)},
        "date": datetime.now(UTC).date().isoformat(),
        "libraries": {library: version(library) for library in _LIBRARIES},
        "seconds": round(seconds, 1),
    }


def _write(found: dict[str, Any], folder: Path) -> list[Path]:
    """trace.json, then the plots: the numbers are kept even where matplotlib is missing."""
    from kbsync.plots.trace import draw
    from kbsync.versions.files import write_durably

    path = folder / "trace.json"
    write_durably(path, json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False).encode())
    return [path, *draw(found, folder)]


def _show(found: dict[str, Any]) -> None:
    facts, probability, subject = found["facts"], found["probability"], found["effects"]["last_subject"]
    say(
        f"{facts['traced']} facts traced ({facts['asked']} of {facts['read']} asked) in {found['seconds']} s; the "
        f"answer's probability {probability['clean']:.3f}, with the subject blurred {probability['corrupted']:.3f}"
    )
    gap = found["gap"]
    columns = {
        "state": subject["state"]["mean"],
        "MLPs": subject["mlp"]["mean"],
        "attentions": subject["attention"]["mean"],
        "attentions severed": subject["attention_severed"]["mean"],
        "MLPs severed": subject["mlp_severed"]["mean"],
        "gap": gap["mean"],
        "±": [high - mean for high, mean in zip(gap["high"], gap["mean"], strict=True)],
    }
    rows = [
        (layer, *(f"{value:.3f}" for value in values))
        for layer, values in enumerate(zip(*columns.values(), strict=True))
    ]
    table("average indirect effect at the last subject token", ("layer", *columns), rows)
    say(f"layers to edit: {found['suggested']['layers']} ({escape(found['suggested']['rule'])})")
