"""Taking snapshots in: what is decided again, and what is accepted without weighing, comes to what `resolve` says of
everything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from kbsync.connectors import Connector, make_connector
from kbsync.facts import Claim, Entity, QuarantinedRow, Snapshot
from kbsync.intake import Intake, take_in
from kbsync.ledger import Ledger, schema
from kbsync.ledger import scope as scopes
from kbsync.ledger.scope import Undecided
from kbsync.ledger.writer import Writer
from kbsync.policy import Policy, Source
from kbsync.weigh import ONLY_CLAIM
from tests import ledgers
from tests.ledgers import Clock, on_postgresql, opened
from tests.worlds import SOURCES, claim, claims, policies, policy_of

pytestmark = pytest.mark.usefixtures("database")


class _Whole(Writer):
    """A Writer that leaves every key to `resolve`."""

    def narrow(self, run_id: int, policy: Policy) -> Undecided:  # noqa: ARG002
        """All of them."""
        return Undecided(None)


def take(ledger: Ledger, policy: Policy, *snapshots: Snapshot, whole: bool = False) -> Intake:
    """One pass over the snapshots, as a run of its own; what came of it."""
    with ledger.write() as db:
        if whole:
            db.__class__ = _Whole
        return take_in(db, policy, db.start_run(policy.policy, model=None, trigger="sync", user="me"), snapshots)


def said(source: str, *those: Claim, **more: Any) -> Snapshot:
    """What a source said of `place`."""
    return ledgers.snapshot(*those, source=source, relation="place", **more)


def contents(ledger: Ledger, policy: Policy) -> tuple[Any, ...]:
    """All that was decided, and when, in an order of its own: every fact that there ever was, conflicts, waits. In what
    order the facts of one moment were written is left to the ledger."""
    with ledger.read() as db:
        subjects = {one.subject.id for one in db.claims(list(policy.relations))} | {key[1] for key in db.facts()}
        history = sorted({repr(replace(row, id=None)) for subject in subjects for row in db.history(subject)})
        conflicts = sorted(repr((row.conflict, row.opened_at, row.closed_at)) for row in db.conflicts(open_only=False))
        waits = sorted(repr((row.waiting, row.since, row.until)) for row in db.waiting(open_only=False))
        return db.facts(), history, conflicts, waits


_KINDS = st.sampled_from(["complete", "partial", "same"])
_MERGED = st.sampled_from([{}, {}, {}, {"s:1": "s:2"}, {"o:1": "o:2"}, {"s:3": "s:1", "o:2": "o:3"}])
_PASSES = st.lists(
    st.tuples(
        st.integers(0, 1),  # which of two policies
        st.lists(
            st.tuples(
                st.sampled_from(SOURCES),
                st.lists(claims(), max_size=5),
                _KINDS,
                _MERGED,
            ),
            min_size=1,
            max_size=2,
            unique_by=lambda one: one[0],
        ),
    ),
    min_size=1,
    max_size=6,
)


def test_what_may_have_changed_is_all_that_needs_deciding(tmp_path: Path) -> None:
    """For any policies and any passes over three sources, with labels that collide, conflicts, inverse relations,
    merged ids, confirmation, both ways to retract, and policies that take the relation from each other, the ledger is
    the same, to the moment, as one in which every pass resolved everything."""
    names = count()

    @settings(max_examples=4 if on_postgresql() else 40, deadline=None)
    @given(policies(), policies(), st.booleans(), _PASSES)
    def check(first: Policy, second: Policy, other: bool, passes: Sequence[tuple[int, Any]]) -> None:
        second = second.model_copy(update={"policy": "q" if other else "p"})
        folder = tmp_path / str(next(names))
        (folder / "narrow").mkdir(parents=True)
        (folder / "whole").mkdir()
        clock = Clock()
        with opened(folder / "narrow", clock) as narrow, opened(folder / "whole", clock) as whole:
            for which, fetched in passes:
                clock.turn(hours=1)
                policy = (first, second)[which]
                snapshots = list(_snapshots(narrow, fetched))
                take(narrow, policy, *snapshots)
                take(whole, policy, *snapshots, whole=True)
                assert contents(narrow, policy) == contents(whole, policy)

    check()


def _snapshots(ledger: Ledger, fetched: Iterable[tuple[str, list[Claim], str, dict[str, str]]]) -> Iterable[Snapshot]:
    for source, those, kind, merged in fetched:
        if kind != "same":
            own = [replace(one, source=source) for one in those]
            yield said(source, *own, complete=kind == "complete", redirects=merged)
            continue
        with ledger.read() as db:
            known = db.last_accepted(source) is not None
        if known:
            yield said(source, not_modified=True)


_BODIES = (
    "Ann,Rome\nBob,Oslo\n",
    "Ann,Oslo\n",
    "Ann,Rome\nBob,\n",
    "Ann,Rome\n,Oslo\n",
    "Bob,Oslo\nAnn,Rome\nAnn,Oslo\n",
)
"""Feeds: rows that move, that are gone, that cannot be used, one without a subject, two that contradict each other."""


def test_the_same_bytes_again_are_as_good_as_reading_them_again(tmp_path: Path) -> None:
    """For any policies and any feeds, complete or partial, one after the other: a ledger that does not read a body that
    it has just accepted is the same, to the moment and the count of fetches, as one that reads every body."""
    names = count()

    @settings(max_examples=4 if on_postgresql() else 40, deadline=None)
    @given(policies(), st.sampled_from(["complete", "partial"]), st.lists(st.sampled_from(_BODIES), max_size=6))
    def check(policy: Policy, kind: str, bodies: Sequence[str]) -> None:
        folder = tmp_path / str(next(names))
        (folder / "quick").mkdir(parents=True)
        (folder / "thorough").mkdir()
        connector, clock, before = feed(folder, kind), Clock(), None
        with opened(folder / "quick", clock) as quick, opened(folder / "thorough", clock) as thorough:
            for body in bodies:
                clock.turn(hours=1)
                (folder / "feed.csv").write_text(f"who,where\n{body}", encoding="utf-8")
                with quick.read() as db:
                    snapshot = connector.fetch(db.last_accepted("alpha"))
                assert (snapshot.not_modified, snapshot.provenance.status) == (body == before, 200)
                before = body
                take(quick, policy, snapshot)
                take(thorough, policy, replace(connector.fetch(None), provenance=snapshot.provenance))
                assert contents(quick, policy) == contents(thorough, policy)
                assert claimed(quick) == claimed(thorough)

    check()


def feed(folder: Path, kind: str) -> Connector:
    """`alpha` says of `place` what feed.csv in the folder has."""
    declared = {"source": "alpha", "type": "csv", "relation": "place", "ids": "s", "snapshot": kind}
    more = {"location": "feed.csv", "columns": {"subject": "who", "object": "where"}}
    return make_connector(Source.model_validate(declared | more), folder=folder)


def claimed(ledger: Ledger) -> tuple[Any, ...]:
    """What `alpha` says and how often it has said so, its rows that cannot be used, what its last fetch had."""
    with ledger.read() as db:
        fetch = db.execute(select(schema.fetch).order_by(schema.fetch.c.id.desc()).limit(1)).mappings().one()
        last = {name: value for name, value in fetch.items() if name != "not_modified"}
        return db.claims(["place"]), db.quarantined(), last


def undecided(ledger: Ledger, policy: Policy, *snapshots: Snapshot) -> Undecided:
    """What would be left to `resolve` once the snapshots are recorded."""
    with ledger.write() as db:
        run = db.start_run(policy.policy, model=None, trigger="sync", user="me")
        for one in snapshots:
            db.record(run, one)
        found = db.narrow(run, policy)
        db.rollback()
        return found


CROWD = [claim(f"Ann{number}", "Rome", origin=f"line {number}") for number in range(20)]


def test_a_first_load_leaves_only_what_must_be_weighed(tmp_path: Path) -> None:
    """One claim and a label of its own: accepted as it is. Two objects, one label for two subjects: for `resolve`."""
    policy = policy_of()
    namesake = replace(claim("Ann77", "Oslo"), subject=replace(CROWD[0].subject, id="s:Ann77"))
    with opened(tmp_path) as ledger:
        found = undecided(ledger, policy, said("alpha", *CROWD, claim("Ann1", "Oslo"), namesake))
        assert found.accepted == 18
        assert found.keys == {CROWD[0].key, CROWD[1].key, namesake.key}
        take(ledger, policy, said("alpha", *CROWD))
        with ledger.read() as db:
            facts = db.facts()
            by_id = {one.id: one for one in db.claims(["place"])}
    assert [fact.rule for fact in facts.values()] == [ONLY_CLAIM] * 20
    assert all(by_id[fact.claim or 0].subject == fact.subject for fact in facts.values())


def test_a_pass_decides_what_changed_and_who_is_written_alike(tmp_path: Path) -> None:
    """Nothing where nothing changed; a changed key and the one whose prompt it comes to; all for another policy."""
    policy = policy_of()
    with opened(tmp_path) as ledger:
        take(ledger, policy, said("alpha", *CROWD))
        assert undecided(ledger, policy, said("alpha", *CROWD)) == Undecided(frozenset())
        renamed = replace(CROWD[0], subject=replace(CROWD[0].subject, label="Ann7"))
        after = said("alpha", renamed, *CROWD[1:])
        assert undecided(ledger, policy, after).keys == {CROWD[0].key}
        other = policy_of(relation={"retract": "revert"})
        assert undecided(ledger, other, said("alpha", *CROWD)).keys is None
        moved = replace(renamed, object=claim("Ann0", "Oslo").object)
        take(ledger, policy, said("alpha", moved, *CROWD[1:]))
        with ledger.read() as db:
            assert [row.conflict.kind for row in db.conflicts()] == ["prompt", "prompt"]
            assert db.facts()[CROWD[7].key].object.label == "Rome"


def test_a_change_that_nobody_decided_is_not_forgotten(tmp_path: Path) -> None:
    """A fetch that was recorded without a decision counts for the next one."""
    policy = policy_of()
    with opened(tmp_path) as ledger:
        take(ledger, policy, said("alpha", *CROWD))
        with ledger.write() as db:
            run = db.start_run("p", model=None, trigger="sync", user="me")
            db.record(run, said("alpha", claim("Ann0", "Oslo"), *CROWD[1:]))
        found = undecided(ledger, policy, said("alpha", claim("Ann0", "Oslo"), *CROWD[1:]))
        assert found.keys == {CROWD[0].key}


def test_another_kbsync_decides_everything_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rules may be others."""
    with opened(tmp_path) as ledger:
        take(ledger, policy_of(), said("alpha", *CROWD))
        monkeypatch.setattr(scopes.kbsync, "__version__", "99")
        assert undecided(ledger, policy_of(), said("alpha", *CROWD)).keys is None


