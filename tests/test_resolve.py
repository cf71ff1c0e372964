"""Resolution: which claim becomes the fact of a key, and what is left to a person."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbsync.facts import Claim, EditRequest, Entity, Fact, FactKey, Ruling
from kbsync.policy import Policy, render
from kbsync.resolve import Context, Resolution, diff, keep_apart, resolve
from tests.worlds import NOON, TEMPLATES, claim, claims, contexts, contradictions, policies, policy_of

ANN, BOB = FactKey("place", "s:Ann"), FactKey("place", "s:Bob")


def fact_of(said: Claim, **changes: str) -> Fact:
    """The fact that a claim makes."""
    fact = Fact(said.relation, said.subject, said.object, said.source, said.origin)
    return replace(fact, **changes)


def facts_of(*said: Claim, **changes: str) -> dict[FactKey, Fact]:
    return {one.key: fact_of(one, **changes) for one in said}


def objects(resolution: Resolution) -> dict[FactKey, str]:
    return {key: fact.object.label for key, fact in resolution.facts.items()}


def kinds(resolution: Resolution) -> dict[FactKey, str]:
    return {conflict.key: conflict.kind for conflict in resolution.conflicts}


def waiting(resolution: Resolution) -> tuple[FactKey, ...]:
    return tuple(one.key for one in resolution.pending)


# One source --------------------------------------------------------------------------------------------------------


def test_a_claim_becomes_the_fact() -> None:
    """One claim, one fact, with its source and origin."""
    said = claim("Ann", "Rome", origin="line 7")
    assert resolve([said], {}, policy_of()) == Resolution({ANN: fact_of(said)}, (), ())


def test_identical_rows_are_one_claim() -> None:
    """The same object twice is no conflict; the first row is the origin, by number and not by spelling."""
    said = [claim("Ann", "Rome", origin=f"line {line}") for line in (10, 9, 11)]
    resolution = resolve(said, {}, policy_of())
    assert (resolution.facts[ANN].origin, resolution.conflicts) == ("line 9", ())


def test_an_object_written_in_two_ways_is_one() -> None:
    """Identity is by id: labels alone make no conflict."""
    first = claim("Ann", "Rome")
    second = replace(first, object=Entity(first.object.id, "Roma"), origin="line 2")
    assert objects(resolve([second, first], {}, policy_of())) == {ANN: "Rome"}


def test_two_rows_with_different_objects_are_a_conflict_that_names_both() -> None:
    """The key keeps its last accepted fact, other keys go on."""
    old = facts_of(claim("Ann", "Paris"))
    said = [claim("Ann", "Rome", origin="line 3"), claim("Ann", "Oslo", origin="line 8"), claim("Bob", "Bonn")]
    resolution = resolve(said, old, policy_of())
    assert objects(resolution) == {ANN: "Paris", BOB: "Bonn"}
    (conflict,) = resolution.conflicts
    assert (conflict.key, conflict.kind, [one.origin for one in conflict.claims]) == (ANN, "rows", ["line 3", "line 8"])
    assert "Rome (alpha line 3), Oslo (alpha line 8)" in conflict.reason


def test_a_conflict_without_an_accepted_fact_gives_none() -> None:
    """Nothing is picked by row order."""
    assert resolve([claim("Ann", "Rome"), claim("Ann", "Oslo")], {}, policy_of()).facts == {}


@pytest.mark.parametrize(
    ("winner", "loser"),
    [
        ({"rank": "preferred"}, {}),
        ({}, {"rank": "deprecated"}),
        ({"rank": "preferred", "end": "2020"}, {"start": "2021"}),
        ({}, {"end": "2030", "start": "2029"}),
        ({"start": "2020", "end": "2022"}, {"start": "2019", "end": "2023"}),
        ({"start": "2021-01-01T00:00:00Z"}, {"start": "2020-12-31"}),
        ({"start": "2011-03"}, {"start": "2010"}),
        ({"start": "-0044-03-15T00:00:00Z"}, {"start": "-0049-00-00T00:00:00Z"}),
        ({"start": "2011"}, {}),
        ({"start": "2011"}, {"start": "last spring"}),
        ({"start": "2024-11-06T00:30:00+00:00"}, {"start": "2024-11-06T01:00:00+02:00"}),
        ({"start": "12024-01-01T00:00:00Z"}, {"start": "2024-01-01T00:00:00Z"}),
    ],
)
def test_the_statement_that_holds_now_wins(winner: dict[str, str], loser: dict[str, str]) -> None:
    """Rank first, then no end, then the latest start, as dates and not as text."""
    said = [claim("Ann", "Oslo", **loser), claim("Ann", "Rome", **winner)]
    resolution = resolve(said, {}, policy_of())
    assert (objects(resolution), resolution.conflicts) == ({ANN: "Rome"}, ())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"rank": "preferred"}, {"rank": "preferred"}),
        ({"start": "2011"}, {"start": "2011-03"}),
        ({"start": "2011-03-04"}, {"start": "2011-03-04T00:00:00Z"}),
        ({"start": "2011-00-00T00:00:00Z"}, {"start": "2011-06-01T00:00:00Z"}),
        ({"end": "2011"}, {"end": "2012"}),
    ],
)
def test_statements_on_a_par_are_ambiguous(one: dict[str, str], other: dict[str, str]) -> None:
    """What ranks and dates do not decide is recorded, not picked."""
    assert kinds(resolve([claim("Ann", "Oslo", **one), claim("Ann", "Rome", **other)], {}, policy_of())) == {
        ANN: "ambiguous"
    }


def test_a_deprecated_claim_is_as_good_as_none() -> None:
    """A key of which only deprecated claims are left is withdrawn."""
    old = facts_of(claim("Ann", "Rome"))
    resolution = resolve([claim("Ann", "Rome", rank="deprecated")], old, policy_of())
    assert resolution.facts[ANN].status == "withdrawn"


# Several sources ---------------------------------------------------------------------------------------------------

THREE = {"sources": ["alpha", "beta", "gamma"]}


def test_order_takes_the_first_source_that_has_a_claim() -> None:
    """Sources that come later count where the earlier ones are silent; deprecated claims are silence."""
    said = [
        claim("Ann", "Oslo", source="gamma"),
        claim("Ann", "Rome", source="beta"),
        claim("Ann", "Bonn", source="alpha", rank="deprecated"),
        claim("Bob", "Oslo", source="gamma"),
    ]
    assert objects(resolve(said, {}, policy_of(**THREE))) == {ANN: "Rome", BOB: "Oslo"}


def test_order_does_not_fall_back_when_the_first_source_contradicts_itself() -> None:
    """That is a conflict of that source's rows."""
    said = [claim("Ann", "Oslo"), claim("Ann", "Rome"), claim("Ann", "Rome", source="beta")]
    assert kinds(resolve(said, {}, policy_of(**THREE))) == {ANN: "rows"}


