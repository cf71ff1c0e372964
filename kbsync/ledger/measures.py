"""Measures of running it: durations by phase, answers of sources, signs of life."""

from __future__ import annotations

from kbsync.ledger.audit import Auditor
from kbsync.ledger.database import Session

__all__ = ["MeasureReader", "MeasureWriter"]


class MeasureReader(Session):
    """Questions about measures."""


class MeasureWriter(MeasureReader, Auditor):
    """What a Writer may write about measures."""