def test_a_change_counts_though_the_clock_went_back(tmp_path: Path) -> None:
    """A pass without a fetch, then one that comes before it by the clock: what that one fetched is decided."""
    policy, clock = policy_of(), Clock()
    with opened(tmp_path, clock) as ledger:
        take(ledger, policy, said("alpha", *CROWD))
        clock.turn(hours=2)
        take(ledger, policy)
        clock.turn(hours=-1)
        take(ledger, policy, said("alpha", claim("Ann0", "Oslo"), *CROWD[1:]))
        with ledger.read() as db:
            assert db.facts()[CROWD[0].key].object.label == "Oslo"


def test_who_takes_a_relation_back_decides_it_again(tmp_path: Path) -> None:
    """In between another policy decided it, which weighs its sources otherwise."""
    first, second = (
        policy_of(policy=name, sources=order) for name, order in (("p", ["alpha", "beta"]), ("q", ["beta", "alpha"]))
    )
    with opened(tmp_path) as ledger:
        other = replace(claim("Ann0", "Oslo"), source="beta")
        take(ledger, first, said("alpha", *CROWD), said("beta", other))
        for policy, wanted in ((second, "Oslo"), (first, "Rome")):
            take(ledger, policy)
            with ledger.read() as db:
                assert db.facts()[CROWD[0].key].object.label == wanted


