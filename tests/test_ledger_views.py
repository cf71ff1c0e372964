"""The views answer what the reader answers, are documented to the column, and open in Datasette as they are."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import column, inspect, select, table

from kbsync.facts import EditRequest
from kbsync.ledger import Ledger, Reader, schema
from kbsync.ledger.columns import UtcTime
from kbsync.ledger.views import VIEWS
from tests.ledgers import (
    MODEL,
    NOON,
    Clock,
    fill,
    opened,
    register,
    tampered,
)

pytestmark = pytest.mark.usefixtures("database")

PAGE = (Path(__file__).parents[1] / "docs" / "ledger.md").read_text(encoding="utf-8")
TIMES = {"since", "until", "at", "fetched_at", "recorded_at", "opened_at", "last_fetch", "as_of", "retry_at"}
FIRST, SECOND = "1" * 64, "2" * 64


def ask(db: Reader, view: str, *names: str) -> list[tuple[Any, ...]]:
    """Columns of a view, as values."""
    columns = [column(name, UtcTime() if name in TIMES else None) for name in names]
    return [tuple(row) for row in db._connection.execute(select(*columns).select_from(table(view)))]


@pytest.fixture
def rich(tmp_path: Path) -> Iterator[Ledger]:
    """Two days of a feed, with everything that may happen to a key."""
    clock = Clock()
    with opened(tmp_path, clock) as ledger:
        register(ledger)
        fill(ledger, clock)
        yield ledger


def test_facts(rich: Ledger) -> None:
    """`live_facts` and `fact_history` are the reader's rows, provenance included."""
    names = ("relation", "subject_id", "object", "status", "since", "run_id", "location", "fetched_at")
    with rich.read() as db:
        rows = db.fact_rows()
        assert sorted(ask(db, "live_facts", *names)) == sorted(map(_told, rows))
        everything = [row for subject in ("Vega", "Deneb", "Altair", "Mira") for row in db.history(subject)]
        found = ask(db, "fact_history", *names, "until")
        assert len(found) > len(rows)
        assert sorted(row[:-1] for row in found) == sorted(map(_told, everything))
        assert {row[-1] for row in found} == {row.until for row in everything}


def _told(row: Any) -> tuple[Any, ...]:
    fact, seen = row.fact, row.provenance
    said = (fact.relation, fact.subject.id, fact.object.label, fact.status, row.since, row.run_id)
    return (*said, seen.location, seen.fetched_at)


def test_changes(rich: Ledger) -> None:
    """`fact_changes` are the reader's changes: kinds, both sides, time and run."""
    with rich.read() as db:
        changes = db.changes(datetime(2000, 1, 1, tzinfo=UTC))
        found = ask(db, "fact_changes", "at", "kind", "subject_id", "before_id", "after_id", "run_id")
    assert {change.kind for change in changes} == {"added", "changed", "removed"}
    assert sorted(found, key=str) == sorted(
        (
            (
                change.at,
                change.kind,
                change.key.subject,
                change.before and change.before.object.id,
                change.after and change.after.object.id,
                change.run_id,
            )
            for change in changes
        ),
        key=str,
    )


def test_claims_and_quarantine(rich: Ledger) -> None:
    """`live_claims` and `quarantined_rows` are what the sources say now, with how often it was said."""
    with rich.read() as db:
        said = [
            (one.id, one.subject.label, one.object.label, one.origin, one.seen, one.since)
            for one in db.claims_of("feed")
        ]
        found = ask(db, "live_claims", "claim_id", "subject", "object", "origin", "times_seen", "since")
        assert sorted(found) == sorted(said)
        assert {row[4] for row in found} == {1, 2}
        waiting = [(row.source, row.row.origin, row.row.reason, row.row.raw, row.since) for row in db.quarantined()]
        assert ask(db, "quarantined_rows", "source", "origin", "reason", "raw", "since") == waiting != []


def test_what_waits(rich: Ledger) -> None:
    """`open_conflicts`, `waiting_keys` and `held_keys` are what the reader lists, with the subject's name."""
    with rich.read() as db:
        assert ask(
            db, "open_conflicts", "relation", "subject_id", "kind", "reason", "opened_at", "run_id", "subject"
        ) == [
            (*row.conflict.key, row.conflict.kind, row.conflict.reason, row.opened_at, row.run_id, "Mira")
            for row in db.conflicts()
        ]
        assert ask(db, "waiting_keys", "subject_id", "reason", "object_id", "detail", "since", "subject") == [
            (row.waiting.key.subject, row.waiting.reason, row.waiting.object, row.waiting.detail, row.since, "Altair")
            for row in db.waiting()
        ]
        assert ask(db, "held_keys", "model", "subject_id", "reason", "held_out", "since", "subject") == [
            (MODEL, row.hold.key.subject, row.hold.reason, row.hold.held_out, row.since, "Deneb")
            for row in db.hold_rows(MODEL)
        ]
        assert min(len(db.conflicts()), len(db.waiting()), len(db.hold_rows(MODEL))) == 1


