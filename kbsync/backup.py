"""Backups: a folder with what a workspace cannot get again. Torch-free; for the holder of the writer lock.

    backups/2026-11-25/
      index.json                                  written last: path, sha256 and size of every other file
      kbsync.yaml  sources/  policies/            as declared, and files that these name; no secrets
      data/ledger.db                              one consistent state, checked
      data/versions/<model>/000007.json           every manifest that is whole
      data/deltas/sha256/<hex>.safetensors        those of HEAD, of versions with an alias, or that one demotion
                                                  gives it again; or of all

    make_backup(workspace, ledger, Path("backups/2026-11-25"))
    check_backup(Path("backups/2026-11-25"))      # each file is as the index says

The folder appears whole or not at all. Base models, statistics and target vectors are not in it: they come again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from kbsync import __version__
from kbsync.config import CONFIG, Workspace
from kbsync.declared import declared_files, place_in_workspace
from kbsync.errors import LedgerError, StoreError, UsageError
from kbsync.ledger import Ledger, Reader
from kbsync.ledger.copy import copy_ledger
from kbsync.progress import Progress, silent
from kbsync.versions.files import TEMPORARY, require_space, sha256_of, sync_folder
from kbsync.versions.manifest import Sha256
from kbsync.versions.store import VersionStore

__all__ = ["LEDGER", "Entry", "Index", "check_backup", "made_whole", "make_backup", "read_entry", "written"]

INDEX = "index.json"
LEDGER = "data/ledger.db"
LARGEST_INDEX = 1 << 28
"""Bytes of an index that is read: a million files."""
CHUNK = 1 << 20
"""Bytes that are copied and hashed at a time."""

_DAMAGED = "take the file from an older backup; `kbsync verify` names all that is wrong"
STALE = 86400.0
"""Seconds for which nothing has been written into an unfinished folder of a process that was killed."""
_UNFINISHED = f"{TEMPORARY}kbsync-"
"""How the names of folders begin that are to become a backup or a workspace."""


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Entry(_Value):
    """A file: its place in the workspace, in the backup too, and its content."""

    path: Annotated[str, AfterValidator(place_in_workspace)]
    sha256: Sha256
    size: Annotated[int, Field(ge=0)]


class Index(_Value):
    """What a backup holds. `versions`: by model, those that can be restored from it; `left_out`: files that the
    workspace has or names and the backup lacks -> why."""

    format: Literal[1] = 1
    kbsync: str
    made_at: AwareDatetime
    versions: dict[str, tuple[int, ...]]
    left_out: dict[str, str] = {}
    files: tuple[Entry, ...]

    @classmethod
    def read(cls, folder: Path) -> Index:
        """The index of the backup in `folder`. Raises UsageError where there is none, StoreError for a damaged one."""
        file = folder / INDEX
        try:
            with file.open("rb") as opened:
                found = cls.model_validate_json(opened.read(LARGEST_INDEX))
        except OSError as error:
            hint = "name the folder that kbsync backup made"
            raise UsageError(f"{file}: cannot be read: {error.strerror}", hint=hint) from error
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            problem = f"{where}: {first['msg']}".removeprefix(": ")
            raise StoreError(f"{file}: no index of a backup: {problem}", hint="take another backup") from error
        paths = [entry.path for entry in found.files]
        for missing in {CONFIG, LEDGER}.difference(paths):
            raise StoreError(f"{file}: names no {missing}", hint="take another backup")
        if len(set(paths)) < len(paths):
            raise StoreError(f"{file}: names a file twice", hint="take another backup")
        return found


def make_backup(
    workspace: Workspace, ledger: Ledger, target: Path, *, everything: bool = False, progress: Progress = silent
) -> dict[str, Any]:
    """Back the workspace up into the folder `target`, which must not exist. `everything`: with the deltas of every
    restorable version.

    `left_out`: files that are not in it -> why: secrets, what lies elsewhere, damaged manifests of old versions. Raises
    UsageError where `target` exists, StoreError where a file of a version that is to be saved is missing or damaged, or
    the disk refuses.
    """
    if target.exists() or target.is_symlink():
        raise UsageError(f"{target} is there already", hint="name a folder that does not exist")
    with made_whole(target) as made:
        _copy_ledger(workspace, ledger, made / LEDGER)
        with Ledger.open(f"sqlite:///{made / LEDGER}", create=False) as copy, copy.read() as db:
            wanted, versions, records = _files_of_versions(workspace, db, everything=everything)
        declared, left_out = declared_files(workspace)
        lost = _not_as_recorded(workspace, records)
        wanted |= dict.fromkeys(declared) | {path: sha256 for path, sha256 in records.items() if path not in lost}
        left_out |= lost
        sources = {path: _source(workspace, path) for path in wanted}
        require_space(made, sum(source.stat().st_size for source in sources.values() if source.exists()))
        entries = [Entry(path=LEDGER, sha256=sha256_of(made / LEDGER), size=(made / LEDGER).stat().st_size)]
        for done, (path, source) in enumerate(sorted(sources.items()), 1):
            entries.append(_copied(source, made, path, wanted[path]))
            progress("backup", done, len(sources))
        index = Index(
            kbsync=__version__,
            made_at=datetime.now(UTC),
            versions={
                model: tuple(number for number in numbers if _manifest(workspace, model, number) not in lost)
                for model, numbers in versions.items()
            },
            left_out=left_out,
            files=tuple(entries),
        )
        data = index.model_dump_json(indent=1).encode()
        digest, _ = written([data], made / INDEX)
    return {
        "backup": str(target),
        "files": len(entries),
        "bytes": sum(entry.size for entry in entries),
        "index_sha256": digest,
        "versions": {model: list(numbers) for model, numbers in index.versions.items()},
        "left_out": left_out,
    }


def check_backup(folder: Path, progress: Progress = silent) -> Index:
    """Read every file of a backup again. Raises UsageError where there is none, StoreError naming the first file that
    is not as the index says, LedgerError where its ledger is damaged."""
    index = Index.read(folder)
    for done, entry in enumerate(index.files, 1):
        for _ in read_entry(folder, entry):
            pass
        progress("verify", done, len(index.files))
    with closing(sqlite3.connect(f"file:{folder / LEDGER}?mode=ro&immutable=1", uri=True)) as copy:
        try:
            verdict = copy.execute("PRAGMA integrity_check").fetchone()[0]
        except sqlite3.DatabaseError as error:
            verdict = str(error)
    if verdict != "ok":
        raise LedgerError(f"{folder / LEDGER}: {verdict}", hint="take another backup")
    return index


def written(chunks: Iterable[bytes], target: Path) -> tuple[str, int]:
    """Write a new file, synced, mode 0600; its sha256 and size. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(target, "xb", opener=_private) as file:
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), size


