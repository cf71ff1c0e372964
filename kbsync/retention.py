"""Retention: for how long versions stay restorable. Pure; `garbage` carries it out.

    settings.retention.keeps(db.made_at(model), pinned={head, 12}, now=db.now)      # {0, 12, 88, 89, 90}

Every manifest is kept for good. Of the deltas those go that only versions need which are old and superseded; such a
version is shown as `not restorable`. A version shares most deltas with the one before it, so that many older than the
limits stay restorable at no cost.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Retention"]


class Retention(BaseModel):
    """`retention:` of kbsync.yaml: a version stays restorable while it is one of the newest or not that old. HEAD, the
    pristine base, versions with an alias and those that one demotion would give it always do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    versions: Annotated[int, Field(ge=1)] = 20
    """The newest versions."""
    days: Annotated[float, Field(ge=0, le=36500)] = 90
    """Younger than this."""

    def keeps(self, made: Mapping[int, datetime], pinned: Collection[int], now: datetime) -> set[int]:
        """Which versions (number -> when it was made) have to stay restorable; `pinned`: those that do
        whatever their age, but for the base."""
        newest = sorted(made)[-self.versions :]
        young = [number for number, at in made.items() if now - at < timedelta(days=self.days)]
        return made.keys() & {0, *newest, *young, *pinned}