def test_newest_goes_by_the_start_that_the_claims_give() -> None:
    """The order of sources does not matter."""
    said = [claim("Ann", "Oslo", start="2019"), claim("Ann", "Rome", source="gamma", start="2021-05-01")]
    assert objects(resolve(said, {}, policy_of(precedence="newest", **THREE))) == {ANN: "Rome"}


@pytest.mark.parametrize("start", [None, "2021"])
def test_newest_on_a_par_is_a_conflict_of_sources(start: str | None) -> None:
    """Neither is newer."""
    said = [claim("Ann", "Oslo", start=start), claim("Ann", "Rome", source="gamma", start=start)]
    assert kinds(resolve(said, {}, policy_of(precedence="newest", **THREE))) == {ANN: "sources"}


def test_quorum_takes_what_enough_sources_say() -> None:
    """Two of three, against the first in order."""
    said = [claim("Ann", "Oslo"), claim("Ann", "Rome", source="beta"), claim("Ann", "Rome", source="gamma")]
    resolution = resolve(said, {}, policy_of(precedence="quorum(2)", **THREE))
    assert (objects(resolution), resolution.conflicts) == ({ANN: "Rome"}, ())


def test_quorum_without_a_majority_is_a_conflict() -> None:
    """Two that disagree are no two that agree."""
    said = [claim("Ann", "Oslo"), claim("Ann", "Rome", source="beta")]
    assert kinds(resolve(said, {}, policy_of(precedence="quorum(2)", **THREE))) == {ANN: "sources"}


def test_quorum_waits_where_too_few_have_spoken() -> None:
    """One voice that nobody contradicts is pending, and the accepted fact stays."""
    old = facts_of(claim("Ann", "Bonn"))
    resolution = resolve([claim("Ann", "Oslo")], old, policy_of(precedence="quorum(2)", **THREE))
    assert (objects(resolution), resolution.conflicts, waiting(resolution)) == ({ANN: "Bonn"}, (), (ANN,))


def test_two_quorums_are_a_conflict() -> None:
    """Where a quorum is no majority, two objects may have one."""
    four = {"sources": ["alpha", "beta", "gamma", "delta"], "precedence": "quorum(2)"}
    said = [claim("Ann", "Oslo" if n < 2 else "Rome", source=source) for n, source in enumerate(four["sources"])]
    assert kinds(resolve(said, {}, policy_of(**four))) == {ANN: "sources"}


def test_a_source_that_contradicts_itself_has_no_vote() -> None:
    """Nor does it spoil the votes of the others."""
    said = [claim("Ann", name, source="alpha") for name in ("Rome", "Oslo")]
    said += [claim("Ann", "Rome", source="beta"), claim("Ann", "Rome", source="gamma")]
    assert objects(resolve(said, {}, policy_of(precedence="quorum(2)", **THREE))) == {ANN: "Rome"}
    assert kinds(resolve(said[:3], {}, policy_of(precedence="quorum(2)", **THREE))) == {ANN: "sources"}


def test_sources_and_relations_that_the_policy_does_not_name_are_ignored() -> None:
    """And so are previous facts of such relations."""
    stranger = replace(claim("Bob", "Rome"), relation="mayor")
    said = [claim("Ann", "Rome", source="beta"), stranger]
    assert resolve(said, facts_of(stranger), policy_of()) == Resolution({}, (), ())


def test_a_relation_of_many_has_no_facts() -> None:
    """Its claims are recorded, not edited; nor do facts from before stay."""
    policy = policy_of(relation={"cardinality": "many", "inverse": {"relation": "holder", "prompt": TEMPLATES[1]}})
    assert resolve([claim("Ann", "Rome")], facts_of(claim("Ann", "Rome")), policy) == Resolution({}, (), ())


def test_the_fact_of_a_quorum_is_the_first_source_s() -> None:
    """In the policy's order, as everywhere."""
    said = [claim("Ann", "Rome", source=source) for source in ("gamma", "beta", "alpha")]
    assert resolve(said, {}, policy_of(**THREE, precedence="quorum(2)")).facts[ANN].source == "alpha"


# Confirmation ------------------------------------------------------------------------------------------------------

TWICE = {"confirm": {"fetches": 2}}


def test_what_was_said_once_waits() -> None:
    """A new key has no fact yet, a changed one keeps the old one; both are pending."""
    old = facts_of(claim("Ann", "Rome"))
    resolution = resolve([claim("Ann", "Oslo"), claim("Bob", "Bonn")], old, policy_of(**TWICE))
    assert (resolution.facts, waiting(resolution)) == (old, (ANN, BOB))


