"""What one version is, as a value and as the JSON file `versions/<model>/000007.json`. Torch-free.

The manifest names everything that the version's weights are a function of: the base, the active deltas in order, the
columns left out of each. `weights_sha256` is what `kbsync.versions.weights` must give for it, byte for byte.

    manifest = Manifest.from_bytes(path.read_bytes())
    manifest.to_bytes()                                    # the same bytes again: sorted keys, one field per line
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, field_validator

from kbsync.facts import EditRequest

__all__ = ["ActiveDelta", "Manifest", "ManifestFact", "Sha256", "VersionKind"]

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A sha256 as 64 lower-case hex digits: the only thing that file names in the store are made of."""

VersionKind = Literal["base", "edit", "revert", "rebase"]


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class ActiveDelta(_Value):
    """A delta that the weights contain: all its columns but `excluded` (JSON key `except`), then those of
    `corrections`: what it took to take facts out, or back in, while this delta was the newest (`weights.hold`)."""

    delta: Sha256
    excluded: tuple[int, ...] = Field(default=(), validation_alias="except", serialization_alias="except")
    corrections: Sha256 | None = None

    @field_validator("excluded")
    @classmethod
    def _sorted(cls, columns: tuple[int, ...]) -> tuple[int, ...]:
        if any(column < 0 for column in columns):
            raise ValueError("columns count from 0")
        return tuple(sorted(set(columns)))


class ManifestFact(_Value):
    """A fact that this version put in: column `column` of `delta`, for `object_id`, said by `source` at `origin`.

    `request` is `EditRequest.to_json()`.
    """

    delta: Sha256
    column: Annotated[int, Field(ge=0)]
    request: dict[str, Any]
    object_id: str
    source: str
    origin: str

    @property
    def edit_request(self) -> EditRequest:
        """The request as a value."""
        return EditRequest.from_json(self.request)


class Manifest(_Value):
    """Version `number` of `model`. `facts` are those that it added; those it holds follow from `active`."""

    format: Literal[1] = 1
    model: str
    number: Annotated[int, Field(ge=0)]
    parent: int | None
    kind: VersionKind
    base_fingerprint: Sha256
    base_revision: str | None = None
    """The commit of the Hugging Face repository that the base came from; None: from a folder, or embedded."""
    modules: tuple[str, ...]
    """Module paths of the edited matrices in layer order: the order in which `weights_sha256` takes them."""
    dtype: Annotated[str, Field(pattern=r"^(b?float16|float32|float64)$")]
    """The dtype that the weights are served in and `weights_sha256` was taken in: `float32`, `bfloat16`, …"""
    active: tuple[ActiveDelta, ...]
    weights_sha256: Sha256
    facts: tuple[ManifestFact, ...] = ()
    settings: dict[str, Any] = {}
    probe: dict[str, Any] | None = None
    numerics: dict[str, Any] = {}
    libraries: dict[str, str] = {}
    created_at: AwareDatetime
    run_id: int | None = None

    def to_bytes(self) -> bytes:
        """The manifest file: UTF-8 JSON with sorted keys. Raises ValueError for a NaN or infinity, which JSON lacks."""
        value = self.model_dump(mode="python", by_alias=True) | {"created_at": self.created_at.isoformat()}
        return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """The inverse of `to_bytes`. Raises pydantic's ValidationError (a ValueError) for anything else."""
        return cls.model_validate_json(data)
