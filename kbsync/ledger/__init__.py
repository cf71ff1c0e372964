"""The fact ledger: what sources said, what was accepted, what each version of each model holds, who did what when.

`Ledger.open(url)`, then `ledger.read()` and `ledger.write()`; see `ledger.ledger`. docs/ledger.md describes the tables.
"""

from __future__ import annotations

from kbsync.ledger.ledger import Ledger
from kbsync.ledger.reader import Reader
from kbsync.ledger.records import (
    AuditRow,
    ConflictRow,
    FactRow,
    HeadMove,
    HoldRow,
    ModelRow,
    Placement,
    PlanRow,
    ProbeRow,
    PromotionKind,
    PromotionRow,
    PublishedVersion,
    QuarantineRow,
    RecordCounts,
    RulingRow,
    RunRow,
    RunStatus,
    ScheduleState,
    SourceState,
    StagedPlan,
    VerdictRow,
    VersionRow,
    WaitingRow,
)
from kbsync.ledger.writer import Writer

__all__ = [
    "AuditRow",
    "ConflictRow",
    "FactRow",
    "HeadMove",
    "HoldRow",
    "Ledger",
    "ModelRow",
    "Placement",
    "PlanRow",
    "ProbeRow",
    "PromotionKind",
    "PromotionRow",
    "PublishedVersion",
    "QuarantineRow",
    "Reader",
    "RecordCounts",
    "RulingRow",
    "RunRow",
    "RunStatus",
    "ScheduleState",
    "SourceState",
    "StagedPlan",
    "VerdictRow",
    "VersionRow",
    "WaitingRow",
    "Writer",
]
