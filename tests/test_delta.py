"""The delta file, taking facts out of a delta, and the page that specifies the file."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from kbsync.errors import EditError, StoreError
from kbsync.versions.delta import FORMAT, Delta, Factors, correct, read_delta, write_delta
from kbsync.versions.files import delta_file, sha256_of
from kbsync.versions.manifest import ActiveDelta
from kbsync.versions.weights import rebuild, served, weights_sha256
from tests.deltas import (
    MODULES,
    D,
    F,
    manifest,
    random_delta,
    random_factors,
    random_weights,
    solved_delta,
    solved_factors,
    stored,
)

PAGE = Path(__file__).parents[1] / "docs" / "delta-format.md"
FACTORS = ("left", "right", "keys")
ZEROS = torch.zeros(1, F)


# --- the file -----------------------------------------------------------------------------------------------------


def test_a_delta_reads_back_bit_for_bit(tmp_path: Path) -> None:
    """Under the sha256 of its file, with mode 0640."""
    delta = random_delta(3)
    sha256 = write_delta(tmp_path, delta)
    path = delta_file(tmp_path, sha256)
    found = read_delta(tmp_path, sha256)
    assert (sha256_of(path), path.stat().st_mode & 0o777) == (sha256, 0o640)
    assert (set(found.factors), found.columns) == (set(MODULES), 3)
    for module in MODULES:
        assert found.factors[module].dense is None
        assert found.factors[module].shape == (D, F)
        for part in FACTORS:
            assert torch.equal(getattr(found.factors[module], part), getattr(delta.factors[module], part))


def test_the_same_delta_has_the_same_name_and_is_written_once(tmp_path: Path) -> None:
    """Tensors that are views of one another or not contiguous make no difference; a damaged file is written anew."""
    whole = torch.randn(2 * D, 3, generator=torch.Generator().manual_seed(1))
    other = random_factors(3)
    views = Delta(
        {
            m: Factors(whole[i * D : (i + 1) * D], other.right.T.contiguous().T, other.keys)
            for i, m in enumerate(MODULES)
        }
    )
    copies = Delta({m: Factors(x.left.clone(), x.right.contiguous(), x.keys.clone()) for m, x in views.factors.items()})
    sha256 = write_delta(tmp_path, views)
    inode = delta_file(tmp_path, sha256).stat().st_ino
    assert write_delta(tmp_path, copies) == sha256
    assert delta_file(tmp_path, sha256).stat().st_ino == inode
    delta_file(tmp_path, sha256).write_bytes(b"damaged")
    assert write_delta(tmp_path, copies) == sha256
    read_delta(tmp_path, sha256)


def test_any_flipped_byte_is_refused_by_name(tmp_path: Path) -> None:
    """In header or data: safetensors alone loads a flipped bit in the data without a word."""
    sha256 = write_delta(tmp_path, random_delta(1))
    path = delta_file(tmp_path, sha256)
    good = path.read_bytes()
    for place in (0, 9, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(StoreError, match=rf"{sha256}\.safetensors: damaged") as error:
            read_delta(tmp_path, sha256)
        assert "rollback" in error.value.hint
    path.write_bytes(good[:-1])
    with pytest.raises(StoreError, match="damaged"):
        read_delta(tmp_path, sha256)


def test_a_missing_delta_is_named(tmp_path: Path) -> None:
    """With the command that finds all others that are missing."""
    with pytest.raises(StoreError, match=r"0{64}\.safetensors: cannot be read: No such file") as error:
        read_delta(tmp_path, "0" * 64)
    assert error.value.hint == "kbsync verify"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no safetensors",
        save({"m.left": torch.zeros(1)}),
        save({"m.left": torch.zeros(1)}, metadata={"format": "kbsync-delta/2"}),
        save({"left": torch.zeros(1)}, metadata={"format": FORMAT}),
        save({"m.left": torch.zeros(D, 1)}, metadata={"format": FORMAT}),
        save({"m.other": torch.zeros(1)}, metadata={"format": FORMAT}),
        save({f"m.{part}": torch.zeros(2, 2).double() for part in FACTORS}, metadata={"format": FORMAT}),
        save({f"m.{part}": torch.zeros(2, 3) for part in FACTORS}, metadata={"format": FORMAT}),
        save({f"m.{part}": torch.full((2, 2), torch.nan) for part in FACTORS}, metadata={"format": FORMAT}),
        save({}, metadata={"format": FORMAT}),
    ],
)
def test_a_whole_file_that_is_no_delta_of_this_format_is_refused(tmp_path: Path, data: bytes) -> None:
    """Even where its name is its sha256."""
    path = tmp_path / "file"
    path.write_bytes(data)
    sha256 = sha256_of(path)
    path.rename(delta_file(tmp_path, sha256))
    with pytest.raises(StoreError, match="not a delta that this kbsync reads"):
        read_delta(tmp_path, sha256)


@pytest.mark.parametrize(
    ("factors", "problem"),
    [
        (Factors(torch.full((D, 1), torch.inf), ZEROS, ZEROS), "left has values that are not finite"),
        (Factors(torch.zeros(D, 1), ZEROS, torch.zeros(2, F)), r"keys is .* \[2, 11\], not float32 \[1, 11\]"),
        (Factors(torch.zeros(D, 1).double(), ZEROS, ZEROS), "left is torch.float64"),
        (random_factors(0), "no columns"),
    ],
)
def test_what_no_reader_would_take_is_never_written(tmp_path: Path, factors: Factors, problem: str) -> None:
    """NaN, infinity, wrong shapes and dtypes are the edit's fault, and say which tensor."""
    with pytest.raises(EditError, match=problem):
        write_delta(tmp_path, Delta({"m": factors}))
    assert list(tmp_path.iterdir()) == []


