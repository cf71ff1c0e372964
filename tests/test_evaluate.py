"""CounterFact scores on hand-made outcomes and on tiny real models."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kbsync.editor.answers import log_probabilities
from kbsync.editor.datasets import CounterFactRecord, load_counterfact
from kbsync.editor.evaluate import Interval, RecordScores, evaluate_counterfact, score_records, summarise
from kbsync.editor.model import Base
from kbsync.facts import EditRequest, FactKey
from tests.conftest import shared_data
from tests.tiny import tiny_gpt2, tiny_llama

bools = st.lists(st.booleans(), min_size=1, max_size=4).map(tuple)
outcomes = st.lists(st.builds(RecordScores, st.booleans(), st.booleans(), bools, bools), min_size=1, max_size=12)


def record(subject: str, new: str = "Orion", true: str = "Lyra") -> CounterFactRecord:
    """A record about a star."""
    request = EditRequest(
        key=FactKey("constellation", subject),
        prompt=f"{subject} belongs to the constellation of",
        subject=subject,
        target=new,
        paraphrases=(f"It was late. {subject} is in", f"I think that {subject} is a star in"),
    )
    return CounterFactRecord(request, true, ("Vega belongs to the constellation of", "Sheliak is in"))


RECORDS = [record("Betelgeuse"), record("Vega", new="the people of France"), record("Rigel", true="Orion the hunter")]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_record_scores_follow_their_definitions(make: type, device: str) -> None:
    """ES, PS: P[o] > P[o_c]; NS the other way round, by the mean over tokens; computed one prompt at a time."""
    base: Base = make(device=device)

    def mean(prompt: str, text: str) -> float:
        ids = base.tokenizer(f"{prompt} {text}", return_tensors="pt").input_ids.to(device)
        start = len(base.tokenizer(prompt).input_ids)
        logs = base.network(ids).logits[0].double().log_softmax(1)
        return statistics.mean(float(logs[at - 1, ids[0, at]]) for at in range(start, ids.shape[1]))

    for made, scores in zip(RECORDS, score_records(base, RECORDS), strict=True):
        new, true = made.request.target, made.true_target
        assert scores.efficacy == (mean(made.request.prompt, new) > mean(made.request.prompt, true))
        assert scores.paraphrase == tuple(mean(p, new) > mean(p, true) for p in made.paraphrases)
        assert scores.neighborhood == tuple(mean(p, true) > mean(p, new) for p in made.neighborhood)
        assert scores.accuracy == log_probabilities(base, [(made.request.prompt, new)])[0].greedy


def test_scores_are_per_cent_and_their_harmonic_mean() -> None:
    """Known outcomes, known numbers: a record counts as the mean of its own prompts."""
    found = summarise([
        RecordScores(True, True, (True, False), (True, True, True, True)),
        RecordScores(True, False, (True,), (False, False)),
    ])  # fmt: skip
    values = [i.value for i in (found.efficacy, found.paraphrase, found.neighborhood, found.accuracy) if i]
    assert values == [100, 75, 50, 50]
    assert found.score is not None
    assert found.score.value == pytest.approx(statistics.harmonic_mean([100, 75, 50]))
    assert found.records == 2


@given(outcomes)
def test_intervals_hold_their_value(records: list[RecordScores]) -> None:
    """0 <= low <= value <= high <= 100 for every number, and the same seed gives the same interval."""
    found = summarise(records, resamples=200)
    for interval in (found.efficacy, found.paraphrase, found.neighborhood, found.accuracy):
        assert interval is not None
        assert -1e-9 <= interval.low <= interval.high <= 100 + 1e-9
    assert found == summarise(records, resamples=200)


def test_the_interval_is_that_of_the_binomial_for_one_bit_per_record() -> None:
    """400 records, 80 %: the normal interval is 76.1 to 83.9."""
    records = [RecordScores(at < 320, True, (True,), (True,)) for at in range(400)]
    found = summarise(records).efficacy
    assert found is not None
    assert found.value == pytest.approx(80)
    assert found.low == pytest.approx(80 - 1.96 * 2, abs=0.6)
    assert found.high == pytest.approx(80 + 1.96 * 2, abs=0.6)
    assert summarise(records).accuracy == Interval(100, 100, 100)


def test_what_was_not_measured_has_no_number() -> None:
    """Records without paraphrases do not count for PS; where none has any, PS and S are None."""
    bare = RecordScores(True, True, (), (True,))
    found = summarise([bare, RecordScores(True, True, (False,), (True,))])
    assert found.paraphrase == Interval(0, 0, 0)
    assert found.score == Interval(0, 0, 0)
    found = summarise([bare, bare])
    assert found.paraphrase is None
    assert found.score is None
    assert found.neighborhood is not None
    assert summarise([]).efficacy is None


def test_scores_are_json() -> None:
    """Numbers that a preset or a report can hold, no NaN."""
    found = summarise([RecordScores(True, True, (), (True,))]).to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["efficacy"] == {"value": 100, "low": 100, "high": 100}


def test_a_model_that_knows_the_object_scores_it() -> None:
    """A head that always says " Orion" has ES, PS and accuracy 100 and NS 0."""
    base = tiny_gpt2()
    (token,) = base.tokenizer(" Orion").input_ids
    base.network.lm_head.weight = torch.nn.Parameter(torch.zeros_like(base.network.lm_head.weight), False)
    base.network.transformer.ln_f.bias.fill_(1.0)
    base.network.lm_head.weight[token] = 100 * base.network.transformer.ln_f.bias
    found = evaluate_counterfact(base, [record("Betelgeuse"), record("Vega")])
    values = [i.value for i in (found.efficacy, found.paraphrase, found.neighborhood, found.score, found.accuracy) if i]
    assert values == [100, 100, 0, 0, 100]


@pytest.mark.model
def test_the_unedited_model_prefers_the_truth(smollm2: Base) -> None:
    """On 16 published records the embedded model says o_c, not o: ES well below NS."""
    records = load_counterfact(shared_data("counterfact/counterfact_500_full.json"))[:16]
    found = evaluate_counterfact(smollm2, records)
    assert found.efficacy is not None
    assert found.neighborhood is not None
    assert found.efficacy.value < 50 < found.neighborhood.value
    assert math.isfinite(found.efficacy.low)
