"""When changes reached the weights: how old a change is, whichever way its fact came about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from kbsync.facts import Claim, Conflict, FactKey, Provenance, Waiting
from kbsync.ledger import Ledger
from kbsync.ledger.arrivals import ArrivalRow, SourceChange
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
    key,
    opened,
    register,
    snapshot,
    sync,
    version,
)

pytestmark = pytest.mark.usefixtures("database")


@pytest.fixture
def clock() -> Clock:
    """Noon, until it is turned."""
    return Clock()


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock, database: str) -> Iterator[Ledger]:
    """An empty ledger that MODEL follows."""
    with opened(tmp_path, clock) as made:
        register(made)
        yield made


def fetch(ledger: Ledger, clock: Clock, *said: Claim, source: str = "feed", as_of: datetime | None = None) -> None:
    """A source is asked now."""
    provenance = Provenance(f"{source}.csv", clock(), 200, "ab" * 32, as_of=as_of)
    sync(ledger, snapshot(*said, source=source, provenance=provenance))


def accept(ledger: Ledger, subject: str, object_: str, source: str = "feed") -> None:
    """The policy accepts what the source says now."""
    with ledger.read() as db:
        [said] = [one for one in db.claims_of(source) if one.subject.label == subject and one.object.label == object_]
    decide(ledger, {key(subject): fact(subject, object_, source=source, claim=said.id)})


def change(ledger: Ledger, subject: str = "Vega") -> SourceChange:
    """Where the live fact comes from."""
    with ledger.read() as db:
        return db.source_changes([key(subject)])[key(subject)]


def hours(number: float) -> datetime:
    """So long after noon."""
    return NOON + timedelta(hours=number)


def test_the_first_fetch_of_a_source_shows_no_change_its_facts_count_from_the_fetch(
    ledger: Ledger, clock: Clock
) -> None:
    fetch(ledger, clock, claim("Vega", "Lyra"))
    accept(ledger, "Vega", "Lyra")
    assert change(ledger) == SourceChange("feed", changed_at=NOON, fetched_at=NOON)


def test_a_change_is_as_old_as_the_last_fetch_that_did_not_show_it(ledger: Ledger, clock: Clock) -> None:
    fetch(ledger, clock, claim("Vega", "Lyra"))
    accept(ledger, "Vega", "Lyra")
    clock.turn(hours=1)
    fetch(ledger, clock, claim("Vega", "Draco"))
    accept(ledger, "Vega", "Draco")
    clock.turn(hours=1)
    fetch(ledger, clock, claim("Vega", "Draco"))
    assert change(ledger) == SourceChange("feed", changed_at=NOON, fetched_at=hours(1))


def test_where_that_fetch_says_that_it_was_older_the_change_may_be_older(ledger: Ledger, clock: Clock) -> None:
    fetch(ledger, clock, claim("Vega", "Lyra"), as_of=hours(-0.5))
    clock.turn(hours=1)
    fetch(ledger, clock, claim("Vega", "Draco"), as_of=hours(0.9))
    accept(ledger, "Vega", "Draco")
    assert change(ledger).changed_at == hours(-0.5)


def test_a_fact_that_was_long_said_before_it_was_accepted_counts_from_when_it_was_first_said(
    ledger: Ledger, clock: Clock
) -> None:
    """Another label, rank or date of the claim is no new beginning; another object in between is."""
    fetch(ledger, clock, claim("Vega", "Lyra"))
    for row in (claim("Vega", "Draco"), claim("Vega", "Draco", rank="preferred"), claim("Vega", "Draco", start="2026")):
        clock.turn(hours=1)
        fetch(ledger, clock, row)
    accept(ledger, "Vega", "Draco")
    assert change(ledger) == SourceChange("feed", changed_at=NOON, fetched_at=hours(1))
    clock.turn(hours=1)
    fetch(ledger, clock, claim("Vega", "Lyra"))
    accept(ledger, "Vega", "Lyra")
    clock.turn(hours=1)
    fetch(ledger, clock, claim("Vega", "Draco"))
    accept(ledger, "Vega", "Draco")
    assert change(ledger) == SourceChange("feed", changed_at=hours(4), fetched_at=hours(5))


def test_an_old_claim_that_counts_since_another_source_fell_silent_is_as_old_as_that_silence(
    ledger: Ledger, clock: Clock
) -> None:
    fetch(ledger, clock, claim("Vega", "Lyra"), source="first")
    fetch(ledger, clock, claim("Vega", "Draco"), source="second")
    accept(ledger, "Vega", "Lyra", source="first")
    clock.turn(days=30)
    fetch(ledger, clock, source="first")
    accept(ledger, "Vega", "Draco", source="second")
    assert change(ledger) == SourceChange("first", changed_at=NOON, fetched_at=NOON + timedelta(days=30))


def test_a_fact_without_a_claim_has_no_age(ledger: Ledger, clock: Clock) -> None:
    fetch(ledger, clock, claim("Vega", "Lyra"))
    decide(ledger, {key("Vega"): fact("Vega", "Lyra")})
    with ledger.read() as db:
        assert db.source_changes([key("Vega"), key("Deneb")]) == {}


def publish(ledger: Ledger, number: int, *subjects: str) -> int:
    """A version answers the live facts of these subjects, from now on."""
    delta = f"{number:064x}"
    put_in = [applied(subject, "Lyra", delta, column) for column, subject in enumerate(subjects)]
    with ledger.write() as db:
        db.publish(version(number, number - 1, *put_in, active=[ActiveDelta(delta=delta)]))
        return db.note_arrivals(MODEL, number, [key(subject) for subject in subjects])


def test_what_a_version_answers_is_an_arrival_with_the_three_times_of_the_change(ledger: Ledger, clock: Clock) -> None:
    fetch(ledger, clock, claim("Vega", "Draco"))
    clock.turn(hours=1)
    fetch(ledger, clock, claim("Vega", "Lyra"))
    accept(ledger, "Vega", "Lyra")
    clock.turn(minutes=5)
    assert publish(ledger, 1, "Vega") == 1
    with ledger.read() as db:
        [row] = db.arrivals(MODEL, NOON)
        assert (
            db.arrivals(MODEL, row.served_at) == db.arrivals(MODEL, NOON, ["other"]) == db.arrivals("other", NOON) == []
        )
    assert row == ArrivalRow(MODEL, 1, key("Vega"), "feed", NOON, hours(1), row.served_at)
    assert 65 * 60 <= row.seconds < 65 * 60 + 1


def test_what_a_source_said_before_the_model_was_there_is_as_old_as_the_model(ledger: Ledger, clock: Clock) -> None:
    fetch(ledger, clock, claim("Vega", "Lyra"))
    accept(ledger, "Vega", "Lyra")
    clock.turn(days=90)
    with ledger.write() as db:
        db.register_model("later", name="later", fingerprint="e" * 64, path="/models/later")
        began = db.now
        assert db.note_arrivals("later", 0, [key("Vega")]) == 1
        [row] = db.arrivals("later", NOON)
    assert row.changed_at == row.served_at == began


def test_keys_that_are_undecided_are_counted_by_source_with_the_oldest(ledger: Ledger, clock: Clock) -> None:
    fetch(ledger, clock, claim("Vega", "Lyra"), claim("Mira", "Lyra"), claim("Deneb", "Lyra"), source="first")
    fetch(ledger, clock, claim("Vega", "Draco"), source="second")
    both = (claim("Vega", "Lyra"), replace(claim("Vega", "Draco"), source="second"))
    first = decide(ledger, {}, Conflict(key("Vega"), "sources", both, "two objects"))
    for subject in ("Mira", "Deneb"):
        clock.turn(hours=1)
        wait(ledger, first, *(["Mira"] if subject == "Mira" else ["Mira", "Deneb"]))
    with ledger.read() as db:
        found = {(part.source, part.why): (part.keys, part.since.hour) for part in db.undecided([RELATION])}
        assert db.undecided(["other"]) == []
    assert found == {("first", "conflict"): (1, 12), ("second", "conflict"): (1, 12), ("first", "confirm"): (2, 13)}


def wait(ledger: Ledger, run: int, *subjects: str) -> None:
    """These subjects' claims do not count yet."""
    waiting = [Waiting(key(subject), "confirm", "feed:Lyra", "1 of 2 fetches") for subject in subjects]
    with ledger.write() as db:
        db.set_waiting(run, waiting, [RELATION])


