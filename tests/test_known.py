"""Facts for tracing: read, put to the model, and turned into counterfactual edits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kbsync.editor.known import KnownFact, answered, counterfactuals, is_counterfact, load_known
from kbsync.errors import ConfigError
from tests.conftest import shared_data
from tests.tiny import tiny_gpt2

PLACES = [
    KnownFact("Rome", "Rome is in", "Italy", "P17"),
    KnownFact("Milan", "Milan is a city of", "Italy", "P17"),
    KnownFact("Paris", "Paris is in", "France", "P17"),
    KnownFact("Lyon", "Lyon is a city of", "France", "P17"),
]
names = st.sampled_from(["Rome", "Milan", "Paris", "Lyon", "Bonn", "Köln"])
facts = st.builds(
    lambda subject, attribute, wording: KnownFact(subject, f"{subject} {wording}", attribute, "P17"),
    names,
    st.sampled_from(["Italy", "France", "Germany"]),
    st.sampled_from(["is in", "is a city of", "lies in"]),
)


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_known_1000_is_read() -> None:
    path = shared_data("known_1000/known_1000.json")
    found = load_known(path)
    assert len(found) == 1209
    assert found[0] == KnownFact("Vinson Massif", "Vinson Massif is located in the continent of", "Antarctica", "P30")
    assert not is_counterfact(path)


@pytest.mark.parametrize("name", ["counterfact_500_full.json", "counterfact-val.json"])
def test_true_objects_of_counterfact_are_known_facts(name: str) -> None:
    path = shared_data(f"counterfact/{name}")
    found = load_known(path)
    assert is_counterfact(path)
    assert len(found) > 0.99 * len(json.loads(path.read_text(encoding="utf-8")))
    assert all(fact.subject in fact.prompt and fact.attribute for fact in found)


def test_facts_that_cannot_be_placed_are_left_out(tmp_path: Path) -> None:
    rows = [
        {"subject": "Rome", "prompt": "Rome is in", "attribute": "Italy"},
        {"subject": "Bo", "prompt": "Bo of Bo is from", "attribute": "Bonn"},
        {"subject": "Vega", "prompt": "Sirius is in", "attribute": "Lyra"},
    ]
    assert load_known(write(tmp_path / "facts.json", rows)) == [KnownFact("Rome", "Rome is in", "Italy")]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"subject": "Rome"}, "not a list of records"),
        ([{"subject": "Rome", "prompt": "Rome is in"}], "record 0: not a fact to trace: 'attribute'"),
        (["Rome"], "record 0: not a fact to trace"),
    ],
)
def test_a_wrong_file_is_named_with_its_record(tmp_path: Path, value: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        load_known(write(tmp_path / "facts.json", value))
    assert "facts.json" in caught.value.message


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text("Rome")
    with pytest.raises(ConfigError, match=r"facts\.json: no JSON to read"):
        load_known(tmp_path / "facts.json")


def test_only_what_the_model_says_itself_is_known() -> None:
    """With a head that always says " Orion"; `limit` ends the asking."""
    base = tiny_gpt2()
    (token,) = base.tokenizer(" Orion").input_ids
    base.network.lm_head.weight = torch.nn.Parameter(torch.zeros_like(base.network.lm_head.weight), False)
    base.network.transformer.ln_f.bias.fill_(1.0)
    base.network.lm_head.weight[token] = 100 * base.network.transformer.ln_f.bias
    right = [KnownFact(name, f"{name} is in", "Orion") for name in ("Betelgeuse", "Rigel", "Bellatrix")]
    facts = [
        right[0],
        KnownFact("Vega", "Vega is in", "Lyra"),
        KnownFact("Mintaka", "Mintaka is in", "Orion Belt"),
        *right[1:],
    ]
    assert answered(base, facts) == (right, 5)
    assert answered(base, facts, limit=2) == (right[:2], 4)
    assert answered(base, facts[1:3]) == ([], 2)


@given(st.lists(facts, max_size=12))
def test_counterfactuals_are_sound(made: list[KnownFact]) -> None:
    """Another object of the relation; other wordings of the same subject; neighbors with the same true object."""
    records = counterfactuals(made)
    truth = {fact.prompt: fact.attribute for fact in reversed(made)}
    objects = {fact.attribute for fact in made}
    assert len({record.request.key for record in records}) == len(records)
    for record in records:
        assert record.request.target in objects - {record.true_target}
        assert record.paraphrases
        assert all(record.request.subject in text for text in record.paraphrases)
        assert record.request.prompt not in record.paraphrases
        assert record.neighborhood
        assert all(record.request.subject not in text for text in record.neighborhood)
        assert record.true_target in {truth[record.request.prompt], *(f.attribute for f in made)}


def test_counterfactuals_are_the_same_for_a_seed() -> None:
    assert counterfactuals(PLACES, seed=3) == counterfactuals(PLACES, seed=3)
    assert len(counterfactuals(PLACES)) == 4
    rome = next(one for one in counterfactuals(PLACES) if one.request.subject == "Rome")
    assert (rome.request.target, rome.true_target) == ("France", "Italy")
    assert (rome.paraphrases, rome.neighborhood) == (("Rome is a city of",), ("Milan is a city of",))


def test_a_relation_with_one_object_gives_no_counterfactual() -> None:
    assert counterfactuals(PLACES[:2]) == []
