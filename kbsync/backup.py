"""Backups: a folder with what a workspace cannot get again. Torch-free; for the holder of the writer lock.

    backups/2026-11-25/
      index.json                                  written last: path, sha256 and size of every other file
      kbsync.yaml  sources/  policies/            as declared; the secrets that they refer to are not in it
      data/ledger.db                              one consistent state, checked
      data/versions/<model>/000007.json           every manifest
      data/deltas/sha256/<hex>.safetensors        those of HEAD and of versions with an alias, or of all

    make_backup(workspace, ledger, Path("backups/2026-11-25"))
    check_backup(Path("backups/2026-11-25"))      # each file is as the index says

The folder appears whole or not at all. Base models, statistics and target vectors are not in it: they come again.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from kbsync import __version__
from kbsync.config import CONFIG, Workspace
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

_PLACES = re.compile(
    r"data/ledger\.db|data/deltas/sha256/[0-9a-f]{64}\.safetensors|data/versions/[^/]+/\d{6,}\.json"
    r"|(?:sources|policies)/.+|(?:[^/]+/)*[^/]+\.yaml"
)
"""Where files of a backup may lie, and so where a restore writes."""
_SECRET_FILE = re.compile(r"""\bfile:([^\s"'#,}\]]+)""")


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if path != "/".join(parts) or ".." in parts or "\0" in path or "\\" in path or not _PLACES.fullmatch(path):
        raise ValueError(f"{path!r} is no place in a workspace")
    return path


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Entry(_Value):
    """A file: its place in the workspace, in the backup too, and its content."""

    path: Annotated[str, AfterValidator(_inside)]
    sha256: Sha256
    size: Annotated[int, Field(ge=0)]


class Index(_Value):
    """What a backup holds. `versions`: by model, those that can be restored from it."""

    format: Literal[1] = 1
    kbsync: str
    made_at: AwareDatetime
    versions: dict[str, tuple[int, ...]]
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

    Raises UsageError where `target` exists, StoreError where a file is missing or damaged or the disk refuses.
    """
    if target.exists() or target.is_symlink():
        raise UsageError(f"{target} is there already", hint="name a folder that does not exist")
    with made_whole(target) as made:
        _copy_ledger(workspace, ledger, made / LEDGER)
        with Ledger.open(f"sqlite:///{made / LEDGER}", create=False) as copy, copy.read() as db:
            wanted, versions = _files_of_versions(workspace, db, everything=everything)
        secrets = _secret_files(workspace)
        wanted |= dict.fromkeys(_declared(workspace, secrets))
        sources = {path: _source(workspace, path) for path in wanted}
        require_space(made, sum(source.stat().st_size for source in sources.values() if source.exists()))
        entries = [Entry(path=LEDGER, sha256=sha256_of(made / LEDGER), size=(made / LEDGER).stat().st_size)]
        for done, (path, source) in enumerate(sorted(sources.items()), 1):
            entries.append(_copied(source, made, path, wanted[path]))
            progress("backup", done, len(sources))
        index = Index(kbsync=__version__, made_at=datetime.now(UTC), versions=versions, files=tuple(entries))
        data = index.model_dump_json(indent=1).encode()
        digest, _ = written([data], made / INDEX)
    return {
        "backup": str(target),
        "files": len(entries),
        "bytes": sum(entry.size for entry in entries),
        "index_sha256": digest,
        "versions": {model: list(numbers) for model, numbers in versions.items()},
        "left_out": sorted(secrets),
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

    Raises StoreError where the disk refuses.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=target.parent))
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


def _copy_ledger(workspace: Workspace, ledger: Ledger, target: Path) -> None:
    """One consistent state of the ledger as a SQLite file, also of one that is on a server."""
    target.parent.mkdir(mode=0o700)
    if workspace.ledger_url.startswith("sqlite"):
        ledger.backup(target)
    else:
        copy_ledger(workspace.ledger_url, f"sqlite:///{target}")


def _files_of_versions(
    workspace: Workspace, db: Reader, *, everything: bool
) -> tuple[dict[str, str | None], dict[str, tuple[int, ...]]]:
    """Place -> sha256 of every manifest and of the deltas to take along; and by model, the versions that these make."""
    wanted: dict[str, str | None] = {}
    versions = {}
    for model in db.models():
        store, files, restorable = VersionStore(workspace.data, model.id), db.files(model.id), db.restorable(model.id)
        chosen = restorable if everything else restorable & {model.head, *db.aliases(model.id).values()}
        deltas = {delta for number in chosen for delta in files[number]}
        versions[model.id] = tuple(sorted(number for number in restorable if files[number] <= deltas))
        wanted |= {_place(workspace, store.delta_path(delta)): delta for delta in deltas}
        for row in db.versions(model.id):
            if row.manifest_sha256 is not None:
                wanted[_place(workspace, store.manifest_path(row.number))] = row.manifest_sha256
    return wanted, versions


def _place(workspace: Workspace, path: Path) -> str:
    return (PurePosixPath("data") / path.relative_to(workspace.data)).as_posix()


def _source(workspace: Workspace, path: str) -> Path:
    """Where a file of the backup comes from: `data/` is wherever kbsync.yaml has it."""
    return workspace.data / path.removeprefix("data/") if path.startswith("data/") else workspace.root / path


def _declared(workspace: Workspace, secrets: Collection[str]) -> Iterator[str]:
    """kbsync.yaml, a preset of the workspace's own, what is in sources/ and policies/; no hidden files, no secrets."""
    yield CONFIG
    preset = workspace.settings.preset or ""
    if preset.endswith(".yaml") and (workspace.root / preset).resolve().is_relative_to(workspace.root.resolve()):
        yield PurePosixPath(os.path.normpath(preset)).as_posix()
    for folder in (workspace.sources, workspace.policies):
        for path in sorted(folder.rglob("*")):
            place = path.relative_to(workspace.root)
            hidden = any(part.startswith(".") for part in place.parts)
            if path.is_file() and not hidden and place.as_posix() not in secrets:
                yield place.as_posix()


def _secret_files(workspace: Workspace) -> set[str]:
    """Files of the workspace that a `file:` reference names: what is in them is no matter of a backup."""
    found = set()
    declared = [workspace.root / CONFIG, *workspace.sources.rglob("*.yaml"), *workspace.policies.rglob("*.yaml")]
    for path in declared:
        for name in _SECRET_FILE.findall(path.read_text(encoding="utf-8", errors="replace")):
            for base in {path.parent, workspace.root}:
                named = Path(os.path.normpath(base / name))
                if named.is_relative_to(workspace.root) and named.is_file():
                    found.add(named.relative_to(workspace.root).as_posix())
    return found


def _copied(source: Path, root: Path, path: str, sha256: str | None) -> Entry:
    """Copy a file to its place below `root`. `sha256`: what it must be. Raises StoreError where it is another one or
    cannot be read."""
    try:
        digest, size = written(_chunks(source), root / path)
    except OSError as error:
        raise StoreError(f"{source}: {error.strerror or error}", hint="kbsync verify") from error
    if sha256 not in (None, digest):
        raise StoreError(f"{source}: damaged, its sha256 is now {digest}", hint="kbsync verify")
    return Entry(path=path, sha256=digest, size=size)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