def test_the_conflicts_of_a_relation_that_was_away_come_back(tmp_path: Path) -> None:
    """They were closed when no policy kept it; the same policy, unchanged, finds them again."""
    policy = policy_of()
    with opened(tmp_path) as ledger:
        take(ledger, policy, said("alpha", *CROWD, claim("Ann1", "Oslo")))
        with ledger.write() as db:
            run = db.start_run("q", model=None, trigger="sync", user="me")
            db.abandon(run, ["other"])
            assert not db.conflicts()
            db.abandon(run, ["other", "place"])
        take(ledger, policy)
        with ledger.read() as db:
            assert [row.conflict.key for row in db.conflicts()] == [CROWD[1].key]


def test_facts_leave_with_the_policy_that_kept_them_unless_another_keeps_them_now(tmp_path: Path) -> None:
    """A relation that nobody kept for a while, and that is kept again, loses nothing."""
    policy = policy_of()
    with opened(tmp_path) as ledger:
        take(ledger, policy, said("alpha", *CROWD))
        for kept, lost in (["other"], ["place"]), (["other", "place"], []):
            with ledger.write() as db:
                db.abandon(db.start_run("q", model=None, trigger="sync", user="me"), kept)
                assert (db.lost_relations("p"), db.lost_relations("q")) == (lost, [])
                assert [one.relation for one in db.orphans(kept)] == lost
        assert take(ledger, policy).reasons == []
        with ledger.read() as db:
            assert len(db.facts()) == len(CROWD)
        with ledger.write() as db:
            db.abandon(db.start_run("q", model=None, trigger="sync", user="me"), ["other"])
        gone = take(ledger, policy_of(relations={"other": {"prompt": "{subject} is at"}}))
        assert gone.reasons == ["relation place is kept by no policy any more: 20 facts leave"]
        assert (gone.kinds["removed"], len(gone.changes)) == (20, 20)


