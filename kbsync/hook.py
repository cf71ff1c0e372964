"""Commands that the owner of a workspace has kbsync run: after a publication, for a notice.

    problem = run("systemctl reload my-server", folder=root, variables={"KBSYNC_VERSION": "7"}, keep=(), seconds=60)

A command never has the workspace's secrets in its environment, but for those that `hook_secrets` names, and never
keeps kbsync waiting: it is ended with all that it started when its time is over, or when kbsync ends (`ENDING`, or
the caller's own `ending`, which may come before).
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO

from kbsync.references import LONGEST_TAIL, environment, last_words

__all__ = ["ENDING", "run"]

ENDING = threading.Event()
"""Set by a process that is about to end: commands that still run are ended, and none begins. Whoever sets it clears it
if the process goes on after all."""

SAID = 500
"""Characters of what a command said last that a failure is told with."""
LOOK = 0.2
"""Seconds between two looks at whether kbsync ends."""
HEAR_OUT = 0.5
"""Seconds for the last words of a command that has ended: what it left running may never stop talking."""


def run(
    command: str,
    *,
    folder: Path,
    variables: Mapping[str, str],
    keep: Collection[str],
    seconds: float,
    stdin: bytes = b"",
    ending: threading.Event | None = None,
) -> str | None:
    """Run a shell command in `folder` with `stdin`, and return what went wrong, in one line; None where nothing did.

    Its environment is this process's without secrets (`keep` names those that it gets), and `variables`. `ending` is
    to it what `ENDING` is to all.
    """
    if _ends(ending):
        return "not run: kbsync is ending"
    with tempfile.TemporaryFile() as given:
        given.write(stdin)
        given.seek(0)
        try:
            process = subprocess.Popen(  # noqa: S602 - the owner's own command line from kbsync.yaml
                command,
                shell=True,
                cwd=folder,
                env=environment(keep) | dict(variables),
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return f"cannot be run: {error.strerror}"
    listener = _Listener(process.stdout)
    problem = _waited(process, seconds, ending)
    if problem is not None or not process.returncode:
        return problem
    listener.join(HEAR_OUT)
    words = " ".join(last_words(io.BytesIO(listener.heard), SAID).split())
    return f"status {process.returncode}" + (f": {words}" if words else "")


class _Listener(threading.Thread):
    """Hears a command to its end and remembers the last of it. It goes on for what the command leaves running, which
    would be ended by a word that nobody hears (SIGPIPE), and would fill the disk if a file heard it."""

    def __init__(self, pipe: IO[bytes] | None) -> None:
        super().__init__(name="hook output", daemon=True)
        self.heard = b""
        self._pipe = pipe
        self.start()

    def run(self) -> None:
        if self._pipe is None:
            return
        with self._pipe:
            while piece := os.read(self._pipe.fileno(), LONGEST_TAIL):
                self.heard = (self.heard + piece)[-LONGEST_TAIL:]


def _ends(ending: threading.Event | None) -> bool:
    return ENDING.is_set() or (ending is not None and ending.is_set())


def _waited(process: subprocess.Popen[bytes], seconds: float, ending: threading.Event | None) -> str | None:
    """Wait for the end of a command; why it was made to end, None where it ended by itself."""
    end = time.monotonic() + seconds
    while (rest := end - time.monotonic()) > 0 and not _ends(ending):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(rest, LOOK))
            return None
    _end(process)
    return "ended, because kbsync is ending" if _ends(ending) else f"did not end within {seconds:g} s"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a command and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
