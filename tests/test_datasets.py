"""CounterFact files, published and flattened, zsRE files and facts in CSV, as edit requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kbsync.editor.datasets import dataset_of, load_counterfact, load_facts, load_references, load_zsre
from kbsync.errors import ConfigError, UsageError
from kbsync.facts import FactKey
from tests.conftest import shared_data


def full(subject: str = "Angola", relation: str = "P30", new: str = "Antarctica") -> dict[str, Any]:
    """A record as published."""
    return {
        "case_id": 1,
        "requested_rewrite": {
            "prompt": "{} is located in",
            "relation_id": relation,
            "target_new": {"str": new, "id": "Q51"},
            "target_true": {"str": "Africa", "id": "Q15"},
            "subject": subject,
        },
        "paraphrase_prompts": [f"A plaque. {subject} belongs to the continent of"],
        "neighborhood_prompts": ["Ghana is in", "Kenya is in"],
        "attribute_prompts": ["Ross Island is in"],
        "generation_prompts": [f"People around {subject} speak"],
    }


def flat(subject: str = "Galata", rephrased: str = "Galata's surroundings include") -> dict[str, Any]:
    """A flat record."""
    return {
        "case_id": 2,
        "prompt": f"{subject} is in",
        "target_new": "Naples",
        "subject": subject,
        "ground_truth": "Istanbul",
        "rephrase_prompt": rephrased,
        "locality_prompt": "Fatih is within",
        "locality_ground_truth": "Istanbul",
    }


def written(folder: Path, value: object) -> Path:
    """A file with that JSON value."""
    path = folder / "counterfact.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_a_published_record_becomes_a_request(tmp_path: Path) -> None:
    """Prompt rendered, targets as text, paraphrases for probing."""
    (record,) = load_counterfact(written(tmp_path, [full()]))
    assert record.request.prompt == "Angola is located in"
    assert (record.request.subject, record.request.target, record.true_target) == ("Angola", "Antarctica", "Africa")
    assert record.paraphrases == ("A plaque. Angola belongs to the continent of",)
    assert record.neighborhood == ("Ghana is in", "Kenya is in")
    assert record.request.key == FactKey("P30", "counterfact:Angola")
    assert record.generation == ("People around Angola speak",)
    assert record.attributes == ("Ross Island is in",)
    assert record.references == ()


def test_the_later_record_of_a_subject_and_relation_is_dropped(tmp_path: Path) -> None:
    """Eqn 5: both could not be true; another relation of the same subject stays."""
    values = [full(), full(new="Europe"), full(relation="P17")]
    assert [record.request.target for record in load_counterfact(written(tmp_path, values))] == ["Antarctica"] * 2


def test_braces_in_a_subject_are_data(tmp_path: Path) -> None:
    """Only the template's own place is filled."""
    (record,) = load_counterfact(written(tmp_path, [full(subject="{} (band)")]))
    assert record.request.prompt == "{} (band) is located in"


def test_a_flat_record_becomes_a_request(tmp_path: Path) -> None:
    """One neighborhood prompt, and no paraphrase where the rephrased prompt is a generation prompt."""
    (record,) = load_counterfact(written(tmp_path, [flat(), flat()]))
    assert record.request.prompt == "Galata is in"
    assert (record.true_target, record.neighborhood, record.paraphrases) == ("Istanbul", ("Fatih is within",), ())


