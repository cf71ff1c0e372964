"""What suffers: kbsync's own commands and its daemon, with the editor that remembers, in processes that start at once.

    python -m tests.faults.subject WORKSPACE # a request a line on stdin, an answer a line on stdout, once it is ready

The program imports everything and then forks for each request, so that a process costs milliseconds. What it says on
the way stands in the control file: the stage that it is in, which a test may have it wait in (`hold`).
"""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event

from kbsync import commands, reconcile
from kbsync.commands import perform
from kbsync.daemon import daemon, run_daemon
from kbsync.errors import Cancelled, KbsyncError
from kbsync.line import Line
from kbsync.log import configure
from tests import standin
from tests.faults.shim import Control
from tests.faults.stages import STAGES
from tests.standin import StandIn

HOLD_SECONDS = 60.0
HELD_ANYWAY = 99
"""No stage's number."""


def main() -> None:
    """Serve requests until stdin ends."""
    control = Control.open(Path(os.environ["FAULTS_CONTROL"]), Path(os.environ["LD_PRELOAD"]))
    _install(control)
    configure(level="error")
    perform(Path(sys.argv[1]), "sync", {}, user="test")  # whoever is forked as another user can import nothing more
    _say({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            _say({"status": os.waitstatus_to_exitcode(status)})
        else:
            _say({"pid": _forked(request)})


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _forked(request: dict[str, Any]) -> int:
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        status = _run(request)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def _run(request: dict[str, Any]) -> int:
    output = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.register(signal.SIGUSR1, file=output)
    if request.get("user"):
        os.setgroups([])
        os.setresgid(*[request["user"]] * 3)
        os.setresuid(*[request["user"]] * 3)
    root = Path(request["root"])
    configure(as_json=True, stream=sys.stdout)
    if request.get("daemon"):
        return _outcome(request, lambda: run_daemon(root) or {})
    told = [
        _outcome(request, functools.partial(perform, root, name, arguments, user="test"))
        for name, arguments in request["commands"]
    ]
    return max(told)


def _outcome(request: dict[str, Any], act: Callable[[], dict[str, Any]]) -> int:
    """Append what came of it to the log, as the command line would say it; the exit status."""
    try:
        said, status = {"event": "result", "result": act()}, 0
    except KbsyncError as error:
        said, status = {"event": "error", "error": error.to_json()}, error.exit_code
    _say(said)
    return status


def _install(control: Control) -> None:
    """Have each stage say that it begins, and wait there where it is asked to."""
    real_edit = StandIn()
    stages = [
        (reconcile, "observe", "fetch"),
        (reconcile.Reconciler, "_decide", "record"),
        (Line, "_publish", "publish"),
        (standin, "_probe", "probe"),
        (commands, "rollback", "rollback"),
        (commands, "revert_fact", "revert"),
        (commands, "collect", "gc"),
    ]
    for owner, name, stage in stages:
        setattr(owner, name, _staged(control, stage, getattr(owner, name)))
    event.listen(Engine, "before_cursor_execute", functools.partial(_statement, control))
    event.listen(Engine, "commit", functools.partial(_statement, control))
    daemon.BEAT = 0.2
    reconcile.run_edit = _staged(control, "edit", real_edit)


def _staged(control: Control, stage: str, act: Callable[..., Any]) -> Callable[..., Any]:
    number = STAGES.index(stage)

    @functools.wraps(act, assigned=())
    def wrapped(*arguments: Any, **options: Any) -> Any:
        before = control.get("stage")
        control.set(stage=number)
        if control.get("hold") == number:
            _wait(control, options.get("cancelled"))
        try:
            return act(*arguments, **options)
        finally:
            control.set(stage=before)

    return wrapped


def _statement(control: Control, *_: Any) -> None:
    """One statement, or a commit, is about to be sent to the database."""
    if control.get("stage") == control.get("within"):
        number = control.get("statements") + 1
        control.set(statements=number)
        if number == control.get("statement"):
            control.set(hold=HELD_ANYWAY)
            _wait(control, None)


def _wait(control: Control, cancelled: threading.Event | None) -> None:
    """Until the test lets it go on. Raises Cancelled as the stage itself would."""
    control.set(held=1)
    end = time.monotonic() + HOLD_SECONDS
    while control.get("hold") and time.monotonic() < end:
        if cancelled is not None and cancelled.is_set():
            raise Cancelled("cancelled")
        time.sleep(0.01)


if __name__ == "__main__":
    main()
