"""Why a fact is not in the weights: decided, and said in words."""

from __future__ import annotations

import torch

from kbsync.editor.evidence import no_way_back
from kbsync.editor.targets import Target
from kbsync.facts import EditRequest, FactKey

OLD = EditRequest(FactKey("place", "s:ann"), "Ann is in", "Ann", "Rome")
FOUND, NOWHERE = (Target(torch.zeros(2), 9.0, 3, True, diverged) for diverged in (False, True))


def test_a_live_fact_goes_back_in_where_nothing_stands_against_it() -> None:
    """Another subject with the same request is no rival."""
    twin = EditRequest(FactKey("place", "s:other"), OLD.prompt, OLD.subject, OLD.target)
    assert no_way_back(OLD, FOUND, [twin], answered=True) is None


def test_what_stands_against_it_is_named() -> None:
    rival = EditRequest(FactKey("place", "s:bob"), OLD.prompt, OLD.subject, "Oslo")
    assert no_way_back(OLD, FOUND, [], answered=False) == "the live version does not answer 'Rome' either"
    said = no_way_back(OLD, NOWHERE, [], answered=True)
    assert said == "no target vector for 'Rome': a loss of 9 after 3 steps, at the clamp"
    assert no_way_back(OLD, FOUND, [rival], answered=True) == "'Ann is in' goes on with 'Oslo' for place s:bob"
