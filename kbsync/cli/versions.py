"""The versions of the model: `log`, `show`, `diff`. No torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from kbsync.cli.common import MEASURED, AsJson, Root, emit, probe_line, say, share, table
from kbsync.cli.read import reading, required_model, short

if TYPE_CHECKING:
    from kbsync.config import Workspace
    from kbsync.facts import Applied, FactKey
    from kbsync.ledger import ModelRow, Reader, VersionRow
    from kbsync.versions.manifest import ActiveDelta

__all__ = ["app"]

app = typer.Typer()


PAGE = 50
"""Versions that are listed where nobody asked for more: a daemon makes thousands."""


@app.command()
def log(
    root: Root = Path(),
    limit: Annotated[int, typer.Option("--limit", "-n", help="How many.", min=1)] = PAGE,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the versions of the model, newest first, which one HEAD is, and which are live or have another name."""
    with reading(root) as (workspace, db):
        model = required_model(workspace, db)
        named = _named(db, model)
        found = db.versions(model.id, newest=None if everything else limit)[::-1]
        holding = db.holding(model.id, [version.number for version in found])
        restorable, total = db.restorable(model.id), len(db.made_at(model.id))
    if as_json:
        rows = [_version_json(version, holding[version.number], named[version.number]) for version in found]
        return emit([row | {"restorable": row["number"] in restorable} for row in rows])
    table(
        f"versions of {model.id}",
        (
            "",
            "version",
            "on",
            "facts",
            "new",
            "made",
            "weights",
            "effic.",
            "para.",
            "spec. drop",
            "drift",
            "reason",
        ),
        (
            (
                " ".join(named[version.number]) if version.number in restorable else "not restorable",
                version.number,
                version.parent,
                holding[version.number],
                version.facts,
                f"{version.created_at:%m-%d %H:%M}",
                (version.weights_sha256 or "")[:8],
                *(share((version.probe or {}).get(name)) for name in MEASURED),
                version.reason,
            )
            for version in found
        ),
    )
    if total > len(found):
        say(f"{total} versions, the newest {len(found)}; --limit N and --all show more")
    return None


def _named(db: Reader, model: ModelRow) -> Mapping[int, list[str]]:
    """Version -> what it is called: HEAD, aliases."""
    from kbsync.ledger.aliases import HEAD

    found: dict[int, list[str]] = defaultdict(list)
    for name, number in {HEAD: model.head, **db.aliases(model.id)}.items():
        found[number].append(name)
    return found


def _version_json(version: VersionRow, holding: int, named: Sequence[str]) -> dict[str, Any]:
    probe = {name: value for name, value in (version.probe or {}).items() if name != "facts"}
    return asdict(version) | {"probe": probe, "holds": holding, "named": named, "live": "live" in named}