def test_a_run_is_held_since_the_first_of_those_that_it_superseded(ledger: Ledger, clock: Clock) -> None:
    def run(status: Any) -> None:
        clock.turn(hours=1)
        with ledger.write() as db:
            db.finish_run(db.start_run("sky", model=None, trigger="sync", user="me"), status)

    with ledger.read() as db:
        assert db.held_since("sky") is None
    for status in ("superseded", "done", "superseded", "failed", "superseded", "held"):
        run(status)
    with ledger.read() as db:
        assert db.held_since("sky") == hours(3)
        assert db.held_since("other") is None


def test_facts_are_counted_by_the_pass_that_accepted_them_and_read_without_their_text(
    ledger: Ledger, clock: Clock
) -> None:
    fetch(ledger, clock, claim("Vega", "Lyra"), claim("Mira", "Lyra"))
    accepted = {key(subject): fact(subject, "Lyra") for subject in ("Vega", "Mira")}
    decide(ledger, accepted)
    clock.turn(hours=1)
    decide(ledger, accepted | {key("Deneb"): fact("Deneb", "Lyra")})
    with ledger.read() as db:
        counts = db.accepted([RELATION])
        assert {(source, relation, since.hour): n for (source, relation, since), n in counts.items()} == {
            ("feed", RELATION, 12): 2,
            ("feed", RELATION, 13): 1,
        }
        first, second = sorted(since for _, _, since in counts)
        assert [place.key for place in db.facts_since("feed", RELATION, second)] == [key("Deneb")]
        assert {place.key for place in db.facts_since("feed", RELATION, first)} == {key("Vega"), key("Mira")}
        assert [place.object_id for place in db.fact_places([key("Mira"), FactKey("other", "x")])] == ["feed:Lyra"]
