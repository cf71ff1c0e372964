"""The search for the version that broke an answer: a planted one is found, in few questions, around what cannot be
asked."""

from __future__ import annotations

from math import ceil, log2

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kbsync.bisect import Probe, Search, looking_back
from kbsync.errors import UsageError


def run(search: Search, answers: list[bool | None]) -> int:
    """Answer every question; how many there were."""
    asked = []
    while search.candidate is not None:
        asked.append(search.candidate)
        search.told(answers[search.candidate])
    assert len(set(asked)) == len(asked), "each version is asked once"
    return len(asked)


@given(st.integers(1, 300), st.data())
def test_a_planted_first_wrong_version_is_found_in_few_questions(first: int, data: st.DataObject) -> None:
    """Right before it, wrong from it on: with the oldest one given as right, or looked for."""
    count = data.draw(st.integers(first + 1, 320))
    answers: list[bool | None] = [index < first for index in range(count)]
    for good in (None, 0, data.draw(st.integers(0, first - 1))):
        search = Search(count - 1, good)
        questions = run(search, answers)
        assert (search.outcome, search.good, search.bad, search.skipped) == ("found", first - 1, first, [])
        assert questions <= 2 + ceil(log2(count)) * (2 if good is None else 1) + 1


@given(st.lists(st.sampled_from([True, False, None]), min_size=1, max_size=40))
@example([True, None, None, False])
@example([None, True, False, True, False])
@example([False] * 7 + [True] + [False] * 3)
@example([False])
@example([True, False])
@example([None, False])
def test_whatever_versions_answer_a_boundary_is_found_where_there_is_one(answers: list[bool | None]) -> None:
    """It is right on one side and wrong on the other, and what lies between cannot be asked."""
    search = Search(len(answers) - 1)
    run(search, answers)
    if answers[-1] is not False:
        assert search.outcome == ("still right" if answers[-1] else "cannot be asked")
    elif True not in answers:
        assert search.outcome == "never right"
        assert len(search.answers) == len(answers)
    else:
        assert search.outcome == "found"
        assert search.good < search.bad
        assert (answers[search.good], answers[search.bad]) == (True, False)
        assert [answers[index] for index in search.skipped] == [None] * len(search.skipped)
        assert search.skipped == list(range(search.good + 1, search.bad))


def test_a_version_that_was_said_to_be_right_and_is_not_ends_the_search() -> None:
    search = Search(4, 1)
    assert run(search, [True, False, True, True, False]) == 2
    assert search.outcome == "never right"


def test_what_lies_in_the_middle_is_asked_next_and_the_nearest_where_that_cannot_be() -> None:
    search = Search(8, 0)
    asked = []
    while search.candidate is not None:
        asked.append(search.candidate)
        search.told({8: False, 0: True, 4: None, 3: True}.get(search.candidate, False))
    assert asked == [8, 0, 4, 3, 5]
    assert (search.good, search.bad, search.skipped) == (3, 5, [4])
    with pytest.raises(ValueError, match="over"):
        search.told(True)


@given(st.integers(0, 70))
def test_looking_back_comes_to_every_earlier_version_once(last: int) -> None:
    assert sorted(looking_back(last)) == list(range(last))


def test_looking_back_doubles_its_steps_first() -> None:
    assert list(looking_back(10)) == [9, 8, 6, 2, 0, 7, 5, 4, 3, 1]
    assert list(looking_back(1)) == [0]
    assert list(looking_back(2)) == [1, 0]


def test_a_probe_is_a_prompt_an_arrow_and_what_is_expected() -> None:
    assert Probe.parse(" Where is Vega =>  Lyra ") == Probe("Where is Vega", "Lyra")
    assert Probe.parse("a => b => c") == Probe("a => b", "c")


@pytest.mark.parametrize("text", ["Where is Vega", "=> Lyra", "Where is Vega =>", ""])
def test_what_is_no_probe_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no probe"):
        Probe.parse(text)
