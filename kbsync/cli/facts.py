"""`kbsync facts`: what the ledger holds true, for people and for other programs. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from rich.markup import escape

from kbsync.cli.common import AsJson, Root, emit, opened, printing, say, table
from kbsync.cli.read import Relation, moment, one_subject, reading, short

if TYPE_CHECKING:
    from kbsync.ledger import FactRow, Ledger
    from kbsync.ledger.read_facts import FactFilter

__all__ = ["app", "paged"]

app = typer.Typer()

PAGE = 50
"""Rows of a table that nobody asked for more of: a ledger may have a million."""

Out = Annotated[Path | None, typer.Option("--out", help="Write there instead of to stdout.", metavar="FILE")]


@app.command()
def facts(
    root: Root = Path(),
    as_of: Annotated[str | None, typer.Option("--as-of", help="As kbsync knew it then (ISO date or time).")] = None,
    valid_at: Annotated[
        str | None, typer.Option("--valid-at", help="What sources say was true then, by their own dates.")
    ] = None,
    relation: Relation = None,
    subject: Annotated[str | None, typer.Option("--subject", help="Only this subject: id or label.")] = None,
    object_: Annotated[str | None, typer.Option("--object", help="Only this object: id or label.")] = None,
    source: Annotated[str | None, typer.Option("--source", help="Only what this source said.")] = None,
    search: Annotated[str | None, typer.Option("--search", help="Only where a label contains this.")] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", help="At most so many; default: 50 in a table, else all.", min=0)
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV that spreadsheets open safely.")] = False,
    ntriples: Annotated[bool, typer.Option("--ntriples", help="Print RDF as N-Triples.")] = False,
    parquet: Annotated[Path | None, typer.Option("--parquet", help="Write Parquet.", metavar="FILE")] = None,
    iri: Annotated[
        list[str] | None,
        typer.Option("--iri", help="With --ntriples: where IRIs of an id space begin.", metavar="SPACE=PREFIX"),
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """List the facts that the ledger holds true, now or at an earlier time; or export them."""
    from kbsync.errors import UsageError
    from kbsync.ledger.read_facts import FactFilter

    form = _form(csv=as_csv, ntriples=ntriples, parquet=parquet is not None, json=as_json)
    if out is not None and form not in ("csv", "ntriples", "json"):
        raise UsageError("--out is for --csv, --json and --ntriples", hint="kbsync facts --csv --out facts.csv")
    wanted = FactFilter(relation, subject, object_, source, search, moment(as_of) if as_of else None)
    prefixes = _prefixes(iri or ())
    if limit is None and form is None:
        limit = PAGE
    if form is not None:
        with opened(root) as (_, ledger):
            return _export(paged(ledger, wanted, valid_at, limit or None), form, parquet or out, prefixes)
    with reading(root) as (_, db):
        found = db.select_facts(wanted, limit or None) if valid_at is None else db.claims_valid_at(wanted, valid_at)
        with closing(found):
            shown = list(islice(found, limit or None))
            rest = sum(1 for _ in found) if valid_at is not None else db.count_facts(wanted) - len(shown)
    return _say_facts(shown, len(shown) + rest, valid=valid_at is not None)


def paged(ledger: Ledger, wanted: FactFilter, valid_at: str | None, limit: int | None) -> Iterator[FactRow]:
    """The rows of an export, as of its begin. The ledger is read page by page: however many there are, and however
    slowly somebody takes them, no writer waits."""
    from kbsync.ledger.read_facts import PAGE as READ

    with ledger.read() as db:
        begin = ledger.now()
        ids = db.fact_ids(wanted, limit) if valid_at is None else db.claim_ids(wanted, valid_at)[:limit]
    for start in range(0, len(ids), READ):
        with ledger.read() as db:
            page = ids[start : start + READ]
            rows = db.facts_by_id(page) if valid_at is None else db.claims_by_id(page)
        yield from (replace(row, until=None) if row.until and row.until > begin else row for row in rows)


def _form(**given: bool) -> str | None:
    """The one form that is asked for; None: a table."""
    from kbsync.errors import UsageError

    forms = [name for name, wanted in given.items() if wanted]
    if len(forms) > 1:
        raise UsageError("--csv, --json, --ntriples, --parquet: one at a time", hint="kbsync facts --help")
    return forms[0] if forms else None


def _prefixes(given: Sequence[str]) -> dict[str, str]:
    from kbsync.errors import UsageError

    found = {}
    for text in given:
        space, _, prefix = text.partition("=")
        if ":" not in prefix:
            raise UsageError(f"--iri {text}: is no SPACE=PREFIX", hint="--iri hip=https://example.org/hip/")
        found[space] = prefix
    return found


def _export(rows: Iterator[FactRow], form: str, out: Path | None, prefixes: Mapping[str, str]) -> None:
    """Write the rows to stdout, or to a file that is there whole or not at all."""
    from kbsync import exports
    from kbsync.versions.files import write_durably

    def write(file: TextIO) -> None:
        if form == "csv":
            exports.write_csv(exports.COLUMNS, map(exports.flat, rows), file)
        elif form == "json":
            exports.write_json(map(exports.flat, rows), file)
        else:
            exports.write_ntriples(rows, file, exports.Namer(prefixes))

    def fill(path: Path) -> None:
        if form == "parquet":
            return exports.write_parquet(exports.COLUMNS, map(exports.flat, rows), path)
        with path.open("w", encoding="utf-8", newline="") as file:
            return write(file)

    if out is None:
        with printing() as stdout:
            return write(stdout)
    write_durably(out, fill)
    return None


def _say_facts(rows: list[FactRow], total: int, *, valid: bool) -> None:
    columns = ["relation", "subject", "object", "status", "source", "origin"]
    columns += ["from", "to"] if valid or any(row.start or row.end for row in rows) else []
    found = [
        {
            "relation": row.fact.relation,
            "subject": row.fact.subject.label,
            "object": row.fact.object.label,
            "status": row.fact.status,
            "source": row.fact.source,
            "origin": row.fact.origin,
            "from": row.start,
            "to": row.end,
            "since": short(row.since),
        }
        for row in rows
    ]
    table("facts", [*columns, "since"], ([row[name] for name in (*columns, "since")] for row in found))
    what = "claims" if valid else "facts"
    if total > len(rows):
        say(f"{total} {what}, the first {len(rows)}; --limit N shows more, --csv, --json and --parquet export all")
    elif total > 1:
        say(f"{total} {what}")


@app.command()
def entity(
    name: Annotated[str, typer.Argument(help="Its id, or any label or alias that it has or had.")],
    root: Root = Path(),
    as_json: AsJson = False,
) -> None:
    """Show what a thing is called, was called, was merged from, and in which relations it stands."""
    with reading(root) as (_, db):
        found = db.entity(one_subject(db, name))
    if as_json:
        return emit(found)
    say(f"[bold]{escape(found['label'])}[/]  {escape(found['id'])}")
    for title, rows, columns in (
        ("names", "names", ("name", "kind", "source", "since", "until")),
        ("merged into it", "merged", ("id", "source", "at")),
        ("relations", "relations", ("relation", "as", "facts")),
    ):
        if found[rows]:
            table(title, columns, ([_minute(row[name]) for name in columns] for row in found[rows]))
    return None


def _minute(value: object) -> object:
    """A time as a table shows it, anything else as it is."""
    return short(datetime.fromisoformat(value)) if isinstance(value, str) and _TIME.match(value) else value


_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:")
