"""What a source file may say of its columns, what is done to their texts, and what no text or pattern can do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kbsync.connectors import Place
from kbsync.connectors.columns import Cell, reader
from kbsync.connectors.transform import Step

RACE = r"^([A-Z]{2})-(\d+)$"


def cell(declared: Any, folder: Path = Path()) -> Cell:
    return Cell.model_validate(declared, context=Place(folder, ()))


def read(declared: Any, folder: Path = Path(), **record: str) -> str:
    """What the declared cell reads from a record of these columns."""

    def column(name: str) -> Callable[[Mapping[str, str]], str]:
        return lambda values: values[name].strip()

    return reader(cell(declared, folder), column)(record)


@pytest.mark.parametrize(
    ("declared", "record", "text"),
    [
        ("name", {"name": " Vega "}, "Vega"),
        ("{first} {last}", {"first": "Ada", "last": "Lovelace"}, "Ada Lovelace"),
        ("{first} {last}", {"first": "", "last": "Cher"}, "Cher"),
        ("{first} {last}", {"first": "", "last": " "}, ""),
        ({"value": "USA"}, {}, "USA"),
        ({"column": "n", "then": "title"}, {"n": "ursa major"}, "Ursa Major"),
        ({"column": "n", "then": "title"}, {"n": "bill's o'neill"}, "Bill's O'Neill"),
        ({"column": "n", "then": ["lower", "title"]}, {"n": "URSA MAJOR"}, "Ursa Major"),
        ({"column": "n", "then": "upper"}, {"n": "oh"}, "OH"),
        ({"column": "race", "match": RACE, "take": 1}, {"race": "OH-12"}, "OH"),
        ({"column": "race", "match": RACE, "take": "{2} of {1}"}, {"race": "OH-12"}, "12 of OH"),
        ({"column": "race", "match": RACE}, {"race": "OH-12"}, "OH"),
        ({"column": "race", "match": RACE, "take": 0}, {"race": "OH-12"}, "OH-12"),
        ({"column": "race", "match": r"\d+"}, {"race": "OH-12"}, "12"),
        ({"column": "race", "match": r"(\d+)|([A-Z]+)", "take": "{1}{2}"}, {"race": "OH"}, "OH"),
        ({"column": "con", "lookup": {"UMa": "Ursa Major"}}, {"con": "UMa"}, "Ursa Major"),
        ({"column": "con", "lookup": {"UMa": "Ursa Major"}}, {"con": ""}, ""),
        ({"column": "full", "otherwise": "{first} {last}"}, {"full": "", "first": "A", "last": "B"}, "A B"),
        ({"column": "full", "otherwise": "{first} {last}"}, {"full": "C", "first": "A", "last": "B"}, "C"),
        ({"column": "a", "otherwise": {"column": "b", "otherwise": {"value": "c"}}}, {"a": "", "b": ""}, "c"),
        ({"column": "n", "replace": {"Sen.": "Senator", "Senator ": "S "}}, {"n": "Sen. Brown"}, "S Brown"),
        ({"column": "d", "date": "%d/%m/%Y"}, {"d": "03/01/2023"}, "2023-01-03"),
        ({"column": "d", "date": "%B %Y"}, {"d": "January 2023"}, "2023-01"),
        ({"column": "d", "date": "%y"}, {"d": "23"}, "2023"),
        ({"column": "d", "date": "%Y%j"}, {"d": "2024366"}, "2024-12-31"),
        (
            {
                "column": "{state}-{district}",
                "match": RACE,
                "take": "{1}",
                "then": [{"lookup": {"OH": "ohio"}}, "title", {"replace": {"O": "0"}}, "strip"],
            },
            {"state": "OH", "district": "3"},
            "0hio",
        ),
    ],
)
def test_a_cell_is_read_as_declared(declared: Any, record: dict[str, str], text: str) -> None:
    """Columns, templates, constants, and each thing that can be done to a text, in the order written."""
    assert read(declared, **record) == text


@pytest.mark.parametrize(
    ("declared", "record", "problem"),
    [
        ({"column": "race", "match": RACE}, {"race": "Ohio"}, r"race: 'Ohio' does not match \^\(\[A-Z\]"),
        ({"column": "c", "lookup": {"UMa": "x", "UMi": "y"}}, {"c": "UMA"}, "c: 'UMA' is not in its lookup.*near: UMa"),
        ({"column": "c", "lookup": {"UMa": "x"}}, {"c": "Lyr"}, "c: 'Lyr' is not in its lookup table$"),
        ({"column": "d", "date": "%d/%m/%Y"}, {"d": "1/31/2023"}, "d: '1/31/2023' is no date as %d/%m/%Y writes it"),
        ({"column": "d", "date": "%d/%m/%Y"}, {"d": "29/02/2023"}, "is no date"),
    ],
)
def test_a_text_that_does_not_fit_is_named(declared: Any, record: dict[str, str], problem: str) -> None:
    """The column, the text, what was wanted and, for a lookup, the nearest that is known."""
    with pytest.raises(ValueError, match=problem):
        read(declared, **record)


def test_a_lookup_may_be_a_file_beside_the_source(tmp_path: Path) -> None:
    """Two columns below a header, quoted as CSV is."""
    (tmp_path / "names.csv").write_text('abbreviation,name\n\nUMa,"Ursa Major"\nCom, Coma Berenices \n')
    assert read({"column": "c", "lookup": "names.csv"}, tmp_path, c="UMa") == "Ursa Major"
    assert read({"column": "c", "lookup": "names.csv"}, tmp_path, c="Com") == "Coma Berenices"
    with pytest.raises(ValueError, match="not in its lookup"):
        read({"column": "c", "lookup": "names.csv"}, tmp_path, c="abbreviation")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "names.csv cannot be read: No such file"),
        (b"a,b\nUMa\n", "line 2 has 1 columns, not 2"),
        (b"a,b\nUMa,x\nUMa,y\n", "line 3 says something else of UMa"),
        (b'a,b\n"UMa,x\n', "unexpected end of data"),
        (b"a,b\n\xff,x\n", "not UTF-8"),
        (b"a,b\n", "at least 1"),
        (b"x" * 5_000_001, "larger than"),
    ],
)
def test_a_lookup_file_that_is_no_table_is_refused(tmp_path: Path, content: bytes | None, problem: str) -> None:
    """When the source is declared, before anything is fetched."""
    if content is not None:
        (tmp_path / "names.csv").write_bytes(content)
    with pytest.raises(ValidationError, match=problem):
        cell({"column": "c", "lookup": "names.csv"}, tmp_path)


def test_a_lookup_file_outside_the_allowed_folders_is_refused(tmp_path: Path) -> None:
    """A source file cannot read what the workspace does not allow."""
    (tmp_path / "secret.csv").write_text("a,b\nc,d\n")
    (tmp_path / "sources").mkdir()
    with pytest.raises(ValidationError, match="outside the folders"):
        cell({"column": "c", "lookup": "../secret.csv"}, tmp_path / "sources")


@pytest.mark.parametrize(
    ("declared", "problem"),
    [
        ("{name", "a template such as"),
        ("", "a template such as"),
        (5, "must be a column, a template, or a mapping"),
        (None, "must be a column, a template, or a mapping"),
        ({}, "either `column` or `value`"),
        ({"column": "a", "value": "b"}, "either `column` or `value`"),
        ({"value": "b", "then": "title"}, "nothing can be done to it"),
        ({"value": "b", "otherwise": "c"}, "nothing can be done to it"),
        ({"column": "a", "match": "x", "date": "%Y"}, "match and date: put the later ones under `then`"),
        ({"column": "a", "then": [{"match": "x", "date": "%Y"}]}, "exactly one of"),
        ({"column": "a", "then": [{"take": 1}]}, "exactly one of"),
        ({"column": "a", "take": 1}, "there is none"),
        ({"column": "a", "match": "(x)", "take": 2}, "names group 2; the pattern has 1"),
        ({"column": "a", "match": "(x)", "take": "{1}-{2}"}, "names group 2; the pattern has 1"),
        ({"column": "a", "match": "(x)", "take": "{one}"}, "a group's number or a template"),
        ({"column": "a", "match": "(x"}, "no pattern of RE2: missing"),
        ({"column": "a", "match": "(?=x)"}, "no pattern of RE2"),
        ({"column": "a", "match": r"(a)\1"}, "no pattern of RE2"),
        ({"column": "a", "match": "((a{1000}){1000}){1000}"}, "no pattern of RE2"),
        ({"column": "a", "date": "%d/%m"}, "gives no date"),
        ({"column": "a", "date": "%d %Y"}, "gives no date"),
        ({"column": "a", "date": "%d/%m/%Y %H"}, "has %H"),
        ({"column": "a", "date": "%d/%m/%Y %"}, "has %"),
        ({"column": "a", "lookup": {}}, "at least 1"),
        ({"column": "a", "replace": {"": "x"}}, "at least 1"),
        ({"column": "a", "then": "shout"}, "strip"),
        ({"column": "a", "lookupp": {"a": "b"}}, "[Ee]xtra"),
    ],
)
def test_a_wrong_declaration_says_what_would_be_right(declared: Any, problem: str) -> None:
    """Before anything is fetched, and never with a second guess."""
    with pytest.raises(ValidationError, match=problem):
        cell(declared)


def test_no_pattern_can_take_long() -> None:
    """What makes a backtracking matcher take the age of the universe ends here, for 100,000 characters, too."""
    with pytest.raises(ValueError, match="does not match"):
        read({"column": "a", "match": "^(a+)+$"}, a="a" * 100_000 + "!")
    with pytest.raises(ValueError, match="does not match"):
        read({"column": "a", "match": "(.*,){20}x$"}, a="1," * 50_000)


def test_a_million_unknown_values_cost_no_million_comparisons() -> None:
    """The nearest known value is looked for a bounded number of times; the same text gets the same reason."""
    function = Step.model_validate({"lookup": {f"key{n}": "x" for n in range(500)}}).function()

    def reason(text: str) -> str:
        with pytest.raises(ValueError, match="not in its lookup") as caught:
            function(text)
        return str(caught.value)

    first = [reason(f"kex{n}") for n in range(300)]
    assert "near: key" in first[0]
    assert "near" not in first[250]
    assert [reason(f"kex{n}") for n in range(300)] == first


def test_a_table_that_is_too_large_is_not_searched() -> None:
    """Its unknown values are named alone."""
    function = Step.model_validate({"lookup": {f"key{n}": "x" for n in range(100_001)}}).function()
    with pytest.raises(ValueError, match=r"'key' is not in its lookup table$"):
        function("key")


@given(st.dates(date(1000, 1, 1), date(9999, 12, 31)), st.sampled_from(["%d/%m/%Y", "%Y%m%d", "%d.%m.%Y", "%m-%d-%Y"]))
def test_every_date_comes_back(day: date, form: str) -> None:
    """Written by the form, read as ISO 8601."""
    assert read({"column": "d", "date": form}, d=day.strftime(form)) == day.isoformat()


@given(
    st.text(), st.sampled_from([{"match": r"(\w)"}, {"date": "%d/%m/%Y"}, {"lookup": {"a": "b"}}, {"then": "title"}])
)
def test_any_text_is_read_or_refused(text: str, done: dict[str, Any]) -> None:
    """Nothing but ValueError comes out of a step; an empty text stays empty."""
    with contextlib.suppress(ValueError):
        found = read({"column": "a", **done}, a=text)
        assert bool(found) <= bool(text.strip())