def test_modules_must_agree_on_the_number_of_columns(tmp_path: Path) -> None:
    """Column j is the same fact in every module."""
    with pytest.raises(EditError, match=r"b\.left"):
        write_delta(tmp_path, Delta({"a": random_factors(2), "b": random_factors(3)}))


@pytest.mark.parametrize(("n", "dense"), [(D, False), (D + 1, True)])
def test_factors_that_cost_more_than_the_matrix_are_stored_dense(tmp_path: Path, n: int, dense: bool) -> None:
    """With left and keys kept; the change is the same to float32, and reading and writing again gives the same file."""
    delta = random_delta(n)
    sha256 = write_delta(tmp_path, delta)
    found = read_delta(tmp_path, sha256)
    factors = found.factors[MODULES[0]]
    assert (factors.dense is not None, found.columns, factors.shape) == (dense, n, (D, F))
    assert factors.right.shape == ((0, F) if dense else (n, F))
    assert write_delta(tmp_path, found) == sha256
    change = rebuild(
        {m: torch.zeros(D, F) for m in MODULES}, [ActiveDelta(delta=sha256)], partial(read_delta, tmp_path)
    )
    wanted = delta.factors[MODULES[0]].left.double() @ delta.factors[MODULES[0]].right.double()
    torch.testing.assert_close(change[MODULES[0]], wanted, rtol=1e-5, atol=1e-5)


# --- taking facts out ---------------------------------------------------------------------------------------------


@st.composite
def _systems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    n, seed = draw(st.integers(2, 7)), draw(st.integers(0, 2**31))
    weight = draw(st.sampled_from([0.3, 1.0, 30.0, 3000.0]))
    out = draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1))
    chance = torch.Generator().manual_seed(seed)
    R, K, B = (torch.randn(shape, generator=chance, dtype=torch.float64) for shape in ((D, n), (F, n), (F, 2 * F)))
    return R, K, weight * B @ B.T / F, sorted(out)


@settings(deadline=None, max_examples=50)
@given(_systems())
def test_taking_facts_out_equals_solving_without_them(system: tuple[Tensor, Tensor, Tensor, list[int]]) -> None:
    """For any set of facts and any weight of C: the columns that stay plus the corrections are Eqn 14 of the rest."""
    R, K, C, out = system
    stay = [column for column in range(R.shape[1]) if column not in out]
    delta = Delta({"m": solved_factors(R, K, C)})
    corrections = correct(delta, out).factors["m"]
    factors = delta.factors["m"]
    found = (
        factors.left[:, stay].double() @ factors.right[stay].double()
        + corrections.left.double() @ corrections.right.double()
    )
    rest = K[:, stay]
    wanted = R[:, stay] @ torch.linalg.solve(C + rest @ rest.T, rest).T
    assert corrections.columns == len(out)
    assert (found - wanted).norm() <= 2e-5 * (R @ factors.right.double()).norm()


def test_one_fact_taken_out_is_the_rank_one_answer() -> None:
    """Δ - (r - Δk) uᵀ / (1 - kᵀu), which plain subtraction of its column is not."""
    R, K, C = (
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        for i, shape in enumerate(((D, 3), (F, 3), (F, F)))
    )
    factors = solved_factors(R, K, C @ C.T + torch.eye(F))
    left, right, keys = (part.double() for part in (factors.left, factors.right, factors.keys))
    change, r, u, k = left @ right, left[:, 1], right[1], keys[1]
    wanted = change - torch.outer(r - change @ k, u) / (1 - k @ u)
    plain = change - torch.outer(r, u)
    got = correct(Delta({"m": factors}), [1]).factors["m"]
    found = plain + got.left.double() @ got.right.double()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert (plain - wanted).norm() > 0.01 * wanted.norm()
    assert torch.equal(got.keys, factors.keys[[1]])


