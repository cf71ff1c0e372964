"""Write commands given while the daemon runs are handed to it over `data/control.sock` (mode 0600, owner only).

One request a connection: a JSON line {command, arguments, user}. The daemon answers with JSON lines: any number of
{phase, done, total}, then {result} or {error}. Both sides are in this module, so that they cannot drift apart.

The kernel says who connects (SO_PEERCRED, unix(7)): the daemon's own user or root, nobody else. A client that says
nothing, reads nothing, or comes as one too many costs the daemon a bounded time, and a command none. However many
commands wait for their turn, one that is urgent is taken.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from kbsync.errors import Busy, KbsyncError, UsageError
from kbsync.progress import Progress, silent

__all__ = ["Gone", "Handler", "call", "serve"]

Gone = Callable[[], bool]
"""Whether the client has hung up: nobody hears the answer."""
Handler = Callable[[str, dict[str, Any], str, Progress, Gone], dict[str, Any]]
"""`handler(command, arguments, user, progress, gone) -> result`, JSON values; raises KbsyncError."""

MAX_REQUEST = 1 << 25
"""Bytes of a request; a longer one is refused. The largest is `sync --plan`: a plan takes about 500 bytes a row."""
CONNECT_SECONDS = 5.0
REQUEST_SECONDS = 10.0
"""What a client may take to say what it wants."""
ANSWER_SECONDS = 10.0
"""What a client may take to read the result; it may have been stopped since."""
CLIENTS = 32
"""Connections at a time that have not said what they want yet, and as many again whose commands are not urgent and have
not ended; a person has one, and each has a thread."""
_PRIVILEGED = 0
"""The user id that may do anything on the machine."""
SOCKET_PATH_LIMIT = 100
"""Bytes; Linux allows 107 in sun_path."""


def call(
    path: Path, command: str, arguments: dict[str, Any], *, user: str, progress: Progress = silent
) -> dict[str, Any]:
    """Ask the daemon to do `command`. Raises Busy where nobody listens, and whatever error the daemon answers."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(CONNECT_SECONDS)
        try:
            connection.connect(_address(path))
        except OSError as error:
            raise Busy(
                f"{path}: another process holds the workspace and takes no commands ({error.strerror or error})",
                hint="wait until it has finished; `kbsync status` shows what it does",
            ) from None
        connection.settimeout(None)
        request = {"command": command, "arguments": arguments, "user": user}
        with suppress(OSError):  # refused while it spoke: the answer says why
            connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile("rb") as stream:
            return _answer(stream, progress)


def _answer(stream: BinaryIO, progress: Progress) -> dict[str, Any]:
    for event in _events(stream):
        if "phase" in event:
            progress(event["phase"], event["done"], event["total"])
        elif "error" in event:
            raise KbsyncError.from_json(event["error"])
        else:
            result: dict[str, Any] = event["result"]
            return result
    raise KbsyncError("the daemon ended before it answered", hint="`kbsync runs` shows how far it came")


def _events(stream: BinaryIO) -> Iterator[dict[str, Any]]:
    """The whole lines that the daemon says before it ends the connection, or itself."""
    with suppress(OSError):
        for line in stream:
            if not line.endswith(b"\n"):
                return
            yield json.loads(line)


