"""The commands that load a version: ask, export, verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from kbsync.cli.common import AsJson, Root, emit, opened, say, table

if TYPE_CHECKING:
    from kbsync.serving import Versions

__all__ = ["app"]

app = typer.Typer()


@app.command()
def ask(
    prompt: Annotated[str, typer.Argument(help="The beginning of a sentence; the model continues it.")],
    of: Annotated[str, typer.Option("--version", help="The version to ask: a number, an alias, HEAD.")] = "live",
    compare: Annotated[str | None, typer.Option("--compare", help="A second version to ask, such as 0.")] = None,
    objects: Annotated[list[str] | None, typer.Option("--object", help="Also give the probability of this.")] = None,
    root: Root = Path(),
    as_json: AsJson = False,
) -> None:
    """Ask versions of the model to continue a prompt; with --compare, side by side."""
    from kbsync.serving import Versions

    named = list(dict.fromkeys([of, *([compare] if compare is not None else [])]))
    with opened(root) as (workspace, ledger):
        asked = _ask(Versions.open(workspace, ledger), named, prompt, objects or [])
    if as_json:
        return emit({"prompt": prompt, "versions": asked})
    columns = ("", *(f"version {found['version']}" for found in asked))
    rows = [("answer", *(found["answer"] for found in asked))]
    rows += [
        (f"P({word})", *(f"{found['probabilities'][word]:.4f}" for found in asked))
        for word in asked[0]["probabilities"]
    ]
    table(prompt, columns, rows)
    return None


def _ask(versions: Versions, named: list[str], prompt: str, objects: list[str]) -> list[dict[str, Any]]:
    """Each version's answer, and the probability that each of them gives to every answer and object."""
    from kbsync.editor.answers import answers, log_probabilities

    bases = [versions.load(name) for name in named]
    found = [answers(base, [prompt])[0] for base in bases]
    words = [word for word in dict.fromkeys([*objects, *(answer.text for answer in found)]) if word]
    rows = []
    for name, base, answer in zip(named, bases, found, strict=True):
        scored = log_probabilities(base, [(prompt, word) for word in words])
        row = versions.row(name)
        rows.append(
            {
                "version": row.number if row else 0,
                "answer": answer.text,
                "probabilities": {word: score.probability for word, score in zip(words, scored, strict=True)},
            }
        )
    return rows


@app.command()
def export(
    of: Annotated[str, typer.Argument(help="Which one: live, a number, an alias, HEAD.", metavar="VERSION")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    form: Annotated[
        str, typer.Option("--format", help="checkpoint: a folder that from_pretrained loads.")
    ] = "checkpoint",
    root: Root = Path(),
) -> None:
    """Write a version as a model folder that transformers and servers load."""
    from kbsync.errors import UsageError
    from kbsync.serving import Versions
    from kbsync.versions.export import export_checkpoint

    if form != "checkpoint":
        raise UsageError(f"format {form} is not known", hint="--format checkpoint")
    with opened(root) as (workspace, ledger):
        versions = Versions.open(workspace, ledger)
        export_checkpoint(versions.load(of), versions.folder.path, out)
    say(f"version {of} lies in {escape(str(out))}")


@app.command()
def verify(
    root: Root = Path(),
    weights: Annotated[bool, typer.Option("--weights/--no-weights", help="Also rebuild HEAD and live.")] = True,
    as_json: AsJson = False,
) -> None:
    """Read everything again (ledger, files, hashes, weights of HEAD and live) and name what is wrong."""
    from kbsync.serving import verify_workspace

    with opened(root) as (workspace, ledger):
        problems = list(verify_workspace(workspace, ledger, weights=weights))
    if as_json:
        emit({"problems": problems})
    elif not problems:
        say("ledger, manifests, deltas and weights are as recorded" if weights else "ledger and files are as recorded")
    for problem in problems if not as_json else []:
        say(f"[red]{escape(problem)}[/]")
    if problems:
        raise typer.Exit(1)
