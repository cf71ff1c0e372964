"""Delivery of notices: from the ledger's outbox to every channel, each notice at least once on each.

    enroll(workspace, ledger)           # first, by whoever holds the workspace: which channels there are
    deliver(workspace, ledger)          # what is due; for a command, before it ends
    outbox = Outbox()                   # the same for a process that goes on:
    outbox.deliver(workspace, ledger)   # every few seconds; waits for no channel
    outbox.stop(5.0)                    # from then on it writes nothing, and no command of its runs

A notice counts as delivered once the ledger says so, after it was sent: whoever ends in between sends it again, with
the same id. An attempt is noted before it is made, with the time of the next one: a ledger that cannot be written sends
nothing, and what was sent but could not be noted comes again no faster than what failed. No transaction is open while
something is sent. Each channel is served by a thread of its own, one notice after the other; the one that fails is left
alone until its next attempt is due, and one that is slow keeps no other one waiting.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import structlog

from kbsync import hook
from kbsync.config import Workspace
from kbsync.errors import Cancelled, KbsyncError, UsageError, place_of
from kbsync.ledger import Ledger
from kbsync.ledger.notices import DeliveryRow, NoticeRow
from kbsync.ledger.writer import Writer
from kbsync.notify import command, mail, webhook
from kbsync.notify.message import Message, Undelivered, message_of
from kbsync.notify.settings import Channel, Email, Webhook

__all__ = ["Outbox", "deliver", "enroll", "next_attempt", "send", "try_channel"]

FIRST = timedelta(seconds=10)
LONGEST = timedelta(hours=6)
GIVE_UP = timedelta(days=3)
"""After the notice was written."""
JITTER = 0.2
"""Share of a wait that is left to chance: many workspaces with one receiver do not come at the same moment."""
ROUND = 60.0
"""Seconds for which a command begins to send more, before it ends. What is left, the next one or the daemon sends."""
BEGUN = "it was begun; how it ended is not noted"

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
    """Send what is due; how many deliveries that were. Raises LedgerError and Busy before anything is sent."""
    outbox = Outbox()
    try:
        outbox.deliver(workspace, ledger)
        outbox.wait(ROUND)
        outbox.stop()
    except BaseException:
        outbox.stop(0)
        raise
    return outbox.delivered


class Outbox:
    """Sends in the background: one thread per channel that has something to send."""

    def __init__(self) -> None:
        self.delivered = 0
        """How many deliveries there were."""
        self._serving: dict[str, threading.Thread] = {}
        self._stopping = threading.Event()
        self._ending = threading.Event()
        """Set once the commands that still run are to be killed."""
        self._writing = threading.Lock()
        self._ended = False

    def deliver(self, workspace: Workspace, ledger: Ledger) -> None:
        """Begin to send what is due on each channel that is not busy; do not wait for it. Raises LedgerError, Busy."""
        if self._stopping.is_set():
            return
        channels = workspace.settings.notify.channels
        self._give_out(ledger, channels)
        for channel in channels:
            if (thread := self._serving.get(channel.name)) is not None and thread.is_alive():
                continue
            with ledger.read() as db:
                due = db.due(channel.name, datetime.now(UTC))
            if due:
                # No thread of a pool: Python would wait for it at its end, however long the receiver hangs.
                thread = threading.Thread(
                    target=self._serve, args=(workspace, ledger, channel), name=f"notify {channel.name}", daemon=True
                )
                self._serving[channel.name] = thread
                thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until nothing is being sent, or for so long. Whether nothing is."""
        end = None if seconds is None else time.monotonic() + seconds
        for thread in self._serving.values():
            thread.join(None if end is None else max(end - time.monotonic(), 0))
        return not any(thread.is_alive() for thread in self._serving.values())

    def stop(self, seconds: float | None = None) -> None:
        """Begin nothing more, give what is being sent so many seconds to end (default: as long as it takes), kill the
        commands that have not, and write nothing to the ledger after that: what was not noted is sent again by whoever
        comes next."""
        self._stopping.set()
        if not self.wait(seconds):
            self._ending.set()
            self.wait(5 * hook.LOOK)
        with self._writing:
            self._ended = True

    def _give_out(self, ledger: Ledger, channels: Sequence[Channel]) -> None:
        """Give each channel the notices that are new to it."""
        if not channels:
            return
        with ledger.read() as db:
            newest = db.notices(1)
            behind = bool(newest) and any(row.seen < newest[0].id for row in db.channels().values())
        if behind:
            self._write(ledger, lambda db: db.enqueue({channel.name: channel.on for channel in channels}))

    def _write(self, ledger: Ledger, act: Callable[[Writer], object]) -> None:
        with self._writing:
            if self._ended:
                raise Cancelled("kbsync ends")
            with ledger.write() as db:
                act(db)

    def _serve(self, workspace: Workspace, ledger: Ledger, channel: Channel) -> None:
        """Send what is due on one channel until an attempt fails."""
        try:
            while not self._stopping.is_set():
                with ledger.read() as db:
                    due, failures = db.due(channel.name, datetime.now(UTC)), db.failures(channel.name)
                if not due or not self._send(workspace, ledger, channel, due[0], failures):
                    break
        except KbsyncError as error:
            log.warning("notice_not_noted", channel=channel.name, problem=error.message)
        except Exception as error:
            log.error("delivery_failed", channel=channel.name, problem=place_of(error))

    def _send(
        self, workspace: Workspace, ledger: Ledger, channel: Channel, due: tuple[NoticeRow, DeliveryRow], failures: int
    ) -> bool:
        """Make one attempt, after so many that failed on the channel; whether it was delivered."""
        notice, row = due
        tries, now = max(row.attempts, failures) + 1, datetime.now(UTC)
        begun = replace(row, attempts=row.attempts + 1, next_at=next_attempt(tries, now, now), error=BEGUN)
        self._write(ledger, lambda db: db.note_delivery(begun))
        after, gone = _attempt(workspace, channel, notice, begun, tries, self._ending)

        def note(db: Writer) -> None:
            db.note_delivery(after)
            if gone:
                db.stop_channel(channel.name, "its receiver answered 410: it wants no notices")

        self._write(ledger, note)
        with self._writing:
            self.delivered += after.delivered_at is not None
        return after.delivered_at is not None


