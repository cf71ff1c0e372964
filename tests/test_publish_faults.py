"""Publication under faults: killed at any step or out of disk, HEAD is old or new and everything verifies."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kbsync.config import Workspace
from kbsync.editor import worker
from kbsync.ledger import Ledger
from kbsync.serving import Versions, verify_workspace
from tests.workspaces import TestWorkspace, workspace

STARS = {"Vega": "Orion", "Betelgeuse": "Lyra", "Deneb": "Paris"}
CHANGED = STARS | {"Vega": "Rome", "Sirius": "French"}
KILLED_AT = """
import os, signal, sys
from pathlib import Path
from kbsync.ledger.writer import Writer
from kbsync.versions import store
from kbsync.editor import worker
from tests.workspaces import TestWorkspace

place, when = {"delta": (worker, "write_delta"), "manifest": (store.VersionStore, "write_manifest"),
               "ledger": (Writer, "publish"), "HEAD": (store.VersionStore, "write_head")}[sys.argv[2]], sys.argv[3]
owner, name = place
real = getattr(owner, name)
count = 0

def fatal(*args, **kwargs):
    global count
    count += 1
    if when == "before" and (name != "write_head" or count == 2):
        os.kill(os.getpid(), signal.SIGKILL)
    answer = real(*args, **kwargs)
    if when == "after" and (name != "write_head" or count == 2):
        os.kill(os.getpid(), signal.SIGKILL)
    return answer

setattr(owner, name, fatal)
with TestWorkspace(Path(sys.argv[1])).open() as reconciler:
    reconciler.sync()
"""


pytestmark = pytest.mark.usefixtures("one_cache")


@pytest.fixture
def made(tmp_path: Path) -> TestWorkspace:
    """A workspace at version 1 whose feed has changed since."""
    found = workspace(tmp_path, STARS)
    with found.open() as reconciler:
        assert reconciler.sync()[0].versions == [1]
    found.feed(CHANGED)
    return found


def killed(made: TestWorkspace, step: str, when: str) -> subprocess.CompletedProcess[bytes]:
    """A pass in a process that kills itself at that step."""
    root = Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", KILLED_AT, str(made.root), step, when],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        timeout=300,
    )


def head_and_problems(made: TestWorkspace) -> tuple[int, list[str]]:
    """The ledger's HEAD, and what `verify` finds once a writer has opened the workspace again."""
    with made.open() as reconciler:
        reconciler.recover()
        reconciler.line()
    opened = Workspace.load(made.root)
    ledger = Ledger.open(opened.ledger_url)
    with ledger.read() as db:
        head = db.head(Versions.open(opened, ledger).model)
        assert "running" not in {run.status for run in db.runs()}
    problems = list(verify_workspace(opened, ledger))
    ledger.close()
    return head, problems


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", ["delta", "manifest", "ledger", "HEAD"])
def test_a_kill_at_any_step_of_publication_leaves_head_old_or_new_and_the_next_pass_converges(
    made: TestWorkspace, step: str, when: str
) -> None:
    done = killed(made, step, when)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    head, problems = head_and_problems(made)
    published = step == "HEAD"  # the row in the ledger is what publishes; HEAD only follows
    assert (head, problems) == (2 if published else 1, [])
    with made.open() as reconciler:
        [report] = reconciler.sync()
        assert report.versions == ([] if published else [2])
        assert reconciler.sync()[0].counts["edits"] == 0
    assert head_and_problems(made) == (2, [])


@pytest.mark.parametrize(("step", "when"), [("delta", "after"), ("ledger", "before"), ("HEAD", "before")])
def test_a_kill_in_a_rebase_leaves_head_old_or_new_too(made: TestWorkspace, step: str, when: str) -> None:
    made.strategy(mode="rebase")
    assert killed(made, step, when).returncode == -signal.SIGKILL
    head, problems = head_and_problems(made)
    published = step == "HEAD"
    assert (head, problems) == (2 if published else 1, [])
    with made.open() as reconciler:
        assert reconciler.sync()[0].versions == ([] if published else [2])
        with reconciler.ledger.read() as db:
            [model] = db.models()
            assert db.version(model.id, 2).kind == "rebase"
            assert len(db.active(model.id, 2)) == 1
    assert head_and_problems(made) == (2, [])


@pytest.mark.parametrize("nth", range(1, 6))
def test_a_full_disk_fails_the_run_and_publishes_nothing(
    made: TestWorkspace, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal count
        count += 1
        if count == nth + 2:  # the first two rewrite HEAD at the start
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with made.open() as reconciler:
        monkeypatch.setattr("os.fsync", full)
        [report] = reconciler.sync()
        monkeypatch.undo()
    if report.status == "failed":
        assert "space" in report.problems[0].message.lower()
    head, problems = head_and_problems(made)
    assert head == (1 if report.status == "failed" else 2)
    assert problems == []
    with made.open() as reconciler:
        reconciler.sync()
    assert head_and_problems(made) == (2, [])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "data/deltas/x"),
            "data/deltas/x: cannot write: No space left",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "model"), "model: the system refuses: Permission denied"),
        (OSError("no such thing"), "the system refuses: no such thing"),
    ],
)
def test_what_the_system_refuses_to_an_edit_is_named_and_only_a_full_disk_is_called_so(
    error: OSError, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    told: list[dict[str, Any]] = []
    monkeypatch.setattr(worker, "perform", fail)
    monkeypatch.setattr(worker, "_say", told.append)
    monkeypatch.setattr(worker.EditJob, "model_validate_json", lambda _: None)
    monkeypatch.setattr(worker, "_end_with_parent", lambda: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("{}"))
    worker.main()
    assert told[0]["error"]["message"].startswith(said)
