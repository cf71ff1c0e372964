"""Planning: what has to change in the weights, what holds keep out, and what the guards stop."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kbsync.facts import (
    Applied,
    Claim,
    EditRequest,
    Entity,
    Fact,
    FactKey,
    Hold,
    HoldReason,
    QuarantinedRow,
    Snapshot,
)
from kbsync.plan import HeldChange, Plan, PlannedEdit, Retraction, carried, check_edits, check_guard, make_plan
from kbsync.policy import Guard, Policy, render
from kbsync.resolve import Context, resolve
from tests import ledgers
from tests.worlds import (
    LABELS,
    NOON,
    SOURCES,
    SUBJECTS,
    TEMPLATES,
    claim,
    claims,
    contexts,
    contradictions,
    policies,
    policy_of,
)

ANN, BOB = FactKey("place", "s:Ann"), FactKey("place", "s:Bob")
POLICY = policy_of()
Desired = Mapping[FactKey, Fact]
Applieds = Mapping[FactKey, Applied]


def fact(subject: str, obj: str, *, written: str | None = None) -> Fact:
    """A live fact of relation `place`."""
    return Fact("place", Entity(f"s:{subject}", written or subject), Entity(f"o:{obj}", obj), "alpha", "line 1")


def state(*facts: Fact) -> dict[FactKey, Fact]:
    return {one.key: one for one in facts}


def in_weights(*facts: Fact, policy: Policy = POLICY) -> dict[FactKey, Applied]:
    """What a version holds after an edit of these facts."""
    return {
        one.key: Applied(render(one, policy.wording()["place"]), one.object.id, "d" * 64, column)
        for column, one in enumerate(facts)
    }


def hold(frozen: Fact | None, held_out: str | None, *, key: FactKey = ANN, reason: HoldReason = "rollback") -> Hold:
    return Hold(key, in_weights(frozen)[key] if frozen else None, held_out and f"o:{held_out}", reason, "version 3")


def plan_of(
    desired: Desired, applied: Applieds, holds: Sequence[Hold] = (), policy: Policy = POLICY, **more: Any
) -> Plan:
    by_key = {one.key: one for one in holds}
    return make_plan(desired, applied, by_key, policy.wording(), model="m", head=3, **more)


def kinds(plan: Plan) -> dict[FactKey, tuple[str, str | None, str]]:
    return {edit.request.key: (edit.kind, edit.before, edit.request.target) for edit in plan.edits}


# What changes ------------------------------------------------------------------------------------------------------


def test_a_new_fact_is_added() -> None:
    """With the fact's own source and origin."""
    new = fact("Ann", "Rome")
    request = render(new, POLICY.relations["place"])
    plan = plan_of(state(new), {})
    assert plan.edits == (PlannedEdit(request, "added", None, "o:Rome", "alpha", "line 1"),)
    assert not plan.empty


def test_another_object_is_a_change() -> None:
    """The plan says what the weights hold before."""
    plan = plan_of(state(fact("Ann", "Oslo")), in_weights(fact("Ann", "Rome")))
    assert kinds(plan) == {ANN: ("changed", "Rome", "Oslo")}


@pytest.mark.parametrize(
    "policy", [policy_of(relation={"prompt": TEMPLATES[1]}), POLICY], ids=["another template", "another label"]
)
def test_other_words_for_the_same_object_are_re_rendered(policy: Policy) -> None:
    """A request whose text differs while its object does not."""
    new = fact("Ann", "Rome", written="Anna" if policy is POLICY else "Ann")
    plan = plan_of(state(new), in_weights(fact("Ann", "Rome")), policy=policy)
    assert kinds(plan) == {ANN: ("re-rendered", "Rome", "Rome")}


def test_the_same_text_is_no_change() -> None:
    """Paraphrases are for probing only, another object id with the same label teaches nothing new."""
    policy = policy_of(relation={"paraphrases": [TEMPLATES[1]]})
    new = replace(fact("Ann", "Rome"), object=Entity("o:other", "Rome"))
    plan = plan_of(state(new), in_weights(fact("Ann", "Rome")), policy=policy)
    assert (plan.empty, plan.unchanged) == (True, 1)


