"""What may be published."""

from __future__ import annotations

import math

import pytest

from kbsync.gate import shortfalls
from kbsync.policy import Gate

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
