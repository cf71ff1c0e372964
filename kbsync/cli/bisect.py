"""`kbsync bisect`: which version broke an answer, and which of its facts is likely to blame."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from kbsync.cli.common import AsJson, Root, bars, counted, emit, opened, say, table
from kbsync.cli.read import short

__all__ = ["app", "next_commands"]

app = typer.Typer()

SHOWN = 10
"""Facts that are listed for a person; `--json` has all."""


@app.command()
def bisect(
    probes: Annotated[
        list[str],
        typer.Option(
            "--probe", help="What the model has to answer; repeatable: all of them.", metavar="PROMPT => TEXT"
        ),
    ],
    good: Annotated[
        str | None, typer.Option("--good", help="A version that answers right; default: one is looked for.")
    ] = None,
    bad: Annotated[str, typer.Option("--bad", help="A version that does not: a number, an alias, HEAD.")] = "live",
    root: Root = Path(),
    as_json: AsJson = False,
) -> None:
    """Find the first version that no longer answers right, by binary search."""
    from kbsync.bisect import Probe
    from kbsync.suspects import find_broken

    wanted = [Probe.parse(text) for text in probes]
    with opened(root) as (workspace, ledger), bars() as progress:
        found = find_broken(workspace, ledger, wanted, good=good, bad=bad, progress=progress)
    if as_json:
        return emit(found)
    _say(found)
    return None


def _say(found: dict[str, Any]) -> None:
    run = f", run {found['run']}" if found["run"] else ""
    because = f": {found['reason']}" if found["reason"] else ""
    how = f"{found['kind']} of {short(found['made'])} by {found['by']}{run}{because}"
    say(f"version [bold]{found['bad']}[/] broke it ({escape(how)})")
    if found["skipped"]:
        say(f"  or one of {', '.join(map(str, found['skipped']))}, which cannot be asked any more")
    if found["others"]:
        listed = ", ".join(map(str, found["others"]))
        say(f"  [yellow]answers went back and forth:[/] this is one boundary; see also {listed}")
    _say_answers(found)
    facts = found["facts"]
    columns = ("fact", "was", "became", "same subject", "influence", "without it")
    told = {True: "right again", False: "still wrong", None: ""}
    rows = (
        (
            row["prompt"],
            row["before"] or "",
            row["after"] or "nothing",
            "yes" if row["same_subject"] else "",
            "" if row["influence"] is None else f"{row['influence']:.0%}",
            told[row["without"]],
        )
        for row in facts[:SHOWN]
    )
    table(f"facts of version {found['bad']}, the likeliest first", columns, rows)
    if len(facts) > SHOWN:
        say(f"… and {len(facts) - SHOWN} more (--json lists all)")
    say(f"next: {escape('; '.join(next_commands(found)))}")


def next_commands(found: dict[str, Any]) -> list[str]:
    """Commands that look further into it and undo it: a fact that was taken out cannot be taken out again, and undoing
    a rebase is to go back."""
    commands = []
    if found["facts"]:
        first = found["facts"][0]
        name = shlex.join((first["subject_id"], first["relation"]))
        commands = [f"blame {name}", f"revert --fact {name}"] if first["after"] else [f"history {name}"]
    commands.append(f"rollback --to {found['good']}" if found["kind"] == "rebase" else f"revert {found['bad']}")
    return [f"kbsync {command}" for command in commands]


def _say_answers(found: dict[str, Any]) -> None:
    """What the last right and the first wrong version answer."""
    said = {row["version"]: row for row in found["asked"]}
    say(f"{counted(len(said), 'version')} asked")
    columns = ("prompt", "expected", *(f"version {found[name]}" for name in ("good", "bad")))
    table(
        "answers",
        columns,
        (
            (
                probe["prompt"],
                probe["expected"],
                *(_answer(said[found[name]]["answers"][index]) for name in ("good", "bad")),
            )
            for index, probe in enumerate(found["probes"])
        ),
    )


def _answer(answer: dict[str, Any]) -> str:
    return f"{answer['answer']} (P {answer['probability']:.3f})"