def test_what_has_faded_is_inserted_once_more() -> None:
    """The very request that it replaces; what is answered stays."""
    facts = [fact("Ann", "Rome"), fact("Bob", "Oslo")]
    applied = in_weights(*facts)
    plan = plan_of(state(*facts), applied, faded={applied[ANN].request.digest})
    assert kinds(plan) == {ANN: ("faded", "Rome", "Rome")}
    assert (plan.edits[0].replaces, plan.edits[0].object_id, plan.unchanged) == (applied[ANN], "o:Rome", 1)
    assert (plan.retractions, plan.empty) == ((), False)
    assert plan.digest != plan_of(state(*facts), applied).digest


def test_a_faded_fact_that_has_changed_is_a_change_and_one_that_is_gone_is_retracted() -> None:
    applied = in_weights(fact("Ann", "Rome"))
    faded = {applied[ANN].request.digest}
    assert kinds(plan_of(state(fact("Ann", "Oslo")), applied, faded=faded)) == {ANN: ("changed", "Rome", "Oslo")}
    gone = plan_of({}, applied, faded=faded)
    assert (gone.edits, gone.retractions) == ((), (Retraction(ANN, applied[ANN]),))


@pytest.mark.parametrize("what", ["held", "protected", "of another policy"])
def test_what_may_not_be_edited_is_not_edited_once_more(what: str) -> None:
    rome = fact("Ann", "Rome")
    applied = in_weights(rome)
    holds = [hold(rome, "Rome")] if what == "held" else []
    policy = policy_of(relation={"protected": [ANN.subject]}) if what == "protected" else POLICY
    wording = {} if what == "of another policy" else policy.wording()
    by_key = {one.key: one for one in holds}
    faded = {applied[ANN].request.digest}
    plan = make_plan(state(rome), applied, by_key, wording, faded=faded, model="m", head=3)
    assert plan.empty


def test_a_withdrawn_fact_stays_desired() -> None:
    """The ledger keeps it, so do the weights."""
    kept = fact("Ann", "Rome")
    assert plan_of(state(replace(kept, status="withdrawn")), in_weights(kept)).empty


def test_what_is_not_desired_is_retracted() -> None:
    """By its column."""
    applied = in_weights(fact("Ann", "Rome"))
    plan = plan_of({}, applied)
    assert (plan.retractions, plan.edits, plan.empty) == ((Retraction(ANN, applied[ANN]),), (), False)


def test_what_is_edited_and_what_is_retracted_leaves() -> None:
    """The key that gets another object, and the one that gets none."""
    plan = plan_of(state(fact("Ann", "Oslo")), in_weights(fact("Ann", "Rome"), fact("Bob", "Bonn")))
    assert (plan.leaving, plan.empty) == ({ANN, BOB}, False)


def test_what_shares_its_column_with_a_fact_that_stays_is_retracted_with_it() -> None:
    """Two subjects written alike: as long as one of them stays, so does what the weights hold."""
    one, other = fact("Ann", "Rome"), replace(fact("Ann", "Rome"), subject=Entity("s:other", "Ann"))
    applied = in_weights(one)
    applied[other.key] = replace(applied[ANN], request=render(other, POLICY.relations["place"]))
    assert plan_of(state(one), applied).empty
    assert [gone.key for gone in plan_of({}, applied).retractions] == [ANN, other.key]
    moved = plan_of(state(fact("Ann", "Oslo")), applied)
    assert ([edit.request.key for edit in moved.edits], [gone.key for gone in moved.retractions]) == (
        [ANN],
        [other.key],
    )


def test_what_shares_its_column_with_a_fact_of_another_policy_stays() -> None:
    """Its column is not this policy's to take out."""
    applied = in_weights(fact("Ann", "Rome"))
    applied[FactKey("mayor", "s:1")] = applied[ANN]
    assert plan_of({}, applied).empty


def test_relations_of_other_policies_are_left_alone() -> None:
    """Neither retracted nor added."""
    stranger = replace(fact("Ann", "Rome"), relation="mayor")
    applied = {stranger.key: in_weights(fact("Ann", "Rome"))[ANN]}
    assert plan_of({}, applied) == Plan("m", 3)
    assert plan_of(state(stranger), {}) == Plan("m", 3)


