"""Averages of traces: means, intervals, the layers they point to, and the report."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kbsync.editor.effects import Effect, average, choose_layers, severed_gap, study
from kbsync.editor.known import KnownFact, answered
from kbsync.editor.tracing import KINDS, SITES, FactTrace, Settings, Tracer, subject_deviation
from kbsync.errors import EditError
from tests.tiny import tiny_llama


def trace_of(state: list[float], severed: list[float]) -> FactTrace:
    zero = torch.zeros(len(state), dtype=torch.float64)
    subject = dict.fromkeys(KINDS, zero) | {
        "state": zero + torch.tensor(state),
        "mlp_severed": zero + torch.tensor(severed),
    }
    return FactTrace(0.5, 0.1, {"last_subject": subject, "last_token": dict.fromkeys(SITES["last_token"], zero)})


def test_mean_spread_and_interval_by_hand() -> None:
    """Of 1, 2, 3: mean 2, standard deviation 1, 1.96 / sqrt(3) on either side."""
    found = Effect.of(torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]], dtype=torch.float64))
    assert (found.mean, found.std) == ((2.0, 0.0), (1.0, 0.0))
    assert found.low[0] == pytest.approx(2 - 1.96 / math.sqrt(3), abs=1e-4)
    assert found.high == pytest.approx((2 + 1.96 / math.sqrt(3), 0), abs=1e-4)


def test_one_fact_has_no_interval() -> None:
    found = Effect.of(torch.tensor([[0.25]], dtype=torch.float64))
    assert (found.mean, found.std, found.low, found.high) == ((0.25,), (0.0,), (0.25,), (0.25,))


def test_the_gap_is_paired_by_fact() -> None:
    """Facts that differ in size and not in what severing takes have a gap without spread."""
    traces = [trace_of([0.25, 0.5], [0.125, 0.25]), trace_of([0.5, 0.75], [0.375, 0.5])]
    found = severed_gap(traces)
    assert found.mean == (0.125, 0.25)
    assert found.std == (0.0, 0.0)
    assert average(traces)["last_subject"]["state"].mean == (0.375, 0.625)


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=40), st.integers(1, 8))
def test_the_chosen_layers_are_a_best_window(gap: list[float], count: int) -> None:
    """Contiguous, below the last layer, and no other such window has a higher sum."""
    count = min(count, len(gap) - 1)
    found = choose_layers(gap, count)
    assert list(found) == list(range(found[0], found[0] + count))
    assert found[-1] < len(gap) - 1
    assert sum(gap[found[0] : found[-1] + 1]) == max(sum(gap[a : a + count]) for a in range(len(gap) - count))


def test_a_flat_gap_gives_the_lowest_layers() -> None:
    assert choose_layers([0.0] * 30) == (0, 1, 2, 3, 4)
    assert choose_layers([0.0] * 6) == (0, 1)


def test_a_report_is_the_average_of_the_facts_that_the_model_knows() -> None:
    """Lost and unknown facts are left out and counted; numbers are those of the tracer; JSON holds them."""
    base = tiny_llama(dtype=torch.float64)
    known = said_by(base)
    lost = KnownFact("Vega", "Sirius is in", "Lyra")
    facts = [lost, KnownFact("France", "The capital of France is", "Orion"), *known]
    settings = Settings(samples=2)
    found = study(base, facts, settings, limit=2, grids=1)
    assert (found.read, found.asked, found.traced) == (len(facts), 3, 2)
    tracer = Tracer(base, subject_deviation(base, facts), settings)
    traces = [tracer.trace(fact) for fact in known[:2]]
    assert found.effects == average(traces)
    assert found.layers == choose_layers(severed_gap(traces).mean)
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert value["effects"]["last_subject"]["state"]["mean"] == list(found.effects["last_subject"]["state"].mean)
    assert value["noise"] == {"factor": 3.0, "sigma": found.sigma, "samples": 2}
    assert value["grids"][0]["prompt"] == known[0].prompt
    assert len(value["grids"][0]["effects"]["mlp"]) == len(value["grids"][0]["tokens"])


def said_by(base: object) -> list[KnownFact]:
    """Facts that a tiny model does say: its own answers."""
    from kbsync.editor.answers import answers

    subjects = ["Vega", "Betelgeuse", "Danielle", "France", "Italy", "Paris", "Rome", "Lyra", "Orion"]
    prompts = {f"{subject} belongs to the constellation of": subject for subject in subjects}
    said = answers(base, list(prompts), tokens=1)  # type: ignore[arg-type]
    facts = [
        KnownFact(subject, prompt, answer.text)
        for (prompt, subject), answer in zip(prompts.items(), said, strict=True)
        if answer.text
    ]
    found, _ = answered(base, facts)  # type: ignore[arg-type]
    assert len(found) >= 2, "the tiny model says things that are written as they are said"
    return found


def test_a_model_that_knows_nothing_is_not_traced() -> None:
    with pytest.raises(EditError, match="answers none of 1 facts right"):
        study(tiny_llama(), [KnownFact("France", "The capital of France is", "Orion")], Settings())
