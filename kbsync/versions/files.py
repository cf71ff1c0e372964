"""Files that are there whole or not at all, whatever stops the process or the machine. Torch-free.

rename(2) alone is not durable: the file is fsynced before it and the folder after it (PostgreSQL's durable_rename).

    digest = write_durably(folder / "000007.json", data)
    sweep_temporary(folder)                                # at start: what a killed process left behind
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from kbsync.errors import StoreError

__all__ = [
    "TEMPORARY",
    "delta_file",
    "make_folder",
    "remove_durably",
    "require_space",
    "sha256_of",
    "sweep_temporary",
    "sync_folder",
    "write_durably",
]

TEMPORARY = ".tmp-"
"""How the names of unfinished files begin."""


def delta_file(folder: Path, sha256: str) -> Path:
    """Where the delta of this sha256 lies in `folder`. Raises StoreError for what is no sha256."""
    if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
        raise StoreError(f"{sha256!r} is not the sha256 of a delta", hint="kbsync verify")
    return folder / f"{sha256}.safetensors"


def sha256_of(path: Path) -> str:
    """sha256 (64 hex digits) of a file's bytes. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, for owner and group alone. Raises OSError."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(mode=0o750, exist_ok=True)  # `parents=True` would make those above for everybody


def write_durably(path: Path, data: bytes | Callable[[Path], None], *, mode: int = 0o640) -> str:
    """Put `data` (bytes, or a function that writes the file it is given) at `path`, and return its sha256.

    A temporary file in the same folder is written, fsynced, read again, given its mode and renamed; then the folder is
    fsynced. Whatever fails, `path` is as it was or as it should be. A failed fsync is not repeated on the same file,
    since the kernel may have dropped the pages. Missing folders are made. Raises StoreError naming `path`.
    """
    try:
        make_folder(path.parent)
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, suffix=path.suffix, dir=path.parent)
        os.close(handle)
        try:
            return _fill_and_rename(Path(name), path, data, mode)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be written: {error.strerror or error}",
            hint="see to space and permissions of that folder, then give the command again",
        ) from error


def _fill_and_rename(temporary: Path, path: Path, data: bytes | Callable[[Path], None], mode: int) -> str:
    if isinstance(data, bytes):
        temporary.write_bytes(data)
    else:
        data(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    digest = sha256_of(temporary)
    if isinstance(data, bytes) and digest != hashlib.sha256(data).hexdigest():
        raise StoreError(f"{path}: the disk gave back other bytes than were written", hint="check the disk")
    temporary.chmod(mode)
    temporary.replace(path)
    sync_folder(path.parent)
    return digest


def remove_durably(path: Path) -> None:
    """Remove a file, for good once this returns; one that is not there is no error. Raises StoreError naming `path`."""
    try:
        path.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be removed: {error.strerror or error}", hint="see to the permissions of that folder"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep_temporary(folder: Path) -> list[Path]:
    """Remove unfinished files anywhere below `folder` and return them. Only for the holder of the writer lock."""
    found = sorted(path for path in folder.rglob(f"{TEMPORARY}*") if path.is_file())
    for path in found:
        path.unlink(missing_ok=True)
    return found


def require_space(folder: Path, needed: int) -> None:
    """Raise StoreError unless `needed` bytes are free on the disk of `folder` (which exists)."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StoreError(
            f"{folder}: {free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB needed",
            hint="free space there, or run `kbsync gc`",
        )
