"""Two versions in weights: the norms from the factors are those of the dense matrices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from kbsync.errors import StoreError
from kbsync.versions.delta import Delta, Factors, read_delta, write_delta
from kbsync.versions.difference import base_norms, weight_difference
from kbsync.versions.manifest import ActiveDelta
from kbsync.versions.store import VersionStore
from kbsync.versions.weights import rebuild

MODULES = {"a": (6, 9), "b": (4, 5)}


def written(store: VersionStore, columns: int, seed: int, *, compact: bool = True) -> str:
    """A delta file with random factors."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        module: Factors(
            torch.randn(d, columns, generator=generator),
            torch.randn(columns, f, generator=generator),
            torch.randn(columns, f, generator=generator),
        )
        for module, (d, f) in MODULES.items()
    }
    return write_delta(store.deltas, Delta(factors), compact=compact)


def pristine() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {module: torch.randn(shape, generator=generator) for module, shape in MODULES.items()}


def dense(store: VersionStore, active: Sequence[ActiveDelta]) -> dict[str, np.ndarray]:
    """The exact weights of a list of active deltas."""
    read = partial(read_delta, store.deltas)
    return {module: matrix.numpy() for module, matrix in rebuild(pristine(), active, read).items()}


@pytest.fixture
def store(tmp_path: Path) -> VersionStore:
    return VersionStore(tmp_path, "tiny")


def lists(store: VersionStore) -> dict[str, list[ActiveDelta]]:
    """Lists of active deltas: few columns, excluded ones with corrections, many columns (stored dense)."""
    one, two, many = written(store, 3, 1), written(store, 2, 2), written(store, 8, 3)
    corrections = written(store, 2, 4, compact=False)
    return {
        "nothing": [],
        "one": [ActiveDelta(delta=one)],
        "both": [ActiveDelta(delta=one), ActiveDelta(delta=two)],
        "corrected": [ActiveDelta(delta=one, excluded=(1,), corrections=corrections), ActiveDelta(delta=two)],
        "dense": [ActiveDelta(delta=many)],
        "mixed": [ActiveDelta(delta=many), ActiveDelta(delta=two, excluded=(0,))],
    }


def test_norm_and_rank_are_those_of_the_dense_difference(store: VersionStore) -> None:
    """Whatever the two lists share, exclude, correct or store dense, in both directions."""
    active = lists(store)
    for first in active.values():
        for second in active.values():
            found = weight_difference(first, second, store).matrices
            for module, before in dense(store, first).items():
                difference = dense(store, second)[module] - before
                if module not in found:
                    assert not difference.any()
                    continue
                assert found[module].norm == pytest.approx(np.linalg.norm(difference), rel=1e-6, abs=1e-6)
                assert found[module].rank == np.linalg.matrix_rank(difference, tol=1e-6)


def test_the_columns_that_only_one_has_are_named(store: VersionStore) -> None:
    """By delta; corrections are not facts' columns."""
    active = lists(store)
    one, two = (entry.delta for entry in active["both"])
    found = weight_difference(active["corrected"], active["one"], store)
    assert found.only_first == {two: (0, 1)}
    assert found.only_second == {one: (1,)}
    same = weight_difference(active["both"], active["both"], store)
    assert (same.matrices, same.only_first, same.only_second) == ({}, {}, {})


def test_the_norm_of_the_base_follows_from_what_a_version_measured(store: VersionStore) -> None:
    """‖W‖ is ‖ΔW‖ over the recorded ‖ΔW‖/‖W‖."""
    active, base = lists(store)["corrected"], pristine()
    measured = {
        module: float(np.linalg.norm(matrix - base[module].numpy()) / np.linalg.norm(base[module].numpy()))
        for module, matrix in dense(store, active).items()
    }
    found = base_norms(active, measured, store)
    assert found == {module: pytest.approx(float(matrix.norm()), rel=1e-6) for module, matrix in base.items()}


def test_a_missing_or_damaged_file_is_named(store: VersionStore) -> None:
    """The difference is not half computed."""
    active = lists(store)["one"]
    path = store.delta_path(active[0].delta)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StoreError, match="damaged"):
        weight_difference([], active, store)
    path.unlink()
    with pytest.raises(StoreError, match="cannot be read"):
        weight_difference([], active, store)
