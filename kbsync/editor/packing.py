"""Which rows go through the model together: pure arithmetic on lengths, no tensors.

pack([5, 2, 9, 2], budget=12)            # [[2], [0, 1], [3]]: longest first, rows x longest <= budget
shared_length([(1, 2, 3), (1, 2, 9)], limits=[2, 2])     # 2
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["pack", "shared_length"]


def pack(lengths: Sequence[int], budget: int, *, pass_cost: int | None = None) -> list[list[int]]:
    """Indices of rows in batches, longest first, each with rows x longest <= budget (a longer row goes alone).

    With `pass_cost` a batch also ends where going on would pad by more tokens than that: what one more pass through
    the model costs, in tokens.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches: list[list[int]] = []
    longest = 0
    for place, index in enumerate(order):
        full = bool(batches) and (len(batches[-1]) + 1) * longest > budget
        padding = (longest - lengths[index]) * (len(order) - place)
        if not batches or full or (pass_cost is not None and padding > pass_cost):
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches


def shared_length(rows: Sequence[tuple[int, ...]], limits: Sequence[int]) -> int:
    """How many tokens all rows begin with alike, at most the smallest of `limits`. 0 without rows."""
    if not rows:
        return 0
    least, most = min(rows), max(rows)  # in sorted order, what the ends share, all share
    most_possible = min(len(least), len(most), *limits)
    return next((at for at in range(most_possible) if least[at] != most[at]), most_possible)