def test_protected_subjects_are_never_touched() -> None:
    """Neither edited nor retracted."""
    policy = policy_of(relation={"protected": ["s:Ann"]})
    applied = in_weights(fact("Ann", "Rome"))
    for desired in ({}, state(fact("Ann", "Oslo"))):
        assert plan_of(desired, applied, policy=policy) == Plan("m", 3, unchanged=1)
    assert plan_of(state(fact("Ann", "Oslo")), {}, policy=policy) == Plan("m", 3)


def test_a_subject_is_protected_under_every_id_that_it_had() -> None:
    """The policy names the id of before a merge."""
    policy = policy_of(relation={"protected": ["s:Anna"]})
    desired = state(fact("Ann", "Oslo"))
    plans = [plan_of(desired, {}, policy=policy, moved=moved) for moved in (None, {"s:Anna": "s:Ann"})]
    assert [len(plan.edits) for plan in plans] == [1, 0]


def test_an_inverse_fact_is_planned_like_any() -> None:
    """Nothing protects its subject or skips it."""
    policy = policy_of(relation={"inverse": {"relation": "holder", "prompt": "In {subject} lives"}})
    direct = fact("Ann", "Rome")
    inverse = replace(direct, relation="holder", subject=direct.object, object=direct.subject)
    assert kinds(plan_of(state(direct, inverse), {}, policy=policy)) == {
        ANN: ("added", None, "Rome"),
        inverse.key: ("added", None, "Ann"),
    }


def test_known_facts_are_skipped_only_where_the_relation_says_so() -> None:
    """What the base answers by itself costs no capacity; an older object in its way is taken out."""
    new, old = fact("Ann", "Oslo"), in_weights(fact("Ann", "Rome"))
    known = [render(new, POLICY.relations["place"]).digest]
    assert not plan_of(state(new), {}, known=known).known
    skipping = policy_of(relation={"skip_known": True})
    assert plan_of(state(new), {}, policy=skipping, known=known) == Plan("m", 3, known=(ANN,))
    assert list(kinds(plan_of(state(fact("Bob", "Bonn")), {}, policy=skipping, known=known))) == [BOB]
    plan = plan_of(state(new), old, policy=skipping, known=known)
    assert (plan.known, plan.edits, [gone.key for gone in plan.retractions]) == ((ANN,), (), [ANN])
    assert plan_of(state(new), in_weights(new), policy=skipping, known=known).known == ()


def test_a_subject_that_the_prompt_has_twice_is_blocked() -> None:
    """The engine could not tell which token to edit; what the weights hold stays."""
    plan = plan_of(state(fact("is", "Rome")), {})
    (blocked,) = plan.blocked
    assert (plan.empty, blocked.target) == (True, "Rome")
    assert "'is is in' has the subject 'is' 2 times" in blocked.reason
    renamed = state(fact("Ann", "Oslo", written="in"))
    assert plan_of(renamed, in_weights(fact("Ann", "Rome"))).unchanged == 1


def test_a_request_that_contradicts_another_policy_is_blocked() -> None:
    """One prompt has one target in the weights, whoever asked for it."""
    stranger = FactKey("mayor", "s:1")
    applied = {stranger: Applied(EditRequest(stranger, "Ann is in", "Ann", "Bonn"), "o:Bonn", "d" * 64, 0)}
    plan = plan_of(state(fact("Ann", "Rome"), fact("Bob", "Oslo")), applied)
    assert list(kinds(plan)) == [BOB]
    assert [(no.key, no.reason) for no in plan.blocked] == [(ANN, "'Ann is in' goes on with 'Bonn' for mayor s:1")]


# Holds -------------------------------------------------------------------------------------------------------------

OLD = fact("Ann", "Rome")


