"""Reading the ledger: every question in one consistent state, in one transaction that changes nothing."""

from __future__ import annotations

from kbsync.ledger.entities import EntityReader
from kbsync.ledger.read_decisions import DecisionReader
from kbsync.ledger.read_events import EventReader
from kbsync.ledger.read_runs import RunReader

__all__ = ["Reader"]


class Reader(EventReader, RunReader, DecisionReader, EntityReader):
    """What the ledger answers, as of the moment that the transaction began."""
