"""Freshness: when changes at the sources reached the weights."""

from __future__ import annotations

from kbsync.ledger.audit import Auditor
from kbsync.ledger.database import Session

__all__ = ["ArrivalReader", "ArrivalWriter"]


class ArrivalReader(Session):
    """Questions about arrivals."""


class ArrivalWriter(ArrivalReader, Auditor):
    """What a Writer may write about arrivals."""