@pytest.mark.parametrize(
    ("frozen", "held_out", "wanted", "listed"),
    [
        (OLD, "Oslo", fact("Ann", "Oslo"), True),
        (OLD, "Oslo", OLD, False),
        (OLD, "Oslo", None, True),
        (OLD, None, None, True),
        (OLD, None, OLD, False),
        (None, "Oslo", fact("Ann", "Oslo"), True),
        (None, "Oslo", None, False),
    ],
)
def test_a_hold_freezes_its_key(frozen: Fact | None, held_out: str | None, wanted: Fact | None, listed: bool) -> None:
    """At an object or at nothing, against changes and retractions; what it keeps out is listed."""
    one = hold(frozen, held_out)
    plan = plan_of(state(wanted) if wanted else {}, in_weights(frozen) if frozen else {}, [one])
    assert (plan.empty, plan.ended_holds) == (True, ())
    assert plan.held == ((HeldChange(ANN, one, wanted.object.id if wanted else None),) if listed else ())


@pytest.mark.parametrize(("frozen", "held_out"), [(OLD, "Oslo"), (OLD, None), (None, "Oslo")])
def test_a_third_object_ends_a_hold(frozen: Fact | None, held_out: str | None) -> None:
    """It is planned like any change."""
    plan = plan_of(state(fact("Ann", "Bonn")), in_weights(frozen) if frozen else {}, [hold(frozen, held_out)])
    assert (plan.ended_holds, plan.held) == ((ANN,), ())
    assert kinds(plan) == {ANN: ("changed" if frozen else "added", "Rome" if frozen else None, "Bonn")}


def test_an_outdated_hold_ends_and_its_object_is_planned_like_any_other() -> None:
    """Only that of the key named: its neighbour stays held."""
    plan = plan_of(
        state(fact("Ann", "Oslo"), fact("Bob", "Oslo")),
        in_weights(OLD),
        [hold(OLD, "Oslo"), hold(None, "Oslo", key=BOB)],
        outdated=[ANN],
    )
    assert (plan.ended_holds, [change.key for change in plan.held]) == ((ANN,), [BOB])
    assert kinds(plan) == {ANN: ("changed", "Rome", "Oslo")}


def test_a_held_key_is_not_re_rendered() -> None:
    """Frozen is frozen, in its old words."""
    renamed = fact("Ann", "Rome", written="Anna")
    one = hold(OLD, "Oslo")
    plan = plan_of(state(renamed), in_weights(OLD), [one])
    assert (plan.empty, plan.held) == (True, (HeldChange(ANN, one, "o:Rome"),))


def test_a_plan_from_nothing_restores_what_is_frozen() -> None:
    """A rebase edits the frozen object, not the held-out one, and nothing for a key frozen at nothing."""
    plan = plan_of(
        state(fact("Ann", "Oslo"), fact("Bob", "Oslo")), {}, [hold(OLD, "Oslo"), hold(None, "Oslo", key=BOB)]
    )
    assert kinds(plan) == {ANN: ("added", None, "Rome")}
    assert plan.edits[0].source == ""
    plan = plan_of(state(OLD), {}, [hold(OLD, "Oslo")])
    assert plan.edits[0].source == "alpha"


def test_a_fact_that_contradicts_a_frozen_one_is_blocked() -> None:
    """What waits for a person is not talked over by a subject of the same name."""
    plan = plan_of(state(fact("Bob", "Oslo", written="Ann")), in_weights(OLD), [hold(OLD, "Bonn")])
    assert (plan.empty, [no.key for no in plan.blocked]) == (True, [BOB])


def test_holds_of_other_relations_do_not_matter() -> None:
    """They belong to another policy's plan."""
    stranger = replace(hold(OLD, None), key=FactKey("mayor", "s:1"))
    assert plan_of({}, {}, [stranger]) == Plan("m", 3)


def test_a_rebase_carries_what_the_weights_hold() -> None:
    """With the origin of a fact that says the same, and without one where the weights are frozen at another object."""
    held = in_weights(fact("Ann", "Rome"), fact("Bob", "Oslo"), fact("Cid", "Bonn"))
    carry = carried(held, state(fact("Ann", "Rome"), fact("Bob", "Rome"), fact("Dan", "Rome")))
    assert [(edit.request, edit.kind, edit.replaces, edit.object_id) for edit in carry] == [
        (held[key].request, "kept", held[key], held[key].object_id) for key in sorted(held)
    ]
    assert [edit.source for edit in carry] == ["alpha", "", ""]


