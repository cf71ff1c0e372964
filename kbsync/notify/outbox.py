"""Delivery of notices: from the ledger's outbox to every channel, each notice at least once on each.

    enroll(workspace, ledger)           # first, by whoever holds the workspace: which channels there are
    deliver(workspace, ledger)          # what is due; again every few seconds

A notice counts as delivered once the ledger says so, after it was sent: whoever ends in between sends it again, with
the same id. No transaction is open while something is sent. Channels are served side by side; the one that fails is
left alone until its next attempt is due, and keeps no other one waiting.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import structlog

from kbsync.config import Workspace
from kbsync.errors import KbsyncError, UsageError, place_of
from kbsync.ledger import Ledger
from kbsync.ledger.notices import DeliveryRow, NoticeRow
from kbsync.notify import command, mail, webhook
from kbsync.notify.message import Message, Undelivered, message_of
from kbsync.notify.settings import Channel, Email, Webhook

__all__ = ["deliver", "enroll", "next_attempt", "send", "try_channel"]

FIRST = timedelta(seconds=10)
LONGEST = timedelta(hours=6)
GIVE_UP = timedelta(days=3)
"""After the notice was written."""
JITTER = 0.2
"""Share of a wait that is left to chance: many workspaces with one receiver do not come at the same moment."""

log = structlog.get_logger()


def next_attempt(
    attempts: int, written: datetime, now: datetime, *, retry_after: float | None = None, chance: float = 0.5
) -> datetime | None:
    """When to try again after so many failed attempts (from 1): in 10 s, then in twice as long each time, up to 6 h,
    give or take a fifth by `chance` (0 to 1); not before the receiver wants it. None, 3 days after it was written: not
    any more."""
    wait = min(FIRST * 2.0 ** min(attempts - 1, 20), LONGEST) * (1 + JITTER * (2 * chance - 1))
    if retry_after is not None:
        wait = max(wait, min(timedelta(seconds=retry_after), LONGEST))
    return now + wait if now < written + GIVE_UP else None


def enroll(workspace: Workspace, ledger: Ledger) -> None:
    """Make the ledger's channels those of kbsync.yaml. What was written before a channel came is not sent on it."""
    names = {channel.name for channel in workspace.settings.notify.channels}
    with ledger.read() as db:
        known = db.channels().keys()
    if known != names:
        with ledger.write() as db:
            db.set_channels(names)


def deliver(workspace: Workspace, ledger: Ledger) -> int:
    """Send what is due; how many deliveries that were. Raises LedgerError and Busy, but nothing for a channel."""
    channels = workspace.settings.notify.channels
    if not channels:
        return 0
    with ledger.read() as db:
        newest = db.notices(1)
        behind = bool(newest) and any(row.seen < newest[0].id for row in db.channels().values())
    if behind:
        with ledger.write() as db:
            db.enqueue({channel.name: channel.on for channel in channels})
    now = datetime.now(UTC)
    with ledger.read() as db:
        due = {channel.name: db.due(channel.name, now) for channel in channels}
    busy = [channel for channel in channels if due[channel.name]]
    if not busy:
        return 0
    with ThreadPoolExecutor(max_workers=len(busy), thread_name_prefix="notify") as pool:
        return sum(pool.map(lambda channel: _serve(workspace, ledger, channel, due[channel.name]), busy))


def try_channel(workspace: Workspace, ledger: Ledger, name: str) -> None:
    """Send a message to see whether a channel works; one that was stopped goes on after it. Raises UsageError where
    there is no such channel, or the message did not arrive."""
    channels = {channel.name: channel for channel in workspace.settings.notify.channels}
    if name not in channels:
        raise UsageError(f"no channel {name}", hint=f"notify: in kbsync.yaml has {', '.join(channels) or 'none'}")
    now = datetime.now(UTC)
    message = Message(
        id=f"msg_test{now:%Y%m%d%H%M%S%f}",
        kind="test",
        thread="test",
        workspace=workspace.root.name,
        policy=None,
        run=None,
        message="a test of this channel",
        hint="",
        at=now,
        detail={},
    )
    try:
        send(workspace, channels[name], message)
    except Undelivered as error:
        raise UsageError(f"channel {name}: {error.problem}", hint="see `notify:` in kbsync.yaml") from None
    with ledger.write() as db:
        db.resume_channel(name)


def send(workspace: Workspace, channel: Channel, message: Message) -> None:
    """Send one message on one channel. Raises Undelivered, whatever went wrong."""
    try:
        if isinstance(channel, Webhook):
            url, secret = (workspace.secret(f"notify.{channel.name}", one) for one in (channel.url, channel.secret))
            webhook.post(channel, url, secret, message)
        elif isinstance(channel, Email):
            key = f"notify.{channel.name}"
            mail.send(channel, workspace.secret(key, channel.password) if channel.password else None, message)
        else:
            keep = workspace.settings.hook_secrets
            command.run(channel, message, folder=workspace.root, keep=keep)
    except Undelivered:
        raise
    except KbsyncError as error:
        raise Undelivered(error.message) from None
    except Exception as error:
        raise Undelivered(f"channel {channel.name}: {place_of(error)}") from None


def _serve(workspace: Workspace, ledger: Ledger, channel: Channel, due: list[tuple[NoticeRow, DeliveryRow]]) -> int:
    """Send what is due on one channel until an attempt fails; how many were delivered."""
    for sent, (notice, row) in enumerate(due):
        problem = _attempt(workspace, channel, notice)
        now = datetime.now(UTC)
        after = replace(row, attempts=row.attempts + 1)
        if problem is None:
            after = replace(after, delivered_at=now, next_at=None, error="")
        else:
            again = next_attempt(
                after.attempts,
                notice.at,
                now,
                retry_after=problem.retry_after,
                chance=random.random(),  # noqa: S311
            )
            after = replace(after, next_at=again, error=problem.problem)
            log.warning("notice_not_delivered", channel=channel.name, notice=notice.id, problem=problem.problem)
        with ledger.write() as db:
            db.note_delivery(after)
            if problem is not None and problem.gone:
                db.stop_channel(channel.name, "its receiver answered 410: it wants no notices")
        if problem is not None:
            return sent
    return len(due)


def _attempt(workspace: Workspace, channel: Channel, notice: NoticeRow) -> Undelivered | None:
    try:
        send(workspace, channel, message_of(notice, workspace.root.name))
    except Undelivered as error:
        return error
    return None
