"""Spaced checks of old facts: does the live version still answer them? What has faded is edited once more.

A fact is asked again `first` after it was published, then at intervals that grow by `factor` while it is answered, up
to `longest`: the spacing of a memory schedule (Leitner; Settles and Meeder 2016, half-life regression).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from kbsync.policy import Seconds

__all__ = ["Recheck"]


class Recheck(BaseModel):
    """`recheck:` of kbsync.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    first: Annotated[Seconds, Field(gt=0)] = 86400.0
    factor: Annotated[float, Field(ge=1)] = 2.0
    longest: Annotated[Seconds, Field(gt=0)] = 60 * 86400.0
    facts: Annotated[int, Field(ge=0)] = 100
    """How many are asked at once at most; 0: none, ever."""