# The plan as a value -----------------------------------------------------------------------------------------------


def big_plan() -> Plan:
    """Three edits, one retraction, a hold that has ended, one that has not."""
    desired = state(fact("Ann", "Bonn"), fact("Bob", "Oslo"), fact("Cid", "Rome"), fact("Dan", "Rome"))
    holds = [hold(OLD, "Oslo"), hold(None, "Rome", key=FactKey("place", "s:Dan"))]
    return plan_of(desired, in_weights(OLD, fact("Bob", "Bonn"), fact("Eve", "Rome")), holds)


def test_the_digest_covers_what_would_happen_and_on_which_version() -> None:
    """Any other edit, retraction, model or HEAD is another plan; what only informs is not."""
    plan = big_plan()
    others = [
        replace(plan, head=4),
        replace(plan, model="n"),
        replace(plan, edits=plan.edits[1:]),
        replace(plan, retractions=()),
        replace(plan, ended_holds=()),
    ]
    assert len({plan.digest, *(other.digest for other in others)}) == 6
    assert replace(plan, held=(), unchanged=9).digest == plan.digest == big_plan().digest


def test_a_plan_is_json() -> None:
    """For `--json` and for staging, with what a person needs to judge it."""
    shown = json.loads(json.dumps(big_plan().to_json()))
    assert [edit["kind"] for edit in shown["edits"]] == ["changed", "changed", "added"]
    assert shown["edits"][0]["before"] == "Rome"
    assert shown["retractions"] == [{"relation": "place", "subject_id": "s:Eve", "target": "Rome"}]
    assert shown["held"][0] == {
        "relation": "place", "subject_id": "s:Dan", "frozen": None, "wanted": "o:Rome", "reason": "rollback"
    }  # fmt: skip
    assert shown["digest"] == big_plan().digest
    (blocked,) = plan_of(state(fact("is", "Rome")), {}).to_json()["blocked"]
    assert blocked == {
        "relation": "place", "subject_id": "s:is", "target": "Rome",
        "reason": "the prompt 'is is in' has the subject 'is' 2 times"
    }  # fmt: skip


def test_a_version_takes_the_first_edits_and_all_retractions() -> None:
    """A hold ends with the edit that ends it."""
    plan = big_plan()
    assert plan.take(3) == plan
    first = plan.take(1)
    assert ([edit.request.key for edit in first.edits], first.retractions) == ([ANN], plan.retractions)
    assert first.ended_holds == (ANN,)
    assert plan.take(0).ended_holds == ()


def test_a_version_on_the_way_does_not_contradict_itself_either() -> None:
    """Where two subjects exchange names, the one that has to wait is taken out until its turn."""
    before = in_weights(fact("Ann", "Rome"), fact("Bob", "Oslo"))
    swapped = state(fact("Ann", "Rome", written="Bob"), fact("Bob", "Oslo", written="Ann"))
    first = plan_of(swapped, before).take(1)
    assert ([edit.request.key for edit in first.edits], [gone.key for gone in first.retractions]) == ([ANN], [BOB])


# Guards ------------------------------------------------------------------------------------------------------------


def rows(numbers: range, *, place: str = "Rome") -> list[Claim]:
    return [claim(f"Ann{number}", place, origin=f"line {number}") for number in numbers]


def snapshot(said: Sequence[Claim], **more: Any) -> Snapshot:
    return ledgers.snapshot(*said, source="alpha", relation="place", **more)


def alarms(before: Sequence[Claim], after: Snapshot, **limits: Any) -> list[str]:
    """The words of the guard that fired: changed, added, removed, rows."""
    reasons = check_guard(ledgers.difference(before, after), Guard(**limits))
    words = ("changed", "added", "removed", "min_rows", "no rows")
    return [word for reason in reasons for word in words if f" {word}" in reason]


BEFORE = rows(range(100))


