"""How far the weights of two versions are from each other, from their factors alone: no model is loaded, no torch.

Δ₂ − Δ₁ = L R per matrix, over the columns that only one of the versions has, those of the first with a minus. With the
triangular factors of L and Rᵀ (QR), ‖L R‖_F = ‖R_L R_Rᵀ‖_F and both have one rank: small matrices, however large W is.

    found = weight_difference(db.active(model, 1), db.active(model, 2), store)
    found.matrices["model.layers.4.mlp.down_proj"].norm
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kbsync.errors import StoreError
from kbsync.versions.manifest import ActiveDelta
from kbsync.versions.store import VersionStore

__all__ = ["MatrixDifference", "WeightDifference", "base_norms", "weight_difference"]

_WHOLE = -1
"""In the place of a column: a delta stored dense, which is one."""


@dataclass(frozen=True, slots=True)
class MatrixDifference:
    """One matrix: Frobenius norm and rank of the difference."""

    norm: float
    rank: int


@dataclass(frozen=True, slots=True)
class WeightDifference:
    """By module; and the columns of deltas that only the first or only the second version has, by delta's sha256
    (corrections, which take facts out, are weighed but not listed)."""

    matrices: Mapping[str, MatrixDifference]
    only_first: Mapping[str, tuple[int, ...]]
    only_second: Mapping[str, tuple[int, ...]]


def weight_difference(
    first: Sequence[ActiveDelta], second: Sequence[ActiveDelta], store: VersionStore
) -> WeightDifference:
    """Compare the weights that two lists of active deltas stand for. Raises StoreError where a file is missing or
    damaged."""
    files = {sha: _read(store, sha) for sha in _differing(first, second)}
    old, new = _columns(first, files), _columns(second, files)
    gone, come = old.keys() - new.keys(), new.keys() - old.keys()
    modules = sorted({name.rpartition(".")[0] for tensors in files.values() for name in tensors})
    terms = [*((-1.0, one) for one in sorted(gone)), *((1.0, one) for one in sorted(come))]
    matrices = {module: _matrix(module, terms, files) for module in modules}
    return WeightDifference(matrices, _listed(gone, old), _listed(come, new))


def base_norms(active: Sequence[ActiveDelta], relative: Mapping[str, float], store: VersionStore) -> dict[str, float]:
    """‖W‖ of the pristine base by module, which follows from ‖ΔW‖ of a version and the ‖ΔW‖/‖W‖ that it measured of
    itself when it was made (`numerics.capacity.norms` of its manifest)."""
    found = weight_difference((), active, store).matrices
    return {module: found[module].norm / share for module, share in relative.items() if share and module in found}


def _differing(first: Sequence[ActiveDelta], second: Sequence[ActiveDelta]) -> set[str]:
    """The files that the two lists do not use in the same way."""
    return {
        sha
        for entry in set(first).symmetric_difference(second)
        for sha in (entry.delta, entry.corrections)
        if sha is not None
    }


def _read(store: VersionStore, sha256: str) -> dict[str, Any]:
    """The tensors of a delta file, float32."""
    from safetensors.numpy import load

    path = store.delta_path(sha256)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}", hint="kbsync verify") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise StoreError(f"{path}: damaged", hint="kbsync verify")
    return dict(load(data))


def _columns(active: Iterable[ActiveDelta], files: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, int], bool]:
    """(file, column) -> whether it is a correction, for the files that are read."""
    found: dict[tuple[str, int], bool] = {}
    for entry in active:
        if entry.delta in files:
            found |= {(entry.delta, column): False for column in _count(files[entry.delta]) - set(entry.excluded)}
        if entry.corrections is not None and entry.corrections in files:
            found |= {(entry.corrections, column): True for column in _count(files[entry.corrections])}
    return found


def _count(tensors: Mapping[str, Any]) -> set[int]:
    """The columns of a file; of one with a matrix stored dense, which can lose none, the whole as well."""
    columns = next(tensor.shape[1] for name, tensor in tensors.items() if name.endswith(".left"))
    whole = {_WHOLE} if any(name.endswith(".dense") for name in tensors) else set()
    return set(range(columns)) | whole


def _listed(
    columns: Iterable[tuple[str, int]], corrections: Mapping[tuple[str, int], bool]
) -> dict[str, tuple[int, ...]]:
    found: dict[str, list[int]] = {}
    for sha, column in sorted(columns):
        if column != _WHOLE and not corrections[sha, column]:
            found.setdefault(sha, []).append(column)
    return {sha: tuple(some) for sha, some in found.items()}


def _matrix(
    module: str, terms: Sequence[tuple[float, tuple[str, int]]], files: Mapping[str, Mapping[str, Any]]
) -> MatrixDifference:
    """Norm and rank of the sum of the terms: (sign, (file, column))."""
    import numpy as np

    lefts: list[Any] = []
    rights: list[Any] = []
    dense: Any = None
    for sign, (sha, column) in terms:
        tensors = files[sha]
        if (whole := tensors.get(f"{module}.dense")) is not None:
            if column == _WHOLE:
                dense = sign * whole.astype(np.float64) + (0 if dense is None else dense)
        elif column != _WHOLE and f"{module}.left" in tensors:
            lefts.append(sign * tensors[f"{module}.left"][:, column].astype(np.float64))
            rights.append(tensors[f"{module}.right"][column].astype(np.float64))
    if not lefts:
        return MatrixDifference(0.0, 0) if dense is None else _measured(dense, float(np.linalg.norm(dense)))
    left, right = np.stack(lefts, axis=1), np.stack(rights)
    scale = float(np.linalg.norm(left) * np.linalg.norm(right))
    if dense is not None or len(lefts) >= min(left.shape[0], right.shape[1]):
        return _measured(left @ right + (0 if dense is None else dense), scale)
    of_left, of_right = (np.asarray(np.linalg.qr(each, mode="r")) for each in (left, right.T))
    return _measured(of_left @ of_right.T, scale)


def _measured(core: Any, scale: float) -> MatrixDifference:
    """Norm and rank of a matrix; `scale` bounds what it was computed from, below whose rounding there is nothing."""
    import numpy as np

    values = np.linalg.svd(core, compute_uv=False)
    least = max(scale, 1e-300) * max(core.shape) * np.finfo(np.float64).eps
    return MatrixDifference(float(np.linalg.norm(values)), int((values > least).sum()))
