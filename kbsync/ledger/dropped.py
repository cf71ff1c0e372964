"""Deltas that retention has removed, and so the versions that are not restorable any more."""

from __future__ import annotations

from kbsync.ledger.audit import Auditor
from kbsync.ledger.database import Session

__all__ = ["DroppedReader", "DroppedWriter"]


class DroppedReader(Session):
    """Questions about dropped deltas."""


class DroppedWriter(DroppedReader, Auditor):
    """What a Writer may write about dropped deltas."""
