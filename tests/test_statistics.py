"""Covariances: right over every token and no padding, kept under all they depend on, refused when damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kbsync.editor import statistics as module
from kbsync.editor.model import Base
from kbsync.editor.preset import Preset
from kbsync.editor.statistics import collect, statistics_for, verify
from kbsync.errors import EditError, ModelError, StoreError
from tests.tiny import TEXT, tiny_gpt2, tiny_llama

PRESET = Preset(
    name="tiny",
    layers=(1, 3),
    covariance_weight=10,
    clamp=0.75,
    rate=0.5,
    steps=3,
    sample_tokens=256,
    token_budget=256,
    chat_context=False,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the statistics of the tiny Llama; read only."""
    cache = tmp_path_factory.mktemp("cache")
    statistics_for(tiny_llama(), PRESET, cache=cache)
    return cache


@pytest.fixture
def own(built: Path, tmp_path: Path) -> Path:
    """A copy of that cache to break."""
    return Path(shutil.copytree(built, tmp_path / "cache"))


def _blocks(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 384, (length,), generator=generator) for length in lengths]


def _modules(base: Base, *layers: int) -> list[str]:
    return [base.spec.down_name(layer) for layer in layers]


def _keys_by_hand(base: Base, name: str, blocks: list[Tensor]) -> Tensor:
    """All keys of a module [n, f], one whole forward pass per block."""
    found: list[Tensor] = []
    handle = base.module(name).register_forward_pre_hook(lambda _module, inputs: found.append(inputs[0][0]))
    for block in blocks:
        base.network(block.unsqueeze(0).to(base.device))
    handle.remove()
    return torch.cat(found).cpu()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_covariance_is_the_mean_outer_product_of_every_token(make: Callable[..., Base], device: str) -> None:
    """Blocks of many lengths, batched and padded, give what each gives alone."""
    base = make(dtype=torch.float64, device=device)
    blocks = _blocks([3, 64, 17, 1, 40, 40])
    modules = _modules(base, 0, 2, 4)
    covariance, _ = collect(base, modules, blocks)
    for name in modules:
        keys = _keys_by_hand(base, name, blocks)
        torch.testing.assert_close(covariance[name], keys.T @ keys / 165, rtol=1e-12, atol=1e-14)


def test_batches_are_bounded_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    base, blocks = tiny_llama(dtype=torch.float64), _blocks([30, 5, 22, 8, 64])
    whole, error = collect(base, _modules(base, 2), blocks)
    shapes: list[torch.Size] = []
    handle = base.layer(0).register_forward_pre_hook(lambda _module, inputs: shapes.append(inputs[0].shape))
    monkeypatch.setattr(module, "BATCH_TOKENS", 64)
    parts, same_error = collect(base, _modules(base, 2), blocks)
    handle.remove()
    assert len(shapes) == 3
    assert all(shape[0] * shape[1] <= 64 for shape in shapes)
    (name,) = whole
    torch.testing.assert_close(whole[name], parts[name], rtol=1e-12, atol=1e-14)
    assert error[name] == pytest.approx(same_error[name])


def test_pass_stops_at_the_deepest_module_and_leaves_no_hook() -> None:
    base = tiny_llama()
    base.layer(4).register_forward_pre_hook(_unreachable)
    before = _hooks(base)
    collect(base, _modules(base, 1, 3), _blocks([5, 5]))
    assert _hooks(base) == before


def _unreachable(*_args: Any) -> None:
    raise AssertionError("a layer above the deepest edited one was run")


def _hooks(base: Base) -> int:
    return sum(len(part._forward_pre_hooks) for part in base.network.modules())


def test_activations_that_are_not_finite_are_refused() -> None:
    base = tiny_llama()
    base.weight(base.spec.down_name(0))[0, 0] = torch.nan
    with pytest.raises(EditError, match="not finite"):
        collect(base, _modules(base, 2), _blocks([5, 5]))
    assert _hooks(base) == 0


def test_error_estimate_is_about_the_error_and_falls_with_the_sample() -> None:
    base = tiny_llama()
    (name,) = modules = _modules(base, 2)
    truth = collect(base, modules, _blocks([32] * 800, seed=9))[0][name]
    found = []
    for count in (20, 80):
        covariance, error = collect(base, modules, _blocks([32] * count))
        actual = float((covariance[name] - truth).norm() / truth.norm())
        assert 0.4 < error[name] / actual < 2.5
        found.append(error[name])
    assert found[1] < found[0]


def test_error_estimate_of_a_large_matrix_uses_a_sample_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    base, blocks = tiny_llama(), _blocks([32] * 60)
    (name,) = modules = _modules(base, 2)
    whole = collect(base, modules, blocks)[1][name]
    monkeypatch.setattr(module, "_HALF_ROWS", 16)
    assert collect(base, modules, blocks)[1][name] == pytest.approx(whole, rel=0.5)


