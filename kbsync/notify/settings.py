"""`notify:` of kbsync.yaml: the channels that notices go out on, and which ones."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Notify"]


class Notify(BaseModel):
    """`notify:` of kbsync.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    failures: Annotated[int, Field(ge=1)] = 3
    """Passes of a policy that fail in a row before people are told."""
