"""Small random deltas and manifests for tests of the version store.

delta = random_delta(3)                          # two modules, 3 facts
(sha256,), read = stored(tmp_path, delta)
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kbsync.versions.delta import Delta, Factors, read_delta, write_delta
from kbsync.versions.manifest import Manifest

D, F = 6, 11
MODULES = ("model.layers.4.mlp.down_proj", "model.layers.10.mlp.down_proj")


def random_factors(n: int, *, d: int = D, f: int = F, seed: int = 0) -> Factors:
    """Factors [d, n], [n, f], [n, f] of a standard normal."""
    chance = torch.Generator().manual_seed(seed)
    left, right, keys = (torch.randn(shape, generator=chance) for shape in ((d, n), (n, f), (n, f)))
    return Factors(left, right, keys)


def random_delta(n: int, *, seed: int = 0) -> Delta:
    """A delta of MODULES with n columns."""
    return Delta({module: random_factors(n, seed=seed + index) for index, module in enumerate(MODULES)})


def random_weights() -> dict[str, Tensor]:
    """The pristine matrices of MODULES, float32 [D, F]."""
    chance = torch.Generator().manual_seed(99)
    return {module: torch.randn(D, F, generator=chance) for module in MODULES}


def stored(folder: Path, *deltas: Delta) -> tuple[list[str], Callable[[str], Delta]]:
    """The sha256 of each delta, written into `folder`, and the function that reads them."""
    return [write_delta(folder, delta) for delta in deltas], partial(read_delta, folder)


def manifest(**fields: Any) -> Manifest:
    """A manifest of version 1 of model `m-0` without facts, but for `fields`."""
    return Manifest(
        **{
            "model": "m-0",
            "number": 1,
            "parent": 0,
            "kind": "edit",
            "base_fingerprint": "0" * 64,
            "modules": MODULES,
            "dtype": "float32",
            "active": (),
            "weights_sha256": "0" * 64,
            "created_at": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
            **fields,
        }
    )
