"""Merged ids and other names: what was known of a thing goes on under the id that it has now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbsync.facts import Alias, Change, Claim, Entity, FactKey, Hold, Provenance, Ruling, Snapshot
from kbsync.intake import Intake, take_in
from kbsync.ledger import Ledger
from kbsync.ledger.entities import collapsed
from kbsync.plan import Plan, make_plan
from kbsync.policy import Policy
from kbsync.versions.manifest import ActiveDelta
from tests.ledgers import MODEL, NOON, RELATION, Clock, applied, claim, claims, key, opened, register, said, version

pytestmark = pytest.mark.usefixtures("database")

POLICY = Policy.model_validate(
    {
        "policy": "astronomy",
        "sources": ["feed", "other"],
        "schedule": {"every": "1h"},
        "guard": {"max_changed": "100%", "max_removed": "100%"},
        "relations": {
            RELATION: {
                "prompt": "{subject} belongs to",
                "retract": "revert",
                "inverse": {"relation": "brightest", "prompt": "The brightest star of {subject} is"},
            }
        },
    }
)


def feed(
    *told: Claim, source: str = "feed", aliases: Mapping[str, list[str]] | None = None, **more: object
) -> Snapshot:
    """What a source says in one complete fetch, with other names by subject."""
    names = [Alias(f"feed:{subject}", label) for subject, labels in (aliases or {}).items() for label in labels]
    seen = Provenance("feed.csv", NOON, 200, "ab" * 32)
    return Snapshot(source, RELATION, seen, (*map(said, told), *names), **more)  # type: ignore[arg-type]


def merged(**ids: str) -> dict[str, str]:
    return {f"feed:{old}": f"feed:{new}" for old, new in ids.items()}


def take(ledger: Ledger, *snapshots: Snapshot) -> Intake:
    """One pass over the policy's sources."""
    with ledger.write() as db:
        run = db.start_run("astronomy", model=None, trigger="sync", user="me")
        taken = take_in(db, POLICY, run, snapshots)
        db.finish_run(run, "done")
        return taken


def now(ledger: Ledger, relation: str = RELATION) -> dict[str, str]:
    """The live facts: subject id -> object id."""
    with ledger.read() as db:
        return {key.subject: fact.object.id for key, fact in db.facts([relation]).items()}


def renamed(one: Claim, name: str) -> Claim:
    """The same claim about the same label under another id."""
    return Claim(one.source, one.relation, Entity(f"feed:{name}", one.subject.label), one.object, one.origin)


def kinds(changes: list[Change] | tuple[Change, ...]) -> list[tuple[str, str]]:
    return [(change.key.subject, change.kind) for change in changes]


def test_a_merged_subject_is_no_change(tmp_path: Path) -> None:
    """Nothing is removed and nothing added: the fact goes on under the new id, and was there under the old one."""
    clock = Clock()
    with opened(tmp_path, clock) as ledger:
        take(ledger, feed(*claims(Vega="Lyra", Deneb="Cygnus")))
        then = clock.turn(hours=1)
        clock.turn(hours=1)
        after = renamed(claim("Vega", "Lyra"), "Wega")
        taken = take(ledger, feed(after, *claims(Deneb="Cygnus"), redirects=merged(Vega="Wega")))
        assert (list(taken.changes), taken.reasons) == ([], [])
        assert now(ledger) == {"feed:Wega": "feed:Lyra", "feed:Deneb": "feed:Cygnus"}
        assert now(ledger, "brightest") == {"feed:Lyra": "feed:Wega", "feed:Cygnus": "feed:Deneb"}
        with ledger.read() as db:
            assert FactKey(RELATION, "feed:Vega") in db.facts([RELATION], as_of=then), "as it was known then"
            assert db.ids_of("feed:Wega") == db.ids_of("feed:Vega") == ("feed:Wega", "feed:Vega")
            assert [(change.kind, change.key) for change in db.changes(then)] == [], "a merge is no news"
            assert db.redirects() == merged(Vega="Wega")
        assert list(take(ledger, feed(after, *claims(Deneb="Cygnus"))).changes) == []
        named = Claim("feed", RELATION, Entity("feed:Wega", "Wega"), Entity("feed:Lyra", "Lyra"), "line 2")
        take(ledger, feed(named, *claims(Deneb="Cygnus")))
        with ledger.read() as db:
            assert ("feed:Wega", "relabelled") in kinds(db.changes(then))


def test_a_merged_object_is_no_change(tmp_path: Path) -> None:
    """The object's new id takes the old one's place, in the inverse relation too."""
    with opened(tmp_path) as ledger:
        take(ledger, feed(*claims(Vega="Lyra")))
        lyre = Claim("feed", RELATION, Entity("feed:Vega", "Vega"), Entity("feed:Lyre", "Lyra"), "line 2")
        assert list(take(ledger, feed(lyre, redirects=merged(Lyra="Lyre"))).changes) == []
        assert now(ledger) == {"feed:Vega": "feed:Lyre"}
        assert now(ledger, "brightest") == {"feed:Lyre": "feed:Vega"}
        assert list(take(ledger, feed(lyre)).changes) == []


