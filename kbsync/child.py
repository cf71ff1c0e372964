"""Run an edit in a child process, so that a CUDA error or out-of-memory ends the run and not the daemon.

The job goes down the child's stdin as one JSON line; stdin then stays open, and its end tells the child that the
parent is gone. Events come up its stdout, one JSON line each: progress, then a result or an error.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from typing import IO, Any

from kbsync import references
from kbsync.editor.job import AskJob, AskResult, EditJob, EditResult, ModelJob
from kbsync.errors import Cancelled, EditError, KbsyncError
from kbsync.progress import Progress, silent

KEPT = ("HF_TOKEN", "RAY_AUTH_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
"""Variables with secrets that an edit cannot do without: for texts of the Hub, and for a Ray cluster."""

__all__ = ["end", "last_words", "run_ask", "run_edit", "start"]

WORKER = "kbsync.editor.worker"
ASKER = "kbsync.editor.asker"
POLL_SECONDS = 0.2
TERMINATE_SECONDS = 5.0
STDERR_TAIL = 2000
"""Characters of the child's stderr that an unexpected end is reported with."""


def run_edit(
    job: EditJob, *, progress: Progress = silent, cancelled: threading.Event | None = None, worker: str = WORKER
) -> EditResult:
    """Run `job` in a child process and return what it made.

    Raises Cancelled when `cancelled` is set meanwhile (the child is ended), the child's own KbsyncError, or EditError
    where it ended without a word (killed, out of memory).
    """
    return EditResult.model_validate(_result(job, worker, progress, cancelled))


def run_ask(
    job: AskJob, *, progress: Progress = silent, cancelled: threading.Event | None = None, worker: str = ASKER
) -> AskResult:
    """Ask a version in a child process, as edits run. Raises what `run_edit` raises."""
    return AskResult.model_validate(_result(job, worker, progress, cancelled))


def _result(job: ModelJob, worker: str, progress: Progress, cancelled: threading.Event | None) -> Any:
    stop = cancelled or threading.Event()
    with tempfile.TemporaryFile() as stderr:
        process = start(worker, stderr)
        watcher = threading.Thread(target=_end_when_set, args=(process, stop), daemon=True)
        watcher.start()
        try:
            answer = _converse(process, job, progress)
        finally:
            end(process)
            watcher.join()
            if process.stdout is not None:
                process.stdout.close()
        if stop.is_set():
            raise Cancelled("the edit was cancelled; nothing was published", hint="the next pass plans it again")
        return _outcome(answer, last_words(process, stderr))


def start(module: str, stderr: IO[bytes], environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """One of our own modules under our own interpreter, with pipes to its stdin and from its stdout; of this process's
    environment it has all but the secrets (`KEPT` aside)."""
    ours = {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", **(environment or {})}
    return subprocess.Popen(  # noqa: S603 - our own module under our own interpreter
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        start_new_session=True,
        env=references.environment(KEPT) | ours,
    )


def last_words(process: subprocess.Popen[bytes], stderr: IO[bytes]) -> str:
    """How an ended process ended, in one line: its status, and the last line that it wrote to `stderr`."""
    tail = references.last_words(stderr, STDERR_TAIL).splitlines()
    return f"status {process.wait()}" + (f": {tail[-1]}" if tail else "")


def _converse(process: subprocess.Popen[bytes], job: ModelJob, progress: Progress) -> dict[str, Any]:
    """Send the job, pass progress on, return the last event that is none ({} where there was none)."""
    if process.stdin is None or process.stdout is None:
        raise EditError("the edit process has no pipes")
    try:
        process.stdin.write(job.model_dump_json().encode() + b"\n")
        process.stdin.flush()
    except (BrokenPipeError, ValueError):  # ValueError: it was cancelled at once, and its stdin is closed
        return {}
    answer: dict[str, Any] = {}
    for line in process.stdout:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # a library wrote to stdout
        if "phase" in event:
            progress(event["phase"], event["done"], event["total"])
        else:
            answer = event
    process.wait()
    return answer


def _outcome(answer: dict[str, Any], ended: str) -> Any:
    if "result" in answer:
        return answer["result"]
    if "error" in answer:
        raise KbsyncError.from_json(answer["error"])
    raise EditError(
        f"the edit process ended with {ended}",
        hint="`kbsync doctor` shows memory and device; the next pass tries again",
    )


def _end_when_set(process: subprocess.Popen[bytes], stop: threading.Event) -> None:
    while process.poll() is None:
        if stop.wait(POLL_SECONDS):
            end(process)
            return


def end(process: subprocess.Popen[bytes]) -> None:
    """End the child: terminate, then kill. Safe to call twice and from two threads."""
    if process.stdin is not None and not process.stdin.closed:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(TERMINATE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
