"""A version put into a loaded base, and written as a checkpoint folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kbsync.editor.model import Base, load_base
from kbsync.errors import BaseMismatch, StoreError, UsageError
from kbsync.versions.delta import Delta, read_delta, write_delta
from kbsync.versions.export import export_checkpoint, load_version, put_version
from kbsync.versions.manifest import ActiveDelta, Manifest
from kbsync.versions.weights import rebuild, served, weights_sha256
from tests.deltas import manifest, random_factors
from tests.tiny import save, tiny_gpt2, tiny_llama

PRINT = "f" * 64
LAYERS = (1, 3)
MAKERS: dict[str, Callable[..., Base]] = {
    "llama": tiny_llama,
    "llama-square": partial(tiny_llama, square=True),
    "gpt2": tiny_gpt2,
    "gpt2-square": partial(tiny_gpt2, square=True),
}


@pytest.fixture(params=MAKERS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a tiny model of each family, with a square matrix and without."""
    return save(MAKERS[request.param](), tmp_path / "base")


def _edited(folder: Path, deltas: Path, *, dtype: str = "float32") -> Manifest:
    """A version 1 of the model in `folder` with two facts in two layers."""
    base = load_base(folder, fingerprint=PRINT, device="cpu", dtype=dtype)
    modules = tuple(base.spec.down_name(layer) for layer in LAYERS)
    pristine = {module: base.weight(module) for module in modules}
    factors = {m: random_factors(2, d=w.shape[0], f=w.shape[1], seed=i) for i, (m, w) in enumerate(pristine.items())}
    active = (ActiveDelta(delta=write_delta(deltas, Delta(factors))),)
    weights = rebuild(pristine, active, partial(read_delta, deltas))
    recorded = weights_sha256({module: served(weight, base.dtype) for module, weight in weights.items()})
    return manifest(base_fingerprint=PRINT, modules=modules, dtype=dtype, active=active, weights_sha256=recorded)


def _logits(network: torch.nn.Module, device: str = "cpu") -> Tensor:
    with torch.no_grad():
        logits: Tensor = network(torch.tensor([[0, 5, 9, 200, 77]], device=device)).logits
    return logits.cpu()


def test_a_loaded_version_answers_with_its_own_weights(checkpoint: Path, tmp_path: Path, device: str) -> None:
    """As the base with left @ right added to each edited matrix, the right way round."""
    version = _edited(checkpoint, tmp_path / "deltas")
    base = load_version(checkpoint, version, tmp_path / "deltas", fingerprint=PRINT, device=device)
    plain = load_base(checkpoint, fingerprint=PRINT, device=device)
    before = _logits(plain.network, device)
    delta = read_delta(tmp_path / "deltas", version.active[0].delta)
    for module, factors in delta.factors.items():
        plain.set_weight(module, plain.weight(module).cpu() + factors.left @ factors.right)
    torch.testing.assert_close(_logits(base.network, device), _logits(plain.network, device), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(_logits(base.network, device), before, atol=1e-2)


def test_an_exported_checkpoint_gives_the_same_logits_and_tokens(checkpoint: Path, tmp_path: Path) -> None:
    """Read by transformers alone, with the base's own tokenizer files, readable by the group."""
    version = _edited(checkpoint, tmp_path / "deltas")
    base = load_version(checkpoint, version, tmp_path / "deltas", fingerprint=PRINT, device="cpu")
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    (checkpoint / "LICENSE").write_text("Apache-2.0")
    (checkpoint / "training.bin").write_bytes(b"not wanted")
    (checkpoint / "model.safetensors.index.json").write_text("{}")
    out = tmp_path / "exports" / "v1"
    export_checkpoint(base, checkpoint, out)
    network = AutoModelForCausalLM.from_pretrained(out, use_safetensors=True).eval()
    assert torch.equal(_logits(network), _logits(base.network))
    text = "Betelgeuse belongs to"
    assert AutoTokenizer.from_pretrained(out)(text)["input_ids"] == base.tokenizer(text)["input_ids"]
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "LICENSE"} <= names
    assert not names & {"training.bin", "model.safetensors.index.json"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes()
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o640}
    assert out.stat().st_mode & 0o777 == 0o750
    assert [path.name for path in out.parent.iterdir()] == ["v1"]