def test_a_new_key_waits_until_its_sources_are_settled() -> None:
    """A confirmed claim is no fact for one pass only, while a better source's claim is on its way."""
    said = [claim("Ann", "Oslo", seen=1), claim("Ann", "Bonn", source="beta", seen=9)]
    resolution = resolve(said, {}, policy_of(**TWICE, **THREE))
    assert (resolution.facts, waiting(resolution)) == ({}, (ANN,))


def test_what_was_said_often_enough_counts() -> None:
    """At the threshold exactly."""
    resolution = resolve([claim("Ann", "Oslo", seen=2)], facts_of(claim("Ann", "Rome")), policy_of(**TWICE))
    assert (objects(resolution), waiting(resolution)) == ({ANN: "Oslo"}, ())


def test_said_once_takes_nothing_away() -> None:
    """A claim that is deprecated for the first time does not withdraw the fact."""
    old = facts_of(claim("Ann", "Rome"))
    resolution = resolve([claim("Ann", "Rome", rank="deprecated")], old, policy_of(**TWICE))
    assert (resolution.facts, waiting(resolution)) == (old, (ANN,))


def test_a_source_that_changes_its_mind_does_not_let_a_lesser_one_through() -> None:
    """While the better source's new object is unconfirmed, the fact is not the lesser source's in between."""
    old = facts_of(claim("Ann", "Rome"))
    said = [claim("Ann", "Oslo", seen=1), claim("Ann", "Bonn", source="beta", seen=9)]
    resolution = resolve(said, old, policy_of(**TWICE, **THREE))
    assert (resolution.facts, waiting(resolution)) == (old, (ANN,))


def test_a_second_row_that_was_seen_once_is_no_conflict_yet() -> None:
    """The confirmed row stands, the key is pending."""
    said = [claim("Ann", "Rome", seen=5), claim("Ann", "Oslo", seen=1)]
    resolution = resolve(said, facts_of(said[0]), policy_of(**TWICE))
    assert (objects(resolution), resolution.conflicts, waiting(resolution)) == ({ANN: "Rome"}, (), (ANN,))


def test_hours_count_from_when_the_ledger_first_had_the_claim() -> None:
    """At the hour exactly; a claim of unknown age is new. With `fetches` both must hold."""
    policy = policy_of(confirm={"hours": 24, "fetches": 2})
    old = facts_of(claim("Ann", "Rome"))
    for seen, age, confirmed in [(2, 24.0, True), (2, 23.9, False), (1, 24.0, False), (2, None, False)]:
        since = None if age is None else NOON - timedelta(hours=age)
        resolution = resolve([claim("Ann", "Oslo", seen=seen, since=since)], old, policy, Context(now=NOON))
        assert objects(resolution) == {ANN: "Oslo" if confirmed else "Rome"}
        assert [one.detail for one in resolution.pending] == (
            [] if confirmed else ["Oslo counts after 2 fetches in a row and 24 hours"]
        )


def test_hours_are_not_over_where_the_time_is_unknown() -> None:
    """The claim waits; of one fetch, which is no condition, the wait says nothing."""
    resolution = resolve([claim("Ann", "Oslo", since=NOON)], {}, policy_of(confirm={"hours": 24}))
    assert (resolution.facts, [one.detail for one in resolution.pending]) == ({}, ["Oslo counts after 24 hours"])


def test_a_change_that_is_taken_back_before_it_counts_was_none() -> None:
    """A, B, A: the second A is said once only, and is what the fact is already; nothing waits for it."""
    rome = claim("Ann", "Rome")
    old = facts_of(rome)
    first = resolve([claim("Ann", "Oslo")], old, policy_of(**TWICE))
    assert [(one.key, one.reason, one.object) for one in first.pending] == [(ANN, "confirm", "o:Oslo")]
    assert resolve([rome], first.facts, policy_of(**TWICE)) == Resolution(old, (), ())
    withdrawn = facts_of(rome, status="withdrawn")
    assert waiting(resolve([rome], withdrawn, policy_of(**TWICE))) == (ANN,)


def test_what_was_said_once_does_not_respell_the_fact_either() -> None:
    """The object is the fact's, its new name is not confirmed."""
    rome = claim("Ann", "Rome")
    roma = replace(rome, object=Entity("o:Rome", "Roma"))
    assert resolve([roma], facts_of(rome), policy_of(**TWICE)) == Resolution(facts_of(rome), (), ())
    assert resolve([replace(roma, seen=2)], facts_of(rome), policy_of(**TWICE)).facts == facts_of(roma)


WEEK = {"confirm": {"flip_flop": "7d"}}


def test_a_change_back_waits_until_the_window_has_passed() -> None:
    """The objects that the key had within the window are in the context; another object is a change like any."""
    old, recent = facts_of(claim("Ann", "Oslo")), Context(recent={ANN: frozenset({"o:Rome"})})
    back = resolve([claim("Ann", "Rome")], old, policy_of(**WEEK), recent)
    assert (back.facts, [(one.reason, one.object) for one in back.pending]) == (old, [("flip-flop", "o:Rome")])
    assert back.pending[0].detail == (
        "Rome was its object within the last 7 days, it is Oslo now: a change back waits as long"
    )
    assert objects(resolve([claim("Ann", "Rome")], old, policy_of(**WEEK))) == {ANN: "Rome"}
    assert objects(resolve([claim("Ann", "Bonn")], old, policy_of(**WEEK), recent)) == {ANN: "Bonn"}
    again = Context(recent={ANN: frozenset({"o:Rome", "o:Oslo"})})
    assert resolve([claim("Ann", "Oslo")], old, policy_of(**WEEK), again).pending == ()


def test_what_left_and_comes_back_within_the_window_waits_too() -> None:
    """A, nothing, A: without a fact in between."""
    back = resolve([claim("Ann", "Rome")], {}, policy_of(**WEEK), Context(recent={ANN: frozenset({"o:Rome"})}))
    assert (back.facts, waiting(back)) == ({}, (ANN,))
    assert "it has none now" in back.pending[0].detail


