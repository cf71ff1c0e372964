"""Which rows go through the model together, and what they begin with alike: pure arithmetic, no tensors.

pack([5, 2, 9, 2], budget=9)                                  # [[2], [0, 1, 3]]: longest first, tokens <= budget
shared_length([(1, 2, 3), (1, 2, 9)], limits=[2, 2])          # 2
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["pack", "shared_length"]


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of rows in batches, longest first, of at most `budget` tokens each (a longer row goes alone)."""
    batches: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if not batches or tokens + lengths[index] > budget:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += lengths[index]
    return batches


def shared_length(rows: Sequence[tuple[int, ...]], limits: Sequence[int]) -> int:
    """How many tokens all rows begin with alike, at most the smallest of `limits`. 0 without rows."""
    if not rows:
        return 0
    least, most = min(rows), max(rows)  # what the ends of the sorted order share, all share
    limit = min(len(least), len(most), *limits)
    return next((at for at in range(limit) if least[at] != most[at]), limit)