@app.command()
def show(
    version: Annotated[str, typer.Argument(help="Its number, an alias such as live, or HEAD.")],
    root: Root = Path(),
    as_json: AsJson = False,
) -> None:
    """Show one version: what it put in, what its probe measured, its files."""
    with reading(root) as (workspace, db):
        model = required_model(workspace, db)
        row = db.version(model.id, db.number_of(model.id, version))
        held, named = db.applied(model.id, row.number), _named(db, model)[row.number]
        before = db.applied(model.id, row.parent) if row.parent is not None else {}
        active = [entry.model_dump(by_alias=True) for entry in db.active(model.id, row.number)]
        restorable = row.number in db.restorable(model.id)
    difference = _difference(before, held)
    if as_json:
        more = {"active": active, "changes": difference, "holds": len(held), "restorable": restorable, "named": named}
        return emit(asdict(row) | more)
    say(f"[bold]version {row.number}[/] of {escape(model.id)}: {row.kind} on {row.parent}, {short(row.created_at)}")
    if named:
        say(f"  is {' and '.join(named)}")
    say(f"  {escape(row.reason)}  by {escape(row.user)}  run {row.run_id}")
    say(f"  weights {row.weights_sha256}")
    say(f"  {probe_line(row.probe)}")
    if not restorable:
        say("  [yellow]not restorable[/]: its deltas are gone")
    for entry in active:
        say(f"  delta {entry['delta'][:12]}" + (f" without columns {entry['except']}" if entry["except"] else ""))
    _say_difference(f"against version {row.parent}", difference)
    return None


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="V1", help="From this version (a number, an alias, HEAD)")],
    second: Annotated[str, typer.Argument(metavar="V2", help="to this one.")],
    root: Root = Path(),
    as_json: AsJson = False,
) -> None:
    """Show in which facts two versions differ, and how far their weights are from each other."""
    with reading(root) as (workspace, db):
        model = required_model(workspace, db)
        one, other = db.number_of(model.id, first), db.number_of(model.id, second)
        difference = _difference(db.applied(model.id, one), db.applied(model.id, other))
        lost = {one, other} - db.restorable(model.id)
        sides = [(db.version(model.id, number), db.active(model.id, number)) for number in (one, other)]
    weights = None if lost else _weights(workspace, sides)
    if as_json:
        return emit({"facts": difference, "weights": weights})
    _say_difference(f"version {one} -> {other}", difference)
    if weights is None:
        return say(f"[yellow]no weights to compare[/]: version {min(lost)} is not restorable")
    columns = ("matrix", "‖difference‖", "of ‖W‖", "rank")
    rows = weights["matrices"]
    table(
        "weights",
        columns,
        ((r["module"], f"{r['norm']:.5g}", share(r["relative"]), r["rank"]) for r in rows),
    )
    for which, number in (("only_first", one), ("only_second", other)):
        for delta, some in weights[which].items():
            say(f"only in version {number}: delta {delta[:12]}, {_counted(some)}")
    return None


def _counted(columns: Sequence[int]) -> str:
    """Columns in words: those there are, up to ten."""
    named = ", ".join(map(str, columns[:10])) + (", …" if len(columns) > 10 else "")
    return f"column {named}" if len(columns) == 1 else f"{len(columns)} columns: {named}"


def _weights(workspace: Workspace, sides: Sequence[tuple[VersionRow, Sequence[ActiveDelta]]]) -> dict[str, Any]:
    """How the weights of two versions differ: by matrix, and which columns only one has."""
    from kbsync.versions.difference import base_norms, weight_difference
    from kbsync.versions.store import VersionStore

    store = VersionStore(workspace.data, sides[0][0].model)
    found = weight_difference(sides[0][1], sides[1][1], store)
    norms: dict[str, float] = {}
    for row, active in sides:
        if row.manifest_sha256 is not None:
            capacity = store.manifest(row.number, row.manifest_sha256).numerics.get("capacity", {})
            norms |= base_norms(active, capacity.get("norms", {}), store)
    return {
        "matrices": [
            {
                "module": module,
                "norm": matrix.norm,
                "relative": matrix.norm / norms[module] if module in norms else None,
                "rank": matrix.rank,
            }
            for module, matrix in found.matrices.items()
        ],
        "only_first": {delta: list(columns) for delta, columns in found.only_first.items()},
        "only_second": {delta: list(columns) for delta, columns in found.only_second.items()},
    }


def _difference(before: Mapping[FactKey, Applied], after: Mapping[FactKey, Applied]) -> list[dict[str, Any]]:
    """Facts that only one of two versions holds, or that they hold differently."""
    found = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if (old.request.digest if old else None) != (new.request.digest if new else None):
            request = (new or old).request  # type: ignore[union-attr]  # one of them has the key
            found.append(
                {
                    "relation": key.relation,
                    "subject_id": key.subject,
                    "subject": request.subject,
                    "before": old.request.target if old else None,
                    "after": new.request.target if new else None,
                }
            )
    return found


def _say_difference(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = ("relation", "subject", "before", "after")
    table(title, columns, ([row[column] for column in columns] for row in rows))
