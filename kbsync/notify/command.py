"""A notice by command: the owner's own shell command line, as `on_publish` is one, with the message on its stdin.

Its environment says the same in short (KBSYNC_KIND, KBSYNC_THREAD, KBSYNC_POLICY, KBSYNC_RUN, KBSYNC_MESSAGE,
KBSYNC_HINT, KBSYNC_NOTICE), so that a line such as `logger -t kbsync "$KBSYNC_MESSAGE"` will do. What a source wrote is
never part of the command line itself.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from pathlib import Path

from kbsync import hook
from kbsync.notify.message import Message, Undelivered
from kbsync.notify.settings import Command

__all__ = ["run"]


def run(
    channel: Command,
    message: Message,
    *,
    folder: Path,
    keep: Collection[str] = (),
    ending: threading.Event | None = None,
) -> None:
    """Run the command in `folder`; `keep`: variables with secrets that it may see; `ending`, once set, ends it. Raises
    Undelivered where it fails or does not end in time."""
    variables = {
        "KBSYNC_NOTICE": message.id,
        "KBSYNC_KIND": message.kind,
        "KBSYNC_THREAD": message.thread,
        "KBSYNC_POLICY": message.policy or "",
        "KBSYNC_RUN": "" if message.run is None else str(message.run),
        "KBSYNC_MESSAGE": message.message,
        "KBSYNC_HINT": message.hint,
        "KBSYNC_WORKSPACE": str(folder),
    }
    # A NUL, which a source may have written, can be in no environment.
    clean = {name: value.replace("\0", " ") for name, value in variables.items()}
    body = message.body() + b"\n"
    problem = hook.run(
        channel.run,
        folder=folder,
        variables=clean,
        keep=keep,
        seconds=channel.timeout,
        stdin=body,
        ending=ending,
    )
    if problem:
        raise Undelivered(f"the command failed: {problem}")
