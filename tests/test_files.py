"""Files that are there whole or not at all."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kbsync.errors import StoreError
from kbsync.versions.files import (
    TEMPORARY,
    delta_file,
    require_space,
    sha256_of,
    sweep_temporary,
    sync_folder,
    write_durably,
)

STEPS = 9
"""System calls of KILLED that it can be killed before."""

KILLED = """
import os, signal, sys
from pathlib import Path
from kbsync.versions.files import write_durably

left = int(sys.argv[2])
def deadly(function):
    def step(*arguments, **options):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return function(*arguments, **options)
    return step

for name in ("close", "fsync", "chmod", "replace", "open"):
    setattr(os, name, deadly(getattr(os, name)))
Path.write_bytes = deadly(Path.write_bytes)
write_durably(Path(sys.argv[1]), b"new")
"""


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_file_holds_the_bytes_and_their_sha256_is_returned(tmp_path: Path) -> None:
    """Missing folders are made; nothing but the file is left."""
    path = tmp_path / "a" / "b" / "file.bin"
    digest = write_durably(path, b"content")
    assert path.read_bytes() == b"content"
    assert digest == hashlib.sha256(b"content").hexdigest() == sha256_of(path)
    assert _names(path.parent) == ["file.bin"]


@pytest.mark.parametrize(("mode", "wanted"), [(None, 0o640), (0o600, 0o600)])
def test_the_mode_is_0640_or_the_one_asked_for(tmp_path: Path, mode: int | None, wanted: int) -> None:
    """Not 0600 as temporary files are, so that a server of the same group can read it."""
    path = tmp_path / "file"
    write_durably(path, b"x", **({} if mode is None else {"mode": mode}))
    assert path.stat().st_mode & 0o777 == wanted


def test_a_function_may_write_the_file_even_by_renaming_onto_it(tmp_path: Path) -> None:
    """Libraries that write a file of their own and rename it are served too."""

    def write(path: Path) -> None:
        other = path.with_name("other")
        other.write_bytes(b"by a library")
        other.replace(path)

    assert write_durably(tmp_path / "file", write) == hashlib.sha256(b"by a library").hexdigest()
    assert _names(tmp_path) == ["file"]


def test_a_function_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """Its own error comes through."""
    path = tmp_path / "file"
    write_durably(path, b"old")

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_durably(path, write)
    assert (path.read_bytes(), _names(tmp_path)) == (b"old", ["file"])


@pytest.mark.parametrize("step", ["mkstemp", "write_bytes", "fsync", "sha256_of", "chmod", "replace", "sync_folder"])
def test_a_failing_step_is_one_clear_error_and_the_file_is_old_or_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Disk full, input/output errors and refused permissions name the file; no temporary file stays."""
    path = tmp_path / "file"
    write_durably(path, b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    where = {
        "mkstemp": "tempfile.mkstemp",
        "fsync": "os.fsync",
        "sha256_of": "kbsync.versions.files.sha256_of",
        "sync_folder": "kbsync.versions.files.sync_folder",
    }
    monkeypatch.setattr(where.get(step, f"pathlib.Path.{step}"), fail)
    with pytest.raises(StoreError, match=r"file: cannot be written: No space left on device"):
        write_durably(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == (b"new" if step == "sync_folder" else b"old")
    assert _names(tmp_path) == ["file"]


def test_a_failed_fsync_is_not_tried_again_on_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may have dropped the pages and would then report success."""
    calls = []

    def fail(handle: int) -> None:
        calls.append(handle)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError, match="Input/output error"):
        write_durably(tmp_path / "file", b"new")
    assert len(calls) == 1


def test_the_steps_come_in_the_order_that_makes_a_rename_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync of the file, then mode and rename, then fsync of the folder."""
    steps: list[str] = []
    fsync, chmod, replace = os.fsync, Path.chmod, Path.replace

    def spy_fsync(handle: int) -> None:
        steps.append("fsync folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "fsync file")  # noqa: PTH112
        fsync(handle)

    def spy_chmod(path: Path, mode: int) -> None:
        steps.append("chmod")
        chmod(path, mode)

    def spy_replace(path: Path, target: Path) -> Path:
        steps.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "chmod", spy_chmod)
    monkeypatch.setattr(Path, "replace", spy_replace)
    write_durably(tmp_path / "file", b"x")
    assert steps == ["fsync file", "chmod", "rename", "fsync folder"]


@pytest.mark.parametrize("steps", range(STEPS + 1))
def test_kill_9_before_any_step_leaves_the_old_or_the_new_file(tmp_path: Path, steps: int) -> None:
    """At most one temporary file stays, and the sweep at the next start removes it."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), str(steps)], check=False, timeout=60)
    assert done.returncode == (-signal.SIGKILL if steps < STEPS else 0)
    assert path.read_bytes() in ((b"old", b"new") if steps < STEPS else (b"new",))
    left = [name for name in _names(tmp_path) if name != "file"]
    assert len(left) <= 1
    assert [removed.name for removed in sweep_temporary(tmp_path)] == left
    assert _names(tmp_path) == ["file"]


def test_a_real_limit_on_file_size_changes_nothing(tmp_path: Path) -> None:
    """As a full disk does: the write stops half-way, the old file stays."""
    path = tmp_path / "file"
    write_durably(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StoreError, match="File too large"):
            write_durably(path, b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (path.read_bytes(), _names(tmp_path)) == (b"old", ["file"])


def test_a_disk_that_gives_back_other_bytes_is_found_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is read again after the fsync."""
    monkeypatch.setattr("kbsync.versions.files.sha256_of", lambda _: "0" * 64)
    with pytest.raises(StoreError, match="other bytes"):
        write_durably(tmp_path / "file", b"x")
    assert _names(tmp_path) == []


def test_the_sweep_removes_unfinished_files_at_any_depth_and_nothing_else(tmp_path: Path) -> None:
    """A folder that is not there yet is no error."""
    deep = tmp_path / "deltas" / "sha256"
    deep.mkdir(parents=True)
    (deep / f"{TEMPORARY}x.safetensors").touch()
    (deep / "kept.safetensors").touch()
    assert [path.name for path in sweep_temporary(tmp_path)] == [f"{TEMPORARY}x.safetensors"]
    assert _names(deep) == ["kept.safetensors"]
    assert sweep_temporary(tmp_path / "absent") == []


def test_too_little_space_is_said_in_megabytes(tmp_path: Path) -> None:
    """And enough space is no error."""
    require_space(tmp_path, 1)
    with pytest.raises(StoreError, match=r"MB free, 1000000000000 MB needed"):
        require_space(tmp_path, 10**18)


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_a_delta_is_named_by_a_sha256_and_nothing_else(tmp_path: Path, name: str) -> None:
    """So no path can be smuggled in."""
    with pytest.raises(StoreError, match="not the sha256 of a delta"):
        delta_file(tmp_path, name)


def test_a_folder_that_cannot_be_synced_is_an_error(tmp_path: Path) -> None:
    """The caller is told, and no handle leaks."""
    with pytest.raises(OSError, match="No such file"):
        sync_folder(tmp_path / "absent")
