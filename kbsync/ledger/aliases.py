"""Names for versions, and the log of what each named when."""

from __future__ import annotations

from kbsync.ledger.audit import Auditor
from kbsync.ledger.database import Session

__all__ = ["PromotionReader", "PromotionWriter"]


class PromotionReader(Session):
    """Questions about aliases."""


class PromotionWriter(PromotionReader, Auditor):
    """What a Writer may write about aliases."""
