"""The weights that a list of active deltas stands for, to the byte; and the list that holds other facts (`hold`).

Float32 times float32 is exact in float64, and each element is summed on its own in one fixed order, so threads, BLAS,
fused multiply-add and device make no difference. The rule and the hash are specified in docs/delta-format.md.

    masters = rebuild(pristine, manifest.active, read)                   # float64 [d, f] per module
    weights = {name: served(master, torch.bfloat16) for name, master in masters.items()}
    weights_sha256(weights) == manifest.weights_sha256
    active = hold(manifest.active, {delta: columns_that_stay}, read, write)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kbsync.errors import Inseparable, StoreError
from kbsync.versions.delta import Delta, Factors
from kbsync.versions.manifest import ActiveDelta

__all__ = ["hold", "live_columns", "live_keys", "rebuild", "served", "weights_sha256"]

ANEW = "kbsync revert --fact SUBJECT RELATION --exact; a sync does it by itself, as a rebase"
"""What takes a fact out where its share cannot be: inserting all others anew."""

_TILE = 1 << 15
"""Elements of a matrix that all columns are added to before the next: 256 kB of float64 stay in a core's cache."""

_MIN_GAIN = 1e-4
"""The smallest 1 - kᵀu that float32 factors (7 digits) still carry with 3 digits to spare."""

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
                hint=ANEW,
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


class _Move(NamedTuple):
    """A column of an active entry that leaves the weights (`sign` -1) or comes back into them (+1)."""

    entry: int
    column: int
    sign: int


def hold(
    active: Sequence[ActiveDelta], live: Mapping[str, Collection[int]], read: Read, write: Callable[[Delta], str]
) -> tuple[ActiveDelta, ...]:
    """The active deltas that hold the columns `live` (delta -> columns) and no others, as MEMIT would have made them.

    Leaving a column out is not enough: its own delta's other facts and all facts inserted later were solved for with it
    in place. Δ = R Kᵀ A^-1, A = C + K Kᵀ over all live facts (Eqn 14): a fact that leaves takes k kᵀ out of A, one that
    comes back puts it in. Both are rank one (Sherman-Morrison), with e = r - Δ k and u = A^-1 k of this moment:

        Δ ← Δ - e uᵀ / (1 - kᵀ u)   leaves,        Δ ← Δ + e uᵀ / (1 + kᵀ u)   comes back

    The changes are added to the corrections of the newest entry, so that list order is the order in which everything
    happened; u and e follow from the factors alone by replaying it. Exact for one edited layer, as long as each delta
    was inserted with the live keys protected; over several layers the probe tells. A newest delta that gives up all its
    columns is dropped, which is exact to the bit. A delta of `live` that is not active is put at the end.

    C is taken to be the same for all deltas. With `covariance_growth` it was not: each delta has the λ of its own
    moment, and what is left after a removal is near the solve over the live facts, not equal to it.

    `write` stores corrections and gives their sha256: `partial(write_delta, folder, compact=False)`. Raises Inseparable
    for keys so alike that float32 factors cannot tell them apart and for dense deltas, StoreError as `read` does.
    """
    known = {entry.delta for entry in active}
    entries = [
        *active,
        *(ActiveDelta(delta=delta) for delta, columns in live.items() if columns and delta not in known),
    ]
    while entries and not live.get(entries[-1].delta) and entries[-1].corrections is None:
        entries.pop()
    deltas = [read(entry.delta) for entry in entries]
    wanted = [_excluding(entry, delta, live) for entry, delta in zip(entries, deltas, strict=True)]
    pairs = [(set(new.excluded), set(old.excluded)) for new, old in zip(wanted, entries, strict=True)]
    leave = [_Move(index, column, -1) for index, (new, old) in enumerate(pairs) for column in sorted(new - old)]
    back = [_Move(index, column, 1) for index, (new, old) in enumerate(pairs) for column in sorted(old - new)]
    if not (moves := leave + back):
        return tuple(wanted)
    start = min(move.entry for move in moves)  # what happened before these facts came in does not matter to them
    moves = [move._replace(entry=move.entry - start) for move in moves]
    corrections = [None if (name := entry.corrections) is None else read(name) for entry in entries[start:]]
    modules = sorted({module for delta in deltas[start:] for module in delta.factors})
    moved = {module: _move(module, deltas[start:], corrections, moves) for module in modules}
    wanted[-1] = wanted[-1].model_copy(update={"corrections": write(Delta(moved))})
    return tuple(wanted)