def test_corrections_are_a_delta_that_can_be_stored(tmp_path: Path) -> None:
    """One active entry then holds the columns that stay and the corrections, and gives Δ without the facts."""
    R, K = torch.randn(D, 4, dtype=torch.float64), torch.randn(F, 4, dtype=torch.float64)
    delta = Delta({module: solved_factors(R, K, torch.eye(F, dtype=torch.float64)) for module in MODULES})
    (sha256, corrections), read = stored(tmp_path, delta, correct(delta, {0, 2}))
    active = [ActiveDelta(delta=sha256, excluded=(0, 2), corrections=corrections)]
    found = rebuild({module: torch.zeros(D, F) for module in MODULES}, active, read)
    rest = K[:, [1, 3]]
    wanted = R[:, [1, 3]] @ torch.linalg.solve(torch.eye(F) + rest @ rest.T, rest).T
    torch.testing.assert_close(found[MODULES[1]], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("out", [[], [0, 1, 2], [3], [-1]])
def test_no_columns_all_columns_and_unknown_columns_cannot_be_taken_out(out: list[int]) -> None:
    """Where all go, the delta itself is left out of the active ones."""
    with pytest.raises(ValueError, match="cannot take columns"):
        correct(random_delta(3), out)


def test_a_dense_delta_gives_up_no_single_fact(tmp_path: Path) -> None:
    """Its u_j are not kept; the error says how to keep them next time."""
    (sha256,), read = stored(tmp_path, random_delta(D + 1))
    with pytest.raises(EditError, match="stored dense") as error:
        correct(read(sha256), [0])
    assert f"{D} or less" in error.value.hint


def test_keys_too_much_alike_are_refused_rather_than_answered_wrongly() -> None:
    """Without a C of any weight, 1 - kᵀu is lost in float32."""
    K = torch.randn(F, 2, dtype=torch.float64)
    delta = Delta(
        {"m": solved_factors(torch.randn(D, 2, dtype=torch.float64), K, 1e-9 * torch.eye(F, dtype=torch.float64))}
    )
    with pytest.raises(EditError, match="too much alike"):
        correct(delta, [1])


# --- the page -----------------------------------------------------------------------------------------------------


def _page_reader() -> dict[str, Any]:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102 - the page's own reader, which this test is about
    return names


def test_the_reader_on_the_format_page_gives_the_same_weights_to_the_byte(tmp_path: Path) -> None:
    """It is run as it stands there, on factors, corrections, excluded columns and a dense delta."""
    reader = _page_reader()
    first = random_delta(4)
    shas, read = stored(
        tmp_path, first, correct(solved_delta(4), [1]), random_delta(D + 2, seed=30), random_delta(2, seed=40)
    )
    active = (
        ActiveDelta(delta=shas[0], excluded=(1,), corrections=shas[1]),
        ActiveDelta(delta=shas[2]),
        ActiveDelta(delta=shas[2], excluded=tuple(range(D + 2))),
        ActiveDelta(delta=shas[3]),
    )
    pristine = random_weights()
    ours = {m: served(w, torch.float32) for m, w in rebuild(pristine, active, read).items()}
    recorded = json.loads(manifest(active=active, weights_sha256=weights_sha256(ours)).to_bytes())
    theirs = reader["weights"]({m: w.numpy() for m, w in pristine.items()}, recorded, tmp_path)
    assert all(theirs[module].tobytes() == ours[module].numpy().tobytes() for module in MODULES)
    assert reader["weights_sha256"](theirs) == recorded["weights_sha256"]


def test_the_reader_on_the_format_page_refuses_a_damaged_file(tmp_path: Path) -> None:
    """It keeps the rule that the page gives."""
    (sha256,), _ = stored(tmp_path, random_delta(1))
    path = delta_file(tmp_path, sha256)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="damaged"):
        _page_reader()["read"](tmp_path, sha256)


def test_the_format_page_names_format_tensors_shapes_and_mode_as_the_code_has_them(tmp_path: Path) -> None:
    """Each row of its table is checked against real files, with a column for each fact and dense."""
    text = PAGE.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `<module>\.(\w+)` \| \[(\w), \w\] \|", text, flags=re.MULTILINE))
    shapes = dict(re.findall(r"^\| `<module>\.(\w+)` \| \[(\w, \w)\] \|", text, flags=re.MULTILINE))
    assert list(rows) == ["left", "right", "keys", "dense"]
    for n, parts in ((D, {"left", "right", "keys"}), (D + 1, {"left", "keys", "dense"})):
        sha256 = write_delta(tmp_path, Delta({"m": random_factors(n)}))
        data = delta_file(tmp_path, sha256).read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert header.pop("__metadata__") == {"format": FORMAT}
        assert set(header) == {f"m.{part}" for part in parts}
        for part in parts:
            letters = shapes[part].split(", ")
            assert header[f"m.{part}"]["shape"] == [{"d": D, "f": F, "n": n}[letter] for letter in letters]
            assert header[f"m.{part}"]["dtype"] == "F32"
    assert f"`{FORMAT}`" in text
    assert "mode 0640" in text
    assert "where n > d" in text
