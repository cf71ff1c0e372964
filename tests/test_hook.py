"""Commands that the owner has kbsync run."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from kbsync import hook
from kbsync.references import noted


def run(tmp_path: Path, command: str, *, seconds: float = 60, keep: tuple[str, ...] = (), stdin: bytes = b"") -> str:
    """What went wrong, or an empty text."""
    variables = {"KBSYNC_VERSION": "7"}
    found = hook.run(command, folder=tmp_path, variables=variables, keep=keep, seconds=seconds, stdin=stdin)
    return found or ""


def test_a_command_runs_in_the_workspace_with_its_variables_and_its_input(tmp_path: Path) -> None:
    assert run(tmp_path, "cat > said; echo $KBSYNC_VERSION >> said", stdin=b"notice\n") == ""
    assert (tmp_path / "said").read_text() == "notice\n7\n"


def test_a_failure_is_one_line_with_the_status_and_the_last_words(tmp_path: Path) -> None:
    assert run(tmp_path, "echo no such; echo server >&2; exit 3") == "status 3: no such server"
    assert run(tmp_path, "exit 4") == "status 4"
    assert run(tmp_path / "absent", "true") == "cannot be run: No such file or directory"


def test_of_much_output_the_end_is_told(tmp_path: Path) -> None:
    problem = run(tmp_path, "yes x | head -c 3000000; echo END; exit 1")
    assert problem.endswith("x x END")
    assert len(problem) < 600


def test_a_command_that_does_not_end_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    assert run(tmp_path, "sh -c 'sleep 300' & echo $! > pid; wait", seconds=0.5) == "did not end within 0.5 s"
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 30
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_server_that_a_command_leaves_running_keeps_nobody_waiting(tmp_path: Path) -> None:
    assert run(tmp_path, "sleep 300 & echo $! > pid") == ""
    os.kill(int((tmp_path / "pid").read_text()), 9)


def test_what_is_left_running_may_talk_without_end(tmp_path: Path) -> None:
    """It is not ended by a word that nobody hears, no file grows of it, and the last words are still those told."""
    problem = run(tmp_path, "echo on and on; (while :; do echo on and on; sleep 0.01; done) & echo $! > pid; exit 3")
    talker = int((tmp_path / "pid").read_text())
    try:
        assert problem.startswith("status 3: ")
        assert problem.endswith("on and on")
        time.sleep(0.5)
        assert _runs(talker)
        assert Path(f"/proc/{talker}/fd/1").readlink().name.startswith("pipe:")
    finally:
        os.kill(talker, 9)


def test_a_process_that_is_about_to_end_ends_its_commands_and_begins_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending = threading.Event()
    monkeypatch.setattr(hook, "ENDING", ending)

    def end() -> None:
        while not (tmp_path / "pid").exists():
            time.sleep(0.05)
        ending.set()

    threading.Thread(target=end, daemon=True).start()
    assert run(tmp_path, "echo $$ > begun; mv begun pid; sleep 300") == "ended, because kbsync is ending"
    assert not _runs(int((tmp_path / "pid").read_text()))
    assert run(tmp_path, "touch begun") == "not run: kbsync is ending"
    assert not (tmp_path / "begun").exists()


def test_a_command_sees_no_secret_but_those_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the reference in a file, by its name, by its value."""
    noted("headers: {X-Key: '${FEED_ACCESS}'}")
    planted = {
        "FEED_ACCESS": "canary-1",
        "PGPASSWORD": "canary-2",
        "DEPLOY_TOKEN": "canary-3",
        "DATABASE_URL": "postgresql://ada:canary-4@db/facts",
        "AWS_SECRET_ACCESS_KEY": "canary-5",
    }
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("KUBECONFIG", "/srv/kube")
    assert run(tmp_path, "env > seen", keep=("DEPLOY_TOKEN",)) == ""
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines())
    assert planted.keys() & seen.keys() == {"DEPLOY_TOKEN"}
    assert "canary" not in "".join(value for name, value in seen.items() if name != "DEPLOY_TOKEN")
    assert (seen["KUBECONFIG"], seen["PATH"]) == ("/srv/kube", os.environ["PATH"])


def test_a_secret_that_a_command_repeats_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted("url: https://example.org/?key=${FEED_ACCESS}")
    monkeypatch.setenv("FEED_ACCESS", "canary-7a1b")
    assert run(tmp_path, "echo wrong key $FEED_ACCESS; exit 1", keep=("FEED_ACCESS",)) == "status 1: wrong key ***"
