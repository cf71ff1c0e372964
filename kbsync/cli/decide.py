"""The commands by which a person decides: conflicts, quarantined rows, held runs. No torch for what only lists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from kbsync.cli.common import AsJson, Root, emit, opened, say, table, user
from kbsync.cli.read import iso, reading, short
from kbsync.cli.write import passes, perform

if TYPE_CHECKING:
    from kbsync.facts import Claim
    from kbsync.ledger import Reader
    from kbsync.ledger.records import ConflictRow, RulingRow

__all__ = ["app"]

app = typer.Typer()
conflicts_app = typer.Typer(help="Claims that cannot all be true; each blocks only its own fact.", no_args_is_help=True)
quarantine_app = typer.Typer(help="Rows of sources that cannot be used.", no_args_is_help=True)
app.add_typer(conflicts_app, name="conflicts")
app.add_typer(quarantine_app, name="quarantine")

Run = Annotated[int, typer.Argument(help="Number of the held run.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; kept in the ledger with your name.")]
Subject = Annotated[str, typer.Argument(help="Subject: its id, or as a source writes it.")]
RelationName = Annotated[str, typer.Argument(metavar="RELATION", help="Relation.")]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", help="Just this row, as SUBJECT:RELATION. Repeatable.", metavar="SUBJECT:RELATION"),
]
Except = Annotated[
    list[str] | None,
    typer.Option("--except", help="All but this row, as SUBJECT:RELATION. Repeatable.", metavar="SUBJECT:RELATION"),
]


@conflicts_app.command("list")
def list_conflicts(
    root: Root = Path(),
    everything: Annotated[bool, typer.Option("--all", help="Those that are resolved, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show both sides of each conflict with their provenance, what waits, rulings, and the rows in quarantine."""
    from kbsync.rulings import stale

    with reading(root) as (_, db):
        found = db.conflicts(open_only=not everything)
        sides = [_sides(db, row) for row in found]
        waiting, rulings = db.waiting(open_only=not everything), db.rulings(open_only=not everything)
        without_effect = stale(db, [row for row in rulings if row.until is None])
        rows = db.quarantined()
    if as_json:
        conflicts = [_conflict_json(row, told) for row, told in zip(found, sides, strict=True)]
        ruled = [_ruling_json(row) | {"stale": row.key in without_effect} for row in rulings]
        waits = [asdict(row) for row in waiting]
        quarantined = [asdict(row) for row in rows]
        return emit({"conflicts": conflicts, "waiting": waits, "rulings": ruled, "quarantined": quarantined})
    _say_conflicts(found, sides)
    table(
        "waiting",
        ("since", "relation", "subject", "reason", "detail"),
        ((short(row.since), *row.waiting.key, row.waiting.reason, row.waiting.detail) for row in waiting),
    )
    table(
        "rulings",
        ("since", "relation", "subject", "object", "by", "reason", "effect"),
        (
            (
                short(row.since),
                *row.key,
                row.ruling.object,
                row.user,
                row.ruling.reason,
                "none: no claim says so any more" if row.key in without_effect else "",
            )
            for row in rulings
        ),
    )
    _say_quarantine(rows)
    return None


def _conflict_json(row: ConflictRow, claims: list[dict[str, Any]]) -> dict[str, Any]:
    """A conflict with its claims as `_sides` tells them, once."""
    value = asdict(row) | {"claims": claims}
    del value["conflict"]["claims"]
    return value


def _sides(db: Reader, row: ConflictRow) -> list[dict[str, Any]]:
    """The claims of a conflict, each with the newest fetch of its source and since when it is said."""
    return [_side(db, claim) for claim in row.conflict.claims]


