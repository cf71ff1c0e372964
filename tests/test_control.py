"""Write commands over the daemon's socket."""

from __future__ import annotations

import json
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kbsync.control import Gone, call, serve
from kbsync.errors import Busy, Held, KbsyncError
from kbsync.progress import Progress


def handler(command: str, arguments: dict[str, Any], user: str, progress: Progress, gone: Gone) -> dict[str, Any]:
    """Answers what it was asked, with progress; fails on request."""
    if command == "fail":
        raise Held("run 3 is held", hint="kbsync approve 3")
    progress("edit", 1, 2)
    progress("edit", 2, 2)
    return {"command": command, "arguments": arguments, "user": user}


REQUEST = b'{"command": "sync", "arguments": {}, "user": "ada"}\n'


@contextmanager
def talking_to(path: Path) -> Iterator[socket.socket]:
    """A connection of a client that does as the test says."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(path))
        yield client


def heard(client: socket.socket, *, last: bool = False) -> dict[str, Any]:
    """The next line that the daemon says, or its last one."""
    with client.makefile("rb") as stream:
        lines = list(stream) if last else [stream.readline()]
    found: dict[str, Any] = json.loads(lines[-1])
    return found


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


@pytest.mark.parametrize(
    "line",
    [
        b"not json\n",
        b"[]\n",
        b'{"command": 1, "arguments": {}, "user": "x"}\n',
        b'{"command": "sync", "arguments": {}}\n',
        b"[" * 100_000 + b"\n",
        b"\xff\xfe\n",
    ],
    ids=["no JSON", "no object", "wrong type", "no user", "very deep", "no UTF-8"],
)
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


def test_a_request_that_is_too_large_is_refused_before_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kbsync.control.MAX_REQUEST", 100_000)
    with serve(tmp_path / "control.sock", handler), talking_to(tmp_path / "control.sock") as client:
        client.sendall(b"x" * 100_001)
        assert "larger than 100,000 bytes" in heard(client)["error"]["message"]


@pytest.mark.parametrize("said", [b"", b'{"command": '], ids=["silent", "half a request"])
def test_a_client_that_does_not_say_what_it_wants_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr("kbsync.control.REQUEST_SECONDS", 0.2)
    with serve(tmp_path / "control.sock", handler), talking_to(tmp_path / "control.sock") as client:
        client.sendall(said)
        assert "no whole request in 0.2 s" in heard(client)["error"]["message"]


def test_a_command_does_not_wait_for_a_client_that_reads_nothing(tmp_path: Path) -> None:
    """Its progress is left out where there is no room for it, and what is sent stays whole lines up to the result."""

    def chatty(command: str, arguments: dict[str, Any], user: str, progress: Progress, gone: Gone) -> dict[str, Any]:
        for step in range(20_000):
            progress("targets", step, 20_000)
        done.set()
        return {"command": command}

    done = threading.Event()
    with serve(tmp_path / "control.sock", chatty), talking_to(tmp_path / "control.sock") as client:
        client.sendall(REQUEST)
        assert done.wait(60)
        with client.makefile("rb") as stream:
            events = [json.loads(line) for line in stream]
    assert events[-1] == {"result": {"command": "sync"}}
    assert 1 < len(events) < 20_000


def test_one_client_too_many_is_told_so_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kbsync.control.CLIENTS", 2)
    path = tmp_path / "control.sock"
    with serve(path, handler), talking_to(path) as one, talking_to(path) as two, talking_to(path) as three:
        assert "2 clients have not said" in heard(three)["error"]["message"]
        for client in (one, two):
            client.sendall(REQUEST)
        assert [heard(client, last=True)["result"]["user"] for client in (one, two)] == ["ada", "ada"]


def test_another_user_is_refused_whatever_the_files_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says whose process it is; this process is made to take itself for another user's."""
    path = tmp_path / "control.sock"
    with serve(path, handler):
        monkeypatch.setattr("kbsync.control._PRIVILEGED", -1)
        monkeypatch.setattr("os.geteuid", lambda: 54321)
        with talking_to(path) as client:
            client.sendall(REQUEST)
            assert "another user" in heard(client)["error"]["message"]


def test_however_many_commands_wait_an_urgent_one_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one too many of the others is told so, in words."""
    monkeypatch.setattr("kbsync.control.CLIENTS", 2)
    path, editing, may_end = tmp_path / "control.sock", threading.Semaphore(0), threading.Event()

    def slow(command: str, arguments: dict[str, Any], user: str, progress: Progress, gone: Gone) -> dict[str, Any]:
        if command == "sync":
            editing.release()
            may_end.wait(60)
        return {"command": command}

    with serve(path, slow, urgent={"rollback"}), talking_to(path) as one, talking_to(path) as two:
        for client in (one, two):
            client.sendall(REQUEST)
            assert editing.acquire(timeout=60)
        with pytest.raises(Busy, match="2 commands wait") as caught:
            call(path, "sync", {}, user="ada")
        assert caught.value.hint
        assert call(path, "rollback", {}, user="ada") == {"command": "rollback"}
        may_end.set()
        assert heard(one, last=True) == {"result": {"command": "sync"}}


def test_a_handler_learns_that_its_client_has_hung_up(tmp_path: Path) -> None:
    """Not of one that only says no more: it reads on."""
    seen: list[bool] = []
    asked, may_look, looked = threading.Semaphore(0), threading.Semaphore(0), threading.Semaphore(0)

    def look(command: str, arguments: dict[str, Any], user: str, progress: Progress, gone: Gone) -> dict[str, Any]:
        for _ in range(2):
            asked.release()
            may_look.acquire(timeout=60)
            seen.append(gone())
            looked.release()
        return {}

    with serve(tmp_path / "control.sock", look), talking_to(tmp_path / "control.sock") as client:
        client.sendall(REQUEST)
        client.shutdown(socket.SHUT_WR)
        assert asked.acquire(timeout=60)
        may_look.release()
        assert looked.acquire(timeout=60)
        client.close()
        may_look.release()
        assert looked.acquire(timeout=60)
    assert seen == [False, True]


@pytest.mark.parametrize("said", [b"", b'{"error": {"kin'], ids=["nothing", "half an answer"])
def test_a_daemon_that_ends_while_it_is_spoken_to_is_an_error_in_words(tmp_path: Path, said: bytes) -> None:
    """The request is longer than the socket takes, so that the client is still writing as the other end goes."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control.sock"))
        listener.listen()

        def end() -> None:
            connection, _ = listener.accept()
            connection.recv(1)
            connection.sendall(said)
            connection.close()

        ending = threading.Thread(target=end)
        ending.start()
        with pytest.raises(KbsyncError, match="the daemon ended before it answered"):
            call(tmp_path / "control.sock", "sync", {"filling": "x" * (1 << 22)}, user="ada")
        ending.join()