@contextmanager
def serve(path: Path, handler: Handler, *, urgent: Collection[str] = ()) -> Iterator[None]:
    """Listen on `path` while the block runs, each request in a thread of its own. Needs the writer lock: a socket
    file left by a dead daemon is replaced. `urgent`: commands that are taken however many others wait."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    os.fchmod(listener.fileno(), 0o600)  # before it has a name: there is no moment at which others may connect
    listener.bind(_address(path))
    listener.listen()
    thread = threading.Thread(target=_accept, args=(listener, _Office(handler, urgent)), name="control", daemon=True)
    thread.start()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def _address(path: Path) -> str:
    """The path as the kernel takes it: relative where the absolute one is too long."""
    absolute = str(path)
    if len(os.fsencode(absolute)) <= SOCKET_PATH_LIMIT:
        return absolute
    relative = os.path.relpath(absolute)
    if len(os.fsencode(relative)) > SOCKET_PATH_LIMIT:
        raise UsageError(f"{path}: the path is too long for a socket", hint="run kbsync from inside the workspace")
    return relative


@dataclass(frozen=True, slots=True)
class _Office:
    """Where requests are taken."""

    handler: Handler
    urgent: Collection[str]
    asking: threading.BoundedSemaphore = field(default_factory=lambda: threading.BoundedSemaphore(CLIENTS))
    """Room for connections that have not said what they want."""
    waiting: threading.BoundedSemaphore = field(default_factory=lambda: threading.BoundedSemaphore(CLIENTS))
    """Room for commands that are not urgent."""

    def take(self, connection: socket.socket) -> None:
        """Hear what a client wants, do it and answer; gives back the place in `asking`."""
        with connection:
            try:
                request = self._hear(connection)
                with nullcontext() if request["command"] in self.urgent else self._place():
                    result = self._do(connection, request)
            except KbsyncError as error:
                _send(connection, {"error": error.to_json()})
            else:
                _send(connection, {"result": result})

    def refuse(self, connection: socket.socket) -> None:
        """Tell a client that it is one too many."""
        problem = Busy(f"{CLIENTS} clients have not said what they want", hint="try again in a moment")
        with connection:
            _send(connection, {"error": problem.to_json()}, seconds=0.0)

    def _hear(self, connection: socket.socket) -> dict[str, Any]:
        try:
            _refuse_others(connection)
            return _request(_line(connection))
        finally:
            self.asking.release()

    @contextmanager
    def _place(self) -> Iterator[None]:
        if not self.waiting.acquire(blocking=False):
            raise Busy(f"{CLIENTS} commands wait for the daemon already", hint="try again later; `kbsync status`")
        try:
            yield
        finally:
            self.waiting.release()

    def _do(self, connection: socket.socket, request: dict[str, Any]) -> dict[str, Any]:
        room, end = select.poll(), select.poll()
        room.register(connection, select.POLLOUT)
        end.register(connection, 0)  # its end and errors are always told, poll(2)

        def progress(phase: str, done: int, total: int) -> None:
            # Progress may be left out: the command does not wait for a client that reads nothing.
            if room.poll(0):
                _send(connection, {"phase": phase, "done": done, "total": total}, seconds=0.0)

        return self.handler(
            request["command"], request["arguments"], request["user"], progress, lambda: bool(end.poll(0))
        )


def _accept(listener: socket.socket, office: _Office) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return  # closed by `serve`
        if office.asking.acquire(blocking=False):
            threading.Thread(target=office.take, args=(connection,), daemon=True).start()
        else:
            office.refuse(connection)


def _send(connection: socket.socket, event: dict[str, Any], *, seconds: float = ANSWER_SECONDS) -> None:
    try:
        connection.settimeout(seconds)
        connection.sendall(json.dumps(event).encode() + b"\n")
    except OSError:
        with suppress(OSError):  # the client went away, or half a line is on its way: no more of it
            connection.shutdown(socket.SHUT_RDWR)


def _refuse_others(connection: socket.socket) -> None:
    """Raise UsageError unless the process at the other end is this user's or root's."""
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if uid not in (_PRIVILEGED, os.geteuid()):
        raise UsageError("this workspace belongs to another user", hint="give the command as that user")


def _line(connection: socket.socket) -> bytes:
    """All of a request, up to its newline or the end. Raises UsageError where it is too long or comes too slowly."""
    deadline = time.monotonic() + REQUEST_SECONDS
    found = bytearray()
    while not found.endswith(b"\n"):
        try:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            piece = connection.recv(1 << 16)
        except OSError:
            raise UsageError(f"no whole request in {REQUEST_SECONDS:g} s") from None
        if not piece:
            break
        found += piece
        if len(found) > MAX_REQUEST:
            raise UsageError(f"the request is larger than {MAX_REQUEST:,} bytes")
    return bytes(found)


def _request(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise UsageError("the request is not one line of JSON") from None
    shape = {"command": str, "arguments": dict, "user": str}
    if not isinstance(value, dict) or any(not isinstance(value.get(key), kind) for key, kind in shape.items()):
        raise UsageError("a request needs command, arguments and user")
    return value
