"""How much each fact of a delta has to say while the model reads a prompt.

A column adds left_j (right_j · k) to what its MLP writes at a token whose key is k. What counts is the strongest such
contribution over the prompt's tokens, ‖left_j‖ · |right_j · k|, added up over the edited modules.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kbsync.editor.answers import final_states, tokenized
from kbsync.editor.model import Base
from kbsync.versions.delta import Delta

__all__ = ["influence"]


def influence(base: Base, prompt: str, delta: Delta) -> list[float] | None:
    """Of each column of `delta` on the weights that `base` holds; None where a module has no column per fact."""
    if any(factors.dense is not None for factors in delta.factors.values()):
        return None
    keys = _keys(base, prompt, delta)
    total = torch.zeros(delta.columns, dtype=torch.float64)
    for name, factors in delta.factors.items():
        strength = (factors.right.double() @ keys[name].T).abs().amax(1)  # [n]
        total += factors.left.double().norm(dim=0) * strength
    found: list[float] = total.tolist()
    return found


def _keys(base: Base, prompt: str, delta: Delta) -> Mapping[str, Tensor]:
    """What each edited module reads at the prompt's tokens: float64 [tokens, f] by module, on the CPU."""
    found: dict[str, Tensor] = {}
    hooks = []
    for name in delta.factors:

        def keep(_module: object, inputs: tuple[Tensor, ...], name: str = name) -> None:
            found[name] = inputs[0].detach().flatten(0, -2).double().cpu()

        hooks.append(base.module(name).register_forward_pre_hook(keep))
    try:
        [(ids, _)] = tokenized(base, [prompt])
        final_states(base, [ids])
    finally:
        for hook in hooks:
            hook.remove()
    return found