def test_a_ruling_ends_the_wait() -> None:
    """Of a flip-flop and of a confirmation: a person has looked."""
    old = facts_of(claim("Ann", "Oslo"))
    context = Context(rulings={ANN: Ruling("o:Rome")}, recent={ANN: frozenset({"o:Rome"})})
    policy = policy_of(confirm={"fetches": 2, "flip_flop": "7d"})
    resolution = resolve([claim("Ann", "Rome")], old, policy, context)
    assert (objects(resolution), resolution.pending) == ({ANN: "Rome"}, ())


def test_a_ruling_confirms_no_other_object() -> None:
    """One that it knew nothing of waits like any, before it is a conflict."""
    said, context = [claim("Ann", "Rome"), claim("Ann", "Oslo")], Context(rulings={ANN: Ruling("o:Rome")})
    resolution = resolve(said, facts_of(claim("Ann", "Rome")), policy_of(**TWICE), context)
    assert (objects(resolution), resolution.conflicts, waiting(resolution)) == ({ANN: "Rome"}, (), (ANN,))


# Rulings and preferences -------------------------------------------------------------------------------------------


def ruled(*said: Claim, overruled: Iterable[str] = (), reason: str = "", **changes: Any) -> Resolution:
    """What claims about Ann come to where a person has chosen Rome."""
    ruling = Ruling("o:Rome", frozenset(overruled), reason)
    return resolve(said, {}, policy_of(**changes), Context(rulings={ANN: ruling}))


def test_a_ruling_decides_a_conflict_it_was_made_on() -> None:
    """Whichever row comes first, and says so in the fact's rule."""
    said = [claim("Ann", "Oslo"), claim("Ann", "Rome", origin="line 2")]
    for reason, rule in [("the mayor called", "ruling: the mayor called"), ("", "ruling")]:
        resolution = ruled(*said, overruled=["o:Oslo"], reason=reason)
        assert (resolution.facts[ANN].object.label, resolution.facts[ANN].rule) == ("Rome", rule)
        assert resolution.conflicts == ()


def test_a_ruling_goes_before_precedence() -> None:
    """A later source's claim is chosen over the first one's."""
    said = [claim("Ann", "Oslo"), claim("Ann", "Rome", source="beta")]
    assert objects(ruled(*said, overruled=["o:Oslo"], **THREE)) == {ANN: "Rome"}


def test_an_object_that_the_ruling_knew_nothing_of_is_a_conflict_again() -> None:
    """Nobody chose between it and the ruled one; the key keeps what it had."""
    said = [claim("Ann", name, origin=f"line {line}") for line, name in enumerate(("Rome", "Oslo", "Bonn"))]
    resolution = ruled(*said, overruled=["o:Oslo"])
    assert (resolution.facts, kinds(resolution)) == ({}, {ANN: "rows"})
    assert len(resolution.conflicts[0].claims) == 3


def test_a_ruling_that_no_claim_names_any_more_has_no_effect() -> None:
    """Nor one whose claims have ended at the source, or are deprecated there."""
    oslo = claim("Ann", "Oslo", start="2024")
    ended, wrong = claim("Ann", "Rome", start="2020", end="2024"), claim("Ann", "Rome", rank="deprecated")
    for said in ([oslo], [oslo, ended], [oslo, wrong]):
        resolution = ruled(*said)
        assert (objects(resolution), resolution.conflicts) == ({ANN: "Oslo"}, ())


def test_a_preferred_source_decides_alone() -> None:
    """Against order, newest and quorum; the next preferred one where it is silent, the others where all are."""
    first = [claim("Ann", "Oslo", start="2024"), claim("Ann", "Oslo", source="gamma", start="2024")]
    beta, old = claim("Ann", "Rome", source="beta"), claim("Ann", "Bonn", source="beta", rank="deprecated")
    for precedence in ("order", "newest", "quorum(2)"):
        policy = policy_of(precedence=precedence, relation={"prefer": ["beta"]}, **THREE)
        assert objects(resolve([*first, beta], {}, policy)) == {ANN: "Rome"}
        assert objects(resolve([*first, old], {}, policy)) == {ANN: "Oslo"}
    both = policy_of(relation={"prefer": ["gamma", "beta"]}, **THREE)
    assert objects(resolve([*first, beta], {}, both)) == {ANN: "Oslo"}
    assert objects(resolve([first[0], beta], {}, both)) == {ANN: "Rome"}


# The rule of a fact ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "changes", "rule"),
    [
        ([{}], {}, "the only claim"),
        ([{}, {"origin": "line 2"}], {}, "the only claim"),
        ([{"source": "gamma"}], {}, "the only claim"),
        ([{}, {"source": "beta", "to": "Oslo"}], {}, "first of alpha, beta"),
        ([{"start": "2021"}, {"to": "Oslo", "start": "2020"}], {}, "latest start"),
        ([{}, {"to": "Oslo", "end": "2020"}], {}, "no end"),
        ([{"rank": "preferred"}, {"to": "Oslo"}], {}, "preferred rank"),
        ([{}, {"to": "Oslo", "rank": "deprecated"}], {}, "not deprecated"),
        (
            [
                {"rank": "preferred", "start": "2021"},
                {"to": "Oslo", "rank": "preferred"},
                {"to": "Bonn"},
                {"source": "beta"},
            ],
            {},
            "first of alpha, beta, preferred rank, latest start",
        ),
        ([{"start": "2025", "source": "beta"}, {"to": "Oslo"}], {"precedence": "newest"}, "newest: 2025 (beta)"),
        ([{}, {"source": "beta"}], {"precedence": "newest"}, "agreed by alpha, beta"),
        ([{}], {"precedence": "newest"}, "the only claim"),
        ([{}, {"to": "Oslo", "source": "beta"}, {"source": "gamma"}], {"precedence": "quorum(2)"}, "quorum 2 of 3"),
        ([{}], {"precedence": "quorum(1)"}, "the only claim"),
        ([{"start": "2021"}, {"to": "Oslo"}], {"precedence": "quorum(1)"}, "latest start"),
        ([{"source": "beta"}, {"to": "Oslo"}], {"relation": {"prefer": ["beta"]}}, "preferred source beta"),
        ([{"source": "beta"}], {"relation": {"prefer": ["beta"]}}, "the only claim"),
    ],
)  # fmt: skip
def test_a_fact_says_why_its_claim_was_chosen(said: list[dict[str, str]], changes: dict[str, Any], rule: str) -> None:
    """In words, in the order in which the rules narrowed the claims down."""
    told = [claim("Ann", one.pop("to", "Rome"), **one) for one in map(dict, said)]
    resolution = resolve(told, {}, policy_of(**THREE, **changes))
    assert [(fact.object.label, fact.rule) for fact in resolution.facts.values()] == [("Rome", rule)]


