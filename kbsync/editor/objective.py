"""What a target is searched by, from the last states on: -log P of the object's tokens, and the KL term.

Logits are by far the largest tensors of a step. So they are made for a block of rows at a time and turned, in place,
into their own gradient, which goes back through the head at once: what is returned are losses and their gradients by
the states after the last block. MEMIT Eqn 16 and its authors' code.

    missing, slope, top = missing_tokens(layers, states, expected, weights, gradient=True)
    divergence, slope = divergence_from(layers, states, before, fresh, gradient=True)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kbsync.editor.layers import Layers

__all__ = ["BLOCK", "divergence_from", "missing_tokens"]

BLOCK = 2**22
"""Numbers of one block of logits (16 MiB in float32): small enough to stay near the processor."""


class _Missing(torch.autograd.Function):
    """-log softmax(logits)[expected] by row. The logits are overwritten with its gradient: no second tensor of their
    size is made, and nothing before them needs them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, expected: Tensor) -> Tensor:
        total = logits.logsumexp(1, keepdim=True)
        missing = (total - logits.gather(1, expected[:, None]))[:, 0]
        ctx.gradient = logits.sub_(total).exp_()
        ctx.gradient.scatter_add_(1, expected[:, None], -torch.ones_like(total))
        return missing

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.mul_(gradients[0][:, None]), None


def missing_tokens(
    layers: Layers, states: Tensor, expected: Tensor, weights: Tensor, *, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """For last states [m, d], each predicting a token of `expected` [m]: `weights` [m] x -log P of it [m], the gradient
    [m, d] of their sum (zeros unless `gradient`), and whether it is the most probable token [m]."""
    found = [
        _missing_block(layers, *part, gradient=gradient)
        for part in zip(*_blocks(layers, states, expected, weights), strict=True)
    ]
    missing, slope, top = (torch.cat(parts) for parts in zip(*found, strict=True))
    return missing, slope, top


def _blocks(layers: Layers, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Each tensor's rows in parts (views), as many at a time as one block of logits has."""
    rows = max(1, BLOCK // int(layers.base.network.config.vocab_size))
    return [one.split(rows) for one in tensors]


def _missing_block(
    layers: Layers, states: Tensor, expected: Tensor, weights: Tensor, *, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.set_grad_enabled(gradient):
        part = states.detach().requires_grad_(gradient)
        logits = layers.logits(part)
        top = logits.detach().argmax(1) == expected
        missing = weights * _Missing.apply(logits, expected)  # type: ignore[no-untyped-call]
        slope = torch.autograd.grad(missing.sum(), part)[0] if gradient else torch.zeros_like(part)
    return missing.detach(), slope, top


def divergence_from(
    layers: Layers, states: Tensor, before: Tensor, fresh: Tensor, *, gradient: bool
) -> tuple[Tensor, Tensor]:
    """For last states [e, d]: KL(now || before) of the next token [e], and the gradient [e, d] of its sum.

    `before` [e, vocabulary] holds log-probabilities; those of the rows that are `fresh` [e] are filled in with what
    they are now.
    """
    found = [
        _divergence_block(layers, *part, gradient=gradient)
        for part in zip(*_blocks(layers, states, before, fresh), strict=True)
    ]
    divergence, slope = (torch.cat(parts) for parts in zip(*found, strict=True))
    return divergence, slope


def _divergence_block(
    layers: Layers, states: Tensor, before: Tensor, fresh: Tensor, *, gradient: bool
) -> tuple[Tensor, Tensor]:
    with torch.set_grad_enabled(gradient):
        part = states.detach().requires_grad_(gradient)
        now = layers.logits(part).log_softmax(dim=1)
        before[fresh] = now.detach()[fresh]
        divergence = functional.kl_div(before, now, reduction="none", log_target=True).sum(dim=1)
        slope = torch.autograd.grad(divergence.sum(), part)[0] if gradient else torch.zeros_like(part)
    return divergence.detach(), slope
