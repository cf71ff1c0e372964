"""CounterFact files, published and flattened, as edit requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kbsync.editor.datasets import load_counterfact
from kbsync.errors import ConfigError
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