@pytest.mark.parametrize(("changed", "alarm"), [(19, []), (20, []), (21, ["changed"])])
def test_the_share_of_changed_subjects_is_guarded(changed: int, alarm: list[str]) -> None:
    """20 % pass, one more does not."""
    after = rows(range(changed), place="Oslo") + rows(range(changed, 100))
    assert alarms(BEFORE, snapshot(after)) == alarm


@pytest.mark.parametrize(("removed", "alarm"), [(9, []), (10, []), (11, ["removed"])])
def test_the_share_of_removed_subjects_is_guarded(removed: int, alarm: list[str]) -> None:
    """10 % pass, one more does not."""
    assert alarms(BEFORE, snapshot(rows(range(removed, 100)))) == alarm


@pytest.mark.parametrize(("removed", "alarm"), [(10, []), (11, ["removed"])])
def test_an_increment_is_guarded_by_what_it_covers(removed: int, alarm: list[str]) -> None:
    """Its few rows are no alarm; covered subjects without a row are, by their share of the whole source."""
    covers = frozenset(row.subject.id for row in rows(range(removed + 5)))
    assert alarms(BEFORE, snapshot(rows(range(removed, removed + 5)), covers=covers)) == alarm
    assert alarms(BEFORE, snapshot([], covers=frozenset())) == []


@pytest.mark.parametrize(("added", "alarm"), [(199, []), (200, []), (201, ["added"])])
def test_the_share_of_added_subjects_is_guarded(added: int, alarm: list[str]) -> None:
    """200 % pass, one more does not."""
    assert alarms(BEFORE, snapshot(rows(range(100 + added)))) == alarm


@pytest.mark.parametrize(("left", "alarm"), [(51, []), (50, []), (49, ["min_rows"])])
def test_the_number_of_rows_is_guarded(left: int, alarm: list[str]) -> None:
    """Half the rows pass, one less does not."""
    assert alarms(BEFORE, snapshot(rows(range(left))), max_removed="100%") == alarm


@pytest.mark.parametrize("percent", range(1, 100))
def test_shares_are_compared_as_if_exact(percent: int) -> None:
    """29 % of 100 is 29, not 28.999999999999996."""
    after = rows(range(percent), place="Oslo") + rows(range(percent, 100))
    limits = {"max_changed": f"{percent}%", "min_rows": 0}
    assert alarms(BEFORE, snapshot(after), **limits) == []
    assert alarms(BEFORE, snapshot(after), **limits | {"max_changed": f"{percent - 1}%"}) == ["changed"]


def test_percentages_count_from_ten_rows_on() -> None:
    """Of nine rows one is 11 % and no alarm."""
    assert alarms(rows(range(9)), snapshot(rows(range(1, 9)))) == []
    assert alarms(rows(range(10)), snapshot(rows(range(2, 10)))) == ["removed"]


def test_a_source_does_not_become_empty() -> None:
    """Of however few rows; one that was empty before, or gives nothing but quarantined rows, is another matter."""
    assert alarms(rows(range(1)), snapshot([])) == ["no rows"]
    assert alarms([], snapshot([])) == []
    bad = [QuarantinedRow(f"line {number}", "no label", "", f"s:Ann{number}") for number in range(100)]
    assert alarms(BEFORE, snapshot([], quarantined=bad)) == ["min_rows"]


def test_a_partial_snapshot_says_nothing_by_what_it_lacks() -> None:
    """Its changes are guarded all the same."""
    assert alarms(BEFORE, snapshot([], complete=False)) == []
    assert alarms(BEFORE, snapshot(rows(range(21), place="Oslo"), complete=False)) == ["changed"]


def test_a_quarantined_subject_is_present() -> None:
    """A row that lost its label is no removal."""
    bad = [QuarantinedRow(f"line {number}", "no label", "", f"s:Ann{number}") for number in range(30)]
    assert alarms(BEFORE, snapshot(rows(range(30, 100)), quarantined=bad)) == []


def test_labels_and_ranks_are_changes_and_places_are_not() -> None:
    """Whoever renames all subjects or drops all ranks changes what would be edited; who sorts the feed does not."""
    renamed = [replace(one, subject=Entity(one.subject.id, "Mallory")) for one in BEFORE]
    deprecated = [replace(one, rank="deprecated") for one in BEFORE]
    moved = [replace(one, origin="line 7", seen=9) for one in BEFORE]
    assert [alarms(BEFORE, snapshot(after)) for after in (renamed, deprecated, moved, [*BEFORE, *BEFORE])] == [
        ["changed"],
        ["changed"],
        [],
        [],
    ]