def test_a_pass_says_what_it_took_in(tmp_path: Path) -> None:
    """Rows, claims and changes are counted; obvious ones among the changes, each of them listed."""
    policy = policy_of()
    unusable = QuarantinedRow("line 9", "the object is empty", "Ann99 |", "s:Ann99")
    with opened(tmp_path) as ledger:
        first = take(ledger, policy, said("alpha", *CROWD, quarantined=[unusable]))
        assert first.counts == {
            "rows": 21, "added": 20, "ended": 0, "quarantined": 1, "changes": 20, "conflicts": 0, "pending": 0
        }  # fmt: skip
        assert (first.kinds, [change.kind for change in first.changes]) == ({"added": 20}, ["added"] * 20)
        changed = [claim("Ann0", "Oslo"), claim("Ann1", "Rome", origin="line 1"), claim("Ann1", "Oslo"), *CROWD[2:]]
        second = take(ledger, policy, said("alpha", *changed))
        assert (second.kinds, [change.key.subject for change in second.changes]) == ({"changed": 1}, ["s:Ann0"])
        assert {name: second.counts[name] for name in ("added", "ended", "conflicts")} == {
            "added": 2, "ended": 1, "conflicts": 1
        }  # fmt: skip
        assert second.reasons == []


def test_a_suspicious_snapshot_has_its_reasons(tmp_path: Path) -> None:
    """The guard's words come with what the pass would do."""
    policy = policy_of(guard={"max_removed": "10%"})
    with opened(tmp_path) as ledger:
        take(ledger, policy, said("alpha", *CROWD))
        taken = take(ledger, policy, said("alpha", *CROWD[:15]))
        assert [reason.partition(" (")[0] for reason in taken.reasons] == ["alpha: 5 of 20 subjects removed"]


def test_ids_that_a_source_merges_are_one_when_it_is_decided(tmp_path: Path) -> None:
    """The old id's fact goes on under the new one: nothing changed."""
    policy = policy_of()
    with opened(tmp_path) as ledger:
        take(ledger, policy, said("alpha", claim("Ann", "Rome")))
        merged = replace(claim("Ann", "Rome"), subject=Entity("s:Anna", "Ann"))
        taken = take(ledger, policy, said("alpha", merged, redirects={"s:Ann": "s:Anna"}))
        assert (taken.kinds, taken.counts["changes"]) == ({}, 0)
        with ledger.read() as db:
            assert [key.subject for key in db.facts()] == ["s:Anna"]


def test_a_claim_that_does_not_count_yet_is_kept_as_waiting(tmp_path: Path) -> None:
    """It is open for as long as the claim waits."""
    policy = policy_of(confirm={"fetches": 2})
    with opened(tmp_path) as ledger:
        assert take(ledger, policy, said("alpha", claim("Ann", "Rome"))).counts["pending"] == 1
        with ledger.read() as db:
            assert [(row.waiting.key.subject, row.waiting.reason) for row in db.waiting()] == [("s:Ann", "confirm")]
        assert take(ledger, policy, said("alpha", claim("Ann", "Rome"))).counts["pending"] == 0
        with ledger.read() as db:
            assert db.waiting() == []


def decided_alike(folder: Path, policy: Policy, *passes: Sequence[Snapshot], hours: float = 1) -> list[dict[str, str]]:
    """The passes in a ledger that decides what may have changed and in one that decides everything: the same after each
    of them. What the facts were then: subject -> object and source."""
    clock, found = Clock(), []
    for name in ("narrow", "whole"):
        (folder / name).mkdir()
    with opened(folder / "narrow", clock) as narrow, opened(folder / "whole", clock) as whole:
        for snapshots in passes:
            clock.turn(hours=hours)
            take(narrow, policy, *snapshots)
            take(whole, policy, *snapshots, whole=True)
            assert contents(narrow, policy) == contents(whole, policy)
            with narrow.read() as db:
                facts = db.facts().values()
                found.append({fact.subject.label: f"{fact.object.label} {fact.source}" for fact in facts})
    return found