def test_what_versions_hold(rich: Ledger) -> None:
    """`version_contents` is what each version holds, the live one marked: excluded columns are out, the later delta of
    a key counts."""
    names = ("version", "state", "subject_id", "object_id", "delta", "delta_column", "prompt", "object")
    with rich.read() as db:
        held = [
            (number, state, one.request.key.subject, one.object_id, one.delta, one.column, *_asked(one.request))
            for number, state in ((1, "not live"), (2, "live"))
            for one in db.applied(MODEL, number).values()
        ]
        assert sorted(ask(db, "version_contents", *names)) == sorted(held)
    assert len(held) == 3


def _asked(request: EditRequest) -> tuple[str, str]:
    return request.prompt, request.target


def test_sources(rich: Ledger) -> None:
    """`fetch_log` has every fetch with its lag in seconds; `source_health` every source, one without a fetch too."""
    with rich.read() as db:
        assert ask(db, "fetch_log", "number", "lag_seconds", "who") == [(1, None, "me"), (2, 86400, "me")]
        names = ("source", "fetches", "lag_seconds", "live_claims", "quarantined", "failures", "last_error", "retry_at")
        assert sorted(ask(db, "source_health", *names)) == [
            ("broken", None, None, 0, 0, 3, "503", NOON + timedelta(days=2)),
            ("feed", 2, 86400, len(db.claims_of("feed")), 1, 0, None, None),
        ]


def test_labels(rich: Ledger) -> None:
    """`entity_labels` has every way to write an entity, from when, and until when where no claim writes it so now."""
    with rich.read() as db:
        found = {row[0]: row[1:] for row in ask(db, "entity_labels", "entity_id", "label", "kind", "since", "until")}
        labels = {one.subject.id: one.subject.label for one in db.claims_of("feed")}
        ended = {row.until for row in db.history("Deneb")}
    assert {id_: row[0] for id_, row in found.items() if row[3] is None and id_ in labels} == labels
    assert found["feed:Deneb"][:2] == ("Deneb", "label")
    assert {found["feed:Deneb"][3]} == ended


def test_the_documented_questions(rich: Ledger, tmp_path: Path) -> None:
    """The SQL about views in docs/ledger.md runs, and answers what its comments say."""
    changed, taught = PAGE.split("## Views")[1].split("```sql")[1].split("```")[0].split(";")[:2]
    with rich.read() as db:
        newest = db.changes(NOON - timedelta(days=1))[-1]
    assert tampered(tmp_path, changed)[0][1] == newest.kind
    assert tampered(tmp_path, taught) == []


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_datasette_shows_every_table_and_view(rich: Ledger, tmp_path: Path) -> None:
    """Real Datasette serves the page and the JSON of each without an error, on a ledger that is in use."""
    datasette = pytest.importorskip("datasette.app", reason="datasette is not installed; ends with: make test")
    names = [*schema.metadata.tables, *(view.name for view in VIEWS)]
    pages = ["/", "/ledger", *(f"/ledger/{name}{end}" for name in names for end in ("", ".json?_shape=objects"))]

    async def visit() -> dict[str, tuple[int, str]]:
        served = datasette.Datasette([tmp_path / "ledger.db"])
        answers = {page: await served.client.get(page) for page in pages}
        return {page: (answer.status_code, answer.text) for page, answer in answers.items()}

    found = asyncio.run(visit())
    assert {page: status for page, (status, _) in found.items() if status != 200} == {}
    assert "Draco" in found["/ledger/live_facts"][1]
    assert rich.check() == []


def test_every_view_and_column_is_documented(rich: Ledger) -> None:
    """docs/ledger.md lists each view with all its columns in their order, and no other."""
    rows = [line.split("|") for line in PAGE.splitlines() if line.startswith("| `")]
    documented = {row[1].strip(" `"): re.findall(r"`(\w+)`", row[3]) for row in rows}
    found = inspect(rich._engine)
    assert {name: [one["name"] for one in found.get_columns(name)] for name in sorted(found.get_view_names())} == {
        view.name: documented[view.name] for view in sorted(VIEWS, key=lambda view: view.name)
    }
    assert documented.keys() == {view.name for view in VIEWS} | schema.metadata.tables.keys()
