"""The weights that active deltas stand for, to the byte."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kbsync.errors import StoreError
from kbsync.versions.delta import Delta, Factors
from kbsync.versions.manifest import ActiveDelta
from kbsync.versions.weights import live_columns, live_keys, rebuild, served, weights_sha256
from tests.deltas import MODULES, D, F, random_delta, random_factors, random_weights, stored


def _by_numpy(pristine: Tensor, columns: Sequence[tuple[Tensor, Tensor]]) -> np.ndarray[Any, Any]:
    weight = pristine.double().numpy()
    for left, right in columns:
        weight = weight + left.numpy().astype(np.float64)[:, None] * right.numpy().astype(np.float64)
    return weight


def test_the_weights_are_the_sum_of_the_columns_in_order_to_the_byte(tmp_path: Path) -> None:
    """Delta after delta: its columns but the excluded ones, then its corrections; checked against NumPy."""
    (first, second, third), read = stored(tmp_path, random_delta(3), random_delta(2, seed=10), random_delta(4, seed=20))
    active = [ActiveDelta(delta=first, excluded=(1,), corrections=third), ActiveDelta(delta=second)]
    pristine = random_weights()
    before = {module: matrix.clone() for module, matrix in pristine.items()}
    found = rebuild(pristine, active, read)
    for module in MODULES:
        parts = [
            (read(sha).factors[module], columns)
            for sha, columns in ((first, [0, 2]), (third, range(4)), (second, range(2)))
        ]
        columns = [(factors.left[:, j], factors.right[j]) for factors, picked in parts for j in picked]
        assert found[module].numpy().tobytes() == _by_numpy(pristine[module], columns).tobytes()
        assert torch.equal(pristine[module], before[module])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_threads_tiles_and_layout_make_no_difference_to_the_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """1 and 2 threads, any tile, matrices stored the other way round: the same bytes."""
    d, f, n = 96, 700, 5
    (sha256,), read = stored(tmp_path, Delta({"m": random_factors(n, d=d, f=f)}))
    pristine = torch.randn(d, f, generator=torch.Generator().manual_seed(5)).to(dtype)
    threads, hashes = torch.get_num_threads(), set()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for tile in (1, 1 << 15, 1 << 30):
                monkeypatch.setattr("kbsync.versions.weights._TILE", tile)
                for matrix in (pristine, pristine.T.contiguous().T):
                    weights = rebuild({"m": matrix}, [ActiveDelta(delta=sha256)], read)
                    hashes.add(weights_sha256({"m": served(weights["m"], dtype)}))
    finally:
        torch.set_num_threads(threads)
    assert len(hashes) == 1


def test_the_weights_are_the_same_on_every_device(tmp_path: Path, device: str) -> None:
    """And are left on the device of the pristine ones."""
    (sha256,), read = stored(tmp_path, random_delta(3))
    active = [ActiveDelta(delta=sha256)]
    there = rebuild({module: matrix.to(device) for module, matrix in random_weights().items()}, active, read)
    assert there[MODULES[0]].device.type == device
    assert weights_sha256(there) == weights_sha256(rebuild(random_weights(), active, read))


def test_a_rollback_gives_the_recorded_bytes(tmp_path: Path) -> None:
    """Versions 0, 1, 2 and 1 again: what a version's weights are does not depend on how one came there."""
    (first, second), read = stored(tmp_path, random_delta(3), random_delta(2, seed=10))
    one, two = [ActiveDelta(delta=first)], [ActiveDelta(delta=first), ActiveDelta(delta=second)]
    hashes = [weights_sha256(rebuild(random_weights(), active, read)) for active in ([], one, two, one, [])]
    assert hashes[0] == hashes[4] == weights_sha256(rebuild(random_weights(), [], read))
    assert hashes[1] == hashes[3]
    assert len(set(hashes)) == 3


def test_bf16_weights_are_rounded_once_from_the_exact_sum(tmp_path: Path) -> None:
    """Many changes too small for bf16 alone add up, where adding each to the rounded weights would lose them."""
    small = Factors(torch.full((D, 5), 1e-3), torch.ones(5, F), torch.ones(5, F))
    (sha256,), read = stored(tmp_path, Delta({"m": small}))
    base = torch.ones(D, F, dtype=torch.bfloat16)
    exact = rebuild({"m": base}, [ActiveDelta(delta=sha256)], read)["m"]
    weights = served(exact, torch.bfloat16)
    assert weights.dtype == torch.bfloat16
    assert torch.equal(weights, exact.float().bfloat16())
    assert (weights > base).all()
    assert torch.equal(base + torch.tensor(1e-3, dtype=torch.bfloat16), base)


def test_the_hash_covers_names_order_shapes_dtype_and_bits() -> None:
    """Any of them changes it; the memory layout does not."""
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(2, 2)
    base = weights_sha256({"a": a, "b": b})
    others = [
        {"b": b, "a": a},
        {"a": a, "c": b},
        {"a": a.reshape(3, 2), "b": b},
        {"a": a.bfloat16(), "b": b.bfloat16()},
        {"a": a, "b": -b},
        {"a": a},
    ]
    assert len({base, *(weights_sha256(other) for other in others)}) == 1 + len(others)
    assert weights_sha256({"a": a.T.contiguous().T, "b": b}) == base


def test_a_dense_delta_is_added_whole_or_not_at_all(tmp_path: Path) -> None:
    """Leaving some of its columns out is refused."""
    (sha256,), read = stored(tmp_path, random_delta(D + 1))
    none = rebuild(random_weights(), [ActiveDelta(delta=sha256, excluded=tuple(range(D + 1)))], read)
    assert weights_sha256(none) == weights_sha256(rebuild(random_weights(), [], read))
    with pytest.raises(StoreError, match="stored dense"):
        rebuild(random_weights(), [ActiveDelta(delta=sha256, excluded=(0,))], read)


def test_deltas_of_another_model_are_refused(tmp_path: Path) -> None:
    """Unknown modules, other shapes and columns that the delta never had."""
    (sha256,), read = stored(tmp_path, random_delta(2))
    with pytest.raises(StoreError, match="no edited matrix of this model"):
        rebuild({MODULES[0]: torch.zeros(D, F)}, [ActiveDelta(delta=sha256)], read)
    with pytest.raises(StoreError, match="no edited matrix of this model"):
        rebuild({module: torch.zeros(F, D) for module in MODULES}, [ActiveDelta(delta=sha256)], read)
    with pytest.raises(StoreError, match="column 7 of 2 is excluded"):
        rebuild(random_weights(), [ActiveDelta(delta=sha256, excluded=(7,))], read)


def test_live_keys_are_those_of_the_facts_that_are_held(tmp_path: Path) -> None:
    """In the order of the active deltas, without excluded facts and without corrections."""
    first, second, third = random_delta(3), random_delta(2, seed=10), random_delta(1, seed=20)
    (one, two, corrections), read = stored(tmp_path, first, second, third)
    active = [ActiveDelta(delta=one, excluded=(0,), corrections=corrections), ActiveDelta(delta=two)]
    keys = live_keys(active, read)
    for module in MODULES:
        wanted = torch.cat([first.factors[module].keys[[1, 2]], second.factors[module].keys])
        assert torch.equal(keys[module], wanted)
    assert live_columns(active[0], first) == [1, 2]
    assert live_keys([], read) == {}
