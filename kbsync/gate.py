"""The gate: is what the probe measured good enough to publish? Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kbsync.policy import Gate

__all__ = ["shortfalls"]

AT_LEAST = ("efficacy", "paraphrase")
AT_MOST = ("specificity_drop", "drift")


def shortfalls(probe: Mapping[str, Any], gate: Gate) -> list[str]:
    """Why a version with this probe report may not be published; empty: it may.

    A number that was not measured (None: nothing to measure it on) passes; one that is not a number never does.
    """
    reasons = []
    for name in AT_LEAST:
        value, limit = probe.get(name), getattr(gate, name)
        if value is not None and not value >= limit:
            reasons.append(f"{name} {value:.3f} is below {limit:g}")
    for name in AT_MOST:
        value, limit = probe.get(name), getattr(gate, name)
        if value is not None and not value <= limit:
            reasons.append(f"{name} {value:.3f} is above {limit:g}")
    return reasons
