"""A notice as it is sent: one JSON value for webhooks and commands, the same words for mails. docs/notices.md lists it.

message = message_of(notice, workspace="astronomy")
message.body()          # bytes, the same for every attempt
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from kbsync.ledger.columns import canonical
from kbsync.ledger.notices import NoticeRow
from kbsync.references import hidden

__all__ = ["Message", "Undelivered", "message_of"]

HINTS = {
    "held": "kbsync holds",
    "rejected": "kbsync runs",
    "conflict": "kbsync conflicts list",
    "failed": "kbsync status",
    "stale": "kbsync freshness",
    "faded": "kbsync recheck --report",
    "recovered": "",
    "test": "",
}
"""Kind -> the command that shows more, or what to do."""


class Undelivered(Exception):
    """An attempt that failed: why (without secrets), in how many seconds it may be tried again at the earliest, and
    whether the receiver wants no notice ever again."""

    def __init__(self, problem: str, *, retry_after: float | None = None, gone: bool = False) -> None:
        super().__init__(problem)
        self.problem = hidden(problem)
        self.retry_after = retry_after
        self.gone = gone


class Message(BaseModel):
    """What receivers get. Fields are only added within a version."""

    model_config = ConfigDict(frozen=True)

    version: Literal[1] = 1
    id: str
    """The same for every attempt: a receiver that has seen it drops it."""
    kind: str
    thread: str
    workspace: str
    policy: str | None
    run: int | None
    message: str
    hint: str
    at: datetime
    detail: dict[str, Any]

    def body(self) -> bytes:
        """As JSON in UTF-8, with sorted keys."""
        return canonical(self.model_dump(mode="json")).encode()


def message_of(notice: NoticeRow, workspace: str) -> Message:
    """The message of a notice; `workspace` is the name of its folder."""
    return Message(
        id=notice.uid,
        kind=notice.kind,
        thread=notice.thread,
        workspace=workspace,
        policy=notice.policy,
        run=notice.run_id,
        message=notice.message,
        hint=HINTS[notice.kind],
        at=notice.at,
        detail=dict(notice.detail),
    )