def test_a_fact_names_its_claim() -> None:
    """By its row in the ledger; so does the inverse, whose rule says what it would have collided with."""
    facts = resolve([claim("Ann", "Rome", id=7)], {}, turned()).facts
    assert [(fact.claim, fact.rule) for fact in facts.values()] == [
        (7, "the only claim"),
        (7, "the only subject of Rome"),
    ]


# The template of a subject -----------------------------------------------------------------------------------------

STATES = {"relation": {"subject": "{subject} ({state})"}}


def test_a_template_tells_subjects_apart_that_are_written_alike() -> None:
    """With the claims' qualifiers; a claim without them is written plainly."""
    ohio = written(claim("Ann", "Rome", qualifiers=(("state", "Ohio"),)), "Springfield")
    utah = written(claim("Bob", "Oslo", qualifiers=(("state", "Utah"),)), "Springfield")
    assert set(kinds(resolve([ohio, utah], {}, policy_of())).values()) == {"prompt"}
    resolution = resolve([ohio, utah], {}, policy_of(**STATES))
    assert [fact.subject.label for fact in resolution.facts.values()] == ["Springfield (Ohio)", "Springfield (Utah)"]
    assert resolve([ohio, utah], resolution.facts, policy_of(**STATES)).facts == resolution.facts
    plain = resolve([replace(ohio, qualifiers=()), utah], {}, policy_of(**STATES))
    assert [fact.subject.label for fact in plain.facts.values()] == ["Springfield", "Springfield (Utah)"]


def test_braces_in_a_qualifier_are_no_template() -> None:
    """Labels are data."""
    said = claim("Ann", "Rome", qualifiers=(("state", "{subject}"),))
    assert resolve([said], {}, policy_of(**STATES)).facts[ANN].subject.label == "Ann ({subject})"


def test_the_inverse_of_a_subject_is_written_as_the_fact() -> None:
    """The model is taught one way to write a thing."""
    said = claim("Ann", "Rome", qualifiers=(("state", "Ohio"),))
    policy = policy_of(
        relation=STATES["relation"] | {"inverse": {"relation": "holder", "prompt": "In {subject} lives"}}
    )
    resolution = resolve([said], {}, policy)
    assert resolution.facts[ROME].object.label == "Ann (Ohio)"


# Retraction and history --------------------------------------------------------------------------------------------


def test_keep_withdraws_and_a_claim_restores() -> None:
    """The fact stays, marked, until somebody says it again."""
    said = claim("Ann", "Rome")
    gone = resolve([], facts_of(said), policy_of())
    assert gone.facts == facts_of(said, status="withdrawn")
    assert resolve([], gone.facts, policy_of()) == gone
    assert resolve([said], gone.facts, policy_of()).facts == facts_of(said)


def test_revert_lets_the_fact_go() -> None:
    """Also one that was withdrawn under another rule."""
    said = claim("Ann", "Rome")
    for status in ("live", "withdrawn"):
        assert resolve([], facts_of(said, status=status), policy_of(relation={"retract": "revert"})).facts == {}


def test_a_row_that_moved_is_the_fact_as_accepted() -> None:
    """A line number alone rewrites no history; another source does, because the old one no longer says it."""
    old = facts_of(claim("Ann", "Rome", origin="line 3"))
    assert resolve([claim("Ann", "Rome", origin="line 4")], old, policy_of()).facts == old
    other = claim("Ann", "Rome", source="beta")
    assert resolve([other], old, policy_of(**THREE)).facts == facts_of(other)


# One object per prompt ---------------------------------------------------------------------------------------------


def written(said: Claim, label: str) -> Claim:
    """The claim with its subject written as `label`."""
    return replace(said, subject=Entity(said.subject.id, label))


def test_two_subjects_written_alike_with_different_objects_are_a_conflict_of_both() -> None:
    """The model sees only text; who was there before stays."""
    first, second = claim("Ann", "Rome"), written(claim("Bob", "Oslo"), "Ann")
    assert resolve([first, second], {}, policy_of()).facts == {}
    resolution = resolve([first, second], facts_of(first), policy_of())
    assert (resolution.facts, kinds(resolution)) == (facts_of(first), {ANN: "prompt", BOB: "prompt"})
    assert {one.subject.id for one in resolution.conflicts[0].claims} == {"s:Ann", "s:Bob"}
    assert "'Ann is in' would go on with Rome (s:Ann, alpha line 1)" in resolution.conflicts[0].reason


def test_two_subjects_written_alike_with_objects_written_alike_are_none() -> None:
    """One prompt, one target: nothing to contradict."""
    first, second = claim("Ann", "Rome"), written(claim("Bob", "Rome"), "Ann")
    second = replace(second, object=Entity("o:other", "Rome"))
    assert len(resolve([first, second], {}, policy_of()).facts) == 2


