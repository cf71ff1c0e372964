"""The commands that set up a workspace and look after its model: init, check, config, doctor, model, statistics."""

from __future__ import annotations

import os
import shutil
import sqlite3
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from kbsync.cli.common import AsJson, Root, bars, counted, emit, opened, say, table

if TYPE_CHECKING:
    from kbsync.catalog import Catalog
    from kbsync.config import Workspace
    from kbsync.editor.model import Base
    from kbsync.editor.preset import Preset

__all__ = ["app"]

app = typer.Typer()
model_app = typer.Typer(help="Fetch a model, or show the one that is edited.", no_args_is_help=True)
statistics_app = typer.Typer(help="The covariance statistics that an edit needs.", no_args_is_help=True)
app.add_typer(model_app, name="model")
app.add_typer(statistics_app, name="statistics")


@app.command()
def init(root: Root = Path(), as_json: AsJson = False) -> None:
    """Make a workspace of an empty folder, with examples that work offline."""
    from kbsync.config import Workspace

    written = Workspace.init(root)
    if as_json:
        return emit({"workspace": str(root.absolute()), "files": [str(path) for path in written]})
    for path in written:
        say(f"wrote {escape(str(root / path))}")
    say("next: kbsync check, then kbsync plan")
    return None


@app.command()
def check(root: Root = Path(), as_json: AsJson = False) -> None:
    """Read kbsync.yaml, sources and policies, and say what is wrong or unwise in them."""
    from kbsync.catalog import load_catalog
    from kbsync.config import Workspace

    workspace = Workspace.load(root)
    catalog = load_catalog(workspace)
    warnings = [*catalog.check(), *_orphans(workspace, catalog)]
    if as_json:
        return emit({"sources": sorted(catalog.sources), "policies": sorted(catalog.policies), "warnings": warnings})
    say(f"{counted(len(catalog.sources), 'source')}, {counted(len(catalog.policies), 'policy', 'policies')}: sound")
    for warning in warnings:
        say(f"[yellow]warning:[/] {escape(warning)}")
    return None


@app.command()
def config(root: Root = Path(), as_json: AsJson = False) -> None:
    """Show the settings in force and where each is from: kbsync.yaml, the environment, or a default. No secrets."""
    from kbsync.effective import effective

    found = effective(root)
    if as_json:
        return emit([{"key": one.key, "value": one.value, "origin": one.origin} for one in found])
    table("settings", ("key", "value", "from"), ((one.key, one.value, one.origin) for one in found))
    return None


def _orphans(workspace: Workspace, catalog: Catalog) -> list[str]:
    """What is still in the ledger and kept by no policy; nothing where there is no ledger yet."""
    from kbsync.errors import LedgerError
    from kbsync.ledger import Ledger

    try:
        ledger = Ledger.open(workspace.ledger_url, create=False)
    except LedgerError:
        return []
    with ledger, ledger.read() as db:
        return [one.warning(catalog.policies) for one in db.orphans(catalog.relations)]


