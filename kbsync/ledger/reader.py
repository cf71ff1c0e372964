"""Reading the ledger: every question in one consistent state, in one transaction that changes nothing."""

from __future__ import annotations

from kbsync.ledger.aliases import PromotionReader
from kbsync.ledger.arrivals import ArrivalReader
from kbsync.ledger.checks import CheckReader
from kbsync.ledger.dropped import DroppedReader
from kbsync.ledger.entities import EntityReader
from kbsync.ledger.measures import MeasureReader
from kbsync.ledger.notices import NoticeReader
from kbsync.ledger.read_decisions import DecisionReader
from kbsync.ledger.read_events import EventReader
from kbsync.ledger.read_runs import RunReader

__all__ = ["Reader"]


class OperationReader(PromotionReader, DroppedReader, CheckReader, ArrivalReader, NoticeReader, MeasureReader):
    """What it answers about running it."""


class Reader(OperationReader, EventReader, RunReader, DecisionReader, EntityReader):
    """What the ledger answers, as of the moment that the transaction began."""
