"""Retention: for how long versions stay restorable.

Every manifest is kept for good. Of the deltas those go that only versions need which are old and superseded; such a
version is shown as `not restorable`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Retention"]


class Retention(BaseModel):
    """`retention:` of kbsync.yaml: a version stays restorable while it is one of the newest or not that old. HEAD, the
    pristine base and versions with an alias always do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    versions: Annotated[int, Field(ge=1)] = 20
    """The newest versions."""
    days: Annotated[float, Field(ge=0)] = 90
    """Younger than this."""