@app.command()
def doctor(
    root: Root = Path(),
    model: Annotated[
        str | None, typer.Option("--model", help="Say what memory this model would need: a pulled id, or a folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what this machine and workspace are, or what memory a model would need (nothing is loaded)."""
    found = _diagnosis(root) if model is None else _memory(root, model)
    if as_json:
        return emit(found)
    table("doctor", ("what", "found"), found.items())
    return None


def _memory(root: Path, model: str) -> dict[str, Any]:
    """What editing `model` would need, by part, and what there is, in GB; as kbsync.yaml says, where there is one."""
    from kbsync.config import CONFIG, Settings, Workspace
    from kbsync.editor.memory import assumed_preset, available, forecast
    from kbsync.editor.preset import load_preset, packaged_presets
    from kbsync.hub import resolve_model

    workspace = Workspace.load(root) if (root / CONFIG).is_file() else None
    settings = workspace.settings if workspace else Settings(model=model)
    folder = resolve_model(model, root=root)
    own = settings.preset or folder.name
    if own in packaged_presets() or own.endswith(".yaml"):
        preset = load_preset(root / own if own.endswith(".yaml") else own)
    else:
        preset = assumed_preset(folder.path)
    needs, (memory, there) = forecast(folder.path, preset, dtype=settings.dtype), available(settings.device)
    found: dict[str, Any] = {"model": folder.name, "preset": preset.name}
    for part in ("weights", "masters", "statistics", "targets", "total"):
        found[f"{part}_gb"] = round(getattr(needs, part) / 1e9, 3)
    found |= {"memory": memory, "memory_gb": round(there / 1e9, 1), "fits": needs.total <= there}
    return found


def _diagnosis(root: Path) -> dict[str, Any]:
    import torch

    from kbsync.config import Workspace
    from kbsync.ledger.database import journal_mode

    workspace = Workspace.load(root)
    cuda = torch.cuda.is_available()
    found: dict[str, Any] = {
        "workspace": str(workspace.root),
        "sqlite": f"{sqlite3.sqlite_version}, journal mode {journal_mode()}, synchronous FULL",
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "disk_free_gb": round(shutil.disk_usage(workspace.root).free / 1e9, 1),
    }
    if cuda:
        free, total = torch.cuda.mem_get_info()
        found["gpu_memory_free_gb"], found["gpu_memory_gb"] = round(free / 1e9, 1), round(total / 1e9, 1)
    found |= {library: _installed(library) for library in ("kbsync", "torch", "transformers", "sqlalchemy")}
    return found | _model_diagnosis(workspace)


def _installed(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


def _model_diagnosis(workspace: Workspace) -> dict[str, Any]:
    """Whether the model is there, edits it with which preset, and has its statistics."""
    from kbsync.errors import KbsyncError
    from kbsync.hub import resolve_model

    try:
        folder = resolve_model(workspace.settings.model, root=workspace.root)
        preset = workspace.preset(folder.name)
    except KbsyncError as error:
        return {"model": f"{error.message} ({error.hint})"}
    size = sum(path.stat().st_size for path in folder.path.glob("*.safetensors"))
    return {"model": f"{folder.name}, {size / 1e9:.2f} GB of weights", "preset": f"layers {list(preset.layers)}"}


@model_app.command("pull")
def pull_model(name: Annotated[str, typer.Argument(help="smollm2-135m, or a Hugging Face id.")]) -> None:
    """Fetch a model into the user's cache; hashes are checked, safetensors only."""
    from kbsync.hub import pull

    with bars() as progress:
        folder = pull(name, progress=progress)
    say(f"{escape(folder.name)} lies in {escape(str(folder.path))}")


@model_app.command("show")
def show_model(root: Root = Path(), as_json: AsJson = False) -> None:
    """Show the model that this workspace edits: layers, shapes, dtype, fingerprint, preset."""
    base, preset = _base(root)
    d, f = base.weight(base.spec.down_name(0)).shape
    found = {
        "family": base.spec.family,
        "layers": base.layers,
        "hidden": d,
        "intermediate": f,
        "vocabulary": base.network.config.vocab_size,
        "parameters": sum(parameter.numel() for parameter in base.network.parameters()),
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": str(base.device),
        "fingerprint": base.fingerprint,
        "preset": preset.name,
        "edited": [base.spec.down_name(layer) for layer in preset.layers],
        "lambda": preset.covariance_weight,
        "scores": preset.scores,
    }
    if as_json:
        return emit(found)
    table("model", ("what", "found"), found.items())
    return None


@statistics_app.command("build")
def build_statistics(root: Root = Path(), as_json: AsJson = False) -> None:
    """Collect the covariance statistics into the user's cache (an edit does it by itself, once)."""
    _statistics(root, as_json, build=True)


@statistics_app.command("verify")
def verify_statistics(root: Root = Path(), as_json: AsJson = False) -> None:
    """Read the stored statistics again: hash, fingerprint, error estimate."""
    _statistics(root, as_json, build=False)


def _statistics(root: Path, as_json: bool, *, build: bool) -> None:
    from kbsync.editor.statistics import statistics_for

    base, preset = _base(root)
    with bars() as progress:
        found = statistics_for(base, preset, build=build, progress=progress)
    shown = {
        "fingerprint": found.fingerprint,
        "corpus": preset.corpus,
        "tokens": found.tokens,
        "error": {name: round(value, 4) for name, value in found.error.items()},
        "contexts": list(found.contexts),
    }
    if as_json:
        return emit(shown)
    say(f"{found.tokens} tokens of corpus {preset.corpus}, fingerprint {found.fingerprint[:12]}")
    table("split-half relative error", ("matrix", "error"), ((n, f"{e:.3f}") for n, e in found.error.items()))
    return None


def _base(root: Path) -> tuple[Base, Preset]:
    """The pristine model of the workspace, and its preset with the workspace's own choice of statistics."""
    from kbsync.serving import Versions

    with opened(root) as (workspace, ledger):
        versions = Versions.open(workspace, ledger)
        return versions.load(0), workspace.preset(versions.folder.name)
