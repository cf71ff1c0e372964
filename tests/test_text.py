"""What a label, an id or a date may look like."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbsync.connectors.text import MAX_LENGTH, clean, clean_date, clean_label, label_key, printable


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("NO", "NO"),
        ("1.10", "1.10"),
        ("  Canis   Major ", "Canis Major"),
        ("Canis\u00a0Major", "Canis Major"),
        ("Bo\u0308otes", "Böotes"),
        ("\u200eVega\u200f", "Vega"),
        ("\u202eageV\u202c", "ageV"),
        ("Ve\u200bga\ufeff", "Vega"),
        ("soft\u00adware", "software"),
        ("Vega" + "".join(chr(0xE0000 + ord(letter)) for letter in "ignore"), "Vega"),
        ("Vega\U000e0100\ufe0f\u2062\u3164", "Vega"),
        ("Ve\u200dga \u200c", "Vega"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("ശ്രീ\u200d\u200d", "ശ്രീ\u200d"),
        ("e\u200d\u0301", "é"),
        ("Vega\n", "Vega"),
        ("参宿四", "参宿四"),
        ('He said "no"; it\'s a <b>', 'He said "no"; it\'s a <b>'),
    ],
)
def test_values_have_one_spelling(value: str, text: str) -> None:
    """NFC, single spaces, nothing invisible but the joiners that a script needs; everything else stays as it is."""
    assert clean(value, "the name") == text


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("", "the name is empty"),
        (" \u00a0\t", "the name is empty"),
        ("\u200e", "the name is empty"),
        ("Ve\0ga", "U\\+0000"),
        ("Ve\x1b[31mga", "U\\+001B"),
        ("Ve\nga", "U\\+000A"),
        ("Ve\x85ga", "U\\+0085"),
        ("Ve\ud800ga", "U\\+D800"),
        ("x" * (MAX_LENGTH + 1), "513 characters"),
        ("\u200b\u00ad", "the name is empty"),
        ("a" + "\u0301\u0300" * 4_000_000, "8000001 characters"),
    ],
)
def test_what_is_no_plain_text_is_refused(value: str, problem: str) -> None:
    """Empty values, control characters, half surrogates and over-long values name what is wrong."""
    with pytest.raises(ValueError, match=problem):
        clean(value, "the name")


@pytest.mark.parametrize("value", ["{subject}", "a {} b", "}", "{{name}}"])
def test_braces_in_a_label_are_refused(value: str) -> None:
    """A label is no template, and a template is no label."""
    with pytest.raises(ValueError, match="braces"):
        clean_label(value, "the label")


@pytest.mark.parametrize(
    "date",
    [
        "2022",
        "2022-11",
        "2022-11-08",
        "2022-00-00",
        "2019-01-20T00:00:00Z",
        "-0044-03-15T00:00:00Z",
        "2022-11-08T10:00:00.5+01:00",
    ],
)
def test_iso_dates_stay_as_they_are(date: str) -> None:
    """Dates of any precision are kept as the source wrote them."""
    assert clean_date(date, "the start") == date


@pytest.mark.parametrize(
    "date",
    [
        "8.11.2022",
        "11/08/2022",
        "yesterday",
        "2022-1-1",
        "22",
        "2020-99-99",
        "2020-13",
        "2020-12-32",
        "2020-12-01T25:00:00Z",
        "\u0662\u0660\u0662\u0662",
    ],
)
def test_other_dates_are_refused(date: str) -> None:
    """A date that would not sort is named in the error."""
    with pytest.raises(ValueError, match="ISO 8601"):
        clean_date(date, "the start")


@given(st.text())
def test_cleaning_is_done_once(value: str) -> None:
    """What is accepted is stable, printable, NFC, and within the limit."""
    try:
        text = clean(value, "the name")
    except ValueError:
        return
    assert clean(text, "the name") == text
    assert text == unicodedata.normalize("NFC", text)
    assert text == printable(text)
    assert 0 < len(text) <= MAX_LENGTH


@given(st.text(alphabet=st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20))
def test_label_keys_do_not_see_case(label: str) -> None:
    """Two spellings that differ in case alone have one key."""
    assert label_key(label_key(label)) == label_key(label)
    assert label_key("STRASSE") == label_key("straße")


def test_raw_rows_are_safe_to_print() -> None:
    """Controls are escaped and long rows cut, so that a hostile row cannot drive a terminal."""
    assert printable("a\x1b[2J\nb\u202e") == "a\\x1b[2J\\x0ab"
    assert printable("x" * 600) == "x" * 511 + "…"