def test_whoever_wants_the_prompt_of_one_that_had_to_go_back_goes_back_too() -> None:
    """Renaming Ann to Bob collides with Bob, so Ann keeps her name, which Cid cannot take then."""
    ann, bob, cid = claim("Ann", "Rome"), claim("Bob", "Oslo"), claim("Cid", "Bonn")
    old = facts_of(ann, bob, cid)
    resolution = resolve([written(ann, "Bob"), bob, written(cid, "Ann")], old, policy_of())
    assert resolution.facts == old
    assert set(kinds(resolution).values()) == {"prompt"}
    assert len(resolution.conflicts) == 3


def test_names_may_be_exchanged() -> None:
    """Where all move at once nothing collides."""
    ann, bob = claim("Ann", "Rome"), claim("Bob", "Oslo")
    resolution = resolve([written(ann, "Bob"), written(bob, "Ann")], facts_of(ann, bob), policy_of())
    assert ({key: fact.subject.label for key, fact in resolution.facts.items()}, resolution.conflicts) == (
        {ANN: "Bob", BOB: "Ann"},
        (),
    )


def test_a_withdrawn_fact_gives_way_to_a_live_one() -> None:
    """A feed that gives a subject a new id is not blocked by what it no longer says."""
    new = written(claim("Bob", "Oslo"), "Ann")
    resolution = resolve([new], facts_of(claim("Ann", "Rome")), policy_of())
    assert (resolution.facts, resolution.conflicts) == (facts_of(new), ())


def test_a_withdrawn_fact_that_comes_back_under_a_taken_name_stays_withdrawn() -> None:
    """Its previous state is what it goes back to, in its old words."""
    bob, old = claim("Bob", "Oslo"), facts_of(claim("Ann", "Rome"), status="withdrawn")
    resolution = resolve([written(claim("Ann", "Rome"), "Bob"), bob], old | facts_of(bob), policy_of())
    assert resolution.facts == old | facts_of(bob)
    assert kinds(resolution) == {ANN: "prompt", BOB: "prompt"}


def test_a_withdrawn_fact_that_cannot_come_back_gives_way_too() -> None:
    """Its old words are free for a live fact."""
    ann, bob, cid = claim("Ann", "Rome"), claim("Bob", "Oslo"), written(claim("Cid", "Bonn"), "Ann")
    old = facts_of(ann, status="withdrawn") | facts_of(bob)
    resolution = resolve([written(ann, "Bob"), bob, cid], old, policy_of())
    assert (resolution.facts, kinds(resolution)) == (facts_of(bob, cid), {ANN: "prompt", BOB: "prompt"})


def test_a_withdrawn_fact_stays_where_the_live_ones_block_each_other() -> None:
    """Nobody takes its prompt."""
    rivals = [written(claim("Bob", "Oslo"), "Ann"), written(claim("Cid", "Bonn"), "Ann")]
    resolution = resolve(rivals, facts_of(claim("Ann", "Rome")), policy_of())
    assert resolution.facts == facts_of(claim("Ann", "Rome"), status="withdrawn")
    assert len(resolution.conflicts) == 2


def test_previous_facts_that_contradict_each_other_both_go() -> None:
    """A new template may make two accepted facts one prompt: neither is kept then."""
    ann, bob = claim("Ann", "Rome"), written(claim("Bob", "Oslo"), "Ann")
    assert resolve([ann, bob], facts_of(ann, bob), policy_of()).facts == {}


def test_a_previous_fact_that_another_one_contradicts_is_nothing_to_stay_at() -> None:
    """A key in conflict does not keep it, so that it takes nobody along, now or when resolved again."""
    ann, bob = claim("Ann", "Rome"), written(claim("Bob", "Oslo"), "Ann")
    said = [ann, claim("Ann", "Bonn"), bob]
    resolution = resolve(said, facts_of(ann, bob), policy_of())
    assert (resolution.facts, kinds(resolution)) == (facts_of(bob), {ANN: "rows"})
    assert resolve(said, resolution.facts, policy_of()) == resolution


def test_a_withdrawn_fact_does_not_contradict_the_one_that_a_conflict_stays_at() -> None:
    """It gives way."""
    ann, bob = claim("Ann", "Rome"), written(claim("Bob", "Oslo"), "Ann")
    old = facts_of(ann) | facts_of(bob, status="withdrawn")
    resolution = resolve([ann, claim("Ann", "Bonn")], old, policy_of())
    assert (resolution.facts, kinds(resolution)) == (facts_of(ann), {ANN: "rows"})


def test_a_withdrawn_fact_stays_withdrawn_while_its_key_is_in_conflict() -> None:
    """What it was before is kept, and that is withdrawn."""
    old = facts_of(claim("Ann", "Rome"), status="withdrawn")
    resolution = resolve([claim("Ann", "Oslo"), claim("Ann", "Bonn")], old, policy_of())
    assert (resolution.facts, kinds(resolution)) == (old, {ANN: "rows"})


# Inverse relations -------------------------------------------------------------------------------------------------

ROME, OSLO = FactKey("holder", "o:Rome"), FactKey("holder", "o:Oslo")


def turned(**changes: object) -> Policy:
    """A policy whose relation `place` has the inverse `holder`."""
    return policy_of(relation={"inverse": {"relation": "holder", "prompt": "In {subject} lives"} | changes})


def test_the_inverse_is_derived_from_the_fact() -> None:
    """Subject and object change places, source and origin stay."""
    said = claim("Ann", "Rome", origin="line 5")
    fact = resolve([said], {}, turned()).facts[ROME]
    assert fact == Fact("holder", said.object, said.subject, "alpha", "line 5")


def test_an_inverse_with_two_objects_blocks_only_itself() -> None:
    """Both direct facts hold, the inverse keeps what it had."""
    said = [claim("Ann", "Rome"), claim("Bob", "Rome", origin="line 2")]
    old = resolve(said[:1], {}, turned()).facts
    resolution = resolve(said, old, turned())
    assert objects(resolution) == {ANN: "Rome", BOB: "Rome", ROME: "Ann"}
    (conflict,) = resolution.conflicts
    assert (conflict.key, conflict.kind, len(conflict.claims)) == (ROME, "inverse", 2)


