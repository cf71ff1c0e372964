"""How much is tried: a small sample in `make test`, all of it with FAULTS=100, as `make faults` does."""

from __future__ import annotations

import os

SHARE = int(os.environ.get("FAULTS", "0"))
"""Points that each kind of fault is tried at; 0: a sample."""


def points(sample: int, most: int = 100) -> int:
    """How many points of a kind to try: the sample, or FAULTS of them, but never more than `most`."""
    return min(SHARE, most) if SHARE else sample


WHOLE = bool(SHARE)
"""Whether what takes long is tried, too."""
