"""A delta: the weight change of one edit as factors, one column per fact, in an immutable file named by its content.

The file is specified in docs/delta-format.md. Per edited matrix W [d, f] (d = d_out, f = d_in) it holds `left` [d, n],
`right` [n, f] and `keys` [n, f], float32: Δ = left @ right, column j and row j belonging to fact j.

    sha = write_delta(folder, Delta({"model.layers.4.mlp.down_proj": Factors(left, right, keys)}))
    delta = read_delta(folder, sha)               # refused where a single bit is not as it was written
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kbsync.errors import EditError, StoreError
from kbsync.versions.files import delta_file, sha256_of, write_durably

__all__ = ["FORMAT", "Delta", "Factors", "read_delta", "write_delta"]

FORMAT = "kbsync-delta/1"
"""The metadata entry `format` of a delta file. The only entry: safetensors writes several in no fixed order."""


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """Δ of one matrix [d, f]: `left` [d, n], `right` [n, f], `keys` [n, f], float32 on the CPU. Column j is fact j.

    `keys` holds the facts' keys k_j as rows. Where `dense` [d, f] is there it is Δ itself, and `right` is [0, f].
    """

    left: Tensor
    right: Tensor
    keys: Tensor
    dense: Tensor | None = None

    @property
    def columns(self) -> int:
        """Number of facts n."""
        return self.left.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(d, f) of the matrix that this changes."""
        return self.left.shape[0], self.right.shape[1]


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """The change of one edit: module path -> factors. Column j is the same fact in every module."""

    factors: Mapping[str, Factors]

    @property
    def columns(self) -> int:
        """Number of facts n."""
        return next(iter(self.factors.values())).columns


def write_delta(folder: Path, delta: Delta, *, compact: bool = True) -> str:
    """Write `delta` durably into `folder` under its sha256, which is returned. A whole file of that name is kept.

    A matrix with more facts than rows (n > d) is stored dense, since its `right` would take more room than Δ itself;
    unless `compact` is False: corrections keep their columns. Raises EditError for values that are not finite or
    shapes that do not fit, StoreError where the disk refuses.
    """
    try:
        _require_sound(delta)
    except ValueError as error:
        raise EditError(f"the edit gave no delta that can be kept: {error}") from error
    tensors = {
        f"{module}.{part}": tensor.clone()
        for module, factors in delta.factors.items()
        for part, tensor in _stored(factors, compact=compact).items()
    }
    data = save(tensors, metadata={"format": FORMAT})
    digest = hashlib.sha256(data).hexdigest()
    path = delta_file(folder, digest)
    if path.exists() and sha256_of(path) == digest:
        path.touch()  # it may be an old orphan: as young as a new file, `gc` leaves it to the edit that needs it
    else:
        write_durably(path, data)
    return digest


def _require_sound(delta: Delta) -> None:
    """Raise ValueError, naming the tensor, unless all are finite float32 of shapes that fit together."""
    if not delta.factors or not delta.columns:
        raise ValueError("no columns")
    for module, factors in delta.factors.items():
        n, (d, f) = delta.columns, factors.shape
        wanted = {"left": (d, n), "right": (n, f), "keys": (n, f)}
        if factors.dense is not None:
            wanted |= {"right": (0, f), "dense": (d, f)}
        for part, shape in wanted.items():
            tensor: Tensor = getattr(factors, part)
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
                raise ValueError(f"{module}.{part} is {tensor.dtype} {list(tensor.shape)}, not float32 {list(shape)}")
            if not tensor.isfinite().all():
                raise ValueError(f"{module}.{part} has values that are not finite")


def _stored(factors: Factors, *, compact: bool) -> dict[str, Tensor]:
    """The tensors that go into the file: `right` or, where that is smaller, `dense`."""
    d, _ = factors.shape
    parts = {"left": factors.left.contiguous(), "keys": factors.keys.contiguous()}
    if factors.dense is not None:
        return parts | {"dense": factors.dense.contiguous()}
    if compact and factors.columns > d:
        return parts | {"dense": (factors.left.double() @ factors.right.double()).float()}
    return parts | {"right": factors.right.contiguous()}


def read_delta(folder: Path, sha256: str) -> Delta:
    """Read the delta named `sha256` from `folder`; modules in alphabetical order.

    The bytes that were hashed are the bytes that are parsed. Raises StoreError naming the file where it is missing, is
    not as it was written, or is of another format.
    """
    path = delta_file(folder, sha256)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}", hint="kbsync verify") from error
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise StoreError(f"{path}: damaged, its sha256 is now {found}", hint="restore the file, or `kbsync rollback`")
    try:
        return _parse(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: not a delta that this kbsync reads: {error}", hint="update kbsync") from error


def _parse(data: bytes) -> Delta:
    """A delta from a file's bytes. Raises SafetensorError, ValueError, KeyError or TypeError for what is no delta."""
    if (written := _format(data)) != FORMAT:
        raise ValueError(f"format {written!r}, expected {FORMAT!r}")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(load(data).items()):
        module, part = name.rsplit(".", 1)
        parts.setdefault(module, {})[part] = tensor
    delta = Delta({module: _factors(found) for module, found in parts.items()})
    _require_sound(delta)
    return delta


def _format(data: bytes) -> str:
    """The metadata entry `format`: safetensors begins with the header's length (8 bytes, little-endian) and JSON."""
    length = int.from_bytes(data[:8], "little")
    return str(json.loads(data[8 : 8 + length])["__metadata__"]["format"])


def _factors(parts: Mapping[str, Tensor]) -> Factors:
    if unknown := set(parts) - {"left", "right", "keys", "dense"}:
        raise ValueError(f"unknown tensors {sorted(unknown)}")
    keys, dense = parts["keys"], parts.get("dense")
    right = parts["right"] if dense is None else keys.new_empty(0, keys.shape[1])
    return Factors(parts["left"], right, keys, dense)
