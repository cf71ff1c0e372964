"""Write commands over the daemon's socket."""

from __future__ import annotations

import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from kbsync.control import call, serve
from kbsync.errors import Busy, Held, KbsyncError
from kbsync.progress import Progress


def handler(command: str, arguments: dict[str, Any], user: str, progress: Progress) -> dict[str, Any]:
    """Answers what it was asked, with progress; fails on request."""
    if command == "fail":
        raise Held("run 3 is held", hint="kbsync approve 3")
    progress("edit", 1, 2)
    progress("edit", 2, 2)
    return {"command": command, "arguments": arguments, "user": user}


def test_a_command_reaches_the_daemon_and_its_progress_and_result_come_back(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    with serve(tmp_path / "control.sock", handler):
        result = call(
            tmp_path / "control.sock",
            "rollback",
            {"to": 1},
            user="ada",
            progress=lambda phase, done, total: seen.append((phase, done, total)),
        )
    assert result == {"command": "rollback", "arguments": {"to": 1}, "user": "ada"}
    assert seen == [("edit", 1, 2), ("edit", 2, 2)]


def test_an_error_comes_back_as_the_error_that_it_was(tmp_path: Path) -> None:
    with serve(tmp_path / "control.sock", handler), pytest.raises(Held, match="run 3 is held") as caught:
        call(tmp_path / "control.sock", "fail", {}, user="ada")
    assert caught.value.hint == "kbsync approve 3"
    assert caught.value.exit_code == 3


def test_only_the_owner_may_speak_to_the_socket(tmp_path: Path) -> None:
    with serve(tmp_path / "control.sock", handler):
        assert stat.S_IMODE((tmp_path / "control.sock").stat().st_mode) == 0o600


def test_where_nobody_listens_the_workspace_is_busy(tmp_path: Path) -> None:
    with pytest.raises(Busy, match="takes no commands"):
        call(tmp_path / "control.sock", "sync", {}, user="ada")


def test_a_socket_left_by_a_dead_daemon_is_replaced_and_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with serve(path, handler):
        assert call(path, "sync", {}, user="ada")["command"] == "sync"
    assert not path.exists()


@pytest.mark.parametrize("line", [b"not json\n", b"[]\n", b'{"command": 1, "arguments": {}, "user": "x"}\n'])
def test_a_malformed_request_is_answered_with_an_error_and_the_daemon_goes_on(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "control.sock"
    with serve(path, handler):
        with socket.socket(socket.AF_UNIX) as rude:
            rude.connect(str(path))
            rude.sendall(line)
            assert b'"error"' in rude.makefile("rb").readline()
        assert call(path, "sync", {}, user="ada")["command"] == "sync"


def test_an_error_of_any_class_survives_the_way_through_json() -> None:
    for kind in (KbsyncError, Held, Busy):
        again = KbsyncError.from_json(kind("m", hint="h").to_json())
        assert (type(again), again.message, again.hint, again.exit_code) == (kind, "m", "h", kind.exit_code)
