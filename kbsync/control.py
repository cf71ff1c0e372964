"""Write commands given while the daemon runs are handed to it over `data/control.sock` (mode 0600, owner only).

One request a connection: a JSON line {command, arguments, user}. The daemon answers with JSON lines: any number of
{phase, done, total}, then {result} or {error}. Both sides are in this module, so that they cannot drift apart.

The kernel says who connects (SO_PEERCRED, unix(7)): the daemon's own user or root, nobody else. A client that says
nothing, reads nothing, or comes as one too many costs the daemon a bounded time, and a command none.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from kbsync.errors import Busy, KbsyncError, UsageError
from kbsync.progress import Progress, silent

__all__ = ["Handler", "call", "serve"]

Handler = Callable[[str, dict[str, Any], str, Progress], dict[str, Any]]
"""`handler(command, arguments, user, progress) -> result`, JSON values; raises KbsyncError."""

MAX_REQUEST = 1 << 25
"""Bytes of a request; a longer one is refused. The largest is `sync --plan`: a plan takes about 500 bytes a row."""
CONNECT_SECONDS = 5.0
REQUEST_SECONDS = 10.0
"""What a client may take to say what it wants."""
ANSWER_SECONDS = 10.0
"""What a client may take to read the result; it may have been stopped since."""
CLIENTS = 32
"""Connections at a time; a person has one, and each has a thread."""
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
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile("rb") as stream:
            return _answer(stream, progress)


def _answer(stream: BinaryIO, progress: Progress) -> dict[str, Any]:
    for line in stream:
        event = json.loads(line)
        if "phase" in event:
            progress(event["phase"], event["done"], event["total"])
        elif "error" in event:
            raise KbsyncError.from_json(event["error"])
        else:
            result: dict[str, Any] = event["result"]
            return result
    raise KbsyncError("the daemon ended before it answered", hint="`kbsync runs` shows how far it came")


@contextmanager
def serve(path: Path, handler: Handler) -> Iterator[None]:
    """Listen on `path` while the block runs, each request in a thread of its own. Needs the writer lock: a socket
    file left by a dead daemon is replaced."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    os.fchmod(listener.fileno(), 0o600)  # before it has a name: there is no moment at which others may connect
    listener.bind(_address(path))
    listener.listen()
    thread = threading.Thread(target=_accept, args=(listener, handler), name="control", daemon=True)
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


def _accept(listener: socket.socket, handler: Handler) -> None:
    free = threading.BoundedSemaphore(CLIENTS)

    def handle(connection: socket.socket) -> None:
        try:
            _handle(connection, handler)
        finally:
            free.release()

    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return  # closed by `serve`
        if free.acquire(blocking=False):
            threading.Thread(target=handle, args=(connection,), daemon=True).start()
        else:
            with connection:
                _send(
                    connection, {"error": Busy(f"the daemon serves {CLIENTS} clients already").to_json()}, seconds=0.0
                )


def _handle(connection: socket.socket, handler: Handler) -> None:
    room = select.poll()
    room.register(connection, select.POLLOUT)

    def progress(phase: str, done: int, total: int) -> None:
        # Progress may be left out: the command does not wait for a client that reads nothing.
        if room.poll(0):
            _send(connection, {"phase": phase, "done": done, "total": total}, seconds=0.0)

    with connection:
        try:
            _refuse_others(connection)
            request = _request(_line(connection))
            result = handler(request["command"], request["arguments"], request["user"], progress)
        except KbsyncError as error:
            _send(connection, {"error": error.to_json()})
        else:
            _send(connection, {"result": result})


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
