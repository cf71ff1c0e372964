"""Covariance statistics of the keys, E[k kᵀ] (Eqn 15), uncentred, for all edited layers in one truncated pass.

k is the input of the down-projection W_l over ordinary text. Float32 products per batch are added up in float64; the
halves of the sample are compared, so that the error is known instead of guessed. Kept in the user's cache under
everything that they depend on, checked on every load, refused on mismatch.
Source: Meng et al. 2022, arXiv 2210.07229, section 4.3.

    statistics = statistics_for(base, preset)
    statistics.covariance["model.layers.4.mlp.down_proj"]        # [f, f] float64, not scaled by λ
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kbsync.editor.contexts import chat_context, sample_contexts
from kbsync.editor.corpus import BATCH_TOKENS, corpus_for, corpus_identity
from kbsync.editor.model import Base
from kbsync.editor.preset import Preset
from kbsync.errors import EditError, ModelError, StoreError
from kbsync.facts import digest_of
from kbsync.hub import cache_dir, publish_folder
from kbsync.progress import Progress, silent
from kbsync.versions.files import sha256_of, write_durably

__all__ = ["Statistics", "collect", "statistics_for", "verify"]

_FORMAT = 1
_TENSORS, _RECORD = "statistics.safetensors", "statistics.json"
_HALF_ROWS = 2048
"""Rows of a covariance that the halves of the sample are compared on: all of a small model, a sample of a large one
(where a second matrix of 2 GB a layer would buy nothing)."""
_STRIPS = 8
"""Strips of rows that a product is computed in: 56 % of its operations instead of all, in still large pieces."""


@dataclass(slots=True)
class Statistics:
    """What the insertion needs to know about ordinary text, and the contexts and held-out tokens that go with it."""

    contexts: tuple[str, ...]
    """Templates with the prompt where the last `{}` is; the first is `{}`."""
    covariance: dict[str, Tensor]
    """Module name -> E[k kᵀ] [f, f] float64 on the CPU, not scaled by λ."""
    tokens: int
    error: dict[str, float]
    """Module name -> relative error of its covariance, estimated from the sample's halves."""
    holdout: Tensor
    """[m, T] int64: tokens of the same corpus that were not collected from."""
    fingerprint: str
    """Of the model's weights and tokenizer."""
    factors: dict[Any, Any] = field(default_factory=dict, repr=False)
    """Factorisations of C that a solver keeps here, so that a small batch does not pay O(f³) again."""


def statistics_for(
    base: Base, preset: Preset, *, cache: Path | None = None, build: bool = True, progress: Progress = silent
) -> Statistics:
    """The statistics of `base`, which holds its pristine weights: from the cache, or collected and put there.

    Raises ModelError where there are none and `build` is False, or where the model has no such layer; StoreError where
    the stored ones are damaged.
    """
    if preset.layers[-1] >= base.layers:
        raise ModelError(
            f"preset {preset.name}: layer {preset.layers[-1]} of a model with {base.layers} layers (from 0)",
            hint="use the preset of this model",
        )
    key = _key(base, preset)
    folder = (cache or cache_dir()) / "statistics" / digest_of(key)
    if not folder.is_dir():
        if not build:
            raise ModelError("no covariance statistics for this model yet", hint="kbsync statistics build")
        _build(base, preset, key, folder, progress)
    found = _load(folder, key)
    if preset.chat_context:
        found.contexts += (chat_context(base),)
    return found


def verify(cache: Path | None = None) -> dict[str, str]:
    """Re-read all stored statistics: folder name -> what is wrong with it, empty where nothing is."""
    root = (cache or cache_dir()) / "statistics"
    return {folder.name: _problem(folder) for folder in sorted(root.glob("[0-9a-f]*"))}


@torch.inference_mode()
def collect(
    base: Base, modules: Sequence[str], blocks: Sequence[Tensor], *, progress: Progress = silent
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """E[k kᵀ] [f, f] float64 of each of `modules` (in layer order) over all tokens of `blocks`, and its relative error.

    One pass up to the input of the last module. Halves are made of whole blocks, since tokens of one text are alike.
    """
    moments = {name: _Moment() for name in modules}
    done, total = 0, sum(map(len, blocks))
    for indices in _batches(blocks):
        rows = [blocks[index] for index in indices]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # right-padded: causal attention never sees it
        counted = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows]).unsqueeze(1)  # [b, t]
        odd = (torch.tensor(indices) % 2 == 1).unsqueeze(1)
        for name, found in _keys(base, modules, ids.to(base.device)):
            keys = found.view(*ids.shape, -1)  # OPT calls it with the tokens of all rows as one
            moments[name].add(keys[counted & odd], keys[counted & ~odd])
        done += int(counted.sum())
        progress("statistics", done, total)
    return {name: moment.mean() for name, moment in moments.items()}, {
        name: moment.error() for name, moment in moments.items()
    }


