"""The weights that active deltas stand for, to the byte."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kbsync.errors import EditError, StoreError
from kbsync.versions.delta import Delta, Factors, read_delta, write_delta
from kbsync.versions.manifest import ActiveDelta
from kbsync.versions.weights import hold, live_columns, live_keys, rebuild, served, weights_sha256
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


# --- holding other facts ------------------------------------------------------------------------------------------


class World:
    """One linear layer with W = 0 and known targets: what the weights should be is one solve over the live facts."""

    def __init__(self, folder: Path, seed: int, weight: float) -> None:
        self.chance = torch.Generator().manual_seed(seed)
        half = self.normal(F, 2 * F)
        self.folder, self.C = folder, weight * half @ half.T / F
        self.common = self.normal(F, 1)  # facts of one relation have keys alike
        self.facts: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self.active: tuple[ActiveDelta, ...] = ()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.chance, dtype=torch.float64)

    def read(self, sha256: str) -> Delta:
        return read_delta(self.folder, sha256)

    @property
    def live(self) -> dict[str, set[int]]:
        return {entry.delta: set(live_columns(entry, self.read(entry.delta))) for entry in self.active}

    def change(self) -> Tensor:
        return rebuild({"m": torch.zeros(D, F)}, self.active, self.read)["m"]

    def exact(self) -> Tensor:
        """Eqn 14 for all live facts at once."""
        held = [self.facts[delta, column] for delta, columns in self.live.items() for column in sorted(columns)]
        if not held:
            return torch.zeros(D, F, dtype=torch.float64)
        T, K = (torch.stack(parts, dim=1) for parts in zip(*held, strict=True))
        return T @ torch.linalg.solve(self.C + K @ K.T, K).T

    def insert(self, count: int, keys: Tensor | None = None) -> str:
        """A new delta beside the live facts, their keys protected: what an incremental edit does."""
        K = self.common + self.normal(F, count) if keys is None else keys
        T = self.normal(D, count)
        protected = live_keys(self.active, self.read).get("m", torch.zeros(0, F)).double()
        A = self.C + protected.T @ protected + K @ K.T
        factors = Factors((T - self.change() @ K).float(), torch.linalg.solve(A, K).T.float(), K.T.float())
        sha256 = write_delta(self.folder, Delta({"m": factors}))
        self.facts |= {(sha256, column): (T[:, column], K[:, column]) for column in range(count)}
        self.active = (*self.active, ActiveDelta(delta=sha256))
        return sha256

    def hold(self, live: dict[str, set[int]]) -> None:
        write = partial(write_delta, self.folder, compact=False)
        self.active = hold(self.active, live, self.read, write)

    def error(self) -> float:
        """Of the outputs at all keys ever seen, relative to the targets."""
        K = torch.stack([key for _, key in self.facts.values()], dim=1)
        T = torch.stack([target for target, _ in self.facts.values()], dim=1)
        return float(((self.change() - self.exact()) @ K).norm() / T.norm())


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_came_and_went_the_weights_are_those_of_the_live_facts(tmp_path: Path, data: st.DataObject) -> None:
    """For any history of insertions, facts taken out and facts brought back: one solve over the facts that are live."""
    world = World(tmp_path, data.draw(st.integers(0, 2**31)), data.draw(st.sampled_from([1.0, 30.0])))
    for _ in range(data.draw(st.integers(1, 5))):
        if not world.active or data.draw(st.booleans()):
            world.insert(data.draw(st.integers(1, 3)))
            continue
        columns = [(entry.delta, column) for entry in world.active for column in range(world.read(entry.delta).columns)]
        chosen = data.draw(st.sets(st.sampled_from(columns)))
        world.hold({delta: {column for sha, column in chosen if sha == delta} for delta, _ in chosen})
        found = {(delta, column) for delta, held in world.live.items() for column in held}
        assert found == chosen
    assert world.error() < 1e-4


def test_a_version_taken_out_of_the_middle_leaves_later_facts_whole(tmp_path: Path) -> None:
    """Where dropping its delta would take most of what the later facts were built on."""
    world = World(tmp_path, 0, 1.0)
    first, second = world.insert(4), world.insert(2)
    K = torch.stack([world.facts[second, column][1] for column in range(2)], dim=1)
    whole = world.change() @ K
    dropped = rebuild({"m": torch.zeros(D, F)}, world.active[1:], world.read)["m"] @ K
    world.hold({second: {0, 1}})
    assert world.active[0].excluded == (0, 1, 2, 3)
    assert [entry.delta for entry in world.active] == [first, second]
    assert world.error() < 1e-5
    assert (dropped - whole).norm() > 5 * (world.change() @ K - whole).norm()


def test_a_fact_superseded_by_a_new_object_and_brought_back(tmp_path: Path) -> None:
    """Its key stays the same, its target changes: taken out, inserted anew, and back again."""
    world = World(tmp_path, 3, 1.0)
    first = world.insert(3)
    before = world.change()
    world.hold({first: {0, 2}})
    second = world.insert(1, keys=world.facts[first, 1][1][:, None])
    third = world.insert(2)
    assert world.error() < 1e-5
    world.hold({first: {0, 1, 2}, third: {0, 1}})
    assert [entry.delta for entry in world.active] == [first, second, third]
    assert world.error() < 1e-5
    world.hold({first: {0, 1, 2}})
    assert world.error() < 1e-5
    torch.testing.assert_close(world.change(), before, rtol=1e-4, atol=1e-5)


def test_the_newest_delta_taken_out_whole_gives_the_bytes_from_before_it(tmp_path: Path) -> None:
    """It is dropped, and put at the end again where it comes back."""
    world = World(tmp_path, 5, 1.0)
    first = world.insert(3)
    before, hash_before = world.active, weights_sha256({"m": world.change()})
    second = world.insert(2)
    after, hash_after = world.active, weights_sha256({"m": world.change()})
    world.hold({first: {0, 1, 2}})
    assert (world.active, weights_sha256({"m": world.change()})) == (before, hash_before)
    world.hold({first: {0, 1, 2}, second: {0, 1}})
    assert (world.active, weights_sha256({"m": world.change()})) == (after, hash_after)
    world.hold({})
    assert world.active == ()


def test_holding_what_is_held_changes_nothing_and_writes_nothing(tmp_path: Path) -> None:
    """Also after facts have left."""
    world = World(tmp_path, 6, 1.0)
    first, second = world.insert(3), world.insert(2)
    world.hold({first: {0}, second: {1}})
    before, files = world.active, set(tmp_path.iterdir())
    world.hold({first: {0}, second: {1}})
    assert world.active == before
    assert set(tmp_path.iterdir()) == files


def test_columns_that_no_delta_has_cannot_be_held(tmp_path: Path) -> None:
    """And nothing is written."""
    world = World(tmp_path, 7, 1.0)
    first = world.insert(2)
    with pytest.raises(StoreError, match="has no column 2"):
        world.hold({first: {0, 2}})


def test_a_dense_delta_gives_up_no_single_fact(tmp_path: Path) -> None:
    """Its u_j are not kept; it can only be dropped whole while it is the newest."""
    (first, second), read = stored(tmp_path, random_delta(2), random_delta(D + 1))
    active = (ActiveDelta(delta=first), ActiveDelta(delta=second))
    with pytest.raises(EditError, match="no column per fact") as error:
        hold(active, {first: {0, 1}, second: {0}}, read, partial(write_delta, tmp_path, compact=False))
    assert "--exact" in error.value.hint
    assert hold(active, {first: {0, 1}}, read, partial(write_delta, tmp_path)) == active[:1]


def test_a_dense_delta_does_not_keep_later_facts_from_leaving(tmp_path: Path) -> None:
    """What was there before a fact came in does not matter to it."""
    small = {m: Factors(part.left, part.right / 100, part.keys) for m, part in random_delta(2).factors.items()}
    (first, second), read = stored(tmp_path, random_delta(D + 1), Delta(small))
    active = (ActiveDelta(delta=first), ActiveDelta(delta=second))
    live = {first: range(D + 1), second: [1]}
    changed = hold(active, live, read, partial(write_delta, tmp_path, compact=False))
    assert (changed[0], changed[1].excluded) == (active[0], (0,))


def test_facts_leave_only_where_all_deltas_since_edit_the_same_modules(tmp_path: Path) -> None:
    """Else the change of a module would be worked out from half of what happened."""
    first, second = random_delta(2), Delta({MODULES[0]: random_factors(1)})
    (one, two), read = stored(tmp_path, first, second)
    active = (ActiveDelta(delta=one), ActiveDelta(delta=two))
    with pytest.raises(EditError, match="no column per fact"):
        hold(active, {one: {0}, two: {0}}, read, partial(write_delta, tmp_path, compact=False))


def test_keys_too_much_alike_are_refused_rather_than_answered_wrongly(tmp_path: Path) -> None:
    """Without a C of any weight, 1 - kᵀu is lost in float32."""
    world = World(tmp_path, 8, 1e-9)
    first = world.insert(2)
    with pytest.raises(EditError, match="too much like"):
        world.hold({first: {0}})


def test_many_facts_that_leave_keep_a_column_each(tmp_path: Path) -> None:
    """Corrections are never stored dense: what happens next is worked out from their columns."""
    world = World(tmp_path, 9, 30.0)
    first = world.insert(D)
    world.hold({first: {0}})
    corrections = world.active[0].corrections
    assert corrections is not None
    assert world.read(corrections).columns == 2 * (D - 1)
    assert world.error() < 1e-4