def test_other_sources_that_still_use_the_old_id_mean_the_new_one(tmp_path: Path) -> None:
    """A merge at one source joins what all of them say."""
    other = renamed(claim("Vega", "Lyra"), "Vega")
    other = Claim("other", other.relation, other.subject, other.object, "row 1")
    with opened(tmp_path) as ledger:
        take(ledger, feed(*claims(Vega="Lyra")), feed(other, source="other"))
        after = feed(renamed(claim("Vega", "Lyra"), "Wega"), redirects=merged(Vega="Wega"))
        assert list(take(ledger, after).changes) == []
        assert now(ledger) == {"feed:Wega": "feed:Lyra"}
        assert list(take(ledger, feed(other, source="other")).changes) == []
        assert now(ledger) == {"feed:Wega": "feed:Lyra"}


def test_two_things_that_become_one_and_disagree_are_a_conflict(tmp_path: Path) -> None:
    """The merged item has both statements: nobody picks one; the new id keeps its fact, the old one's is seen to go."""
    with opened(tmp_path) as ledger:
        take(ledger, feed(*claims(Vega="Lyra", Wega="Draco")))
        both = [renamed(claim("Vega", "Lyra"), "Wega"), claim("Wega", "Draco", "line 3")]
        taken = take(ledger, feed(*both, redirects=merged(Vega="Wega")))
        assert now(ledger) == {"feed:Wega": "feed:Draco"}
        with ledger.read() as db:
            [row] = db.conflicts()
        assert (row.conflict.key, row.conflict.kind) == (FactKey(RELATION, "feed:Wega"), "rows")
        assert {one.object.id for one in row.conflict.claims} == {"feed:Lyra", "feed:Draco"}
        assert ("feed:Vega", "removed") in kinds(list(taken.changes))
        with ledger.read() as db:
            assert ("feed:Vega", "removed") in kinds(db.changes(NOON))
        settled = take(ledger, feed(both[0]))
        assert now(ledger) == {"feed:Wega": "feed:Lyra"}
        assert ("feed:Wega", "changed") in kinds(list(settled.changes))


def test_chains_are_followed_and_circles_refused(tmp_path: Path) -> None:
    """A into B into C is A into C; C into A would be a circle, and is left out and noted."""
    with opened(tmp_path) as ledger:
        take(ledger, feed(*claims(A="Lyra")))
        take(ledger, feed(renamed(claim("A", "Lyra"), "B"), redirects=merged(A="B")))
        take(ledger, feed(renamed(claim("A", "Lyra"), "C"), redirects=merged(B="C")))
        assert now(ledger) == {"feed:C": "feed:Lyra"}
        with ledger.read() as db:
            assert db.redirects() == merged(A="C", B="C")
        take(ledger, feed(source="other", redirects=merged(C="A")))
        assert now(ledger) == {"feed:C": "feed:Lyra"}
        with ledger.read() as db:
            assert db.redirects() == merged(A="C", B="C")
            assert [row.detail["ids"] for row in db.audit_log() if row.action == "refuse merge"] == [merged(C="A")]


IDS = st.sampled_from("abcdef")
FOUND = st.dictionaries(IDS, IDS, max_size=6)


@given(st.lists(FOUND, max_size=4))
def test_redirects_never_form_chains_or_circles(steps: list[dict[str, str]]) -> None:
    """Whatever sources say, in whatever order: no id is both old and new, and what is refused changes nothing."""
    moved: dict[str, str] = {}
    for found in steps:
        before = dict(moved)
        moved, refused = collapsed(moved, found)
        assert moved.keys().isdisjoint(moved.values())
        assert refused.items() <= found.items()
        assert moved.keys() <= before.keys() | found.keys()
        assert collapsed(moved, {})[0] == moved


def test_what_is_parted_again_has_its_own_id_again(tmp_path: Path) -> None:
    """The source speaks of the old id by itself: the merge is undone, and that is in the audit log."""
    with opened(tmp_path) as ledger:
        take(ledger, feed(*claims(Vega="Lyra", Wega="Draco")))
        take(ledger, feed(claim("Wega", "Draco"), redirects=merged(Vega="Wega")))
        assert now(ledger) == {"feed:Wega": "feed:Draco"}
        take(ledger, feed(*claims(Vega="Lyra", Wega="Draco")))
        assert now(ledger) == {"feed:Vega": "feed:Lyra", "feed:Wega": "feed:Draco"}
        with ledger.read() as db:
            assert db.redirects() == {}
            assert [row.action for row in db.audit_log() if row.action in ("merge", "part")] == ["part", "merge"]