class _Moment:
    """The running second moment of one module's keys, and that of the odd half of the sample."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.half: Tensor | float = 0.0
        self.counts = [0, 0]

    def add(self, odd: Tensor, even: Tensor) -> None:
        """Add the keys [n, f] of both halves of a batch."""
        product = _product(odd)
        self.half += product[:_HALF_ROWS]
        self.total += product + _product(even)
        self.counts[0] += len(odd)
        self.counts[1] += len(even)

    def mean(self) -> Tensor:
        """E[k kᵀ] [f, f] float64."""
        upper = torch.as_tensor(self.total).triu() / sum(self.counts)
        return upper + upper.triu(1).T

    def error(self) -> float:
        """‖A − B‖ / ‖A + B‖ (Frobenius) of the halves' means, in their upper triangles: what the error of their mean is
        expected to be."""
        odd = torch.as_tensor(self.half).triu() / self.counts[0]
        even = (torch.as_tensor(self.total)[:_HALF_ROWS] - self.half).triu() / self.counts[1]
        return float((odd - even).norm() / (odd + even).norm())


def _product(keys: Tensor) -> Tensor:
    """KᵀK of keys [n, f] as float64 on the CPU, [f, f]: a float32 product (float64 for a float64 model).

    It is symmetric, so of each strip of rows only what is not left of the diagonal is computed; zeros stand there.
    """
    keys = keys if keys.dtype == torch.float64 else keys.float()
    width = keys.shape[1]
    product = keys.new_zeros(width, width)
    for start in range(0, width, step := -(-width // _STRIPS)):
        strip = keys[:, start : start + step]
        torch.mm(strip.T, keys[:, start:], out=product[start : start + step, start:])
    if not product.isfinite().all():
        raise EditError("the model's activations are not finite", hint="load it with another `dtype:`")
    return product.to("cpu", torch.float64)


class _Reached(Exception):
    """The deepest module's input has been read: nothing above it is needed."""


def _keys(base: Base, modules: Sequence[str], ids: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Each module's input [b, t, f] for the tokens [b, t], by a forward pass that stops at the last module."""
    found: dict[str, Tensor] = {}
    with _reading(base, modules, found):
        try:
            base.network(ids, use_cache=False)
        except _Reached:
            yield from found.items()


@contextmanager
def _reading(base: Base, modules: Sequence[str], found: dict[str, Tensor]) -> Iterator[None]:
    def read(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = inputs[0]
            if name == modules[-1]:
                raise _Reached

        return hook

    handles = [base.module(name).register_forward_pre_hook(read(name)) for name in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _batches(blocks: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of blocks of similar length, longest first, at most BATCH_TOKENS (padding included) together."""
    order = sorted(range(len(blocks)), key=lambda index: -len(blocks[index]))
    while order:
        size = max(1, BATCH_TOKENS // len(blocks[order[0]]))
        yield order[:size]
        order = order[size:]


def _key(base: Base, preset: Preset) -> dict[str, Any]:
    """Everything that the statistics depend on."""
    return {
        "format": _FORMAT,
        "fingerprint": base.fingerprint,
        "dtype": str(base.dtype).removeprefix("torch."),
        "corpus": corpus_identity(preset.corpus),
        "tokens": preset.sample_tokens,
        "seed": preset.seed,
        "modules": [base.spec.down_name(layer) for layer in preset.layers],
    }


def _build(base: Base, preset: Preset, key: Mapping[str, Any], folder: Path, progress: Progress) -> None:
    contexts = sample_contexts(base, preset.seed)
    corpus = corpus_for(base, preset.corpus, tokens=preset.sample_tokens, seed=preset.seed, progress=progress)
    covariance, error = collect(base, key["modules"], corpus.blocks, progress=progress)
    tensors = {name: _upper(matrix) for name, matrix in covariance.items()} | {"holdout": corpus.holdout}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as name:
        scratch = Path(name) / "statistics"
        digest = write_durably(scratch / _TENSORS, lambda path: save_file(tensors, path))
        record = {
            "key": key,
            "sha256": digest,
            "contexts": contexts,
            "tokens": sum(map(len, corpus.blocks)),
            "error": error,
        }
        write_durably(scratch / _RECORD, json.dumps(record, indent=1, sort_keys=True).encode())
        publish_folder(scratch, folder)


def _load(folder: Path, key: Mapping[str, Any]) -> Statistics:
    """Raises StoreError where a file is missing, damaged, or of another model or other settings."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        if record["key"] != key:
            raise ValueError("they are of another model or other settings")
        if sha256_of(folder / _TENSORS) != record["sha256"]:
            raise ValueError(f"{_TENSORS} was changed")
        tensors = load_file(folder / _TENSORS)
        return Statistics(
            contexts=tuple(record["contexts"]),
            covariance={name: _full(tensors[name]) for name in key["modules"]},
            tokens=int(record["tokens"]),
            error=dict(record["error"]),
            holdout=tensors["holdout"],
            fingerprint=str(record["key"]["fingerprint"]),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise StoreError(
            f"{folder}: these statistics cannot be used: {error}",
            hint="remove this folder, then `kbsync statistics build`",
        ) from error


def _problem(folder: Path) -> str:
    try:
        key = json.loads((folder / _RECORD).read_text(encoding="utf-8"))["key"]
        if digest_of(key) != folder.name:
            return f"{folder}: these statistics are of another model or other settings than their folder's name says"
        _load(folder, key)
    except StoreError as error:
        return error.message
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder / _RECORD}: {error}"
    return ""


def _upper(matrix: Tensor) -> Tensor:
    """The upper triangle of a symmetric [f, f] as [f(f+1)/2] float32, row by row."""
    return matrix[torch.ones_like(matrix, dtype=torch.bool).triu()].float()


def _full(triangle: Tensor) -> Tensor:
    """The inverse of `_upper`, as float64. Raises ValueError where the length is no triangle's."""
    width = int(((8 * len(triangle) + 1) ** 0.5 - 1) / 2)
    mask = torch.ones(width, width, dtype=torch.bool).triu()
    if int(mask.sum()) != len(triangle):
        raise ValueError("a covariance is not square")
    upper = torch.zeros(width, width, dtype=torch.float64)
    upper[mask] = triangle.double()
    return upper + upper.triu(1).T
