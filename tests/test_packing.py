"""Packing: every row once, within the budget; beginnings as long as they can be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kbsync.editor.packing import pack, shared_length

ROWS = st.lists(st.lists(st.integers(0, 2), max_size=6).map(tuple), max_size=6)


@given(st.lists(st.integers(0, 30), max_size=40), st.integers(1, 50))
def test_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    """Batches hold each row once, longest first, and at most the budget unless a row alone is longer."""
    batches = pack(lengths, budget)
    order = [lengths[index] for batch in batches for index in batch]
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert order == sorted(order, reverse=True)
    assert all(len(batch) == 1 or sum(lengths[index] for index in batch) <= budget for batch in batches)


@given(ROWS, st.integers(0, 8))
def test_shared_length_is_the_longest(rows: list[tuple[int, ...]], limit: int) -> None:
    """All rows begin alike for that long, and no longer unless the limit or a row's end stops it."""
    found = shared_length(rows, [limit] * len(rows))
    assert len({row[:found] for row in rows}) <= 1
    if rows and found < min([limit, *map(len, rows)]):
        assert len({row[: found + 1] for row in rows}) > 1