def plan(ledger: Ledger) -> Plan:
    with ledger.read() as db:
        return make_plan(
            db.facts(tuple(POLICY.wording())),
            db.applied(MODEL, db.head(MODEL)),
            db.holds(MODEL),
            POLICY.wording(),
            model=MODEL,
            head=db.head(MODEL),
        )


def publish(ledger: Ledger, *names: str, objects: str = "Lyra") -> None:
    """A version that holds `objects` for these subjects, a column each."""
    register(ledger)
    delta = "d" * 64
    columns = [applied(name, objects, delta, column) for column, name in enumerate(names)]
    with ledger.write() as db:
        db.publish(version(1, 0, *columns, active=[ActiveDelta(delta=delta)]))


def test_the_weights_keep_the_column_of_a_merged_subject(tmp_path: Path) -> None:
    """No retraction and no new edit: the column is the new id's; another label is rendered anew in its place."""
    with opened(tmp_path) as ledger:
        take(ledger, feed(*claims(Vega="Lyra")))
        publish(ledger, "Vega")
        take(ledger, feed(renamed(claim("Vega", "Lyra"), "Wega"), redirects=merged(Vega="Wega")))
        with ledger.read() as db:
            [held] = db.applied(MODEL, 1).items()
        assert held[0] == held[1].request.key == FactKey(RELATION, "feed:Wega")
        made = plan(ledger)
        assert [edit.request.key.relation for edit in made.edits] == ["brightest"], "which was never edited"
        assert made.retractions == ()
        take(ledger, feed(claim("Wega", "Lyra")))
        [edit] = [edit for edit in plan(ledger).edits if edit.request.key.relation == RELATION]
        assert (edit.kind, edit.request.subject, edit.before) == ("re-rendered", "Wega", "Lyra")


def test_of_two_columns_of_one_thing_the_old_ids_leaves_the_weights(tmp_path: Path) -> None:
    """Otherwise nobody would ever take it out."""
    with opened(tmp_path) as ledger:
        take(ledger, feed(*claims(Vega="Lyra", Wega="Lyra")))
        publish(ledger, "Vega", "Wega")
        take(ledger, feed(claim("Wega", "Lyra"), redirects=merged(Vega="Wega")))
        made = plan(ledger)
        assert [gone.key.subject for gone in made.retractions] == ["feed:Vega"]


def test_holds_and_rulings_go_on_under_the_new_id(tmp_path: Path) -> None:
    """What a person decided of a thing does not depend on its id; a decision on the new id itself comes first."""
    with opened(tmp_path) as ledger:
        register(ledger)
        take(ledger, feed(*claims(Vega="Lyra")))
        frozen = applied("Vega", "Lyra", "d" * 64, 0)
        with ledger.write() as db:
            db.hold(MODEL, Hold(key("Vega"), frozen, "feed:Draco", "manual", "seen"))
            db.rule(key("Vega"), Ruling("feed:Lyra", frozenset({"feed:Draco"}), "known"), user="ada")
        take(ledger, feed(redirects=merged(Vega="Wega", Draco="Drake")))
        with ledger.read() as db:
            [(held, hold)] = db.holds(MODEL).items()
            [row] = db.rulings()
        assert (held, hold.held_out) == (key("Wega"), "feed:Drake")
        assert hold.frozen is not None
        assert (hold.frozen.request.key, hold.frozen.column) == (key("Wega"), 0)
        assert (row.key, row.ruling.overruled, row.user) == (key("Wega"), {"feed:Drake"}, "ada")
        with ledger.write() as db:
            assert db.release(MODEL, [key("Wega")]) == 1


def test_what_people_said_differently_of_ids_that_become_one_ends(tmp_path: Path) -> None:
    """Two rulings and two holds: none of them wins silently; where they agree they go on as one."""
    with opened(tmp_path) as ledger:
        register(ledger)
        take(ledger, feed(*claims(A="x", B="y", D="z", E="z")))
        with ledger.write() as db:
            for name, object_ in {"A": "x", "B": "y", "D": "z", "E": "z"}.items():
                db.rule(key(name), Ruling(f"feed:{object_}", frozenset({f"feed:not {name}"}), name), user="ada")
                db.hold(MODEL, Hold(key(name), None, f"feed:{object_}", "manual", name))
        take(ledger, feed(*claims(A="x", B="y", D="z", E="z"), redirects=merged(A="C", B="C", D="F", E="F")))
        with ledger.read() as db:
            [row] = db.rulings()
            assert (row.key, row.ruling.object) == (key("F"), "feed:z")
            assert row.ruling.overruled == {"feed:not D", "feed:not E"}
            assert {now: hold.held_out for now, hold in db.holds(MODEL).items()} == {key("F"): "feed:z"}
            ended = [(row.action, row.detail["ended"]) for row in db.audit_log() if "ended" in row.detail]
            assert sorted(ended) == [("release", ["A", "B"]), ("unrule", ["A", "B"])]


