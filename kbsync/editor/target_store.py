"""The cache of target vectors: z of a fact is computed once per base model and settings, and kept.

One safetensors file per fact, named by what z depends on: base weights, request, settings, contexts. The digest of the
request stands in its header, too, so that `gc` can tell whether any version holds it. A crash or a kill in the middle
of an edit keeps every z that was finished.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kbsync.editor.preset import Preset
from kbsync.editor.target_names import TargetNames
from kbsync.editor.targets import Target
from kbsync.facts import EditRequest
from kbsync.versions.files import make_folder, write_durably

__all__ = ["TargetStore"]


class TargetStore:
    """Target vectors in `folder` for one base model (by fingerprint), dtype, preset and set of contexts."""

    def __init__(self, folder: Path, *, fingerprint: str, dtype: str, preset: Preset, contexts: Sequence[str]) -> None:
        self._folder = folder
        self._names = TargetNames(fingerprint, dtype, preset, contexts)

    def path(self, request: EditRequest) -> Path:
        """Where z of `request` lies: its name is the sha256 of all that z depends on."""
        return self._folder / self._names.of(request)

    def get(self, request: EditRequest) -> Target | None:
        """The stored target, or None where there is none or its file is damaged (then it is computed again)."""
        try:
            with safe_open(self.path(request), "pt") as file:
                z, meta = file.get_tensor("z"), file.metadata()
            if meta["sha256"] != _sha256(z):
                return None
            clamped, diverged = (meta[name] == "True" for name in ("clamped", "diverged"))
            return Target(z, float(meta["loss"]), int(meta["steps"]), clamped, diverged)
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def put(self, request: EditRequest, target: Target) -> None:
        """Store a finished target. Raises StoreError where the disk refuses."""
        meta = {
            "request": request.digest,
            "sha256": _sha256(target.z),
            "loss": repr(target.loss),
            "steps": str(target.steps),
            "clamped": str(target.clamped),
            "diverged": str(target.diverged),
        }
        make_folder(self._folder)
        write_durably(self.path(request), save({"z": target.z.contiguous()}, metadata=meta))


def _sha256(z: Tensor) -> str:
    return hashlib.sha256(z.contiguous().numpy().tobytes()).hexdigest()
