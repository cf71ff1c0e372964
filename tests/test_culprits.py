"""The search for the facts that a gate refuses: what is planted is found, in few trials, and never is one blamed that
was not tried with and without."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, log2

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kbsync.culprits import FULL, Search, worst_first

Gate = Callable[[tuple[str, ...]], bool]


def run(search: Search, passes: Gate) -> dict[frozenset[str], bool]:
    """Answer every candidate; what was answered."""
    told: dict[frozenset[str], bool] = {}
    while (candidate := search.candidate) is not None:
        assert frozenset(candidate) not in told, "a candidate is tried once"
        told[frozenset(candidate)] = passes(candidate)
        search.told(told[frozenset(candidate)])
    assert len(told) == search.trials
    return told


def names(count: int) -> list[str]:
    """That many suspects."""
    return [f"f{index}" for index in range(count)]


planted = st.integers(2, 60).flatmap(
    lambda count: st.tuples(st.just(count), st.sets(st.integers(0, count - 1), min_size=1, max_size=min(count, 5)))
)


@given(planted)
@example((200, {0}))
@example((200, {199}))
@example((2, {0, 1}))
@example((7, {3, 4}))
def test_the_planted_facts_are_found_in_few_trials(case: tuple[int, set[int]]) -> None:
    count, bad = case
    guilty = {f"f{index}" for index in bad}
    search = Search(names(count), trials=10_000)
    run(search, lambda candidate: guilty.isdisjoint(candidate))
    assert set(search.guilty) == guilty
    assert sorted(search.accepted) == sorted(set(names(count)) - guilty)
    assert (search.crowded, search.undecided, search.full, search.short) == ({}, [], False, False)
    assert search.trials <= 1 + len(guilty) * (2 * ceil(log2(count)) + 2)


def test_the_worst_looking_one_of_two_hundred_is_found_in_as_many_trials_as_halvings() -> None:
    """One trial of the empty set, eight halvings, one of the fact alone."""
    search = Search(names(200), trials=20)
    told = run(search, lambda candidate: "f0" not in candidate)
    assert search.trials == 1 + 7 + 1
    assert list(search.guilty) == ["f0"]
    assert told[frozenset()]


def test_two_facts_take_the_empty_set_and_the_better_one_and_the_worse_alone() -> None:
    search = Search(["worse", "better"], trials=20)
    tried = []
    while search.candidate is not None:
        tried.append(search.candidate)
        search.told("worse" not in search.candidate)
    assert tried == [(), ("better",), ("worse",)]
    assert search.guilty == {"worse": ("better",)}


def test_where_the_version_falls_short_without_any_no_fact_is_to_blame() -> None:
    search = Search(names(5), trials=20)
    run(search, lambda _: False)
    assert (search.short, search.trials, search.guilty, search.undecided) == (True, 1, {}, names(5))


def test_a_single_fact_is_convicted_by_one_trial_without_it() -> None:
    search = Search(["it"], trials=1)
    assert run(search, lambda candidate: not candidate) == {frozenset(): True}
    assert (search.guilty, search.crowded, search.accepted, search.undecided) == ({"it": ()}, {}, (), [])


def test_where_there_are_no_suspects_nothing_is_tried() -> None:
    search = Search([], trials=20)
    assert (search.candidate, search.trials, search.short, search.undecided) == (None, 0, False, [])


def test_without_trials_nothing_is_tried() -> None:
    search = Search(names(5), trials=0)
    assert (search.candidate, search.trials, search.undecided) == (None, 0, names(5))


@given(st.lists(st.integers(1, 9), min_size=2, max_size=40), st.integers(9, 60))
def test_a_limit_that_no_fact_breaks_alone_fills_up_and_the_rest_is_crowded_out(weights: list[int], limit: int) -> None:
    """Accepted is what fits; each of those crowded out fails beside it, though it passes alone; nobody is guilty."""
    size = dict(zip(names(len(weights)), weights, strict=True))
    search = Search(list(size), trials=10_000)

    def passes(candidate: tuple[str, ...]) -> bool:
        return sum(map(size.__getitem__, candidate)) <= limit

    if passes(tuple(size)):
        return
    told = run(search, passes)
    room = limit - sum(map(size.__getitem__, search.accepted))
    assert search.guilty == {}
    assert all(size[fact] > room for fact in search.crowded)
    assert all(told[frozenset([fact])] for fact in search.crowded)
    assert search.full == (len(search.undecided) > 0) or search.undecided == []
    assert len(search.crowded) >= 1
    if search.full:
        assert len(search.crowded) >= FULL


@pytest.mark.parametrize("fits", [False, True])
def test_room_that_one_fact_leaves_to_another_ends_the_row_of_crowded_ones(fits: bool) -> None:
    """a, b, c, d with c and d accepted: a crowded b passes alone; where the next one fits, the row begins anew."""
    search = Search(["a", "b", "c", "d"], trials=50)
    crowded = {"b"} if fits else {"a", "b"}

    def passes(candidate: tuple[str, ...]) -> bool:
        return len(candidate) == 1 or crowded.isdisjoint(candidate)

    run(search, passes)
    assert set(search.crowded) == crowded
    assert search.full == (not fits)
    assert search.undecided == []


def test_after_a_row_of_crowded_facts_no_other_is_tried() -> None:
    search = Search(names(16), trials=100)
    told = run(search, lambda candidate: len(candidate) <= 1)
    assert (len(search.accepted), len(search.crowded), search.full) == (1, FULL, True)
    assert len(search.undecided) == 16 - 1 - FULL
    assert len(told) < 16


@given(st.integers(1, 12), st.integers(1, 60), st.randoms(use_true_random=False))
def test_whatever_the_gate_says_blame_rests_on_what_was_tried_and_the_budget_is_kept(
    count: int, trials: int, random: object
) -> None:
    """Also by a gate that follows no rule: with the fact the accepted ones of that moment fail, without it they pass;
    what is accepted in the end passed as a whole."""
    search = Search(names(count), trials=trials)
    told = run(search, lambda _: random.random() < 0.5)  # type: ignore[attr-defined]
    assert search.trials <= trials
    for fact, beside in {**search.guilty, **search.crowded}.items():
        assert told[frozenset(beside)] is True
        assert told.get(frozenset([*beside, fact]), False) is False
    assert all(told[frozenset([fact])] for fact in search.crowded)
    assert search.accepted == () or told[frozenset(search.accepted)]
    decided = [*search.accepted, *search.guilty, *search.crowded]
    assert sorted([*decided, *search.undecided]) == sorted(names(count))


def fact(digest: str, **values: object) -> dict[str, object]:
    """A row of a probe report."""
    return {"digest": digest, "efficacy": True, "hits": 0, "paraphrases": 0, "probability": 0.5} | values


def test_the_worst_fact_is_the_one_that_is_not_answered_then_by_paraphrases_then_by_probability() -> None:
    rows = [
        fact("sure", probability=0.9),
        fact("half", hits=1, paraphrases=2, probability=0.9),
        fact("unsure", probability=0.1),
        fact("wrong", efficacy=False, hits=2, paraphrases=2, probability=0.9),
        fact("none", hits=0, paraphrases=2, probability=0.9),
    ]
    assert worst_first({"facts": rows}) == ["wrong", "none", "half", "unsure", "sure"]
