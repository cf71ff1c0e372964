"""Real small disks, where this process may mount one.

with disk(folder, mebibytes=4):          # a tmpfs on `folder`, with what was in it
    with full(folder, leaving=8192): ...
with read_only(folder): ...
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

BALLAST = "ballast"


@contextmanager
def disk(folder: Path, *, mebibytes: int) -> Iterator[None]:
    """A disk of its own for the folder. Skips the test where that is not allowed."""
    with TemporaryDirectory() as kept:
        shutil.copytree(folder, kept, dirs_exist_ok=True)
        _mount("-t", "tmpfs", "-o", f"size={mebibytes}m,mode=755", "tmpfs", str(folder))
        try:
            shutil.copytree(kept, folder, dirs_exist_ok=True)
            yield
        finally:
            shutil.copytree(folder, kept, dirs_exist_ok=True, ignore=shutil.ignore_patterns(BALLAST, "*.sock"))
            _unmount(folder)
    # What is below the mount point is as it was: tests look at the disk while it is there.


@contextmanager
def full(folder: Path, *, leaving: int) -> Iterator[None]:
    """The disk of the folder has so many bytes left."""
    ballast = folder / BALLAST
    free = shutil.disk_usage(folder).free
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(free - leaving, 1))
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be written below the folder, whoever tries. Skips the test where that is not allowed."""
    _mount("--bind", str(folder), str(folder))
    try:
        _mount("-o", "remount,ro,bind", str(folder))
        yield
    finally:
        _unmount(folder)


def _mount(*words: str) -> None:
    program = shutil.which("mount")
    if program is None or os.geteuid():
        pytest.skip("only root may mount a small disk; ends in a run as root, for instance in a container")
    done = subprocess.run([program, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mount is not allowed here ({done.stderr.strip()}); ends with the capability SYS_ADMIN")


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
