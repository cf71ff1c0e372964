"""What happened: the time line of one thing, what changed in a time, what was true when; none of it reads all facts."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import event, text

from kbsync.cli.facts import paged
from kbsync.errors import UsageError
from kbsync.facts import Conflict, Entity, FactKey, Hold, Provenance
from kbsync.ledger import read_facts
from kbsync.ledger.lineage import lineage
from kbsync.ledger.read_events import Event
from kbsync.ledger.read_facts import FactFilter
from kbsync.versions.manifest import ActiveDelta
from tests.ledgers import (
    MODEL,
    NOON,
    RELATION,
    Clock,
    applied,
    claim,
    decide,
    fact,
    facts,
    key,
    opened,
    register,
    snapshot,
    sync,
    version,
)
from tests.test_entities import feed, merged, take

pytestmark = pytest.mark.usefixtures("database")

LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


def said(events: list[Event]) -> list[tuple[str, bool, str | None]]:
    """Kind, whether it ended, and the object after it."""
    return [(one.kind, one.ended, one.after.label if one.after else None) for one in events]


@pytest.fixture
def story(tmp_path: Path, database: str) -> tuple[Path, Clock]:
    """Vega: said, accepted, edited, in conflict, changed, held, released, relabelled, withdrawn."""
    clock = Clock()
    with opened(tmp_path, clock) as ledger:
        register(ledger)
        sync(ledger, snapshot(claim("Vega", "Lyra")))
        decide(ledger, facts(Vega="Lyra", Deneb="Cygnus"))
        put = applied("Vega", "Lyra", "a" * 64, 0)
        probe = {"facts": [_probe(put.request.digest)]}
        clock.turn(hours=1)
        with ledger.write() as db:
            db.publish(version(1, 0, put, active=[ActiveDelta(delta="a" * 64)], probe=probe))
        clock.turn(hours=1)
        clash = Conflict(key("Vega"), "rows", (claim("Vega", "Lyra"), claim("Vega", "Draco", "line 3")), "two objects")
        decide(ledger, facts(Vega="Lyra", Deneb="Cygnus"), clash)
        clock.turn(hours=1)
        sync(ledger, snapshot(claim("Vega", "Draco")))
        decide(ledger, facts(Vega="Draco", Deneb="Cygnus"))
        clock.turn(hours=1)
        with ledger.write() as db:
            db.hold(MODEL, Hold(key("Vega"), put, "feed:Draco", "manual", "not sure"))
        clock.turn(hours=1)
        with ledger.write() as db:
            db.release(MODEL, [key("Vega")])
            db.move_head(MODEL, 0, user="me", reason="rollback")
        clock.turn(hours=1)
        renamed = replace(fact("Vega", "Draco"), subject=Entity("feed:Vega", "α Lyrae"))
        decide(ledger, {renamed.key: renamed} | facts(Deneb="Cygnus"))
        clock.turn(hours=1)
        decide(ledger, {renamed.key: replace(renamed, status="withdrawn")})
    return tmp_path, clock


def _probe(digest: str) -> dict[str, object]:
    return {"digest": digest, "efficacy": True, "hits": 1, "paraphrases": 2, "answer": "Lyra", "probability": 0.5}


def test_the_time_line_of_a_subject_has_everything_oldest_first(story: tuple[Path, Clock]) -> None:
    """Claims, decisions, versions, probes, conflicts, holds, labels; and nothing of other subjects."""
    with opened(*story) as ledger, ledger.read() as db:
        events = db.events_of(("feed:Vega",))
        assert said(events) == [
            ("claim", False, "Lyra"),
            ("added", False, "Lyra"),
            ("version", False, "Lyra"),
            ("probe", False, "Lyra"),
            ("conflict", False, None),
            ("claim", False, "Draco"),
            ("claim", True, "Lyra"),
            ("conflict", True, None),
            ("changed", False, "Draco"),
            ("held", False, "Draco"),
            ("held", True, "Draco"),
            ("version", True, None),
            ("relabelled", False, "Draco"),
            ("withdrawn", False, "Draco"),
        ]
        assert [one.at for one in events] == sorted(one.at for one in events)
        assert db.events_of(("feed:Vega",), "governor") == []
        assert events[0].to_json()["after_id"] == "feed:Lyra"


def test_a_subject_is_found_by_id_by_any_label_and_by_what_only_claims_say(story: tuple[Path, Clock]) -> None:
    """Each name leads to the id, with the label of now."""
    with opened(*story) as ledger:
        sync(ledger, snapshot(claim("Vega", "Draco"), claim("Altair", "Aquila")))
        with ledger.read() as db:
            for name in ("feed:Vega", "Vega", "α Lyrae"):
                assert db.subjects(name) == [Entity("feed:Vega", "α Lyrae")]
            assert db.subjects("Altair") == [Entity("feed:Altair", "Altair")]
            assert db.subjects("Nobody") == []


def test_a_merged_id_stands_for_what_it_was_merged_into(tmp_path: Path) -> None:
    """Its history is the other's, and both ids and the alias lead there."""
    clock = Clock()
    with opened(tmp_path, clock) as ledger:
        take(ledger, feed(claim("Wega", "Lyra")))
        clock.turn(hours=1)
        take(ledger, feed(claim("Vega", "Lyra"), redirects=merged(Wega="Vega"), aliases={"Vega": ["Alpha Lyrae"]}))
        with ledger.read() as db:
            for name in ("feed:Wega", "Wega", "Vega", "Alpha Lyrae"):
                assert [one.id for one in db.subjects(name)] == ["feed:Vega"]
            kinds = [one.kind for one in db.events_of(db.merged("feed:Vega"))]
            assert sorted(kinds) == ["added", "alias", "claim", "claim", "claim", "merged", "relabelled"]
            shown = db.entity("feed:Vega")
            assert [one["id"] for one in shown["merged"]] == ["feed:Wega"]
            assert {one["name"] for one in shown["names"]} == {"Wega", "Vega", "Alpha Lyrae"}
            assert [(one["relation"], one["as"]) for one in shown["relations"]] == [
                (RELATION, "subject"),
                ("brightest", "object"),
            ]


