"""The model as the editor sees it: loading, orientation, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kbsync.editor.model import Base, choose_device, load_base, spec_of
from kbsync.errors import ModelError
from tests.tiny import save, tiny_gpt2, tiny_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tiny_llama(), tmp_path / "model")


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_loads_what_was_saved(make: type[Base], tmp_path: Path, device: str) -> None:
    """A saved checkpoint loads with the same logits, without gradients, its tokenizer beside it."""
    made = make()
    base = load_base(save(made, tmp_path / "model"), fingerprint="abc", device=device)
    ids = torch.tensor([base.tokenizer("Vega belongs to")["input_ids"]])
    assert torch.allclose(base.network(ids.to(base.device)).logits.cpu(), made.network(ids).logits, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in base.network.parameters())
    assert (base.layers, base.dtype, base.fingerprint) == (6, torch.float32, "abc")


@pytest.mark.parametrize("square", [False, True])
def test_weight_is_down_by_intermediate(square: bool) -> None:
    """Both families show the edited matrix as [d, f] such that output = W k, also where it is square."""
    for base in (tiny_llama(square=square), tiny_gpt2(square=square)):
        name = base.spec.down_name(2)
        module = base.module(name)
        matrix = base.weight(name)
        key = torch.randn(matrix.shape[1])
        bias = getattr(module, "bias", None)
        expected = module(key) - (bias if bias is not None else 0)
        assert torch.allclose(matrix @ key, expected, atol=1e-5)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_set_weight_is_in_place_and_exact(make: type[Base]) -> None:
    """What is put in is what is read back, and only that module changes."""
    base = make()
    name, other = base.spec.down_name(1), base.spec.down_name(2)
    kept = base.weight(other).clone()
    matrix = torch.randn(base.weight(name).shape, dtype=torch.float64)
    base.set_weight(name, matrix)
    assert torch.equal(base.weight(name), matrix.float())
    assert torch.equal(base.weight(other), kept)


def test_dtype_can_be_chosen(folder: Path) -> None:
    """`dtype` overrides the checkpoint's."""
    assert load_base(folder, fingerprint="x", dtype="bfloat16").dtype == torch.bfloat16


def test_unknown_family_is_refused() -> None:
    """A family without a spec is refused with the known ones named."""
    with pytest.raises(ModelError, match="bloom") as caught:
        spec_of("bloom")
    assert "llama" in caught.value.hint


def test_quantised_checkpoint_is_refused(folder: Path) -> None:
    """Quantised weights cannot be edited."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match="quantised"):
        load_base(folder, fingerprint="x")


@pytest.mark.parametrize(("wanted", "there", "said"), [
    ("cuda:7", 0, "device cuda:7: this machine has 0 CUDA devices"),
    ("cuda", 0, "device cuda: this machine has 0"),
    ("cuda:2", 2, "device cuda:2: this machine has 2"),
    ("gpu", 2, "device 'gpu' is not known"),
    ("cuda:x", 2, "device 'cuda:x' is not known"),
    ("meta", 2, "device 'meta' is not supported"),
])  # fmt: skip
def test_a_device_that_is_not_there_is_named(
    wanted: str, there: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the setting to change; not a traceback from the depth of torch."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    with pytest.raises(ModelError, match=said) as caught:
        choose_device(wanted)
    assert "device: auto" in caught.value.hint


def test_devices_that_are_there_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_weights_that_cannot_be_read_are_named(folder: Path) -> None:
    """A damaged file is a fault of the model's folder, not of the program."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=f"^{folder}: cannot be read: "):
        load_base(folder, fingerprint="x", device="cpu")
    path.unlink()
    with pytest.raises(ModelError, match=f"^{folder}: cannot be read: "):
        load_base(folder, fingerprint="x", device="cpu")
