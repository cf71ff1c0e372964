"""Commands that the owner of a workspace has kbsync run: after a publication, for a notice.

    problem = run("systemctl reload my-server", folder=root, variables={"KBSYNC_VERSION": "7"}, keep=(), seconds=60)

A command never has the workspace's secrets in its environment, but for those that `hook_secrets` names, and never
keeps kbsync waiting: it is ended with all that it started when its time is over.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

from kbsync.references import environment, last_words

__all__ = ["run"]

SAID = 500
"""Characters of what a command said last that a failure is told with."""


def run(
    command: str,
    *,
    folder: Path,
    variables: Mapping[str, str],
    keep: Collection[str],
    seconds: float,
    stdin: bytes = b"",
) -> str | None:
    """Run a shell command in `folder` with `stdin`, and return what went wrong, in one line; None where nothing did.

    Its environment is this process's without secrets (`keep` names those that it gets), and `variables`.
    """
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:
        given.write(stdin)
        given.seek(0)
        # Files, not pipes: a server that the command leaves running would keep a pipe open, and kbsync waiting.
        try:
            process = subprocess.Popen(  # noqa: S602 - the owner's own command line from kbsync.yaml
                command,
                shell=True,
                cwd=folder,
                env=environment(keep) | dict(variables),
                stdin=given,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        except OSError as error:
            return f"cannot be run: {error.strerror}"
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            return f"did not end within {seconds:g} s"
        words = " ".join(last_words(said, SAID).split())
        return f"status {status}" + (f": {words}" if words else "") if status else None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a command and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