def test_a_flat_record_keeps_a_true_paraphrase(tmp_path: Path) -> None:
    """CounterFact's paraphrases have a sentence before the subject."""
    text = "It closed in 1990. Galata lies in"
    assert load_counterfact(written(tmp_path, [flat(rephrased=text)]))[0].paraphrases == (text,)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"a": 1}, "not a list"),
        ([{"prompt": "x"}], "record 0: not a CounterFact record: 'subject'"),
        ([full(), {"requested_rewrite": {}}], "record 1: not a CounterFact record: 'subject'"),
        ([3], "record 0"),
    ],
)
def test_another_file_is_refused_by_name(tmp_path: Path, value: object, problem: str) -> None:
    """The error names the file, the record and the missing key."""
    path = written(tmp_path, value)
    with pytest.raises(ConfigError, match=problem) as caught:
        load_counterfact(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("body", [b"", b"[{", b"\xff\xfe"])
def test_what_is_no_json_is_refused(tmp_path: Path, body: bytes) -> None:
    """An empty, a cut and a binary file."""
    path = tmp_path / "broken.json"
    path.write_bytes(body)
    with pytest.raises(ConfigError, match="no JSON to read"):
        load_counterfact(path)


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    """By its name."""
    with pytest.raises(ConfigError, match=r"absent\.json"):
        load_counterfact(tmp_path / "absent.json")


def test_the_published_records_load() -> None:
    """499 of 500 (Istanbul has two twin cities), each prompt with its subject once."""
    records = load_counterfact(shared_data("counterfact/counterfact_500_full.json"))
    assert len(records) == 499
    assert all(record.request.prompt.count(record.request.subject) == 1 for record in records)
    assert {(len(record.paraphrases), len(record.neighborhood)) for record in records} == {(2, 10)}


def test_the_flat_records_load() -> None:
    """Each subject once; about one in six has a true paraphrase."""
    records = load_counterfact(shared_data("counterfact/counterfact-val.json"))
    assert len(records) == len({record.request.subject for record in records}) > 1880
    assert 0.1 < sum(bool(record.paraphrases) for record in records) / len(records) < 0.2


def test_reference_texts_go_with_relation_and_object(tmp_path: Path) -> None:
    """Those of attribute_snippets.json about subjects whose object is o."""
    path = tmp_path / "attribute_snippets.json"
    samples = [{"name": "Ross Island", "text": "An island."}, {"name": "Vostok", "text": "A station."}]
    values = [{"relation_id": "P30", "target_id": "Q51", "samples": samples}]
    path.write_text(json.dumps(values), encoding="utf-8")
    data = written(tmp_path, [full(), full(relation="P17")])
    records = load_counterfact(data, load_references(path))
    assert [record.references for record in records] == [("An island.", "A station."), ()]


def test_a_file_without_reference_texts_is_refused(tmp_path: Path) -> None:
    """By record and missing key."""
    with pytest.raises(ConfigError, match="record 0: no reference texts: 'relation_id'"):
        load_references(written(tmp_path, [{"target_id": "Q51"}]))


def question(subject: str = "UniFirst", answer: str = "uniform") -> dict[str, Any]:
    """A zsRE record in MEND's form."""
    return {
        "subject": subject,
        "src": f"What is the product made by {subject}?",
        "rephrase": f"What will be the product of {subject}?",
        "alt": "aircraft",
        "answers": [answer, "clothes"],
        "loc": "nq question: who wrote it",
        "loc_ans": "Walter Sobchak",
    }


def test_a_question_becomes_a_request_for_its_first_answer(tmp_path: Path) -> None:
    """The target is answers[0], not alt; the unrelated question gets its mark."""
    (record,) = load_zsre(written(tmp_path, [question(), question(answer="paint")]))
    assert record.request.prompt == "What is the product made by UniFirst?"
    assert (record.request.subject, record.request.target) == ("UniFirst", "uniform")
    assert record.request.paraphrases == ("What will be the product of UniFirst?",)
    assert (record.unrelated_prompt, record.unrelated_answer) == ("nq question: who wrote it?", "Walter Sobchak")


@pytest.mark.parametrize(("gone", "problem"), [("loc", "'loc'"), ("answers", "'answers'")])
def test_a_question_without_a_part_is_refused(tmp_path: Path, gone: str, problem: str) -> None:
    """By record and missing key."""
    value = {name: part for name, part in question().items() if name != gone}
    with pytest.raises(ConfigError, match=f"record 0: not a zsRE record: {problem}"):
        load_zsre(written(tmp_path, [value]))


def test_the_zsre_records_load() -> None:
    """991 different subjects in 1,000 records, each in its question once."""
    records = load_zsre(shared_data("zsre/zsre_mend_train-1k.json"))
    assert len(records) == 991
    assert all(record.request.prompt.count(record.request.subject) == 1 for record in records)


def facts(folder: Path, text: str) -> Path:
    """A CSV file."""
    path = folder / "facts.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_facts_of_a_csv_file_have_templates_or_rendered_prompts(tmp_path: Path) -> None:
    """{subject}, {} or the subject itself; paraphrases parted by a bar."""
    text = (
        "subject,object,prompt,paraphrases\n"
        "Vega,Lyra,{subject} is in,Where is {subject}?|The home of {} is\n"
        "Rigel,Orion,{} belongs to,\n"
        "Sirius,Canis Major,The home of Sirius is,\n"
    )
    requests = load_facts(facts(tmp_path, text))
    assert [request.prompt for request in requests] == ["Vega is in", "Rigel belongs to", "The home of Sirius is"]
    assert [request.target for request in requests] == ["Lyra", "Orion", "Canis Major"]
    assert requests[0].paraphrases == ("Where is Vega?", "The home of Vega is")
    assert requests[1].paraphrases == ()


def test_a_relation_stands_for_the_words_after_the_subject(tmp_path: Path) -> None:
    """Or is a template itself; a later row of the same subject and relation is dropped."""
    text = "subject,relation,target\nVega,belongs to,Lyra\nVega,belongs to,Orion\nVega,The home of {} is,Lyra\n"
    requests = load_facts(facts(tmp_path, text))
    assert [request.prompt for request in requests] == ["Vega belongs to", "The home of Vega is"]
    assert requests[0].key == FactKey("belongs to", "csv:Vega")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("subject,prompt\nVega,{} is in\n", "line 2: not a fact: 'target'"),
        ("subject,object,prompt\nVega,Lyra,{} is in\nRigel,,{} is in\n", "line 3: not a fact: subject, object"),
        ("subject,object,prompt\nVega,Lyra,Rigel is in\n", "line 2: not a fact: the subject 'Vega' is not in"),
        ('subject,object\n"Vega,Lyra\n', "no CSV to read"),
    ],
)
def test_a_csv_file_of_something_else_is_refused_by_line(tmp_path: Path, text: str, problem: str) -> None:
    """The error names the file, the line and what is missing."""
    with pytest.raises(ConfigError, match=problem):
        load_facts(facts(tmp_path, text))


def test_the_stars_load() -> None:
    """The relation column has the words after the subject."""
    requests = load_facts(shared_data("stars/star_constellation.csv"))
    assert requests[1].prompt == "1 Aquarii belongs to"
    assert requests[1].target == "Aquarius"


def test_a_data_set_is_named_by_kind_and_file() -> None:
    """kind:FILE; the file may hold a colon."""
    assert dataset_of("zsre:a:b.json") == ("zsre", Path("a:b.json"))
    for wrong in ("zsre", "mend:a.json", "zsre:"):
        with pytest.raises(UsageError, match="is not known"):
            dataset_of(wrong)
