"""The audit log: what every writer of the ledger says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import insert

from kbsync.ledger import schema
from kbsync.ledger.database import Session

__all__ = ["Auditor"]


class Auditor(Session):
    """May write into the audit log."""

    now: datetime

    def audit(self, user: str, action: str, detail: Mapping[str, Any], *, run_id: int | None = None) -> None:
        """Who did what, now, for good."""
        values = {"at": self.now, "who": user, "action": action, "run_id": run_id, "detail": dict(detail)}
        self._connection.execute(insert(schema.audit).values(values))
