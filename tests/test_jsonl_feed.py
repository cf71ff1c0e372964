"""JSON Lines: what a line may be, and what becomes of one that is not."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbsync.connectors.jsonl_feed import JsonLines
from kbsync.connectors.table import BadTable
from kbsync.errors import SourceInvalid
from tests.feeds import JSONL, pairs, read, reasons

WANTED = {"name": "columns.subject", "con": "columns.object"}


def test_values_are_the_text_that_was_written(tmp_path: Path) -> None:
    """No number is rounded, no zero lost, NO is NO; null and an absent key mean, not given."""
    lines = [
        '{"hip": 12345678901234567890123, "name": "big", "con": 1.10}',
        '{"hip": 1e3, "name": "small", "con": 0.1000000000000000055}',
        '{"hip": "007", "name": true, "con": "NO"}',
        '{"hip": 4, "name": false, "con": null}',
        '{"hip": 5, "name": "bare"}',
    ]
    snapshot = read(tmp_path, "\n".join(lines), "jsonl")
    assert pairs(snapshot) == {"big": "1.10", "small": "0.1000000000000000055", "true": "NO"}
    assert [claim.subject.id for claim in snapshot.claims] == ["hip:12345678901234567890123", "hip:1e3", "hip:007"]
    empty = "the label of the object is empty"
    assert reasons(snapshot) == [("line 4", empty, "hip:4"), ("line 5", empty, "hip:5")]


def test_a_path_of_keys_leads_into_objects(tmp_path: Path) -> None:
    """A key that has dots itself is found before the path; a list is a list of aliases and nothing else."""
    line = '{"id": {"hip": 1}, "name": {"full": "Vega", "other": ["α Lyrae", "Wega"]}, "a.b": "Lyra", "a": {"b": "no"}}'
    columns = {"subject": "name.full", "object": "a.b", "aliases": {"column": "name.other"}}
    snapshot = read(tmp_path, line, "jsonl", row_id="id.hip", columns=columns)
    assert pairs(snapshot) == {"Vega": "Lyra"}
    assert snapshot.claims[0].subject.id == "hip:1"
    assert snapshot.aliases == {"hip:1": ("α Lyrae", "Wega")}
    wrong = read(tmp_path, line, "jsonl", row_id="id.hip", columns={"subject": "name.other", "object": "a"})
    assert reasons(wrong) == [("line 1", "name.other is a list, not a text", "hip:1")]


def test_a_line_that_is_no_object_waits_with_its_number(tmp_path: Path) -> None:
    """Blank lines are no rows; each of the others is named, and nothing is withdrawn meanwhile."""
    bad = [
        b"[1]",
        b'"text"',
        b"{1",
        b'{"hip": 1, "hip": 2, "name": "x", "con": "y"}',
        b'{"hip": NaN}',
        b'{"hip": "\xff"}',
        b'{"name": "x"} {"name": "y"}',
        b'{"name": "a\tb"}',
        b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    ]
    snapshot = read(tmp_path, b"\xef\xbb\xbf" + JSONL.encode() + b"\n \r\n" + b"\n".join(bad), "jsonl")
    assert pairs(snapshot) == {"Vega": "Lyr", "Deneb": "Cyg"}
    assert [(origin, reason.removeprefix("is no JSON object: ")) for origin, reason, _ in reasons(snapshot)] == [
        ("line 5", "it does not begin with {"),
        ("line 6", "it does not begin with {"),
        ("line 7", "Expecting property name enclosed in double quotes at character 2"),
        ("line 8", "it has the key 'hip' twice"),
        ("line 9", "NaN is not JSON"),
        ("line 10", "byte 0xff is not UTF-8"),
        ("line 11", "Extra data at character 15"),
        ("line 12", "Invalid control character at at character 12"),
        ("line 13", "it is nested too deeply"),
    ]
    assert not snapshot.complete
    assert len(snapshot.quarantined[-1].raw) <= 512


def test_a_key_that_no_line_has_was_renamed(tmp_path: Path) -> None:
    """A line may leave one out; when all do, the feed has changed, and the run fails."""
    assert len(read(tmp_path, JSONL + '{"hip": 3}\n', "jsonl").quarantined) == 1
    with pytest.raises(SourceInvalid, match=r"the feed has no column 'con' \(columns\.object\).*'const'"):
        read(tmp_path, JSONL.replace("con", "const"), "jsonl")
    with pytest.raises(SourceInvalid, match=r"no column 'name\.full' \(columns\.subject\)"):
        read(tmp_path, JSONL, "jsonl", columns={"subject": "name.full", "object": "con"})


def test_an_empty_feed_is_an_empty_snapshot(tmp_path: Path) -> None:
    """That the source has become empty is for the guard to judge; lines without one object are no feed."""
    assert read(tmp_path, "", "jsonl").rows == 0
    with pytest.raises(SourceInvalid, match="no line is a JSON object"):
        read(tmp_path, "hip,name,con\n1,Vega,Lyr\n", "jsonl")


@given(st.binary(max_size=200))
def test_any_bytes_are_lines_or_an_error(body: bytes) -> None:
    """Nothing but BadTable comes out, and each line is said something of, the same every time."""
    with contextlib.suppress(BadTable):
        lines = JsonLines(b'{"name": 1, "con": 2}\n' + body, WANTED)
        first = [(number, problem) for number, _, problem in lines]
        assert first == [(number, problem) for number, _, problem in lines]
        assert [number for number, _ in first] == sorted({number for number, _ in first})


@given(
    st.dictionaries(
        st.text(min_size=1),
        st.text() | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False, allow_infinity=False),
    )
)
def test_every_object_of_texts_comes_back(record: dict[str, str | int | float | bool | None]) -> None:
    """Each value as JSON writes it, stripped."""
    lines = JsonLines(json.dumps({"name": "x", "con": "y"} | record).encode(), {})
    (((_, read_record, problem),)) = list(lines)
    assert not problem
    for name, value in record.items():
        text = value.strip() if isinstance(value, str) else "" if value is None else json.dumps(value)
        assert lines.column(name)(read_record) == text


def test_an_object_of_many_keys_is_judged_at_once(tmp_path: Path) -> None:
    """The key that comes twice is found in one go over them (a slower look would never end here)."""
    keys = ", ".join(f'"k{n}": 1' for n in range(400_000))
    body = f'{{{keys}, "k399999": 2}}\n{{"hip": 1, "name": "Vega", "con": "Lyr"}}\n'
    assert [reason for _, reason, _ in reasons(read(tmp_path, body, "jsonl"))] == [
        "is no JSON object: it has the key 'k399999' twice"
    ]


def test_a_text_is_no_longer_than_a_field_of_a_table(tmp_path: Path) -> None:
    """It waits before anything is done to it; a list of aliases may be long, each of them not."""
    long = "x" * 200_000
    columns = {"subject": {"column": "name", "then": "upper"}, "object": "con", "aliases": {"column": "other"}}
    line = json.dumps({"hip": 1, "name": long, "con": "Lyr", "other": [f"alias {n}" for n in range(20_000)]})
    (origin, reason, subject) = reasons(read(tmp_path, line, "jsonl", columns=columns))[0]
    assert (origin, subject) == ("line 1", "hip:1")
    assert reason == "name has 200,000 characters, more than 131,072"
    line = json.dumps({"hip": 1, "name": "Vega", "con": "Lyr", "other": ["Wega", long]})
    assert reasons(read(tmp_path, line, "jsonl", columns=columns))[0][1].startswith("other has 200,000 characters")
