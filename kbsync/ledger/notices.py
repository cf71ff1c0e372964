"""Notices that people are told, and how far each came on each channel."""

from __future__ import annotations

from kbsync.ledger.audit import Auditor
from kbsync.ledger.database import Session

__all__ = ["NoticeReader", "NoticeWriter"]


class NoticeReader(Session):
    """Questions about notices."""


class NoticeWriter(NoticeReader, Auditor):
    """What a Writer may write about notices."""