def _attempt(
    workspace: Workspace, channel: Channel, notice: NoticeRow, row: DeliveryRow, tries: int, ending: threading.Event
) -> tuple[DeliveryRow, bool]:
    """Send a notice; how far it came then, and whether the receiver wants none any more."""
    try:
        remark = send(workspace, channel, message_of(notice, workspace.root.name), ending)
    except Undelivered as error:
        now, chance = datetime.now(UTC), random.random()  # noqa: S311
        again = next_attempt(tries, notice.at, now, retry_after=error.retry_after, chance=chance)
        log.warning("notice_not_delivered", channel=channel.name, notice=notice.id, problem=error.problem)
        return replace(row, next_at=again, error=error.problem), error.gone
    if remark:
        log.warning("notice_not_for_all", channel=channel.name, notice=notice.id, problem=remark)
    return replace(row, delivered_at=datetime.now(UTC), next_at=None, error=remark), False


def try_channel(workspace: Workspace, ledger: Ledger, name: str) -> None:
    """Send a message to see whether a channel works; one that was stopped goes on after it, and what waits for its
    next attempt is due. Raises UsageError where there is no such channel, or the message did not arrive everywhere."""
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
        problem = send(workspace, channels[name], message)
    except Undelivered as error:
        raise UsageError(f"channel {name}: {error.problem}", hint="see `notify:` in kbsync.yaml") from None
    with ledger.write() as db:
        db.resume_channel(name)
    if problem:
        raise UsageError(f"channel {name}: {problem}", hint="see `notify:` in kbsync.yaml; the others have got it")


def send(workspace: Workspace, channel: Channel, message: Message, ending: threading.Event | None = None) -> str:
    """Send one message on one channel; who did not get it though others did, or nothing. A command is killed once
    `ending` is set. Raises Undelivered, whatever went wrong."""
    try:
        if isinstance(channel, Webhook):
            url, secret = (workspace.secret(f"notify.{channel.name}", one) for one in (channel.url, channel.secret))
            webhook.post(channel, url, secret, message)
        elif isinstance(channel, Email):
            key = f"notify.{channel.name}"
            return mail.send(channel, workspace.secret(key, channel.password) if channel.password else None, message)
        else:
            keep = workspace.settings.hook_secrets
            command.run(channel, message, folder=workspace.root, keep=keep, ending=ending)
    except Undelivered:
        raise
    except KbsyncError as error:
        raise Undelivered(error.message) from None
    except Exception as error:
        raise Undelivered(f"channel {channel.name}: {place_of(error)}") from None
    return ""
