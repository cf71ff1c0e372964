"""What happened: `history` of a subject, `changes` of a time, `entity`. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kbsync.cli.common import AsJson, Root, emit, printing, say, table
from kbsync.cli.read import Relation, model_row, moment, one_subject, reading, required_model, short

if TYPE_CHECKING:
    from kbsync.config import Workspace
    from kbsync.ledger import Reader
    from kbsync.ledger.read_events import Event

__all__ = ["app"]

app = typer.Typer()

_OVER = {
    "claim": "no longer said",
    "conflict": "resolved",
    "waiting": "waits no more",
    "held": "released",
    "ruling": "ruling over",
    "version": "out of the weights",
    "alias": "alias gone",
}
"""What the end of something is called; its beginning is called as its kind is, or in `_BEGUN`."""
_BEGUN = {"claim": "said", "ruling": "ruled", "version": "in the weights", "probe": "probed", "same": "source changed"}


@app.command()
def history(
    subject: Annotated[str, typer.Argument(help="Subject: its id, or any label that it has had.")],
    relation: Annotated[str | None, typer.Argument(help="Only this relation.")] = None,
    root: Root = Path(),
    as_json: AsJson = False,
) -> None:
    """Show all that ever happened to a subject: claims, decisions, conflicts, holds, versions, probes; oldest first."""
    with reading(root) as (workspace, db):
        id_ = one_subject(db, subject)
        model = model_row(workspace, db)
        events = db.events_of(db.merged(id_), relation, model.id if model else None)
        label = db.label(id_)
    if as_json:
        return emit([event.to_json() for event in events])
    rows = [_history_row(event) for event in events]
    return table(f"history of {label} ({id_})", ("at", "what", "relation", "object", "by", "detail"), rows)


def _history_row(event: Event) -> tuple[object, ...]:
    thing = event.after if event.after and not (event.ended and event.kind == "version") else event.before
    by = " ".join(text for text in (event.source, event.origin) if text)
    if event.kind in ("added", "changed", "removed", "withdrawn", "restored", "relabelled"):
        by = f"run {event.run_id}"
    relation = event.key.relation if event.key else ""
    return short(event.at), _called(event), relation, thing.label if thing else "", by, event.detail


def _called(event: Event) -> str:
    if "verdict" in event.more:
        return str(event.more["verdict"])
    return _OVER.get(event.kind, event.kind) if event.ended else _BEGUN.get(event.kind, event.kind)


@app.command()
def changes(
    since: Annotated[str, typer.Option("--since", help="A date, a time, or the number of a version.")],
    until: Annotated[str | None, typer.Option("--until", help="A date, a time, or the number of a version.")] = None,
    relation: Relation = None,
    source: Annotated[str | None, typer.Option("--source", help="Only what this source said.")] = None,
    kinds: Annotated[list[str] | None, typer.Option("--kind", help="Only this kind; may be given again.")] = None,
    summary: Annotated[bool, typer.Option("--summary", help="Only how many of each kind.")] = False,
    limit: Annotated[int, typer.Option("--limit", "-n", help="Rows of the table; 0: all.", min=0)] = 200,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV that spreadsheets open safely.")] = False,
    root: Root = Path(),
    as_json: AsJson = False,
) -> None:
    """Show what changed since a date or a version; another spelling is no other fact and stands apart."""
    from kbsync.exports import write_csv

    with reading(root) as (workspace, db):
        model = model_row(workspace, db)
        start, end = _time(since, workspace, db), _time(until, workspace, db) if until else None
        found = db.happened(
            start,
            end,
            relation=relation,
            source=source,
            kinds=_kinds(kinds),
            model=model.id if model else None,
        )
        made = {} if summary else _versions(db, found, model.id if model else None)
    counts = dict(Counter(event.kind for event in found if not event.ended))
    if summary:
        return emit(counts) if as_json else _say_summary(since, found)
    rows = [event.to_json() | {"version": made.get(index)} for index, event in enumerate(found)]
    if as_json:
        return emit(rows)
    if as_csv:
        with printing() as out:
            return write_csv(_CSV, ({name: row[name] for name in _CSV} for row in rows), out)
    return _say_changes(since, found, rows, limit)


_CSV = (
    "at",
    "kind",
    "ended",
    "relation",
    "subject",
    "subject_id",
    "before",
    "before_id",
    "after",
    "after_id",
    "source",
    "origin",
    "run",
    "version",
    "detail",
)


def _kinds(given: Sequence[str] | None) -> Sequence[str]:
    from kbsync.errors import UsageError
    from kbsync.ledger.read_events import HAPPENINGS

    for kind in given or ():
        if kind not in HAPPENINGS:
            raise UsageError(f"--kind {kind}: there is no such kind", hint=f"one of {', '.join(HAPPENINGS)}")
    return given or HAPPENINGS


def _say_changes(since: str, found: Sequence[Event], rows: Sequence[Mapping[str, Any]], limit: int) -> None:
    """Facts first, what waits for somebody next, and spelling-only changes last."""
    shown = list(zip(found, rows, strict=True))[: limit or None]
    facts = [pair for pair in shown if pair[0].kind not in ("conflict", "held", "waiting", "relabelled")]
    waits = [pair for pair in shown if pair[0].kind in ("conflict", "held", "waiting")]
    spelled = [pair for pair in shown if pair[0].kind == "relabelled"]
    columns = ("relation", "subject", "before", "after", "source", "origin", "version")
    table(
        f"changes since {since}",
        ("at", "kind", *columns),
        ((short(event.at), _called(event), *(row[name] for name in columns)) for event, row in facts),
    )
    if waits:
        table(
            "conflicts, holds, waits",
            ("at", "kind", "relation", "subject", "detail"),
            ((short(event.at), _called(event), row["relation"], row["subject"], event.detail) for event, row in waits),
        )
    if spelled:
        table(
            "only written otherwise",
            ("at", "relation", "subject", "was", "is", "version"),
            (
                (short(event.at), row["relation"], row["subject"], *_spelling(event), row["version"])
                for event, row in spelled
            ),
        )
    _say_summary(since, found)
    if len(found) > len(shown):
        say(f"the first {len(shown)}; --limit 0 shows all, --csv and --json print all")


def _spelling(event: Event) -> tuple[str, str]:
    """What is written otherwise, before and after: the subject or the object."""
    was = event.more.get("subject_before")
    if was and was != event.subject:
        return str(was), event.subject
    return (event.before.label if event.before else "", event.after.label if event.after else "")


def _say_summary(since: str, found: Sequence[Event]) -> None:
    """How many of each kind."""
    from kbsync.ledger.read_events import HAPPENINGS

    begun = Counter(event.kind for event in found if not event.ended)
    over = Counter(event.kind for event in found if event.ended)
    parts = []
    for kind in HAPPENINGS:
        if begun[kind] or over[kind]:  # type: ignore[index]
            more = f" ({over[kind]} {_OVER[kind]})" if over[kind] else ""  # type: ignore[index]
            parts.append(f"{begun[kind]} {kind}{more}")  # type: ignore[index]
    say(f"since {since}: {', '.join(parts) or 'nothing'}")


def _versions(db: Reader, found: Sequence[Event], model: str | None) -> dict[int, int]:
    """Place in `found` -> the first version made since that holds the object after it."""
    if model is None:
        return {}
    from kbsync.ledger.read_subjects import chunks

    subjects = {event.key.subject for event in found if event.key and event.after}
    held: dict[tuple[str, str, str], set[int]] = {}
    made = db.made_at(model)
    for some in chunks(sorted(subjects)):
        for place in db.placements(some, model):
            key = (*place.applied.request.key, place.applied.object_id)
            held.setdefault(key, set()).update(place.versions)
    first = {}
    for index, event in enumerate(found):
        if event.key and event.after:
            holding = held.get((*event.key, event.after.id), ())
            first[index] = min((number for number in holding if made[number] >= event.at), default=None)
    return {index: number for index, number in first.items() if number is not None}


def _time(text: str, workspace: Workspace, db: Reader) -> datetime:
    """When a version was made, or the moment that the text says."""
    if text.isdecimal() and len(text) < 7:
        return db.version(required_model(workspace, db).id, int(text)).created_at
    return moment(text)