@given(width=st.integers(1, 9), seed=st.integers(0, 99))
def test_triangle_is_a_symmetric_matrix_in_half_the_space(width: int, seed: int) -> None:
    matrix = torch.randn(width, width, generator=torch.Generator().manual_seed(seed))
    symmetric = (matrix + matrix.T).double()
    triangle = module._upper(symmetric)
    assert len(triangle) == width * (width + 1) // 2
    assert torch.equal(module._full(triangle), symmetric.float().double())


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_statistics_are_collected_once_and_then_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Base]
) -> None:
    base = make()
    seen: set[str] = set()
    built = statistics_for(base, PRESET, cache=tmp_path, progress=lambda phase, _done, _total: seen.add(phase))
    assert seen == {"sample", "statistics"}
    monkeypatch.setattr(module, "_build", _unreachable)
    read = statistics_for(base, PRESET, cache=tmp_path, build=False)
    assert (read.contexts, read.tokens, read.error) == (built.contexts, built.tokens, built.error)
    assert read.fingerprint == base.fingerprint
    assert torch.equal(read.holdout, built.holdout)
    assert list(read.covariance) == _modules(base, 1, 3)
    for name, covariance in read.covariance.items():
        assert torch.equal(covariance, built.covariance[name])
        assert covariance.dtype == torch.float64
        assert torch.equal(covariance, covariance.T)
    assert read.tokens == 256
    assert len(read.contexts) == 6


def test_statistics_from_a_file_are_of_that_file(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(TEXT * 30))
    preset = PRESET.model_copy(update={"corpus": f"file:{path}"})
    assert statistics_for(tiny_llama(), preset, cache=tmp_path).tokens >= 256
    path.write_text("\n".join(TEXT * 31))
    with pytest.raises(ModelError, match="no covariance statistics"):
        statistics_for(tiny_llama(), preset, cache=tmp_path, build=False)


def test_absent_statistics_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no covariance statistics") as caught:
        statistics_for(tiny_llama(), PRESET, cache=tmp_path, build=False)
    assert "kbsync statistics build" in caught.value.hint


@pytest.mark.parametrize("change", [{"seed": 1}, {"sample_tokens": 300}, {"layers": (1, 2)}, {"corpus": "hf:a/b"}])
def test_other_settings_are_other_statistics(built: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="no covariance statistics"):
        statistics_for(tiny_llama(), PRESET.model_copy(update=change), cache=built, build=False)


def test_other_weights_or_another_dtype_are_other_statistics(built: Path) -> None:
    other = tiny_llama()
    other.fingerprint = "other"
    for base in (other, tiny_llama(dtype=torch.bfloat16)):
        with pytest.raises(ModelError, match="no covariance statistics"):
            statistics_for(base, PRESET, cache=built, build=False)


def test_settings_that_do_not_matter_share_statistics(built: Path) -> None:
    base = tiny_llama()
    base.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    plain = statistics_for(base, PRESET, cache=built, build=False)
    preset = PRESET.model_copy(update={"covariance_weight": 3.0, "clamp": 0.5, "chat_context": True})
    chat = statistics_for(base, preset, cache=built, build=False)
    assert chat.contexts[:6] == plain.contexts
    assert len(chat.contexts) == 7


def test_bfloat16_keys_are_multiplied_in_float32() -> None:
    base, blocks = tiny_llama(dtype=torch.bfloat16), _blocks([20, 30])
    (name,) = modules = _modules(base, 2)
    keys = _keys_by_hand(base, name, blocks).float()
    covariance, _ = collect(base, modules, blocks)
    assert covariance[name].dtype == torch.float64
    torch.testing.assert_close(covariance[name], (keys.T @ keys).double() / 50, rtol=0.1, atol=0.02)


def _flip(folder: Path) -> None:
    path = folder / "statistics.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _of_another_model(folder: Path) -> None:
    path = folder / "statistics.json"
    record = json.loads(path.read_text())
    record["key"]["fingerprint"] = "other"
    path.write_text(json.dumps(record))


def _drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    "damage", [_flip, _of_another_model, _drop("statistics.json"), _drop("statistics.safetensors")]
)
def test_damaged_statistics_are_refused_and_named(own: Path, damage: Callable[[Path], None]) -> None:
    (folder,) = (own / "statistics").iterdir()
    assert verify(own) == {folder.name: ""}
    damage(folder)
    with pytest.raises(StoreError, match=folder.name) as caught:
        statistics_for(tiny_llama(), PRESET, cache=own)
    assert "kbsync statistics build" in caught.value.hint
    assert verify(own)[folder.name]


def test_interrupted_collection_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "publish_folder", fail)
    with pytest.raises(KeyboardInterrupt):
        statistics_for(tiny_llama(), PRESET, cache=tmp_path)
    assert list((tmp_path / "statistics").iterdir()) == []
    assert verify(tmp_path) == {}


def test_preset_of_a_deeper_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="layer 9 of a model with 6 layers"):
        statistics_for(tiny_llama(), PRESET.model_copy(update={"layers": (1, 9)}), cache=tmp_path)