def test_a_guard_tells_the_numbers() -> None:
    """What a person needs to approve or reject."""
    (reason,) = check_guard(ledgers.difference(BEFORE, snapshot(rows(range(11, 100)))), Guard())
    assert reason == "alpha: 11 of 100 subjects removed (11.0%), max_removed is 10.0%"
    short = ledgers.difference(BEFORE, snapshot(rows(range(49))))
    assert check_guard(short, Guard.model_validate({"max_removed": "100%"})) == [
        "alpha: 49 of 100 good rows (49.0%), min_rows is 50.0%"
    ]


@pytest.mark.parametrize(("limit", "held"), [(5, False), (4, False), (3, True)])
def test_the_size_of_a_plan_is_guarded(limit: int, held: bool) -> None:
    """Edits of every kind and retractions count."""
    assert bool(check_edits(big_plan(), Guard(max_edits=limit))) == held


# For any history ---------------------------------------------------------------------------------------------------


class Sync(RuleBasedStateMachine):
    """A ledger and a model in memory, under random snapshots, policies, probes, rollbacks and releases.

    Every pass resolves, plans and carries the plan out, in versions of random size, whose edits fail their probe at
    random. What must hold after each step is what kbsync promises: Eqn 5 in the ledger and in the weights, for ids and
    for text; a pass after a pass does nothing; holds hold.
    """

    def __init__(self) -> None:
        super().__init__()
        self.claims: dict[str, list[Claim]] = {source: [] for source in SOURCES}
        self.facts: dict[FactKey, Fact] = {}
        self.applied: dict[FactKey, Applied] = {}
        self.holds: dict[FactKey, Hold] = {}
        self.known: set[str] = set()
        self.versions: list[dict[FactKey, Applied]] = [{}]
        self.column = 0
        self.context = Context(now=NOON)

    @initialize(policy=policies())
    def first_policy(self, policy: Policy) -> None:
        self.policy = policy

    @rule(policy=policies(), size=st.integers(1, 3))
    def policy_changes(self, policy: Policy, size: int) -> None:
        """Templates, precedence, retraction, inverse: all may change under the facts."""
        self.policy = policy
        self.sync(size, set())

    @rule(
        source=st.sampled_from(SOURCES),
        rows=st.lists(claims(most_seen=1), max_size=4),
        complete=st.booleans(),
        quarantined=st.sets(st.sampled_from(SUBJECTS), max_size=1),
        size=st.integers(1, 3),
        failing=st.sets(st.sampled_from(SUBJECTS), max_size=1),
    )
    def fetch(
        self, source: str, rows: list[Claim], complete: bool, quarantined: set[str], size: int, failing: set[str]
    ) -> None:
        """A source says something; then a pass."""

        def content(one: Claim) -> tuple[object, ...]:
            return one.key, one.object.id, one.rank, one.start, one.end

        before = {content(one): one for one in self.claims[source]}
        now = {content(one): replace(one, source=source) for one in rows}
        for known in now.keys() & before.keys():
            now[known] = replace(now[known], seen=before[known].seen + 1)
        present = {one.subject.id for one in rows}
        absent = [one for one in before.values() if one.subject.id not in present]
        staying = [one for one in absent if one.subject.id in quarantined or not complete]
        self.claims[source] = [*now.values(), *staying]
        self.sync(size, failing)

    @rule(context=contexts(), size=st.integers(1, 3))
    def people_rule(self, context: Context, size: int) -> None:
        """Other rulings are in force, other objects are recent; then a pass."""
        self.context = context
        self.sync(size, set())

    @rule(source=st.sampled_from(SOURCES), size=st.integers(1, 3))
    def not_modified(self, source: str, size: int) -> None:
        """The source says the same again, which confirms it."""
        self.claims[source] = [replace(one, seen=one.seen + 1) for one in self.claims[source]]
        self.sync(size, set())

    @rule(subject=st.sampled_from(LABELS), answer=st.sampled_from(LABELS), template=st.sampled_from(TEMPLATES))
    def measured(self, subject: str, answer: str, template: str) -> None:
        """The base turns out to answer something by itself; then a pass."""
        request = EditRequest(FactKey("", ""), template.replace("{subject}", subject), subject, answer)
        self.known.add(request.digest)
        self.sync(3, set())

    @precondition(lambda self: len(self.versions) > 1)
    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        """To any older version; what it takes out is held, and a pass must not put it back."""
        then = data.draw(st.sampled_from(self.versions))
        for key in self.applied.keys() | then.keys():
            if self.applied.get(key) != then.get(key):
                wanted = self.facts.get(key)
                self.holds[key] = Hold(key, then.get(key), wanted.object.id if wanted else None, "rollback", "")
        self.applied = dict(then)
        plan = self.plan()
        moved = {edit.request.key for edit in plan.edits} | {gone.key for gone in plan.retractions}
        assert not moved & self.holds.keys() - set(plan.ended_holds)

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """A person lets a held change through; then a pass."""
        del self.holds[data.draw(st.sampled_from(sorted(self.holds)))]
        self.sync(3, set())

    def sync(self, size: int, failing: set[str]) -> None:
        said = [one for claims in self.claims.values() for one in claims]
        self.facts = resolve(said, self.facts, self.policy, self.context).facts
        assert resolve(said, self.facts, self.policy, self.context).facts == self.facts
        for _ in range(30):
            plan = self.plan()
            if plan.empty:
                break
            self.carry_out(plan.take(size), failing)
        else:
            raise AssertionError("planning does not come to an end")
        self.versions.append(dict(self.applied))

    def plan(self) -> Plan:
        wording = self.policy.wording()
        return make_plan(self.facts, self.applied, self.holds, wording, known=self.known, model="m", head=0)

    def carry_out(self, plan: Plan, failing: set[str]) -> None:
        """One version: edits of failing subjects do not take, and are held at what the weights held before."""
        for key in plan.ended_holds:
            del self.holds[key]
        for gone in plan.retractions:
            assert self.applied.pop(gone.key) == gone.applied
        failed = []
        for edit in plan.edits:
            key = edit.request.key
            assert self.applied.get(key) == edit.replaces
            assert key not in self.holds or self.holds[key].frozen is not None
            if key.subject in failing and key not in self.holds:
                failed.append(key)
                self.holds[key] = Hold(key, self.applied.get(key), edit.object_id, "probe", "")
            else:
                self.column += 1
                self.applied[key] = Applied(edit.request, edit.object_id, "d", self.column)
        # An edit that failed may leave its old prompt to another edit of the same version; the next pass sees to it.
        assert failed or not contradictions(now.request for now in self.applied.values())

    @invariant()
    def eqn_5_holds_in_the_ledger(self) -> None:
        """One object per key and per rendered prompt, withdrawn facts included."""
        assert all(key == one.key for key, one in self.facts.items())
        if self.facts:
            wording = self.policy.wording()
            assert not contradictions(render(one, wording[key.relation]) for key, one in self.facts.items())

    @invariant()
    def eqn_5_holds_in_the_weights(self) -> None:
        """One target per prompt, whatever is frozen, protected or left over from another policy."""
        assert not contradictions(now.request for now in self.applied.values())

    @invariant()
    def free_keys_are_fresh(self) -> None:
        """What the ledger wants and nothing stands against is in the weights, in the ledger's words."""
        if not self.facts:
            return
        plan = self.plan()
        wording = self.policy.wording()
        excused = {no.key for no in plan.blocked} | set(plan.known) | self.holds.keys()
        moving = {edit.request.key for edit in plan.edits}
        for key, one in self.facts.items():
            protected = key.subject in getattr(wording[key.relation], "protected", ())
            if key not in excused and not protected:
                current = self.applied.get(key)
                assert key in moving or (current and current.request == render(one, wording[key.relation]))


Sync.TestCase.settings = settings(max_examples=150, stateful_step_count=12, deadline=None)
test_any_history = Sync.TestCase