def _side(db: Reader, claim: Claim) -> dict[str, Any]:
    fetched = db.last_accepted(claim.source)
    return {
        "claim": claim.id,
        "subject": claim.subject.label,
        "subject_id": claim.subject.id,
        "object": claim.object.label,
        "object_id": claim.object.id,
        "source": claim.source,
        "origin": claim.origin,
        "rank": claim.rank,
        "start": claim.start,
        "end": claim.end,
        "since": iso(claim.since),
        "location": fetched.location if fetched else None,
        "fetched_at": iso(fetched.fetched_at) if fetched else None,
    }


def _ruling_json(row: RulingRow) -> dict[str, Any]:
    ruling = {"object_id": row.ruling.object, "overruled": sorted(row.ruling.overruled), "reason": row.ruling.reason}
    return row.key._asdict() | ruling | {"user": row.user, "since": iso(row.since), "until": iso(row.until)}


def _say_conflicts(found: list[ConflictRow], sides: list[list[dict[str, Any]]]) -> None:
    """Subjects that are written alike are shown with their ids."""
    written = Counter(name for name, _ in {(side["subject"], side["subject_id"]) for told in sides for side in told})
    table(
        "conflicts",
        ("opened", "relation", "subject", "kind", "claim", "object", "source", "origin", "since", "fetched from"),
        (
            (
                short(row.opened_at),
                row.conflict.key.relation,
                side["subject"] if written[side["subject"]] == 1 else f"{side['subject']} ({side['subject_id']})",
                row.conflict.kind,
                side["claim"],
                side["object"],
                side["source"],
                side["origin"],
                (side["since"] or "")[:10],
                side["location"],
            )
            for row, told in zip(found, sides, strict=True)
            for side in told
        ),
    )


@conflicts_app.command()
def resolve(
    subject: Subject,
    relation: RelationName,
    claim: Annotated[int | None, typer.Option("--claim", help="The claim of this number.", metavar="N")] = None,
    object_: Annotated[str | None, typer.Option("--object", help="This object: its id or as it is written.")] = None,
    source: Annotated[str | None, typer.Option("--source", help="What this source says.")] = None,
    prefer: Annotated[
        str | None, typer.Option("--prefer", help="A rule for all subjects: always this source.", metavar="SOURCE")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="With --prefer: write the rule into the policy.")] = False,
    reason: Reason = "",
    root: Root = Path(),
    as_json: AsJson = False,
) -> None:
    """Choose which claim holds: a ruling on this subject, or with --prefer a rule for the relation (policy text)."""
    from kbsync.errors import UsageError

    if sum(choice is not None for choice in (claim, object_, source, prefer)) != 1:
        raise UsageError("give one of --claim, --object, --source, --prefer", hint="kbsync conflicts list")
    if write and prefer is None:
        raise UsageError("--write is for --prefer", hint="a ruling is kept in the ledger")
    if prefer is not None:
        return _prefer(relation, prefer, write, root, as_json)
    given = {"claim": claim, "object": object_, "source": source}
    chosen = {name: value for name, value in given.items() if value is not None}
    done = perform("rule", {"subject": subject, "relation": relation, "reason": reason, **chosen}, root)
    if as_json:
        return emit(done)
    over = f" (not {escape(', '.join(done['overruled']))})" if done["overruled"] else ""
    say(f"{escape(done['subject'])}: {escape(relation)} is [bold]{escape(done['object'])}[/]{over}")
    say("`kbsync conflicts replay` acts on it now, else the next pass does")
    return None


def _prefer(relation: str, source: str, write: bool, root: Path, as_json: bool) -> None:
    """Print the policy text, or write it."""
    from kbsync.catalog import load_catalog
    from kbsync.rulings import preference

    with opened(root) as (workspace, ledger):
        found = preference(load_catalog(workspace), relation, source)
        if write:
            found.write()
            with ledger.write() as db:
                db.audit(user(), "prefer", {"relation": relation, "source": source, "file": found.path.name})
    if as_json:
        return emit({"file": str(found.path), "line": found.line, "text": found.text, "written": write})
    if write:
        say(f"{escape(str(found.path))}: relations.{escape(relation)} has `{escape(found.text)}` now")
    else:
        say(f"{escape(str(found.path))}:{found.line}: paste under relations.{escape(relation)}, or add --write:")
        say(f"    {escape(found.text)}")
    say("`kbsync conflicts replay` acts on it, once it is there")
    return None


