"""Accepting facts and conflicts, and asking about them: now, as of a time, their history, what changed."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbsync.facts import Change, Conflict, Entity, Fact, FactKey
from kbsync.ledger import Ledger
from tests.ledgers import (
    NOON,
    RELATION,
    Clock,
    claim,
    claims,
    decide,
    dump,
    fact,
    facts,
    key,
    opened,
    snapshot,
    sync,
)

pytestmark = pytest.mark.usefixtures("database")

HOUR = timedelta(hours=1)
BEGINNING = datetime(2000, 1, 1, tzinfo=UTC)


def apply(ledger: Ledger, wanted: dict[FactKey, Fact], *conflicts: Conflict) -> list[Change]:
    """Accept facts in a run of their own; the changes."""
    with ledger.write() as db:
        run = db.start_run("astronomy", model=None, trigger="sync", user="me")
        return db.apply(run, wanted, conflicts, [RELATION])


def kinds(changes: list[Change]) -> list[tuple[str, str]]:
    """Subject and kind of each change."""
    return [(change.key.subject.removeprefix("feed:"), change.kind) for change in changes]


def test_the_live_facts_become_exactly_those_given(tmp_path: Path) -> None:
    """New keys are added, others changed or removed; each change carries both sides, time and run."""
    clock = Clock()
    with opened(tmp_path, clock) as ledger:
        assert kinds(apply(ledger, facts(Vega="Lyra", Deneb="Cygnus"))) == [("Deneb", "added"), ("Vega", "added")]
        later = clock.turn(hours=1)
        changes = apply(ledger, facts(Vega="Draco", Altair="Aquila"))
        assert changes == [
            Change(key("Altair"), "added", None, fact("Altair", "Aquila"), later, 2),
            Change(key("Deneb"), "removed", fact("Deneb", "Cygnus"), None, later, 2),
            Change(key("Vega"), "changed", fact("Vega", "Lyra"), fact("Vega", "Draco"), later, 2),
        ]
        with ledger.read() as db:
            assert db.facts() == facts(Vega="Draco", Altair="Aquila")


def test_applying_twice_changes_nothing_the_second_time(tmp_path: Path) -> None:
    """The same facts and conflicts once more leave every table but `run` as it was."""
    conflict = Conflict(key("Deneb"), "rows", (claim("Deneb", "Cygnus"), claim("Deneb", "Draco", "line 3")), "two")
    with opened(tmp_path) as ledger:
        apply(ledger, facts(Vega="Lyra"), conflict)
        before = [line for line in dump(tmp_path) if not line.startswith('INSERT INTO "run"')]
        assert apply(ledger, facts(Vega="Lyra"), conflict) == []
        assert [line for line in dump(tmp_path) if not line.startswith('INSERT INTO "run"')] == before


def test_each_kind_of_change_has_its_name(tmp_path: Path) -> None:
    """Withdrawn, restored and relabelled facts are told from changed ones; another source alone is no change."""
    vega = fact("Vega", "Lyra")
    steps: list[tuple[Fact, list[str]]] = [
        (vega, ["added"]),
        (replace(vega, status="withdrawn"), ["withdrawn"]),
        (vega, ["restored"]),
        (replace(vega, subject=Entity("feed:Vega", "α Lyrae")), ["relabelled"]),
        (replace(vega, object=Entity("feed:Lyra", "the Lyre")), ["relabelled"]),
        (replace(vega, object=Entity("feed:Lyra", "the Lyre"), source="other"), []),
        (replace(vega, object=Entity("feed:Draco", "Draco"), status="withdrawn"), ["changed"]),
    ]
    with opened(tmp_path) as ledger:
        for wanted, expected in steps:
            assert [change.kind for change in apply(ledger, {wanted.key: wanted})] == expected
            with ledger.read() as db:
                assert db.facts() == {wanted.key: wanted}
        with ledger.read() as db:
            assert [change.kind for change in db.changes(BEGINNING)] == [kind for _, some in steps for kind in some]


def test_a_fact_that_moved_in_its_source_is_not_written_again(tmp_path: Path) -> None:
    """Another line is no other fact: the row keeps the place that the decision was made on."""
    with opened(tmp_path) as ledger:
        apply(ledger, {key("Vega"): fact("Vega", "Lyra", origin="line 2")})
        assert apply(ledger, {key("Vega"): fact("Vega", "Lyra", origin="line 9")}) == []
        with ledger.read() as db:
            assert db.facts()[key("Vega")].origin == "line 2"


def test_other_relations_are_left_alone(tmp_path: Path) -> None:
    """Only the relations that were resolved may gain or lose facts."""
    with opened(tmp_path) as ledger:
        apply(ledger, facts(Vega="Lyra"))
        governor = replace(fact("Ohio", "DeWine"), relation="governor")
        with ledger.write() as db:
            run = db.start_run("us", model=None, trigger="sync", user="me")
            db.apply(run, {governor.key: governor}, [], ["governor"])
            with pytest.raises(ValueError, match="governor"):
                db.apply(run, {governor.key: governor}, [], [RELATION])
        with ledger.read() as db:
            assert db.facts([RELATION]) == facts(Vega="Lyra")
            assert db.facts(["governor"]) == {governor.key: governor}
            assert len(db.facts()) == 2
            assert db.facts([]) == {}


def test_as_of_answers_what_was_held_true_then(tmp_path: Path) -> None:
    """A fact holds from the moment it was accepted up to, not with, the moment that it ended."""
    clock = Clock()
    with opened(tmp_path, clock) as ledger:
        apply(ledger, facts(Vega="Lyra"))
        clock.turn(hours=2)
        apply(ledger, facts(Vega="Draco"))
        clock.turn(hours=2)
        apply(ledger, {})
        with ledger.read() as db:
            objects = [
                [one.object.label for one in db.facts([RELATION], as_of=NOON + step * HOUR).values()]
                for step in (-1, 0, 1, 2, 3, 4, 5)
            ]
            assert [row.fact.object.label for row in db.fact_rows(as_of=NOON + HOUR)] == ["Lyra"]
            assert db.fact_rows() == []
    assert objects == [[], ["Lyra"], ["Lyra"], ["Draco"], ["Draco"], [], []]


def test_history_is_found_by_id_and_by_any_label(tmp_path: Path) -> None:
    """Every row of a subject, oldest first, with run and end; a label that it had once finds it too."""
    clock = Clock()
    renamed = replace(fact("Vega", "Draco"), subject=Entity("feed:Vega", "α Lyrae"))
    with opened(tmp_path, clock) as ledger:
        first = decide(ledger, facts(Vega="Lyra", Deneb="Cygnus"))
        later = clock.turn(hours=1)
        second = decide(ledger, {renamed.key: renamed})
        with ledger.read() as db:
            rows = db.history("feed:Vega")
            assert rows == db.history("Vega") == db.history("α Lyrae", RELATION)
            assert db.history("Vega", "governor") == db.history("Nobody") == []
    assert [(row.fact, row.since, row.until, row.run_id, row.until_run_id) for row in rows] == [
        (fact("Vega", "Lyra"), NOON, later, first, second),
        (renamed, later, None, second, None),
    ]


def test_a_fact_names_the_fetch_that_the_decision_rests_on(tmp_path: Path) -> None:
    """The newest fetch of its source when it was accepted, not a later one; none where nothing was fetched."""
    clock = Clock()
    old = replace(snapshot(*claims(Vega="Lyra")).provenance, body_sha256="01" * 32)
    new = replace(old, body_sha256="02" * 32)
    with opened(tmp_path, clock) as ledger:
        sync(ledger, snapshot(*claims(Vega="Lyra"), provenance=old))
        clock.turn(hours=1)
        decide(ledger, facts(Vega="Lyra") | {key("Sun"): fact("Sun", "none", source="by hand")})
        clock.turn(hours=1)
        sync(ledger, snapshot(*claims(Vega="Lyra"), provenance=new))
        with ledger.read() as db:
            by_label = {row.fact.subject.label: row.provenance for row in db.fact_rows()}
    assert by_label == {"Vega": old, "Sun": None}


def test_changes_answers_for_a_window(tmp_path: Path) -> None:
    """After `since`, up to and with `until`; by relation and by source; a replaced fact is one change, not two."""
    clock = Clock()
    with opened(tmp_path, clock) as ledger:
        apply(ledger, facts(Vega="Lyra", Deneb="Cygnus"))
        clock.turn(hours=1)
        apply(ledger, facts(Vega="Draco", Deneb="Cygnus") | {key("Sun"): fact("Sun", "none", source="other")})
        clock.turn(hours=1)
        apply(ledger, {key("Sun"): fact("Sun", "none", source="other")})
        with ledger.read() as db:
            assert kinds(db.changes(NOON)) == [
                ("Sun", "added"),
                ("Vega", "changed"),
                ("Deneb", "removed"),
                ("Vega", "removed"),
            ]
            assert kinds(db.changes(NOON - HOUR, NOON)) == [("Deneb", "added"), ("Vega", "added")]
            assert kinds(db.changes(NOON, NOON + HOUR)) == [("Sun", "added"), ("Vega", "changed")]
            assert kinds(db.changes(NOON, source="other")) == [("Sun", "added")]
            assert db.changes(NOON, relation="governor") == db.changes(NOON + 2 * HOUR) == []
            changed = db.changes(NOON, NOON + HOUR)[1]
    assert (changed.before, changed.after, changed.at, changed.run_id) == (
        fact("Vega", "Lyra"),
        fact("Vega", "Draco"),
        NOON + HOUR,
        2,
    )


def test_conflicts_open_stay_and_close(tmp_path: Path) -> None:
    """A conflict stays one row while it is about the same claims, is shown with their present places, and keeps both
    times; other claims make another conflict."""
    clock = Clock()
    one, two, three = claim("Vega", "Lyra"), claim("Vega", "Draco", "line 3"), claim("Vega", "Hercules", "line 4")
    first = Conflict(key("Vega"), "rows", (one, two), "two rows")
    moved = replace(first, claims=(replace(two, origin="line 8", seen=2), replace(one, seen=2)))
    other = Conflict(key("Vega"), "rows", (one, three), "two rows")
    with opened(tmp_path, clock) as ledger:
        apply(ledger, {}, first)
        apply(ledger, {}, moved)
        with ledger.read() as db:
            (row,) = db.conflicts()
            assert (row.conflict, row.opened_at, row.run_id, row.closed_at) == (moved, NOON, 1, None)
        later = clock.turn(hours=1)
        apply(ledger, {}, other, replace(other, kind="prompt"))
        apply(ledger, facts(Vega="Lyra"))
        with ledger.read() as db:
            assert db.conflicts() == []
            ended = [(row.conflict.kind, row.closed_at is not None) for row in db.conflicts(open_only=False)]
            assert ended == [("rows", True), ("rows", True), ("prompt", True)]
            assert db.conflicts(open_only=False)[0].closed_at == later
            assert db.audit_log(1)[0].detail == {"added": 1, "conflicts_closed": 2}


_STATES = st.lists(st.dictionaries(st.sampled_from("ABC"), st.sampled_from("xyz")), min_size=1, max_size=6)


def test_any_history_can_be_replayed(tmp_path: Path) -> None:
    """For any sequence of states: as-of gives back every one of them, Eqn 5 holds at every moment, and the changes
    applied in order lead from the first to the last."""
    relations = count()

    @settings(max_examples=25, deadline=None)
    @given(_STATES)
    def check(states: list[dict[str, str]]) -> None:
        relation = f"relation{next(relations)}"
        began = clock.turn(hours=1)
        times = []
        for state in states:
            times.append(clock.turn(hours=1))
            _accept(ledger, relation, state)
        with ledger.read() as db:
            for state, moment in zip(states, times, strict=True):
                rows = db.fact_rows([relation], as_of=moment)
                assert {row.fact.subject.label: row.fact.object.label for row in rows} == state
                assert len(rows) == len(state)
            replayed: dict[str, str] = {}
            for change in db.changes(began, relation=relation):
                subject = change.key.subject.removeprefix("feed:")
                assert (None if change.before is None else change.before.object.label) == replayed.get(subject)
                replayed.pop(subject, None)
                replayed |= {} if change.after is None else {subject: change.after.object.label}
            assert replayed == states[-1]

    clock = Clock()
    with opened(tmp_path, clock) as ledger:
        check()


def _accept(ledger: Ledger, relation: str, state: dict[str, str]) -> None:
    wanted = {FactKey(relation, one.subject): replace(f, relation=relation) for one, f in facts(**state).items()}
    with ledger.write() as db:
        db.apply(db.start_run(None, model=None, trigger="sync", user="me"), wanted, [], [relation])
