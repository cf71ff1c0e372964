"""What may be published."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kbsync.facts import EditRequest, FactKey
from kbsync.gate import shortfalls, shortfalls_by_policy
from kbsync.policy import Gate, Policy, Relation, Schedule

GATE = Gate(efficacy=0.9, paraphrase=0.5, specificity_drop=0.2, drift=0.1)
GOOD = {"efficacy": 0.9, "paraphrase": 0.5, "specificity_drop": 0.2, "drift": 0.1}


def test_a_report_exactly_at_every_limit_passes() -> None:
    assert shortfalls(GOOD, GATE) == []


@pytest.mark.parametrize(
    ("name", "value"), [("efficacy", 0.899), ("paraphrase", 0.499), ("specificity_drop", 0.201), ("drift", 0.101)]
)
def test_each_number_past_its_limit_is_named(name: str, value: float) -> None:
    reasons = shortfalls(GOOD | {name: value}, GATE)
    assert len(reasons) == 1
    assert reasons[0].startswith(name)


@pytest.mark.parametrize("name", sorted(GOOD))
def test_what_was_not_measured_passes_and_what_is_no_number_never_does(name: str) -> None:
    assert shortfalls(GOOD | {name: None}, GATE) == []
    assert len(shortfalls(GOOD | {name: math.nan}, GATE)) == 1


# --- several policies in one version --------------------------------------------------------------------------------


def policy(name: str, **gate: float) -> Policy:
    """A policy of one relation, named as itself."""
    return Policy(
        policy=name,
        sources=("feed",),
        schedule=Schedule(every=60),
        relations={name: Relation(prompt="{subject} is in")},
        gate=Gate(**gate),
    )


def request(relation: str) -> EditRequest:
    """A request of a relation."""
    return EditRequest(FactKey(relation, "s:ann"), f"{relation} of Ann is", "Ann", "Rome")


def report(*told: tuple[EditRequest, bool], **numbers: float) -> dict[str, Any]:
    """A probe report on requests that are answered or not."""
    facts = [{"digest": one.digest, "efficacy": right, "hits": 0, "paraphrases": 0} for one, right in told]
    return {"facts": facts, "efficacy": 0.5, "paraphrase": None, "specificity_drop": 0.0, "drift": 0.0} | numbers


def test_each_policy_judges_its_own_facts_and_the_strictest_of_them_what_all_share() -> None:
    told = report((request("a"), True), (request("b"), False), drift=0.05)
    policies = [policy("a", drift=0.06), policy("b", drift=0.04), policy("c", drift=0.01)]
    reasons = shortfalls_by_policy(told, [request("a"), request("b")], policies)
    assert reasons == ["b: efficacy 0.000 is below 0.9", "drift 0.050 is above 0.04"]


@pytest.mark.parametrize("policies", [[policy("a", drift=0.2), policy("b", drift=0.1)], []])
def test_facts_of_no_policy_are_let_through_by_no_gate_unseen(policies: list[Policy]) -> None:
    """A relation whose policy is gone is still live; then the strictest gate of all holds, or the default."""
    told = report((request("gone"), True), drift=0.15, specificity_drop=0.5)
    reasons = shortfalls_by_policy(told, [request("gone")], policies)
    assert reasons == ["specificity_drop 0.500 is above 0.2", "drift 0.150 is above 0.1"]