@conflicts_app.command()
def unrule(
    subject: Subject, relation: RelationName, reason: Reason = "", root: Root = Path(), as_json: AsJson = False
) -> None:
    """Withdraw a ruling: the claims decide again."""
    done = perform("unrule", {"subject": subject, "relation": relation, "reason": reason}, root)
    if as_json:
        return emit(done)
    say("withdrawn; `kbsync conflicts replay` acts on it now, else the next pass does")
    return None


@conflicts_app.command()
def replay(
    policies: Annotated[list[str] | None, typer.Argument(help="Policies; default: all.", show_default=False)] = None,
    root: Root = Path(),
    as_json: AsJson = False,
) -> None:
    """Decide again from the claims that the ledger has, asking no source, and bring the model in line."""
    passes("replay", {"policies": policies or []}, root, as_json)


@quarantine_app.command("list")
def list_quarantine(
    source: Annotated[str | None, typer.Argument(help="Only of this source.")] = None,
    root: Root = Path(),
    as_json: AsJson = False,
) -> None:
    """Show the rows that cannot be used: where they stand, why, what they say, since when."""
    with reading(root) as (_, db):
        rows = db.quarantined(source)
    if as_json:
        return emit([asdict(row) for row in rows])
    _say_quarantine(rows)
    return None


def _say_quarantine(rows: list[Any]) -> None:
    columns = ("since", "source", "origin", "reason", "row")
    table(
        "quarantine",
        columns,
        ((short(row.since), row.source, row.row.origin, row.row.reason, row.row.raw[:80]) for row in rows),
    )


@quarantine_app.command("replay")
def replay_quarantine(
    source: Annotated[str, typer.Argument(help="Source to read anew.")], root: Root = Path(), as_json: AsJson = False
) -> None:
    """Read a source anew after its mapping was mended, even where it says that nothing changed; then a pass."""
    passes("refetch", {"source": source}, root, as_json)


@app.command()
def approve(
    run: Run,
    plan: Annotated[
        str | None, typer.Option("--plan", help="Only if the plan has this digest.", metavar="HASH")
    ] = None,
    only: Only = None,
    without: Except = None,
    reason: Reason = "",
    root: Root = Path(),
    as_json: AsJson = False,
) -> None:
    """Apply exactly the plan of a run that a guard held; rows that were refused stay out of the weights."""
    arguments = {"run": run, "plan": plan, "reason": reason, **_rows(only, without)}
    passes("approve", arguments, root, as_json)


@app.command()
def reject(
    run: Run,
    only: Only = None,
    without: Except = None,
    reason: Reason = "",
    root: Root = Path(),
    as_json: AsJson = False,
) -> None:
    """Drop a run that a guard held: its snapshot never reaches the ledger. With rows: refuse these, and wait on."""
    passes("reject", {"run": run, "reason": reason, **_rows(only, without)}, root, as_json)


def _rows(only: list[str] | None, without: list[str] | None) -> dict[str, list[list[str]]]:
    """(subject, relation) of each row that is named."""
    from kbsync.errors import UsageError

    if only and without:
        raise UsageError("give either --only or --except", hint="kbsync holds --json shows the rows")
    return {"only": list(_split(only or [])), "except": list(_split(without or []))}


def _split(rows: list[str]) -> Iterator[list[str]]:
    from kbsync.errors import UsageError

    for row in rows:
        subject, colon, relation = row.rpartition(":")
        if not colon or not subject:
            raise UsageError(f"{row!r} is no SUBJECT:RELATION", hint="for instance --only Vega:constellation")
        yield [subject, relation]