def test_an_inverse_conflict_of_many_lists_some() -> None:
    """A constellation has more stars than anyone would read; the reason has their number."""
    said = [claim(f"Ann{n}", "Rome", origin=f"line {n}") for n in range(40)]
    (conflict,) = resolve(said, {}, turned()).conflicts
    assert len(conflict.claims) == 10
    assert "40 objects" in conflict.reason
    assert "and 30 more" in conflict.reason


def test_a_conflict_names_up_to_ten_objects_and_the_first_claims_label() -> None:
    """Of ten objects none is left to be counted; the reason begins as the claim of the first source writes it."""
    said = [replace(claim("1", f"{n}", origin=f"line {n}"), subject=Entity("s:1", "Bob")) for n in range(10, 20)]
    said[0] = replace(said[0], subject=Entity("s:1", "Ann"))
    (conflict,) = resolve(said, {}, policy_of()).conflicts
    assert conflict.reason.startswith("Ann has 10 objects: ")
    assert "more" not in conflict.reason


def test_the_inverse_has_its_own_retraction() -> None:
    """The direct fact is kept as withdrawn, which derives nothing; its inverse leaves or is kept by its own rule."""
    old = resolve([claim("Ann", "Rome")], {}, turned()).facts
    kept = resolve([], old, turned()).facts
    assert {key: fact.status for key, fact in kept.items()} == {ANN: "withdrawn", ROME: "withdrawn"}
    assert set(resolve([], old, turned(retract="revert")).facts) == {ANN}


def test_the_inverse_of_a_kept_fact_stays() -> None:
    """A key in conflict keeps its fact, and that one's inverse."""
    old = resolve([claim("Ann", "Rome")], {}, turned()).facts
    resolution = resolve([claim("Ann", "Oslo"), claim("Ann", "Bonn")], old, turned())
    assert (resolution.facts, kinds(resolution)) == (old, {ANN: "rows"})


def test_a_direct_fact_never_gives_way_to_an_inverse_one() -> None:
    """With one template for both directions a person called as a town collides: the inverse is blocked."""
    policy = policy_of(relation={"inverse": {"relation": "holder", "prompt": TEMPLATES[0]}})
    said = [claim("Rome", "Oslo"), claim("Ann", "Rome", origin="line 2")]
    resolution = resolve(said, {}, policy)
    assert objects(resolution) == {FactKey("place", "s:Rome"): "Oslo", ANN: "Rome", OSLO: "Rome"}
    assert kinds(resolution) == {ROME: "prompt"}


def test_an_inverse_that_cannot_stand_drags_no_other_along() -> None:
    """One that says what a direct fact says already stays, beside one that contradicts it."""
    policy = policy_of(relation={"inverse": {"relation": "holder", "prompt": TEMPLATES[0]}})
    ann, again, bob = claim("Ann", "Ann"), written(claim("Cid", "Bob"), "Ann"), claim("Bob", "Rome")
    said = [ann, replace(again, object=Entity("o:Bob", "Ann")), replace(bob, object=Entity("o:Rome", "Ann"))]
    resolution = resolve(said, {}, policy)
    assert kinds(resolution) == {FactKey("holder", "o:Rome"): "prompt"}
    assert resolve(said, resolution.facts, policy) == resolution


# Differences -------------------------------------------------------------------------------------------------------


def test_diff_names_each_kind_of_change() -> None:
    """Sorted by key; another origin or source is no change."""
    base = claim("x", "Rome")

    def at(name: str, fact: Fact) -> Fact:
        return replace(fact, subject=Entity(f"s:{name}", "x"))

    plain, away = fact_of(base), fact_of(base, status="withdrawn")
    other = replace(plain, object=Entity("o:Oslo", "Oslo"))
    spelled = replace(plain, object=Entity(plain.object.id, "Roma"))
    moved = replace(plain, origin="line 2", source="beta")
    pairs: dict[str, tuple[Fact | None, Fact | None]] = {
        "added": (None, plain),
        "changed": (plain, other),
        "changed too": (away, other),
        "moved": (plain, moved),
        "relabelled": (plain, spelled),
        "removed": (plain, None),
        "restored": (away, plain),
        "same": (plain, plain),
        "withdrawn": (plain, away),
    }
    before = {at(name, one).key: at(name, one) for name, (one, _) in pairs.items() if one}
    after = {at(name, one).key: at(name, one) for name, (_, one) in pairs.items() if one}
    assert [(change.key.subject, change.kind) for change in diff(before, after)] == [
        (f"s:{name}", name.removesuffix(" too")) for name in pairs if name not in ("moved", "same")
    ]


# For any world -----------------------------------------------------------------------------------------------------


def requests_of(facts: Mapping[FactKey, Fact], policy: Policy) -> Iterable[EditRequest]:
    wording = policy.wording()
    return [render(fact, wording[key.relation]) for key, fact in facts.items()]


def gave_way(old: Fact, facts: Mapping[FactKey, Fact], policy: Policy) -> bool:
    """Whether a withdrawn or inverse fact would contradict what holds now: the only facts that give way to others."""
    lesser = old.status == "withdrawn" or old.relation == "holder"
    return lesser and bool(contradictions(requests_of(dict(facts) | {old.key: old}, policy)))


worlds = st.lists(claims(), max_size=12)


