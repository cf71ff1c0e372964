"""The delta file and the page that specifies it."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from kbsync.errors import EditError, StoreError
from kbsync.versions.delta import FORMAT, Delta, Factors, read_delta, write_delta
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
        tmp_path, first, random_delta(1, seed=20), random_delta(D + 2, seed=30), random_delta(2, seed=40)
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
