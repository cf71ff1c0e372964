"""The points that are measured where none are named: what moves S against drift, and the ablations of the paper. Pure.

frontier_points(preset), ablation_points(preset, layers=30)
"""

from __future__ import annotations

from kbsync.bench.points import Point
from kbsync.editor.preset import Preset

__all__ = ["ablation_points", "frontier_points"]


def frontier_points(preset: Preset) -> list[Point]:
    """λ, also growing with the facts held, clamp, stopping at the top, fewer steps, null space, layers; two together.

    More and fewer layers keep the deepest one, so they share the targets; clamp, stop and steps need their own.
    """
    weight, top, count = preset.covariance_weight, preset.layers[-1], len(preset.layers)
    return _different(
        preset,
        [
            Point("preset", {}),
            Point("λ × 10", {"covariance_weight": weight * 10}),
            Point("λ grows as √n", {"covariance_growth": 0.5}),
            Point("λ grows as n", {"covariance_growth": 1.0}),
            Point("null space 0.02", {"null_space": 0.02}),
            Point("null space 0.1", {"null_space": 0.1}),
            Point("more layers", {"layers": tuple(range(max(0, top - count - 1), top + 1))}),
            Point("fewer layers", {"layers": preset.layers[count // 2 :]}),
            Point("stop at the top", {"stop_top": True}),
            Point("stop at the top, λ × 3", {"stop_top": True, "covariance_weight": weight * 3}),
            Point("clamp × ⅔", {"clamp": round(preset.clamp * 2 / 3, 4)}),
            Point("steps × ½", {"steps": max(2, preset.steps // 2)}),
        ],
    )


def ablation_points(preset: Preset, layers: int) -> list[Point]:
    """Appendix F for a model with `layers` blocks: where, how many, attention instead of the MLP, λ.

    Early, middle and late are as many consecutive layers as the preset has; the last block cannot be edited, since no
    layer above it tells what its state should be.
    """
    weight, count = preset.covariance_weight, min(len(preset.layers), layers - 1)
    middle = (layers - count) // 2
    return _different(
        preset,
        [
            Point("preset", {}),
            Point("early layers", {"layers": tuple(range(count))}),
            Point("middle layers", {"layers": tuple(range(middle, middle + count))}),
            Point("late layers", {"layers": tuple(range(layers - 1 - count, layers - 1))}),
            Point("one layer", {"layers": preset.layers[-1:]}),
            Point("attention", {}, attention=True),
            Point("λ / 10", {"covariance_weight": weight / 10}),
            Point("λ × 10", {"covariance_weight": weight * 10}),
            Point("λ × 50", {"covariance_weight": weight * 50}),
        ],
    )


def _different(preset: Preset, points: list[Point]) -> list[Point]:
    """The preset itself, and the points that differ from it."""
    return [points[0]] + [
        point
        for point in points[1:]
        if point.attention or any(getattr(preset, key) != value for key, value in point.changes.items())
    ]
