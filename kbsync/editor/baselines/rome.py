"""ROME: one fact after the other, each a change of rank one in one layer that sets W k = v exactly.

Δ = (v - W k) (C^-1 k)ᵀ / (kᵀ C^-1 k) (Meng et al. 2022, arXiv 2202.05262, Eqn 2). v comes from the same search as
MEMIT's z, in that layer alone, on the weights that the facts before have left. MEMIT's column for a single fact in a
single layer, r uᵀ with u = (λC + k kᵀ)^-1 k, has the same direction, since u is C^-1 k by a factor: so keys, residuals
and solve are the engine's, and ROME is what scales that column to meet its equation.

    deltas = rome(base, requests, statistics, rome_settings(preset))           # {"model.layers.6.mlp.down_proj": Δ}
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kbsync.editor.memit import insert
from kbsync.editor.model import Base, weights_in
from kbsync.editor.preset import AUTHORS, Preset
from kbsync.editor.statistics import Statistics
from kbsync.editor.targets import compute_targets
from kbsync.errors import UsageError
from kbsync.facts import EditRequest
from kbsync.progress import Progress, silent
from kbsync.versions.delta import Factors
from kbsync.versions.weights import served

__all__ = ["rome", "rome_settings"]

_ROME = {
    "steps": 20,
    "clamp": 4.0,
    "weight_decay": 0.5,
    "kl_weight": 0.0625,
    "stop_loss": 0.05,
    "key_average": "mean",
}
"""kmeng01/memit, hparams/ROME, the same for GPT-2 XL and GPT-J; the rest is as in MEMIT."""
_OFF = {"null_space": None, "covariance_growth": 0.0}


def rome_settings(preset: Preset, layer: int | None = None) -> Preset:
    """The authors' settings of ROME at one layer of a model: by default the middle one of those that MEMIT edits."""
    chosen = preset.layers[len(preset.layers) // 2] if layer is None else layer
    return preset.model_copy(update={"layers": (chosen,), **AUTHORS, **_ROME, **_OFF})


def rome(
    base: Base,
    requests: Sequence[EditRequest],
    statistics: Statistics,
    settings: Preset,
    *,
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """Δ [d, f] float64 of all requests together by module. The network is not changed.

    Raises UsageError for settings of several layers, and what the engine raises.
    """
    if len(settings.layers) != 1:
        raise UsageError(f"ROME edits one layer, not {list(settings.layers)}", hint="rome_settings(preset)")
    name = base.spec.down_name(settings.layers[0])
    pristine = base.weight(name).double().clone()
    master = pristine
    for done, request in enumerate(requests):
        with weights_in(base, {name: served(master, base.dtype)}):
            targets = compute_targets(base, [request], statistics.contexts, settings)
            column = insert(base, [request], targets, statistics, settings, masters={name: master}).delta.factors[name]
        master = master + _rank_one(column).to(master.device)
        progress("rome", done + 1, len(requests))
    return {name: master - pristine}


def _rank_one(column: Factors) -> Tensor:
    """r uᵀ / (uᵀ k) [d, f] of a single fact's column r, u, k."""
    r, u, k = column.left[:, 0].double(), column.right[0].double(), column.keys[0].double()
    return torch.outer(r, u / (u @ k))
