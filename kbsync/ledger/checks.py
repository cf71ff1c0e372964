"""Old facts that were asked again: what a version still answers, what is due, what has faded."""

from __future__ import annotations

from kbsync.ledger.audit import Auditor
from kbsync.ledger.database import Session

__all__ = ["CheckReader", "CheckWriter"]


class CheckReader(Session):
    """Questions about checks of facts."""


class CheckWriter(CheckReader, Auditor):
    """What a Writer may write about checks of facts."""
