"""Write commands given while the daemon runs are handed to it over `data/control.sock` (mode 0600, owner only).

One request a connection: a JSON line {command, arguments, user}. The daemon answers with JSON lines: any number of
{phase, done, total}, then {result} or {error}. Both sides are in this module, so that they cannot drift apart.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    before = os.umask(0o177)
    try:
        listener.bind(_address(path))
    finally:
        os.umask(before)
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
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return  # closed by `serve`
        threading.Thread(target=_handle, args=(connection, handler), daemon=True).start()


def _handle(connection: socket.socket, handler: Handler) -> None:
    with connection, connection.makefile("rwb") as stream:

        def send(event: dict[str, Any]) -> None:
            try:
                stream.write(json.dumps(event).encode() + b"\n")
                stream.flush()
            except (OSError, ValueError):
                pass  # the client went away; the command goes on

        def progress(phase: str, done: int, total: int) -> None:
            send({"phase": phase, "done": done, "total": total})

        try:
            request = _request(stream.readline(MAX_REQUEST))
            result = handler(request["command"], request["arguments"], request["user"], progress)
        except KbsyncError as error:
            send({"error": error.to_json()})
        else:
            send({"result": result})


def _request(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        raise UsageError("the request is not one line of JSON") from None
    shape = {"command": str, "arguments": dict, "user": str}
    if not isinstance(value, dict) or any(not isinstance(value.get(key), kind) for key, kind in shape.items()):
        raise UsageError("a request needs command, arguments and user")
    return value