def test_a_source_cannot_merge_the_ids_of_another_one(tmp_path: Path) -> None:
    """Both ids must be of a space that it speaks about; what is refused is audited."""
    with opened(tmp_path) as ledger:
        take(ledger, feed(*claims(Vega="Lyra")))
        evil = Claim("other", RELATION, Entity("evil:1", "Evil"), Entity("evil:2", "Nowhere"), "row 1")
        taken = {"feed:Vega": "evil:1", "evil:3": "evil:1"}
        take(ledger, feed(evil, source="other", redirects=taken))
        assert now(ledger) == {"feed:Vega": "feed:Lyra", "evil:1": "evil:2"}
        with ledger.read() as db:
            assert db.redirects() == {"evil:3": "evil:1"}
            [refused] = [row.detail["ids"] for row in db.audit_log() if row.action == "refuse merge"]
        assert refused == {"feed:Vega": "evil:1"}


def test_a_merged_subject_is_neither_added_nor_removed_for_the_guard(tmp_path: Path) -> None:
    """It is the same subject, with other things said of it or not."""
    with opened(tmp_path) as ledger:
        take(ledger, feed(*(claim(f"S{n}", "Lyra") for n in range(12))))
        merges = {f"feed:S{n}": f"feed:N{n}" for n in range(12)}
        with ledger.write() as db:
            run = db.start_run("astronomy", model=None, trigger="sync", user="me")
            snapshot = feed(*(claim(f"N{n}", "Lyra") for n in range(12)), redirects=merges)
            db.merge_entities(run, snapshot)
            found = db.record(run, snapshot).difference
        assert found is not None
        assert (found.subjects, found.changed, found.added, found.removed) == (12, 12, 0, 0)


def test_a_subject_stays_protected_when_its_id_is_merged(tmp_path: Path) -> None:
    """The policy names it by the id that it had."""
    words = POLICY.relations[RELATION].model_copy(update={"protected": ("feed:Vega",), "inverse": None})
    with opened(tmp_path) as ledger:
        take(ledger, feed(*claims(Vega="Lyra")))
        publish(ledger, "Vega")
        take(ledger, feed(claim("Wega", "Draco"), redirects=merged(Vega="Wega")))
        with ledger.read() as db:
            held, moved = db.applied(MODEL, db.head(MODEL)), db.redirects()
            facts = db.facts([RELATION])
        assert facts[key("Wega")].object.id == "feed:Draco"
        assert make_plan(facts, held, {}, {RELATION: words}, moved=moved, model=MODEL, head=1).empty
        assert not make_plan(facts, held, {}, {RELATION: words}, model=MODEL, head=1).empty


def test_other_names_have_a_history(tmp_path: Path) -> None:
    """A name begins and ends with a fetch; an increment ends those alone that it covers; nothing is written twice."""
    clock = Clock()
    with opened(tmp_path, clock) as ledger:
        take(
            ledger, feed(*claims(Vega="Lyra", Deneb="Cygnus"), aliases={"Vega": ["Wega", "α Lyr"], "Deneb": ["Arided"]})
        )
        take(ledger, feed(*claims(Vega="Lyra", Deneb="Cygnus"), aliases={"Vega": ["Wega"], "Deneb": ["Arided"]}))
        with ledger.read() as db:
            assert (db.other_labels("feed:Vega"), db.other_labels("feed:Deneb")) == (["Wega"], ["Arided"])
        take(ledger, feed(*claims(Vega="Lyra"), aliases={"Vega": ["Fidis"]}, covers=frozenset({"feed:Vega"})))
        with ledger.read() as db:
            assert (db.other_labels("feed:Vega"), db.other_labels("feed:Deneb")) == (["Fidis"], ["Arided"])
        take(ledger, feed(renamed(claim("Vega", "Lyra"), "Q1"), redirects=merged(Vega="Q1")))
        with ledger.read() as db:
            assert db.other_labels("feed:Q1") == []


def test_a_dry_run_leaves_no_redirect(tmp_path: Path) -> None:
    """It is one transaction with all that follows from it."""
    with opened(tmp_path) as ledger:
        take(ledger, feed(*claims(Vega="Lyra")))
        with ledger.write() as db:
            run = db.start_run("astronomy", model=None, trigger="plan", user="me")
            take_in(db, POLICY, run, [feed(claim("Wega", "Lyra"), redirects=merged(Vega="Wega"))])
            db.rollback()
        with ledger.read() as db:
            assert db.redirects() == {}
        assert now(ledger) == {"feed:Vega": "feed:Lyra"}