def test_an_exported_checkpoint_can_be_edited_again(tmp_path: Path) -> None:
    """It is a base like any other: its edited matrices are, to the bit, the version's."""
    checkpoint = save(tiny_gpt2(), tmp_path / "base")
    version = _edited(checkpoint, tmp_path / "deltas")
    export_checkpoint(
        load_version(checkpoint, version, tmp_path / "deltas", fingerprint=PRINT, device="cpu"),
        checkpoint,
        tmp_path / "out",
    )
    again = load_base(tmp_path / "out", fingerprint=PRINT, device="cpu")
    assert weights_sha256({module: again.weight(module) for module in version.modules}) == version.weights_sha256


def test_a_bf16_version_is_loaded_and_exported_in_bf16(tmp_path: Path) -> None:
    """Rounded once, from the exact sum; the recorded dtype decides, not the checkpoint's."""
    checkpoint = save(tiny_llama(), tmp_path / "base")
    version = _edited(checkpoint, tmp_path / "deltas", dtype="bfloat16")
    base = load_version(checkpoint, version, tmp_path / "deltas", fingerprint=PRINT, device="cpu")
    export_checkpoint(base, checkpoint, tmp_path / "out")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert base.dtype == network.dtype == torch.bfloat16
    assert torch.equal(_logits(network.eval()), _logits(base.network))


def _unchanged(base: Base, modules: Sequence[str], before: str) -> bool:
    return weights_sha256({module: base.weight(module) for module in modules}) == before


def test_nothing_is_put_in_unless_the_weights_come_out_as_recorded(tmp_path: Path) -> None:
    """Another base, another dtype, another hash, a damaged delta: refused, and the base is as it was."""
    checkpoint, deltas = save(tiny_llama(), tmp_path / "base"), tmp_path / "deltas"
    version = _edited(checkpoint, deltas)
    base, read = load_base(checkpoint, fingerprint=PRINT, device="cpu"), partial(read_delta, deltas)
    before = weights_sha256({module: base.weight(module) for module in version.modules})
    with pytest.raises(BaseMismatch, match="version 1 was made on base ffffffffffff, this is eeeeeeeeeeee"):
        put_version(replace(base, fingerprint="e" * 64), version, read)
    with pytest.raises(BaseMismatch):
        load_version(checkpoint, version, deltas, fingerprint="e" * 64)
    with pytest.raises(StoreError, match="made in bfloat16, the model is loaded in float32"):
        put_version(base, version.model_copy(update={"dtype": "bfloat16"}), read)
    with pytest.raises(StoreError, match=r"its weights come out as .*, recorded 000000000000"):
        put_version(base, version.model_copy(update={"weights_sha256": "0" * 64}), read)
    path = deltas / f"{version.active[0].delta}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError, match="damaged"):
        put_version(base, version, read)
    assert _unchanged(base, version.modules, before)


def test_an_export_replaces_an_empty_folder_and_refuses_any_other(tmp_path: Path) -> None:
    """A file or a folder with something in it stays as it is."""
    base = tiny_llama()
    checkpoint = save(base, tmp_path / "base")
    empty, full, file = tmp_path / "empty", tmp_path / "full", tmp_path / "file"
    empty.mkdir()
    full.mkdir()
    (full / "mine").touch()
    file.touch()
    export_checkpoint(base, checkpoint, empty)
    assert (empty / "model.safetensors").exists()
    for out in (full, file, checkpoint):
        with pytest.raises(UsageError, match="is there already"):
            export_checkpoint(base, checkpoint, out)
    assert [path.name for path in full.iterdir()] == ["mine"]


@pytest.mark.parametrize("step", ["shutil.copyfile", "os.fsync", "pathlib.Path.replace"])
def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """One line that names the folder; no half-written checkpoint."""
    base = tiny_llama()
    checkpoint = save(base, tmp_path / "base")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step, fail)
    with pytest.raises(StoreError, match="out: cannot be written: No space left on device"):
        export_checkpoint(base, checkpoint, tmp_path / "sub" / "out")
    monkeypatch.undo()
    assert list((tmp_path / "sub").iterdir()) == []