@settings(max_examples=300, deadline=None)
@given(policy=policies(), past=st.lists(worlds, max_size=3), now=worlds, context=contexts())
def test_any_claims_over_any_history_satisfy_eqn_5(
    policy: Policy, past: list[list[Claim]], now: list[Claim], context: Context
) -> None:
    """One object per key and per prompt; blocked and waiting keys keep what they had; again changes nothing."""
    facts: dict[FactKey, Fact] = {}
    for said in [*past, now]:
        previous, resolution = facts, resolve(said, facts, policy, context)
        facts = resolution.facts
        assert all(key == fact.key for key, fact in facts.items())
        assert not contradictions(requests_of(facts, policy))
        blocked = {conflict.key for conflict in resolution.conflicts}
        assert len(blocked) == len(resolution.conflicts)
        for key in blocked | set(waiting(resolution)):
            kept, old = facts.get(key), previous.get(key)
            assert kept == old or (kept is None and old is not None and gave_way(old, facts, policy))
        again = resolve(said, facts, policy, context)
        assert again.facts == facts
        assert diff(facts, again.facts) == []


@settings(max_examples=150, deadline=None)
@given(policy=policies(), past=worlds, now=worlds, context=contexts(), seed=st.integers(0, 9))
def test_the_order_of_claims_and_facts_does_not_matter(
    policy: Policy, past: list[Claim], now: list[Claim], context: Context, seed: int
) -> None:
    """A source's answer is a set: where rows differ only in what no rule reads, the result is still the same."""
    unique = list({(one.source, one.origin): one for one in now}.values())
    previous = resolve(past, {}, policy).facts
    expected = resolve(unique, previous, policy, context)
    shuffled = random.Random(seed)
    items = list(previous.items())
    shuffled.shuffle(items)
    shuffled.shuffle(unique)
    shuffled_facts = resolve(unique, dict(items), policy, context)
    assert shuffled_facts == expected
    rules = {key: fact.rule for key, fact in expected.facts.items()}
    assert {key: fact.rule for key, fact in shuffled_facts.facts.items()} == rules


@settings(max_examples=200, deadline=None)
@given(policy=policies(), past=worlds, now=worlds, context=contexts())
def test_every_new_live_fact_is_said_by_somebody(
    policy: Policy, past: list[Claim], now: list[Claim], context: Context
) -> None:
    """No fact is made up: a live fact that was not there before is a confirmed or ruled claim, its subject written as
    the template says, or the turned one of a fact; and it is no object from within the window, but by a ruling."""
    previous = resolve(past, {}, policy).facts
    resolution = resolve(now, previous, policy, context)
    words = policy.relations["place"]

    def ruled(one: Claim) -> bool:
        return (ruling := context.rulings.get(one.key)) is not None and ruling.object == one.object.id

    def confirmed(one: Claim) -> bool:
        old = one.since is not None and NOON - one.since >= timedelta(hours=policy.confirm.hours)
        return one.seen >= policy.confirm.fetches and old

    said = {
        (one.key, words.subject_label(one.subject.label, dict(one.qualifiers)), one.object)
        for one in now
        if one.rank != "deprecated" and (ruled(one) or confirmed(one))
    }
    derived = {(FactKey("holder", f.object.id), f.object.label, f.subject) for f in resolution.facts.values()}
    for key, fact in resolution.facts.items():
        before = previous.get(key)
        if fact.status == "live" and fact != before:
            assert (key, fact.subject.label, fact.object) in (said if key.relation == "place" else derived)
            if key not in context.rulings and key.relation == "place" and (before and before.object) != fact.object:
                changed = before is None or before.object.id != fact.object.id
                assert not (changed and fact.object.id in context.recent.get(key, ()))


@settings(max_examples=200, deadline=None)
@given(policy=policies(), now=worlds, context=contexts())
def test_a_ruling_never_lets_through_what_nobody_says(policy: Policy, now: list[Claim], context: Context) -> None:
    """Where a fact rests on a ruling, its object is the ruled one, and every other current object was overruled."""
    for key, fact in resolve(now, {}, policy, context).facts.items():
        if fact.rule.startswith("ruling"):
            ruling = context.rulings[key]
            assert fact.object.id == ruling.object
            if key.relation == "place":
                current = {one.object.id for one in now if one.key == key and not one.end and one.rank == "preferred"}
                assert (
                    current <= {ruling.object, *ruling.overruled} or policy.confirm.fetches > 1 or policy.confirm.hours
                )


@st.composite
def request_maps(draw: st.DrawFn, most: int = 8) -> dict[FactKey, EditRequest]:
    keys = draw(st.lists(st.integers(0, 9), unique=True, max_size=most))
    return {
        (key := FactKey("r", str(number))): EditRequest(
            key, draw(st.sampled_from(["p", "q", "r"])), "s", draw(st.sampled_from(["a", "b"]))
        )
        for number in keys
    }


@settings(max_examples=300, deadline=None)
@given(wanted=request_maps(), fallback=request_maps(), fixed=request_maps(3))
def test_requests_that_are_kept_apart_never_contradict_each_other(
    wanted: dict[FactKey, EditRequest], fallback: dict[FactKey, EditRequest], fixed: dict[FactKey, EditRequest]
) -> None:
    """Nor a fixed one; each key gets its wish, its fallback or nothing; and the result is its own result."""
    pinned = list(fixed.values())
    chosen, blocked = keep_apart(wanted, fallback, pinned)
    among_fixed = contradictions(pinned)
    assert contradictions([*chosen.values(), *pinned]).keys() <= among_fixed.keys()
    assert not any(request.prompt in among_fixed for request in chosen.values())
    for key, request in wanted.items():
        if key not in blocked:
            assert chosen[key] == request
        else:
            assert chosen.get(key) in (None, fallback.get(key))
            rival = blocked[key]
            assert (rival.prompt, rival.target != request.target) == (request.prompt, True)
    assert chosen.keys() <= wanted.keys()
    assert keep_apart(wanted, chosen, pinned)[0] == chosen
    assert keep_apart(dict(reversed(wanted.items())), fallback, pinned) == (chosen, blocked)
