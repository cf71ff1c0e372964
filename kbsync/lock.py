"""One writer per workspace: an OS lock (flock) on `data/lock`, released by the kernel however the process ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kbsync.errors import Busy
from kbsync.versions.files import make_folder

__all__ = ["held_by", "writer_lock"]


@contextmanager
def writer_lock(path: Path) -> Iterator[None]:
    """Hold the workspace's writer lock. Raises Busy, naming the holder's process, where another process has it."""
    make_folder(path.parent)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
            raise Busy(
                f"{path}: the workspace is in use by process {holder}",
                hint="wait for it, or stop it; `kbsync status` shows what it does",
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def held_by(path: Path) -> str | None:
    """The process number of whoever holds the lock now, None where nobody does."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read(32).decode(errors="replace").strip() or "unknown"
    return None
