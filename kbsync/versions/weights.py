"""The weights that a list of active deltas stands for, to the byte; their hash; the keys that they hold.

Float32 times float32 is exact in float64, and each element is summed on its own in one fixed order, so threads, BLAS,
fused multiply-add and device make no difference. The rule and the hash are specified in docs/delta-format.md.

    masters = rebuild(pristine, manifest.active, read)                   # float64 [d, f] per module
    weights = {name: served(master, torch.bfloat16) for name, master in masters.items()}
    weights_sha256(weights) == manifest.weights_sha256
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kbsync.errors import StoreError
from kbsync.versions.delta import Delta, Factors
from kbsync.versions.manifest import ActiveDelta

__all__ = ["live_columns", "live_keys", "rebuild", "served", "weights_sha256"]

_TILE = 1 << 15
"""Elements of a matrix that all columns are added to before the next: 256 kB of float64 stay in a core's cache."""

Read = Callable[[str], Delta]
"""Gives the delta of a sha256: `functools.partial(read_delta, folder)`."""


def rebuild(pristine: Mapping[str, Tensor], active: Sequence[ActiveDelta], read: Read) -> dict[str, Tensor]:
    """The exact weights of a version: module -> float64 [d, f], on the device of `pristine` (module -> [d, f]).

    W = W_base; for each active delta in order, each column j not excluded in order, then each column of its
    corrections: W += left[:, j] · right[j, :], elementwise. A dense delta is added as one column. `pristine` is not
    changed. Raises StoreError for a delta of other modules or shapes, or one that cannot give up a column.
    """
    weights = {
        module: matrix.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
        for module, matrix in pristine.items()
    }
    for entry in active:
        delta = read(entry.delta)
        _add(weights, delta, entry.delta, live_columns(entry, delta))
        if entry.corrections is not None:
            corrections = read(entry.corrections)
            _add(weights, corrections, entry.corrections, list(range(corrections.columns)))
    return weights


def live_columns(entry: ActiveDelta, delta: Delta) -> list[int]:
    """The columns of `delta` that an active entry holds, in order. Raises StoreError for excluded ones it never had."""
    if entry.excluded and entry.excluded[-1] >= delta.columns:
        raise StoreError(
            f"delta {entry.delta[:12]}: column {entry.excluded[-1]} of {delta.columns} is excluded",
            hint="kbsync verify",
        )
    return [column for column in range(delta.columns) if column not in set(entry.excluded)]


def _add(weights: Mapping[str, Tensor], delta: Delta, sha256: str, columns: Sequence[int]) -> None:
    for module, factors in delta.factors.items():
        if module not in weights or tuple(weights[module].shape) != factors.shape:
            raise StoreError(
                f"delta {sha256[:12]}: {module} {list(factors.shape)} is no edited matrix of this model",
                hint="kbsync verify",
            )
        if factors.dense is None:
            _add_columns(weights[module], factors, columns)
        elif len(columns) == delta.columns:
            weights[module].add_(factors.dense.to(weights[module]))
        elif columns:
            raise StoreError(
                f"delta {sha256[:12]}: {module} is stored dense, no column of it can be left out",
                hint="roll back to an earlier version: kbsync rollback --to V",
            )


def _add_columns(weight: Tensor, factors: Factors, columns: Sequence[int]) -> None:
    """W [d, f] += Σ_j left[:, j] · right[j, :] in the order of `columns`, in place, tile after tile of rows."""
    left, right = factors.left.to(weight), factors.right.to(weight)
    rows = weight.shape[0] if weight.is_cuda else max(1, _TILE // weight.shape[1])
    for tile, part in zip(torch.split(weight, rows), torch.split(left, rows), strict=True):
        for column in columns:
            tile.addcmul_(part[:, column, None], right[column])


def served(master: Tensor, dtype: torch.dtype) -> Tensor:
    """Exact weights (float64, any shape) as they are served: rounded to float32, then to `dtype`; float64 stays."""
    return master.clone() if dtype == torch.float64 else master.to(torch.float32).to(dtype)


def weights_sha256(matrices: Mapping[str, Tensor]) -> str:
    """sha256 of the edited matrices in the order of `matrices` (module order), in the dtype that they are in.

    Per matrix: a line `<module> <dtype> <d> <f>`, then its elements in row order, little-endian.
    """
    digest = hashlib.sha256()
    for module, matrix in matrices.items():
        d, f = matrix.shape
        digest.update(f"{module} {str(matrix.dtype).removeprefix('torch.')} {d} {f}\n".encode())
        digest.update(matrix.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def live_keys(active: Sequence[ActiveDelta], read: Read) -> dict[str, Tensor]:
    """The keys of all facts that the active deltas hold, module -> float32 [m, f]: what an insertion must protect."""
    keys: dict[str, list[Tensor]] = {}
    for entry in active:
        delta = read(entry.delta)
        columns = live_columns(entry, delta)
        for module, factors in delta.factors.items():
            keys.setdefault(module, []).append(factors.keys[columns])
    return {module: torch.cat(parts) for module, parts in keys.items()}