def read_entry(folder: Path, entry: Entry) -> Iterator[bytes]:
    """A file of a backup. Raises StoreError where it is not as the index says: no link is followed, and no more is read
    than the index says."""
    path, digest, size = folder / entry.path, hashlib.sha256(), 0
    try:
        if path.resolve() != folder.resolve() / entry.path or not path.is_file():
            raise StoreError(f"{path}: is no file of the backup's own", hint="take another backup")
        for chunk in _chunks(path):
            digest.update(chunk)
            size += len(chunk)
            if size > entry.size:
                break
            yield chunk
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}", hint="take another backup") from error
    if (digest.hexdigest(), size) != (entry.sha256, entry.size):
        raise StoreError(f"{path}: is not as the index says", hint="take another backup")


@contextmanager
def made_whole(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` at the end of the block, synced; where it fails nothing is left.

    What a killed process left beside it goes. Raises StoreError where the disk refuses.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        made = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=target.parent))
    except OSError as error:
        raise StoreError(f"{target}: cannot be made: {error.strerror}", hint="see to permissions and space") from error
    try:
        yield made
        for folder, _, _ in os.walk(made):
            sync_folder(Path(folder))
        made.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        raise StoreError(f"{target}: cannot be made: {error.strerror}", hint="see to permissions and space") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove unfinished folders into which nobody has written for long: another backup may be at work."""
    before = time.time() - STALE
    for unfinished in folder.glob(f"{_UNFINISHED}*"):
        try:
            idle = all(path.lstat().st_mtime < before for path in (unfinished, *unfinished.rglob("*")))
        except OSError:  # becoming a backup just now
            continue
        if idle and unfinished.is_dir() and not unfinished.is_symlink():
            shutil.rmtree(unfinished, ignore_errors=True)


def _copy_ledger(workspace: Workspace, ledger: Ledger, target: Path) -> None:
    """One consistent state of the ledger as a SQLite file, also of one that is on a server."""
    target.parent.mkdir(mode=0o700)
    if workspace.ledger_url.startswith("sqlite"):
        ledger.backup(target)
    else:
        copy_ledger(workspace.ledger_url, f"sqlite:///{target}")


def _files_of_versions(
    workspace: Workspace, db: Reader, *, everything: bool
) -> tuple[dict[str, str | None], dict[str, tuple[int, ...]], dict[str, str]]:
    """Place -> sha256 of the deltas to take along and of the manifests of their versions; by model, the versions that
    these make; place -> sha256 of all other manifests, which are there for the record."""
    wanted: dict[str, str | None] = {}
    versions: dict[str, tuple[int, ...]] = {}
    records: dict[str, str] = {}
    for model in db.models():
        store, files, restorable = VersionStore(workspace.data, model.id), db.files(model.id), db.restorable(model.id)
        served = {model.head, *db.aliases(model.id).values(), *db.behind(model.id).values()}
        chosen = restorable if everything else restorable & served
        deltas = {delta for number in chosen for delta in files[number]}
        versions[model.id] = tuple(sorted(number for number in restorable if files[number] <= deltas))
        wanted |= {_place(workspace, store.delta_path(delta)): delta for delta in deltas}
        for row in db.versions(model.id):
            if row.manifest_sha256 is not None:
                place = _manifest(workspace, model.id, row.number)
                (wanted if row.number in chosen else records)[place] = row.manifest_sha256
    return wanted, versions, records


def _not_as_recorded(workspace: Workspace, records: Mapping[str, str]) -> dict[str, str]:
    """Those of these files (place -> sha256) that are missing or damaged -> how."""
    found = {}
    for path, sha256 in records.items():
        try:
            if sha256_of(_source(workspace, path)) != sha256:
                found[path] = "damaged"
        except OSError as error:
            found[path] = error.strerror or str(error)
    return found


def _manifest(workspace: Workspace, model: str, number: int) -> str:
    return _place(workspace, VersionStore(workspace.data, model).manifest_path(number))


def _place(workspace: Workspace, path: Path) -> str:
    return (PurePosixPath("data") / path.relative_to(workspace.data)).as_posix()


def _source(workspace: Workspace, path: str) -> Path:
    """Where a file of the backup comes from: `data/` is wherever kbsync.yaml has it."""
    return workspace.data / path.removeprefix("data/") if path.startswith("data/") else workspace.root / path


def _copied(source: Path, root: Path, path: str, sha256: str | None) -> Entry:
    """Copy a file to its place below `root`. `sha256`: what it must be. Raises StoreError where it is another one or
    cannot be read."""
    try:
        digest, size = written(_chunks(source), root / path)
    except OSError as error:
        raise StoreError(f"{source}: {error.strerror or error}", hint=_DAMAGED) from error
    if sha256 not in (None, digest):
        raise StoreError(f"{source}: damaged, its sha256 is now {digest}", hint=_DAMAGED)
    return Entry(path=path, sha256=digest, size=size)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
