"""A version as a model to use: put into a loaded base, or written as a checkpoint folder for other programs.

base = load_version(folder, manifest, store.deltas, fingerprint=fingerprint(folder))
export_checkpoint(base, folder, Path("out"))       # AutoModelForCausalLM.from_pretrained("out"): the same logits
"""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

from torch import Tensor

from kbsync.editor.model import Base, load_base
from kbsync.errors import BaseMismatch, StoreError, UsageError
from kbsync.versions.delta import read_delta
from kbsync.versions.files import TEMPORARY, sync_folder
from kbsync.versions.manifest import Manifest
from kbsync.versions.weights import Read, rebuild, served, weights_sha256

__all__ = ["export_checkpoint", "load_version", "put_version", "version_matrices"]

_COPIED = {".json", ".jinja", ".model", ".txt"}
"""What a checkpoint folder holds beside its weights: the tokenizer, its templates, and the licence (no suffix)."""


def load_version(folder: Path, manifest: Manifest, deltas: Path, *, fingerprint: str, device: str = "auto") -> Base:
    """Load the base from `folder` (whose fingerprint is given) with the weights of `manifest`, in the recorded dtype.

    Raises BaseMismatch, StoreError (a delta of `deltas` is missing or damaged) and what `load_base` raises.
    """
    _require_base(fingerprint, manifest)
    base = load_base(folder, fingerprint=fingerprint, device=device, dtype=manifest.dtype)
    put_version(base, manifest, partial(read_delta, deltas))
    return base


def put_version(base: Base, manifest: Manifest, read: Read) -> None:
    """Put the weights of `manifest` into `base`, which holds the pristine ones; `read` gives a delta by its sha256.

    Nothing is changed unless the weights come out as recorded, byte for byte. Raises what `version_matrices` raises.
    """
    for module, matrix in version_matrices(base, manifest, read).items():
        base.set_weight(module, matrix)


def version_matrices(base: Base, manifest: Manifest, read: Read) -> dict[str, Tensor]:
    """The edited matrices of `manifest` by module, as they are served; `base` holds the pristine weights.

    Raises BaseMismatch for another base, StoreError for another dtype or hash than recorded, and what `read` raises.
    """
    _require_base(base.fingerprint, manifest)
    if (dtype := str(base.dtype).removeprefix("torch.")) != manifest.dtype:
        raise StoreError(
            f"version {manifest.number} was made in {manifest.dtype}, the model is loaded in {dtype}",
            hint=f"set `dtype: {manifest.dtype}` in kbsync.yaml",
        )
    masters = rebuild({module: base.weight(module) for module in manifest.modules}, manifest.active, read)
    matrices = {module: served(master, base.dtype) for module, master in masters.items()}
    if (found := weights_sha256(matrices)) != manifest.weights_sha256:
        raise StoreError(
            f"version {manifest.number}: its weights come out as {found[:12]}, recorded {manifest.weights_sha256[:12]}",
            hint="kbsync verify",
        )
    return matrices


def _require_base(fingerprint: str, manifest: Manifest) -> None:
    if fingerprint != manifest.base_fingerprint:
        raise BaseMismatch(
            f"version {manifest.number} was made on base {manifest.base_fingerprint[:12]}, this is {fingerprint[:12]}",
            hint="put the recorded model back: kbsync model show",
        )


def export_checkpoint(base: Base, source: Path, out: Path) -> None:
    """Write what `base` holds as the checkpoint folder `out`, which transformers' from_pretrained loads.

    Weights and config come from the loaded model; the tokenizer and other small files are copied from `source`, the
    base's folder. The folder appears whole or not at all. Raises UsageError where `out` is there and not empty,
    StoreError where the disk refuses.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out}: is there already and not empty", hint="name a folder that does not exist yet")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{out.name}-", dir=out.parent))
        try:
            _fill(base, source, temporary)
            temporary.replace(out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(out.parent)
    except OSError as error:
        raise StoreError(f"{out}: cannot be written: {error.strerror or error}", hint="see to space there") from error


def _fill(base: Base, source: Path, folder: Path) -> None:
    base.network.save_pretrained(folder)
    for path in source.iterdir():
        small = path.suffix in _COPIED or path.name == "LICENSE"
        if small and path.is_file() and not path.name.endswith(".index.json") and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    for path in folder.iterdir():
        path.chmod(0o640)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    folder.chmod(0o750)
    sync_folder(folder)
