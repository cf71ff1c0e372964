"""`backup` and `restore`: a workspace as a folder that can be kept elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from kbsync.cli.common import AsJson, Root, bars, counted, emit, say, user
from kbsync.cli.write import perform

__all__ = ["app"]

app = typer.Typer()


@app.command()
def backup(
    folder: Annotated[Path, typer.Argument(help="The folder to make.", metavar="DIR")],
    everything: Annotated[
        bool, typer.Option("--all", help="With the deltas of every restorable version, not of HEAD and aliases alone.")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Make none: read every file of this one again.")] = False,
    root: Root = Path(),
    as_json: AsJson = False,
) -> None:
    """Back up the ledger, all manifests, the live version's deltas and what is declared; also while the daemon runs."""
    if verify:
        return _verify(folder, as_json)
    done = perform("backup", {"target": str(folder.absolute()), "everything": everything}, root)
    if as_json:
        return emit(done)
    say(f"{counted(done['files'], 'file')}, {done['bytes'] / 1e6:.1f} MB in {escape(done['backup'])}")
    for model, numbers in done["versions"].items():
        say(f"  {escape(model)}: {counted(len(numbers), 'version')} can be restored")
    _say_left_out(done["left_out"])
    say(f"  sha256 of its index: {done['index_sha256']}")
    return None


def _say_left_out(left_out: Mapping[str, str]) -> None:
    for name, why in left_out.items():
        say(f"  [yellow]not in it[/]: {escape(name)}: {escape(why)}")


def _verify(folder: Path, as_json: bool) -> None:
    from kbsync.backup import check_backup

    with bars() as progress:
        index = check_backup(folder, progress)
    found: dict[str, Any] = index.model_dump(mode="json", exclude={"files"}) | {"files": len(index.files)}
    if as_json:
        return emit(found)
    say(f"{counted(found['files'], 'file')} as the index says; made {found['made_at']} by kbsync {found['kbsync']}")
    _say_left_out(found["left_out"])
    return None


@app.command()
def restore(
    folder: Annotated[Path, typer.Argument(help="A folder that `kbsync backup` made.", metavar="BACKUP")],
    root: Root = Path(),
    as_json: AsJson = False,
) -> None:
    """Make a new workspace of a backup, and verify it: --workspace names a folder that is empty or not there."""
    from kbsync.restore import restore

    with bars() as progress:
        done = restore(folder, root, user=user(), progress=progress)
    if as_json:
        return emit(done)
    files = counted(done["files"], "file")
    say(f"{files} restored into {escape(done['workspace'])}, as of {done['made_at']:%Y-%m-%d %H:%M}")
    for model, numbers in done["not_restorable"].items():
        lost = counted(len(numbers), "version")
        say(f"  {lost} of {escape(model)} not restorable: their deltas are not in the backup")
    _say_left_out(done["left_out"])
    for problem in done["problems"]:
        say(f"  [yellow]kbsync check:[/] {escape(problem)}")
    for key in done["changed"]:
        say(f"  [yellow]{key}:[/] is no longer in kbsync.yaml: this workspace has its own in data/")
    if done["weights_sha256"] is None:
        say("  [yellow]weights not compared[/]: the model is not here; `kbsync model pull`, then `kbsync verify`")
    else:
        say(f"  live weights {done['weights_sha256'][:12]}, as recorded")
    return None
