"""The normal equations of MEMIT: U = (λC + K_p K_pᵀ + K Kᵀ)^-1 K in float64, by Cholesky, with its accuracy measured.

C = E[k kᵀ] is the same for every edit of a model, so its factor is kept, whatever λ, and a small batch costs no O(f³):
with V = [K_p, K] [f, m] the Woodbury identity gives A^-1 V = C^-1 V (λI + Vᵀ C^-1 V)^-1. Where m is not small, A itself
is factored. arXiv 2210.07229, Eqn 14.

    solution = Normal(C, device).solve(K, weight=300.0, protected=K_p)      # solution.U is [f, n]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kbsync.errors import EditError

__all__ = ["Normal", "NullSpace", "Solution"]

_WORST_RESIDUAL = 1e-6
"""Largest ‖A U - K‖ / ‖K‖ that is accepted: the solve must not be what limits a float32 delta."""
_JITTERS = (0.0, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8)
"""Shares of the mean diagonal that are added, in this order, until the factorisation succeeds."""
_FEW = 4
"""Woodbury where f is at least so many times the number of keys: about where 2f²m passes f³/3."""
_MORE_TEXT = "use more text for the statistics (sample_tokens), or a larger covariance_weight"


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """U [f, n] float64; ‖A U - K‖ / ‖K‖; what was added to A's diagonal (0 unless it is singular)."""

    U: Tensor
    residual: float
    jitter: float


class Normal:
    """The system of one matrix. `covariance` is C [f, f], float64, on any device; `device` solves."""

    def __init__(self, covariance: Tensor, device: torch.device) -> None:
        self._covariance = covariance
        self._device = device
        self._factor: tuple[Tensor, float] | None = None

    def solve(self, keys: Tensor, *, weight: float, protected: Tensor | None = None) -> Solution:
        """U for keys K [f, n] beside earlier keys K_p [f, m], with λ = `weight`; all float64 on the solving device.

        Raises EditError where the system is not finite or not positive definite even with jitter, and where the
        residual is above 1e-6.
        """
        C = self._covariance.to(self._device)
        V = keys if protected is None else torch.cat((protected, keys), dim=1)  # [f, m + n]
        if not (V.isfinite().all() and C.isfinite().all()):
            raise EditError("keys or covariance are not finite", hint="kbsync statistics verify")
        few = V.shape[1] * _FEW <= len(C)
        found = self._by_woodbury(C, V, keys.shape[1], weight) if few else None
        if found is None:
            factor, jitter = _cholesky(torch.addmm(C, V, V.T, beta=weight))
            found = torch.cholesky_solve(keys, factor), jitter
        U, jitter = found
        missing = weight * (C @ U) + jitter * U + V @ (V.T @ U) - keys
        residual = float(missing.norm() / keys.norm())
        if not residual <= _WORST_RESIDUAL:
            raise EditError(f"the solve is off by {residual:.1e} (accepted: {_WORST_RESIDUAL:.0e})", hint=_MORE_TEXT)
        return Solution(U, residual, jitter)

    def _by_woodbury(self, C: Tensor, V: Tensor, count: int, weight: float) -> tuple[Tensor, float] | None:
        """A^-1 times the last `count` columns of V; None where C is so nearly singular that λ is lost beside its
        inverse."""
        if self._factor is None:
            self._factor = _cholesky(C)
        factor, jitter = self._factor
        half = torch.linalg.solve_triangular(factor, V, upper=False)  # L^-1 V
        inner = half.T @ half  # Vᵀ C^-1 V
        inner.diagonal().add_(weight)
        inner, failed = torch.linalg.cholesky_ex(inner)
        if failed:
            return None
        last = torch.eye(len(inner), dtype=inner.dtype, device=inner.device)[:, -count:]
        mixed = half @ torch.cholesky_solve(last, inner)
        return torch.linalg.solve_triangular(factor.T, mixed, upper=True), weight * jitter


class NullSpace:
    """The same system, kept to the directions that ordinary text hardly uses (AlphaEdit, arXiv 2410.02355): those with
    the smallest eigenvalues of C that together hold at most `share` of its trace. What lies in the others is not moved.
    """

    def __init__(self, covariance: Tensor, device: torch.device, share: float) -> None:
        values, vectors = torch.linalg.eigh(covariance.to(device))
        kept = values.clamp(min=0).cumsum(0) <= share * values.sum()
        self.basis = vectors[:, kept]  # [f, q]
        self._normal = Normal(torch.diag(values[kept].clamp(min=0)), device)

    def solve(self, keys: Tensor, *, weight: float, protected: Tensor | None = None) -> Solution:
        """As `Normal.solve`; U lies in the kept directions, and the residual is measured in them."""
        if not self.basis.shape[1]:
            raise EditError("no direction is left to edit in", hint="a larger null_space in the preset")
        earlier = None if protected is None else self.basis.T @ protected
        found = self._normal.solve(self.basis.T @ keys, weight=weight, protected=earlier)
        return Solution(self.basis @ found.U, found.residual, found.jitter)


def _cholesky(matrix: Tensor) -> tuple[Tensor, float]:
    """The lower factor of `matrix` [f, f] and what was added to its diagonal."""
    size = float(matrix.diagonal().mean())
    for share in _JITTERS:
        shifted = matrix.clone()
        shifted.diagonal().add_(share * size)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            return factor, share * size
    raise EditError("the covariance is not positive definite", hint=_MORE_TEXT)