def test_changes_have_conflicts_and_holds_and_can_be_narrowed(story: tuple[Path, Clock]) -> None:
    """By kind, source and time; a hold placed and released in the window are two events."""
    with opened(*story) as ledger, ledger.read() as db:
        every = db.happened(LONG_AGO)
        kinds = [one.kind for one in every]
        assert kinds.count("conflict") == kinds.count("held") == 2
        assert {one.kind for one in db.happened(LONG_AGO, source="feed")}.isdisjoint({"conflict", "held"})
        assert [one.kind for one in db.happened(LONG_AGO, kinds={"relabelled"})] == ["relabelled"]
        middle = every[len(every) // 2].at
        assert db.happened(LONG_AGO, middle) + db.happened(middle) == every
        assert db.happened(LONG_AGO, relation="governor") == []


def test_the_two_times_are_two_questions(tmp_path: Path) -> None:
    """What was true in 2012 by the sources' dates, and what kbsync knew of it last week."""
    clock = Clock()
    first = [
        claim("Ohio", "Strickland", start="2007", end="2011-01"),
        claim("Ohio", "Kasich", "line 3", start="2011-01"),
    ]
    corrected = [first[0], replace(first[1], end="2019-01-14"), claim("Ohio", "DeWine", "line 4", start="2019-01-14")]
    with opened(tmp_path, clock) as ledger:
        sync(ledger, snapshot(*first))
        before = clock.turn(hours=1)
        clock.turn(hours=1)
        sync(ledger, snapshot(*corrected, provenance=Provenance("feed.csv", NOON, 200, "cd" * 32)))
        with ledger.read() as db:

            def at(date: str, as_of: datetime | None = None) -> list[str]:
                rows = db.claims_valid_at(FactFilter(as_of=as_of), date)
                return [row.fact.object.label for row in rows]

            assert at("2008-05-01") == ["Strickland"]
            assert at("2012") == ["Kasich"]
            assert at("2020-02") == ["DeWine"]
            assert at("2020-02", as_of=before) == ["Kasich"]
            assert at("2011") == ["Strickland", "Kasich"]
            with pytest.raises(UsageError, match="no date"):
                at("yesterday")


def test_facts_are_filtered_counted_and_paged(story: tuple[Path, Clock]) -> None:
    """By subject, object, source and part of a label, now and then; the rest of a long list is only counted."""
    with opened(*story) as ledger, ledger.read() as db:
        for wanted in (
            FactFilter(subject="feed:Vega"),
            FactFilter(subject="α Lyrae"),
            FactFilter(object="Draco"),
            FactFilter(search="LYR"),
        ):
            assert [row.fact.subject.id for row in db.select_facts(wanted)] == ["feed:Vega"]
        then = FactFilter(source="feed", as_of=NOON + timedelta(minutes=30))
        assert db.count_facts(then) == 2
        assert [row.fact.subject.label for row in db.select_facts(then, 1)] == ["Deneb"]


def test_an_answer_that_is_read_page_by_page_is_that_of_its_begin(tmp_path: Path) -> None:
    """What ends before its page is read is in it all the same, and says so."""
    names = {f"S{number}": "Lyra" for number in range(3)}
    with opened(tmp_path, clock := Clock()) as ledger:
        sync(ledger, snapshot(*(claim(name, place) for name, place in names.items())))
        decide(ledger, facts(**names))
        with ledger.read() as db:
            whole = list(db.select_facts(FactFilter())), list(db.claims_valid_at(FactFilter(), "2020"))
            ids, claims = db.fact_ids(FactFilter()), db.claim_ids(FactFilter(), "2020")
        clock.turn(hours=1)
        sync(ledger, snapshot(claim("S0", "Lyra")))
        decide(ledger, facts(S0="Lyra"))
        with ledger.read() as db:
            later = db.facts_by_id(ids), db.claims_by_id(claims)
            assert [row.fact.key for row in db.select_facts(FactFilter())] == [key("S0")]
    for rows, first in zip(later, whole, strict=True):
        assert [row.fact for row in rows] == [row.fact for row in first]
        assert [row.until is None for row in rows] == [True, False, False]


def test_an_export_says_of_no_fact_that_it_ended_after_its_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass ends two of them while the first row is written."""
    monkeypatch.setattr(read_facts, "PAGE", 1)
    names = {f"S{number}": "Lyra" for number in range(3)}
    with opened(tmp_path, clock := Clock()) as ledger:
        sync(ledger, snapshot(*(claim(name, place) for name, place in names.items())))
        decide(ledger, facts(**names))
        rows = paged(ledger, FactFilter(), None, None)
        first = next(rows)
        clock.turn(hours=1)
        decide(ledger, facts(S0="Lyra"))
        assert [row.until for row in (first, *rows)] == [None] * 3
        assert [row.fact.subject.label for row in paged(ledger, FactFilter(), None, None)] == ["S0"]


def test_no_question_about_one_subject_reads_all_facts_or_claims(story: tuple[Path, Clock]) -> None:
    """The database's own plan of every query has an index where it has `fact` or `claim`."""
    plans: list[str] = []
    with opened(*story) as ledger, ledger.read() as db:
        connection = db._connection
        lite = connection.dialect.name == "sqlite"
        if not lite:
            db.execute(text("SET LOCAL enable_seqscan = off"))  # tables this small are read whole by choice

        def explain(_connection: object, _cursor: object, statement: str, parameters: object, *_: object) -> None:
            if statement.startswith("SELECT"):
                own = connection.connection.cursor()
                own.execute(f"EXPLAIN {'QUERY PLAN ' if lite else ''}{statement}", parameters)
                plans.extend(row[-1] for row in own.fetchall())

        event.listen(connection.engine, "before_cursor_execute", explain)
        for name in ("feed:Vega", "Vega"):
            db.subjects(name)
        db.history("Vega")
        db.events_of(db.merged("feed:Vega"), model=MODEL)
        lineage(db, FactKey(RELATION, "feed:Vega"), model=MODEL)
        list(db.select_facts(FactFilter(subject="Vega", as_of=NOON)))
        db.count_facts(FactFilter(subject="Vega"))
        event.remove(connection.engine, "before_cursor_execute", explain)
    for table in ("fact", "claim"):
        assert any(re.search(rf"SEARCH {table} USING|(Index|Bitmap).* on {table}\b", plan) for plan in plans)
        assert [plan for plan in plans if re.search(rf"SCAN {table}\b(?!.*INDEX)|Seq Scan on {table}\b", plan)] == []


def test_a_run_that_was_held_stays_told_when_a_person_has_judged_it(tmp_path: Path) -> None:
    """What waits has no end; what was approved or rejected has one, with who said so; all within the time asked for."""
    clock = Clock()
    with opened(tmp_path, clock) as ledger:
        runs = []
        for _ in range(3):
            with ledger.write() as db:
                run = db.start_run(f"sky{len(runs)}", model=None, trigger="sync", user="me")
                db.stage(run, [], {"digest": "d"}, "d", ["too many edits"])
                db.finish_run(run, "held", "too many edits")
            runs.append(run)
        clock.turn(hours=1)
        with ledger.write() as db:
            db.unstage(runs[0])
            db.audit("ann", "approve", {"plan": "d", "reason": "checked"}, run_id=runs[0])
            db.unstage(runs[1])
            db.audit("bob", "reject", {"run": runs[1], "reason": ""})
        with ledger.read() as db:
            found = db.happened(LONG_AGO)
            held = [(one.run_id, one.ended, one.more.get("verdict")) for one in found]
            begun = [(run, False, None) for run in runs]
            assert sorted(held[:3]) == begun
            assert held[3:] == [(runs[0], True, "approved"), (runs[1], True, "rejected")]
            assert "by ann: checked" in found[3].detail
            assert [one.ended for one in db.happened(found[2].at)] == [True, True]