def _excluding(entry: ActiveDelta, delta: Delta, live: Mapping[str, Collection[int]]) -> ActiveDelta:
    columns = set(live.get(entry.delta, ()))
    if unknown := columns - set(range(delta.columns)):
        raise StoreError(f"delta {entry.delta[:12]}: has no column {min(unknown)}", hint="kbsync verify")
    return entry.model_copy(update={"excluded": tuple(sorted(set(range(delta.columns)) - columns))})


def _move(module: str, deltas: Sequence[Delta], corrections: Sequence[Delta | None], moves: Sequence[_Move]) -> Factors:
    """The newest corrections of one module with the columns of `moves` added: for each move its change with its key,
    then, with a key of zeros, the column itself, which `except` from now on leaves out or no longer leaves out."""
    blocks = [_exact(module, delta) for delta in deltas]
    events = [[] if delta is None else _events(_exact(module, delta)) for delta in corrections]
    E, U, K = _replay(blocks, events, moves)
    own = [(blocks[move.entry].left[:, move.column], blocks[move.entry].right[move.column]) for move in moves]
    last = corrections[-1]
    columns = [] if last is None else [last.factors[module]]
    for index, move in enumerate(moves):
        e, u, k = E[:, index].clone(), U[:, index].clone(), K[:, index]  # [d], [f], [f]
        gain = 1 + move.sign * (k @ u)
        if not gain > _MIN_GAIN:
            raise Inseparable(
                f"{module}: a fact's key is too much like the others' to take it out alone",
                hint=ANEW,
            )
        change = Factors(e[:, None], (move.sign / gain) * u[None], k[None])
        _follow(change, E, U, K)
        left, right = own[index]
        columns += [change, Factors(-move.sign * left[:, None], right[None], torch.zeros_like(k)[None])]
    return Factors(
        torch.cat([part.left.float() for part in columns], dim=1),
        torch.cat([part.right.float() for part in columns]),
        torch.cat([part.keys.float() for part in columns]),
    )


def _replay(
    blocks: Sequence[Factors], events: Sequence[Sequence[Factors]], moves: Sequence[_Move]
) -> tuple[Tensor, Tensor, Tensor]:
    """For each move's fact, as columns: e = r - Δ k [d, m], u = A^-1 k [f, m] as things stand now, and k [f, m]."""
    (d, f), count = blocks[0].shape, len(moves)
    E, U, K = (torch.zeros(size, count, dtype=torch.float64) for size in (d, f, f))
    for index, (block, after) in enumerate(zip(blocks, events, strict=True)):
        earlier = [column for column, move in enumerate(moves) if move.entry < index]
        here = [column for column, move in enumerate(moves) if move.entry == index]
        columns = [moves[column].column for column in here]
        U[:, earlier] -= block.right.T @ (block.keys @ U[:, earlier])
        U[:, here], K[:, here] = block.right[columns].T, block.keys[columns].T
        E[:, here] = block.left[:, columns]
        begun = earlier + here
        E[:, begun] -= block.left @ (block.right @ K[:, begun])
        for event in after:
            # Facts that come later have zeros in U and K still, and so are not touched.
            _follow(event, E, U, K)
    return E, U, K


def _follow(change: Factors, E: Tensor, U: Tensor, K: Tensor) -> None:
    """Bring e and u of all facts, in place, to where they stand after `change` (one column with its key)."""
    E -= change.left @ (change.right @ K)
    U -= change.right.T @ (change.keys @ U)


def _exact(module: str, delta: Delta) -> Factors:
    """The factors of one module in float64. Raises Inseparable where they were not kept."""
    factors = delta.factors.get(module)
    if factors is None or factors.dense is not None:
        raise Inseparable(
            f"{module}: a delta of {delta.columns} facts has no column per fact there, none can be taken out alone",
            hint=ANEW,
        )
    return Factors(factors.left.double(), factors.right.double(), factors.keys.double())


def _events(corrections: Factors) -> list[Factors]:
    """The changes among the columns of a corrections file, in order: those that have a key."""
    return [
        Factors(corrections.left[:, [column]], corrections.right[[column]], corrections.keys[[column]])
        for column in range(corrections.columns)
        if corrections.keys[column].any()
    ]
