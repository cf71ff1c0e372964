"""Injected faults: a library that a process is started with, and the control file that both sides share.

    control = Control.make(folder)
    control.watch(root)                          # count what happens to files below `root`
    subprocess.run(..., env=control.environment())
    control.kill(at=17)                          # the 17th call from now on does not come back
    control.fail(at=3, error=errno.EIO, kinds=SYNC)

`shim.c` is the library; it is compiled where it is needed, and the tests that need it skip where nothing compiles it.
"""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

OPEN, READ, WRITE, SYNC, RENAME, UNLINK, TRUNCATE, MAKE = (1 << bit for bit in range(8))
ALL = 255
CHANGES = ALL & ~(OPEN | READ)
"""The calls that change a file or a name."""

_WORDS = (
    *("mode", "at", "times", "error", "kinds"),
    *("count", "hits", "hit_kind", "again"),
    *("clock", "stage", "hold", "held"),
    *("statements", "statement", "within"),
)
"""The control file's 64-bit words in the order of `struct control` in shim.c."""
_ROOT, _HIT, _TRAIL, _SIZE = 16 * 8, 16 * 8 + 512, 16 * 8 + 1024, 16 * 8 + 1024 + 8192
_OFF, _KILL, _FAIL = range(3)
NAMES = {OPEN: "open", READ: "read", WRITE: "write", SYNC: "sync", RENAME: "rename", UNLINK: "unlink"} | {
    TRUNCATE: "truncate",
    MAKE: "make",
}


class Unavailable(Exception):
    """The library cannot be made here: why, and what would change that."""


def compiled(folder: Path) -> Path:
    """The library, compiled into `folder`. Raises Unavailable where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Unavailable("no C compiler to make the fault library with; ends with: apt-get install gcc libc6-dev")
    made = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(made), str(source), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"the fault library does not compile: {done.stderr.strip()}; ends when it does (glibc)")
    return made


@dataclass(frozen=True)
class Control:
    """The shared words. Any process that has the environment follows them."""

    file: Path
    library: Path
    words: mmap.mmap

    @classmethod
    def make(cls, folder: Path) -> Control:
        """A control file in `folder`, with nothing to suffer yet. Raises Unavailable."""
        file, library = folder / "control", compiled(folder)
        file.write_bytes(bytes(_SIZE))
        return cls.open(file, library)

    @classmethod
    def open(cls, file: Path, library: Path) -> Control:
        """The control file of another process."""
        with file.open("r+b") as opened:
            return cls(file, library, mmap.mmap(opened.fileno(), _SIZE))

    def environment(self) -> dict[str, str]:
        """What a process is started with that is to suffer."""
        own = {"LD_PRELOAD": str(self.library), "FAULTS_CONTROL": str(self.file)}
        return {**os.environ, **own}

    def get(self, name: str) -> int:
        """A word."""
        found: int = struct.unpack_from("<q", self.words, _WORDS.index(name) * 8)[0]
        return found

    def set(self, **words: int) -> None:
        """Set words, in this order."""
        for name, value in words.items():
            struct.pack_into("<q", self.words, _WORDS.index(name) * 8, value)

    def watch(self, root: Path, kinds: int = ALL) -> None:
        """Forget all, and count the calls of these kinds on files below `root` from now on."""
        self.set(mode=_OFF, kinds=kinds, count=0, hits=0, hit_kind=0, again=0)
        self.words[_ROOT:_HIT] = f"{root.resolve()}/".encode().ljust(_HIT - _ROOT, b"\0")

    def kill(self, at: int) -> None:
        """The process that makes the call number `at` ends there (SIGKILL)."""
        self.set(count=0, hits=0, at=at, times=1, mode=_KILL)

    def fail(self, at: int, error: int, *, kinds: int = CHANGES, times: int = 1) -> None:
        """The calls number `at` and following, `times` of them, fail with the errno `error`."""
        self.set(mode=_OFF, kinds=kinds, count=0, hits=0, again=0, at=at, times=times, error=error)
        self.set(mode=_FAIL)

    def stop(self) -> None:
        """Nothing fails any more; counting goes on."""
        self.set(mode=_OFF)

    def turn(self, **by: float) -> None:
        """Set the time of day ahead (or back) by a timedelta's arguments; the monotonic clock goes on as ever."""
        self.set(clock=self.get("clock") + timedelta(**by) // timedelta(microseconds=1) * 1000)

    @property
    def now(self) -> datetime:
        """What the processes take the time to be."""
        return datetime.now(UTC) + timedelta(microseconds=self.get("clock") // 1000)

    @property
    def trail(self) -> dict[int, int]:
        """Number of each call that was counted -> the stage that it came in."""
        made = self.words[_TRAIL : _TRAIL + self.get("count") + 1]
        return {number: made[number] for number in range(1, len(made))}

    @property
    def hit(self) -> str:
        """What the last call that was hit was about: `sync ledger.db-journal`."""
        path = self.words[_HIT:_TRAIL].split(b"\0")[0].decode(errors="replace")
        return f"{NAMES.get(self.get('hit_kind'), '-')} {Path(path).name}"
