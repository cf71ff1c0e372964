"""Before, after, difference: put together from the metrics, by relation, with drift and the work it was."""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor

from kbsync.editor.accuracy import score_chat, score_facts, score_zsre
from kbsync.editor.assess import Dataset, Options, assess
from kbsync.editor.datasets import CounterFactRecord, ZsreRecord
from kbsync.editor.drift import Gauge, HeldOut
from kbsync.editor.evaluate import HARMONIC, columns, score_records
from kbsync.editor.generation import score_generation
from kbsync.editor.intervals import differences, intervals
from kbsync.editor.model import Base, weights_in
from kbsync.errors import EditError
from kbsync.facts import EditRequest, FactKey
from tests.tiny import FACTS, VOCABULARY, tiny_llama

TEXT = HeldOut("text", torch.randint(1, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(2)))


def moved(base: Base) -> dict[str, Tensor]:
    """Another down-projection of layer 2."""
    weight = base.weight(name := base.spec.down_name(2))
    return {name: weight + torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))}


def records() -> list[CounterFactRecord]:
    """Six records of two relations."""
    made = []
    for at, name in enumerate(["Vega", "Deneb", "Rigel", "Spica", "Mira", "Algol"]):
        prompt = f"{name} is in"
        request = EditRequest(FactKey(f"P{at % 3 // 2}", name), prompt, name, "Orion", (f"I think. {prompt}",))
        made.append(CounterFactRecord(request, "Lyra", (f"{name}us is in",), generation=(f"{name} and", prompt)))
    return made


def test_before_and_after_are_the_metrics_on_either_weights() -> None:
    base, data = tiny_llama(), records()
    found = assess(base, Dataset("counterfact", data, 6), partial(weights_in, base, moved(base)))
    before = columns(score_records(base, data))
    with weights_in(base, moved(base)):
        after = columns(score_records(base, data))
    summary = found.summary()
    assert summary["before"] == intervals(before, harmonic=HARMONIC)
    assert summary["after"] == intervals(after, harmonic=HARMONIC)
    assert summary["difference"] == differences(before, after, harmonic=HARMONIC)
    assert before != after


def test_a_relation_is_measured_on_its_own_records() -> None:
    base, data = tiny_llama(), records()
    found = assess(base, Dataset("counterfact", data, 6))
    assert found.relations == {"P0": [0, 1, 3, 4], "P1": [2, 5]}
    alone = assess(base, Dataset("counterfact", [data[2], data[5]], 2))
    assert found.summary([2, 5]) == alone.summary()
    assert found.to_json()["relations"]["P1"]["records"] == 2


def test_one_relation_is_not_told_twice() -> None:
    found = assess(tiny_llama(), Dataset("facts", FACTS[:2], 2)).to_json()
    assert found["relations"] == {}
    assert found["all"].keys() == {"before"}
    assert found["drift"] == {}


def test_texts_are_written_where_asked_with_the_seed() -> None:
    base, data = tiny_llama(), records()[:2]
    found = assess(base, Dataset("counterfact", data, 2), options=Options(write=True, seed=5))
    assert found.before["generation_entropy"] == score_generation(base, data, seed=5)["generation_entropy"]
    assert found.to_json()["protocol"]["texts"]
    assert "generation_entropy" not in assess(base, Dataset("counterfact", data, 2)).before


def test_questions_and_facts_have_metrics_of_their_own() -> None:
    base = tiny_llama()
    questions = [ZsreRecord(fact, "Who are you?", "a star") for fact in FACTS[:3]]
    found = assess(base, Dataset("zsre", questions, 3))
    assert found.before == score_zsre(base, questions)
    assert found.summary()["before"].keys() == {"efficacy", "paraphrase", "specificity", "accuracy", "score"}
    assert str(assess(base, Dataset("facts", FACTS, 5)).before) == str(score_facts(base, FACTS))  # nan in both


def test_a_chat_model_is_asked_in_a_chat_too() -> None:
    base, data = tiny_llama(), records()
    base.tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}I think: "
    found = assess(base, Dataset("counterfact", data, 6)).before
    assert found["chat_accuracy"] == score_chat(base, [one.request for one in data])["chat_accuracy"]
    assert found.keys() == {*columns([]), "chat_accuracy"}


def test_drift_is_that_of_the_edited_weights() -> None:
    base = tiny_llama()
    gauge = Gauge(base, [TEXT])
    with weights_in(base, moved(base)):
        expected = gauge.measure()
    edited = partial(weights_in, base, moved(base))
    found = assess(base, Dataset("facts", FACTS[:2], 2), edited, options=Options(texts=[TEXT]))
    assert found.drift == expected
    assert expected["text"].kl > 0


def test_the_tokens_that_the_network_reads_are_counted() -> None:
    base = tiny_llama()
    read: list[int] = []
    handle = base.network.base_model.register_forward_pre_hook(
        lambda _module, _inputs, given: read.append(given["input_ids"].numel()), with_kwargs=True
    )
    found = assess(base, Dataset("facts", FACTS, 5))
    handle.remove()
    assert found.tokens == sum(read) > 0
    assert found.seconds > 0


def test_the_result_is_json_without_nan() -> None:
    base = tiny_llama()
    edited = partial(weights_in, base, moved(base))
    found = assess(base, Dataset("facts", FACTS, 5), edited, options=Options(texts=[TEXT])).to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["all"]["before"]["paraphrase"] is None


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_is_afterwards_what_it_was(fails: bool) -> None:
    """Weights and hooks, also where the measurement fails."""
    base = tiny_llama()
    before = {name: one.clone() for name, one in base.network.state_dict().items()}
    last = EditRequest(FactKey("r", "x"), "x", "x", " " if fails else "Orion")
    with pytest.raises(EditError, match="nothing to score") if fails else nullcontext():
        assess(base, Dataset("facts", [FACTS[0], last], 2), partial(weights_in, base, moved(base)))
    assert all(torch.equal(before[name], one) for name, one in base.network.state_dict().items())
    assert not base.network.base_model._forward_pre_hooks
