"""One writer per workspace."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kbsync.errors import Busy
from kbsync.lock import writer_lock

HOLD = """
import sys, pathlib
from kbsync.lock import writer_lock
with writer_lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_and_told_who_holds_the_workspace(tmp_path: Path) -> None:
    lock = tmp_path / "data" / "lock"
    lock.parent.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Busy, match=f"process {holder.pid}"), writer_lock(lock):
            pass
        holder.kill()
    with writer_lock(lock):
        pass


def test_the_lock_is_free_again_when_the_block_ends_by_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), writer_lock(tmp_path / "lock"):
        raise ZeroDivisionError
    with writer_lock(tmp_path / "lock"):
        pass
