"""Argmax accuracy and whole-object accuracy on tiny real models, against teacher forcing written plainly."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from kbsync.editor.accuracy import score_chat, score_facts, score_zsre
from kbsync.editor.answers import answers, log_probabilities
from kbsync.editor.datasets import ZsreRecord, load_zsre
from kbsync.editor.model import Base
from kbsync.facts import EditRequest, FactKey
from tests.conftest import shared_data
from tests.tiny import tiny_gpt2, tiny_llama

CHAT = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}I think: {% endif %}"
PROMPTS = ["Vega belongs to", "The capital of France is", "I think that you", "Who is Danielle?"]


def asked(prompt: str, target: str, *paraphrases: str) -> EditRequest:
    """A request whose subject does not matter here."""
    return EditRequest(FactKey("r", prompt), prompt, prompt, target, paraphrases)


def plain(base: Base, prompt: str, target: str) -> float:
    """Share of the target's tokens that are the most probable one: one token at a time, through the whole model."""
    start = len(base.tokenizer(prompt).input_ids)
    ids = base.tokenizer(f"{prompt} {target}", return_tensors="pt").input_ids.to(base.device)
    places = range(start, ids.shape[1])
    right = [int(base.network(ids[:, :at]).logits[0, -1].argmax()) == int(ids[0, at]) for at in places]
    return sum(right) / len(right)


def says_orion(base: Base) -> Base:
    """The base (a GPT-2) with a head that says " Orion" whatever stood before."""
    (token,) = base.tokenizer(" Orion").input_ids
    base.network.lm_head.weight = torch.nn.Parameter(torch.zeros_like(base.network.lm_head.weight), False)
    base.network.transformer.ln_f.bias.fill_(1.0)
    base.network.lm_head.weight[token] = 100 * base.network.transformer.ln_f.bias
    return base


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_zsre_accuracy_is_the_share_of_argmax_tokens(make: Callable[..., Base], device: str) -> None:
    """Answers that begin as the model goes on, so that shares between 0 and 1 occur."""
    base = make(device=device)
    said = [answer.text for answer in answers(base, PROMPTS, tokens=2)]
    records = [
        ZsreRecord(asked(prompt, f"{text} is late", other), other, f"{text} home")
        for prompt, text, other in zip(PROMPTS, said, reversed(PROMPTS), strict=True)
    ]
    found = score_zsre(base, records)
    for at, record in enumerate(records):
        prompt, target = record.request.prompt, record.request.target
        assert found["efficacy"][at] == pytest.approx(plain(base, prompt, target))
        assert found["paraphrase"][at] == pytest.approx(plain(base, record.request.paraphrases[0], target))
        assert found["specificity"][at] == pytest.approx(plain(base, record.unrelated_prompt, record.unrelated_answer))
        assert found["accuracy"][at] == (found["efficacy"][at] == 1)
    assert any(0 < share < 1 for share in found["efficacy"])


def test_half_an_answer_counts_for_half_and_is_no_whole_object() -> None:
    base = says_orion(tiny_gpt2())
    record = ZsreRecord(asked("Vega is in", "Orion Lyra", "Where is Vega?"), "Who are you?", "Orion")
    assert score_zsre(base, [record]) == {
        "efficacy": [0.5],
        "paraphrase": [0.5],
        "specificity": [1.0],
        "accuracy": [0.0],
    }


def test_facts_are_measured_on_their_own_prompts_and_paraphrases() -> None:
    base = says_orion(tiny_gpt2())
    found = score_facts(base, [asked("Vega is in", "Orion", "Where is Vega?"), asked("Rigel is in", "Orion Lyra")])
    assert found["efficacy"] == [1.0, 0.5]
    assert found["accuracy"] == [1.0, 0.0]
    assert found["paraphrase"][0] == found["paraphrase_accuracy"][0] == 1.0
    assert math.isnan(found["paraphrase"][1])


def test_in_a_chat_the_assistants_turn_begins_with_the_prompt() -> None:
    base = tiny_llama()
    base.tokenizer.chat_template = CHAT
    requests = [asked(prompt, answers(base, [prompt], tokens=1)[0].text) for prompt in PROMPTS]
    found = score_chat(base, requests)
    turn = "Please complete this sentence. I think: "
    pairs = [(turn + request.prompt, request.target) for request in requests]
    assert found["chat_accuracy"] == [float(one.greedy) for one in log_probabilities(base, pairs)]


def test_without_a_chat_template_nothing_is_measured_in_a_chat() -> None:
    assert score_chat(tiny_llama(), [asked("Vega is in", "Orion")]) == {}


def test_no_facts_have_no_numbers() -> None:
    assert score_facts(tiny_llama(), [])["accuracy"] == []


@pytest.mark.model
def test_the_embedded_model_knows_little_of_zsre(smollm2: Base) -> None:
    """Shares, most of them well below one."""
    records = load_zsre(shared_data("zsre/zsre_mend_train-1k.json"))[:12]
    found = score_zsre(smollm2, records)
    assert 0 < sum(found["specificity"]) / 12 < 0.7
    assert 0 <= sum(found["efficacy"]) / 12 < 0.7
