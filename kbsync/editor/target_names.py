"""Under which name the target vector of a request is stored: all that z depends on. Torch-free, so that a plan can tell
what it would cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kbsync.editor.preset import Preset
from kbsync.facts import EditRequest, digest_of

__all__ = ["TargetNames"]


@dataclass(frozen=True, slots=True)
class TargetNames:
    """The names of one base model's targets (by fingerprint), in one dtype, with one preset and set of contexts."""

    fingerprint: str
    dtype: str
    preset: Preset
    contexts: Sequence[str]

    def of(self, request: EditRequest) -> str:
        """The file's name: sha256 of all that z of `request` depends on."""
        scope = [self.fingerprint, self.dtype, self.preset.target_digest, list(self.contexts)]
        return f"{digest_of([*scope, request.digest])}.safetensors"
