"""The commands that look into a model and find its settings: trace. No workspace is needed."""

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
    from kbsync.editor.model import Base

__all__ = ["app"]

app = typer.Typer()

Model = Annotated[str, typer.Argument(help="An embedded model, a folder of safetensors, or a Hugging Face id.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1.")]

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
    as_json: AsJson = False,
) -> None:
    """Causal tracing: which layers carry a fact from its subject to its answer."""
    from kbsync.editor.effects import study
    from kbsync.editor.known import load_known
    from kbsync.editor.tracing import Settings

    known = load_known(facts)
    name, base = _load(model, device)
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


def _load(name: str, device: str) -> tuple[str, Base]:
    """The pristine model and what it is called."""
    from kbsync.editor.model import load_base
    from kbsync.hub import fingerprint, resolve_model

    folder = resolve_model(name)
    return folder.name, load_base(folder.path, fingerprint=fingerprint(folder.path), device=device)


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
