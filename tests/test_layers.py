"""Stretches of blocks on packed rows give what the unmodified model gives on each row alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kbsync.editor.layers import ADAPTERS, Layers, Packed, Past, inputs_of
from kbsync.editor.model import FAMILIES, Base
from kbsync.editor.rows import Beginnings, Row, read_rows
from kbsync.editor.tokens import encode
from kbsync.errors import ModelError
from tests.tiny import CONTEXTS, FACTS, VARIANTS, VOCABULARY, tiny, tiny_gpt2, tiny_llama

LENGTHS = [9, 9, 6, 4, 4, 1]
CUTS = [4, 2, 6, 0, 3, 0]
"""Six rows, each cut into tokens read before and tokens run after."""


def random_rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


def expected(base: Base, rows: list[list[int]]) -> list[Tensor]:
    """The unmodified model's logits [length, vocabulary] of each row alone."""
    return [base.network(torch.tensor([row], device=base.device)).logits[0] for row in rows]


def flat(rows: list[list[int]]) -> list[int]:
    return [token for row in rows for token in row]


def test_every_family_has_an_adapter() -> None:
    """A model that loads can be run in stretches, and is tested here."""
    assert set(ADAPTERS) == set(FAMILIES) == {settings["model_type"] for settings in VARIANTS.values()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_rows_are_as_each_alone(variant: str, device: str) -> None:
    """Rows of unequal length in one sequence, run in two stretches, give the whole model's logits."""
    base = tiny(variant, device=device)
    layers, rows = Layers(base), random_rows()
    packed = Packed(LENGTHS, Past.nothing(len(rows), base.device), base.dtype)
    hidden = layers.run(layers.embed(flat(rows), packed), range(2), packed)
    logits = layers.logits(layers.run(hidden, range(2, base.layers), packed))
    assert torch.allclose(logits, torch.cat(expected(base, rows)), atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_go_on_from_stored_keys_and_values(variant: str, device: str) -> None:
    """A row cut anywhere, also at its beginning, gives the same logits after the cut."""
    base = tiny(variant, device=device)
    layers, rows = Layers(base), random_rows()
    heads = Packed(CUTS, Past.nothing(len(rows), base.device), base.dtype)
    hidden = layers.embed(flat([row[:cut] for row, cut in zip(rows, CUTS, strict=True)]), heads)
    _, read = layers.read(hidden, range(base.layers), heads)
    past = Past.gather(read.split(CUTS, dim=2), 0)
    tails = [row[cut:] for row, cut in zip(rows, CUTS, strict=True)]
    order = torch.tensor([3, 1, 0, 4, 5, 2], device=base.device)  # a batch may take the beginnings in any order
    packed = Packed([len(tails[row]) for row in order], past.of(order), base.dtype)
    hidden = layers.run(layers.embed(flat([tails[row] for row in order]), packed), range(base.layers), packed)
    wanted = expected(base, rows)
    assert torch.allclose(layers.logits(hidden), torch.cat([wanted[row][CUTS[row] :] for row in order]), atol=2e-5)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("bos", [False, True])
def test_read_rows_stops_at_the_lookup_token(make: Callable[..., Base], bos: bool) -> None:
    """States from the lookup token on and the past before it continue to the whole model's logits."""
    base = make(dtype=torch.float64, bos=bos)
    layers, top = Layers(base), 3
    rows = [
        Row(encode(base, fact, context), group, len(encode(base, fact, context).ids))
        for group, context in enumerate(CONTEXTS)
        for fact in FACTS
    ]
    beginnings = Beginnings(layers, [row.tokens for row in rows], [row.group for row in rows])
    assert all(beginnings.counts[1:]), "contexts share their own tokens"
    read_rows(layers, rows, beginnings.past(range(base.layers)), top, budget=50)
    past = Past.gather([row.past for row in rows], top)
    packed = Packed([row.suffix for row in rows], past, base.dtype)
    hidden = layers.run(torch.cat([row.states for row in rows]), range(top, base.layers), packed)
    wanted = expected(base, [list(row.tokens.ids) for row in rows])
    tails = [logits[row.tokens.lookup :] for row, logits in zip(rows, wanted, strict=True)]
    assert torch.allclose(layers.logits(hidden), torch.cat(tails), atol=1e-11)


def test_model_is_as_before_afterwards() -> None:
    """The model's own attention is back after a run, also after one that fails."""
    base = tiny_llama()
    layers, row = Layers(base), random_rows()[:1]
    before = expected(base, row)[0]
    packed = Packed(LENGTHS[:1], Past.nothing(1, base.device), base.dtype)
    with pytest.raises(RuntimeError):
        layers.run(torch.zeros(3, 5), range(2), packed)
    assert torch.equal(expected(base, row)[0], before)


def test_attention_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that do not ask the attention interface would mix the rows, and are refused."""
    base = tiny_llama()
    for index in range(base.layers):
        monkeypatch.setattr(base.layer(index), "forward", lambda hidden, **_: hidden)
    packed = Packed([2], Past.nothing(1, base.device), base.dtype)
    with pytest.raises(ModelError, match="llama"):
        Layers(base).run(torch.zeros(2, 32), range(2), packed)


def test_inputs_of_sees_the_keys_and_lets_go() -> None:
    """The input of a module is seen call by call, and the hook is gone afterwards."""
    base = tiny_llama()
    module = base.module(base.spec.down_name(1))
    with inputs_of(module) as seen:
        expected(base, random_rows()[:2])
    assert [tuple(one.shape) for one in seen] == [(1, 9, 48), (1, 9, 48)]
    expected(base, random_rows()[:1])
    assert len(seen) == 2