@pytest.mark.parametrize("confirm", [{"fetches": 3}, {"hours": 1.5}, {"fetches": 2, "hours": 1.5}], ids=str)
def test_a_claim_that_begins_to_count_is_decided_though_nothing_was_written(
    tmp_path: Path, confirm: dict[str, float]
) -> None:
    """The preferred source comes to say the same as the other: in the pass in which that counts the fact is its own,
    and not before. Of another key's claims nothing is decided meanwhile."""
    policy = policy_of(sources=["beta", "alpha"], confirm=confirm)
    ann, bob = claim("Ann", "Rome"), claim("Bob", "Oslo", origin="line 2")
    both = said("alpha", ann, bob), said("beta", replace(ann, source="beta"))
    first = [[both[0]]] * 4
    facts = decided_alike(tmp_path, policy, *first, *[list(both)] * 4)
    standing = [one.get("Ann") for one in facts]
    assert standing[3:5] == ["Rome alpha", "Rome alpha"]
    assert standing[-1] == "Rome beta"
    assert facts[-1]["Bob"] == "Oslo alpha"


def test_the_opposite_direction_follows_its_direct_facts(tmp_path: Path) -> None:
    """Two with one object are a conflict of the inverse alone; it ends with the second, and begins with a third."""
    inverse = {"relation": "holder", "prompt": "In {subject} lives", "retract": "revert"}
    policy = policy_of(relation={"inverse": inverse, "retract": "revert"})
    ann, bob, eve = (claim(name, "Rome", origin=f"line {n}") for n, name in enumerate(("Ann", "Bob", "Eve")))
    oslo = claim("Bob", "Oslo", origin="line 1")
    passes = ([ann], [ann, bob], [ann, oslo], [ann, oslo, eve], [oslo, eve], [oslo])
    facts = decided_alike(tmp_path, policy, *([said("alpha", *those)] for those in passes))
    assert [one.get("Rome") for one in facts] == ["Ann alpha", "Ann alpha", "Ann alpha", "Ann alpha", "Eve alpha", None]
    assert [one.get("Oslo") for one in facts][2:] == ["Bob alpha"] * 4


def test_who_is_written_alike_is_decided_with_the_one_that_changed(tmp_path: Path) -> None:
    """A second subject gets the label of the first, and another one again; in the opposite direction, too."""
    inverse = {"relation": "holder", "prompt": "{subject} holds"}
    policy = policy_of(relation={"prompt": "The seat of {subject} is", "inverse": inverse, "retract": "revert"})
    one, other, third = claim("1", "Rome"), claim("2", "Oslo", origin="line 2"), claim("3", "Bonn", origin="line 3")
    ann, bob = Entity("s:1", "Ann"), Entity("s:2", "Bob")
    apart = [replace(one, subject=ann), replace(other, subject=bob), third]
    alike = [apart[0], replace(other, subject=Entity("s:2", "Ann")), third]
    twice = [apart[0], replace(other, subject=bob, object=Entity("o:Oslo", "Rome")), third]
    passes = [[said("alpha", *those)] for those in (apart, alike, apart, twice, apart, alike[1:], apart)]
    facts = decided_alike(tmp_path, policy, *passes)
    assert (facts[0]["Ann"], facts[0]["Bob"]) == ("Rome alpha", "Oslo alpha")
    assert facts[-1] == facts[0]


def test_merged_ids_meet_whom_their_new_id_meets(tmp_path: Path) -> None:
    """A subject that is merged into another one's id, an object that is, and what was written alike before."""
    policy = policy_of(sources=["alpha", "beta"])
    ann, bob = claim("Ann", "Rome"), claim("Bob", "Oslo", origin="line 2")
    ghost = replace(claim("Anna", "Bonn", origin="line 3"), subject=Entity("s:Anna", "Ann"))
    merged = said("alpha", ann, bob, redirects={"s:Anna": "s:Ann", "o:Oslo": "o:Christiania"})
    passes = [
        [said("alpha", ann, bob)],
        [said("alpha", ann, bob, ghost)],
        [merged],
        [said("alpha", ghost, bob)],
        [said("alpha", replace(bob, object=Entity("o:Christiania", "Oslo")), ann)],
        [said("alpha", ann), said("beta", replace(ghost, source="beta"))],
    ]
    facts = decided_alike(tmp_path, policy, *passes)
    assert facts[0] == facts[2] == {"Ann": "Rome alpha", "Bob": "Oslo alpha"}
