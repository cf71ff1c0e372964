"""The normal equations: right by definition, by either way, with their accuracy known; refused where they are not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kbsync.editor.solve import Normal, NullSpace
from kbsync.errors import EditError

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def covariance(size: int, rows: int) -> Tensor:
    keys = random(rows, size, seed=1) * torch.logspace(0, -3, size, dtype=torch.float64)
    return keys.T @ keys / rows


@settings(deadline=None)
@given(
    few=st.integers(1, 6),
    protected=st.integers(0, 30),
    weight=st.sampled_from([1e-2, 1.0, 300.0, 15000.0]),
)
def test_both_ways_solve_the_system(few: int, protected: int, weight: float) -> None:
    """Woodbury (few keys) and direct Cholesky (many) both give A^-1 K."""
    C, K = covariance(48, 500), random(48, few, seed=2)
    earlier = random(48, protected, seed=3) if protected else None
    solution = Normal(C, CPU).solve(K, weight=weight, protected=earlier)
    A = weight * C + K @ K.T + (0 if earlier is None else earlier @ earlier.T)
    assert torch.allclose(A @ solution.U, K, atol=1e-9)
    assert solution.residual < 1e-9
    assert solution.jitter == 0


def test_factor_is_made_once_for_every_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Further small batches, also with another λ, reuse the covariance's factor."""
    sizes: list[int] = []
    factorise = torch.linalg.cholesky_ex

    def count(matrix: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(matrix))
        found: tuple[Tensor, Tensor] = factorise(matrix)
        return found

    monkeypatch.setattr(torch.linalg, "cholesky_ex", count)
    normal = Normal(covariance(48, 500), CPU)
    for seed, weight in enumerate((1.0, 300.0)):
        normal.solve(random(48, 3, seed=seed), weight=weight)
    assert sizes == [48, 3, 3]  # and what is left of the system, for each batch


@pytest.mark.parametrize("keys", [2, 40], ids=["few", "many"])
def test_singular_covariance_is_solved_with_recorded_jitter(keys: int) -> None:
    """A neuron that never fires makes C singular; the jitter that helps is tiny and said."""
    C = covariance(48, 500)
    C[5], C[:, 5] = 0, 0
    K = random(48, keys, seed=2)
    K[5] = 0
    solution = Normal(C, CPU).solve(K, weight=2.0)
    assert 0 < solution.jitter <= 2e-8 * float(C.diagonal().mean() + K.square().sum() / 48)
    assert torch.allclose((2 * C + K @ K.T) @ solution.U, K, atol=1e-6)


def test_few_keys_in_directions_that_text_does_not_use_are_solved_directly() -> None:
    """Where C is so small that λ is lost beside Vᵀ C^-1 V, equal keys make that singular; the system itself is not."""
    C = torch.eye(48, dtype=torch.float64)
    C.diagonal()[40:] = 1e-20
    K = torch.zeros(48, 3, dtype=torch.float64)
    K[40:] = random(8, 1)
    K[:, 2] = random(48, 1, seed=2)[:, 0]
    normal = Normal(C, CPU)
    assert normal._by_woodbury(C, K, 3, 1.0) is None
    U = normal.solve(K, weight=1.0).U
    assert torch.allclose((C + K @ K.T) @ U, K, atol=1e-6)


def test_indefinite_covariance_is_refused() -> None:
    """Damaged statistics are no covariance."""
    with pytest.raises(EditError, match="not positive definite"):
        Normal(-torch.eye(8, dtype=torch.float64), CPU).solve(random(8, 1), weight=1.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    """Neither keys nor covariance may be NaN or infinite."""
    spoilt = torch.eye(8, dtype=torch.float64)
    spoilt[0, 0] = value
    with pytest.raises(EditError, match="not finite"):
        Normal(spoilt, CPU).solve(random(8, 1), weight=1.0)
    with pytest.raises(EditError, match="not finite"):
        Normal(torch.eye(8, dtype=torch.float64), CPU).solve(random(8, 1) * value, weight=1.0)


def test_inaccurate_solve_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor that is off (here by 0.1 %) shows in the residual and is refused, never used."""
    factorise = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda A: (factorise(A)[0] * 1.001, torch.tensor(0)))
    with pytest.raises(EditError, match="the solve is off by"):
        Normal(covariance(48, 500), CPU).solve(random(48, 40), weight=1.0)


@settings(deadline=None)
@given(share=st.floats(0.001, 0.5), protected=st.integers(0, 5), few=st.integers(1, 5))
def test_null_space_moves_only_what_text_hardly_uses(share: float, protected: int, few: int) -> None:
    """U lies in the directions that hold at most the share of the energy, and solves the system restricted to them."""
    C, K, weight = covariance(48, 500), random(48, few, seed=2), 3.0
    earlier = random(48, protected, seed=3) if protected else None
    system = NullSpace(C, CPU, share)
    Q = system.basis
    U = system.solve(K, weight=weight, protected=earlier).U
    assert torch.allclose(Q @ (Q.T @ U), U, atol=1e-9)
    assert torch.trace(Q.T @ C @ Q) <= share * torch.trace(C) * (1 + 1e-9)
    A = weight * C + K @ K.T + (0 if earlier is None else earlier @ earlier.T)
    assert torch.allclose(Q.T @ A @ U, Q.T @ K, atol=1e-7)


def test_null_space_without_a_direction_is_refused() -> None:
    """A share smaller than the smallest direction's leaves nothing to edit in."""
    with pytest.raises(EditError, match="no direction"):
        NullSpace(torch.eye(8, dtype=torch.float64), CPU, 0.01).solve(random(8, 1), weight=1.0)
