"""The version store: deltas by content, manifests by number, HEAD, aliases. Torch-free.

    data/deltas/sha256/<hex>.safetensors     immutable, shared by all models
    data/versions/<model>/000007.json        manifest
    data/versions/<model>/HEAD               the number that edits build on
    data/versions/<model>/aliases/<name>     the number that an alias names; `live` is always there

HEAD and aliases are derived from the ledger and put right at every start; each is replaced atomically, so that a server
may watch it.

The ledger's row is what publishes a version. So files are written before it, a file that no row names is harmless, and
a row that names a missing or altered file is what `verify` finds.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kbsync.errors import StoreError
from kbsync.versions.files import delta_file, remove_durably, sha256_of, write_durably
from kbsync.versions.manifest import ActiveDelta, Manifest

__all__ = ["ORPHAN_AGE", "Problem", "VersionRecord", "VersionStore", "named", "stray_targets"]

LARGEST_HEADER = 100_000_000
"""Bytes: the limit of the safetensors format itself."""
ORPHAN_AGE = timedelta(hours=1)
"""How long a file that no version names is left alone: it may belong to an edit that is about to be published."""


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """What the ledger says of a version: the number, the sha256 of its manifest (None: it has none), its deltas."""

    number: int
    manifest_sha256: str | None
    active: tuple[ActiveDelta, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a file of the store, and which versions need it."""

    path: Path
    reason: str
    versions: tuple[int, ...] = ()

    def __str__(self) -> str:
        needed = ", ".join(map(str, self.versions))
        return f"{self.path}: {self.reason}" + (f" (needed by version {needed})" if needed else "")


@dataclass(frozen=True, slots=True)
class VersionStore:
    """The files of one model's versions below `data`; its deltas lie with those of the other models."""

    data: Path
    model: str

    @property
    def deltas(self) -> Path:
        """The folder of delta files."""
        return self.data / "deltas" / "sha256"

    @property
    def folder(self) -> Path:
        """The folder of this model's manifests and HEAD."""
        return self.data / "versions" / self.model

    def delta_path(self, sha256: str) -> Path:
        """Where a delta lies. Raises StoreError for what is no sha256."""
        return delta_file(self.deltas, sha256)

    def is_whole(self, sha256: str) -> bool:
        """Whether a delta has a matrix stored dense, of which no column can be taken out alone: read from its header.
        False where there is no such file to read, which the edit itself will find."""
        return any(name.endswith(".dense") for name in _header(self.delta_path(sha256)))

    def fact_size(self, active: Iterable[ActiveDelta]) -> int | None:
        """Bytes that a fact takes in the files of these deltas, on average; None where there are none."""
        paths = [path for entry in active if (path := self.delta_path(entry.delta)).exists()]
        columns = sum(_columns(path) for path in paths)
        return round(sum(path.stat().st_size for path in paths) / columns) if columns else None

    def manifest_path(self, number: int) -> Path:
        """Where the manifest of version `number` lies."""
        return self.folder / f"{number:06d}.json"

    def write_manifest(self, manifest: Manifest) -> str:
        """Write a manifest durably and return its sha256, which the ledger is to record. Raises StoreError.

        A manifest of that number that is there already was never published (the ledger gives each number once).
        """
        if manifest.model != self.model:
            raise StoreError(f"manifest of model {manifest.model} does not belong to {self.model}")
        return write_durably(self.manifest_path(manifest.number), manifest.to_bytes())

    def manifest(self, number: int, sha256: str | None) -> Manifest:
        """The manifest of version `number`, as the ledger recorded it (`sha256` None: not recorded, not compared).

        Raises StoreError naming the file where it is missing, altered, or another version's.
        """
        path = self.manifest_path(number)
        data = _read(path)
        if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
            raise StoreError(
                f"{path}: altered, its sha256 is {found}, recorded {sha256}", hint="restore it from a backup"
            )
        try:
            manifest = Manifest.from_bytes(data)
        except ValueError as error:
            raise StoreError(
                f"{path}: not a manifest that this kbsync reads: {_problem(error)}", hint="update kbsync"
            ) from error
        if (manifest.model, manifest.number) != (self.model, number):
            raise StoreError(f"{path}: is the manifest of version {manifest.number} of {manifest.model}")
        return manifest

    def require(self, number: int, sha256: str | None) -> None:
        """Raise StoreError unless all files of version `number` are there and as recorded. Version 0 needs none."""
        if sha256 is None:
            return
        active = self.manifest(number, sha256).active
        for problem in self.verify([VersionRecord(number, sha256, active)]):
            raise StoreError(str(problem), hint="choose another version: kbsync log")

    def write_head(self, number: int) -> None:
        """Replace HEAD. Raises StoreError where the disk refuses."""
        write_durably(self._head, _pointer(number))

    def write_aliases(self, aliases: Mapping[str, int]) -> None:
        """Let the files of aliases be these: one that names another version is replaced, one that is over removed.
        Raises StoreError where the disk refuses."""
        for name, number in aliases.items():
            path = self._aliases / name
            if not _says(path, number):  # one that does is left alone: who watches it would wake up
                write_durably(path, _pointer(number))
        for path in self._aliases.iterdir():
            if path.name not in aliases:
                remove_durably(path)

    def head(self) -> int | None:
        """The version that edits build on, by HEAD; None where there is no HEAD yet. Raises StoreError for a damaged
        one."""
        return _number(self._head) if self._head.exists() else None

    def aliases(self) -> dict[str, int]:
        """Alias -> the version that it names, by the files. Raises StoreError for a damaged one."""
        return {path.name: _number(path) for path in sorted(self._aliases.glob("[a-z]*"))}

    @property
    def _head(self) -> Path:
        return self.folder / "HEAD"

    @property
    def _aliases(self) -> Path:
        return self.folder / "aliases"

    def verify(
        self,
        records: Sequence[VersionRecord],
        *,
        head: int | None = None,
        aliases: Mapping[str, int] | None = None,
        files: Collection[str] | None = None,
    ) -> list[Problem]:
        """Read every file again that the ledger's records name, and say what is wrong. `head`, `aliases`: the ledger's,
        if their files are to be compared. `files`: of the deltas, those that have to be there (None: all). Reads each
        delta once. Weights are compared by `kbsync.versions.weights`."""
        problems = [problem for record in records for problem in self._verify_manifest(record)]
        problems += self._verify_deltas(records, files)
        if head is not None:
            problems += _verify_pointer(self._head, head)
        if aliases is not None and self._aliases.is_dir():  # an earlier kbsync wrote none
            for name in sorted({*aliases, *(path.name for path in self._aliases.glob("[a-z]*"))}):
                problems += _verify_pointer(self._aliases / name, aliases.get(name))
        return problems

    def _verify_manifest(self, record: VersionRecord) -> Iterator[Problem]:
        if record.manifest_sha256 is None:
            return
        path, versions = self.manifest_path(record.number), (record.number,)
        try:
            manifest = self.manifest(record.number, record.manifest_sha256)
        except StoreError as error:
            yield Problem(path, error.message.removeprefix(f"{path}: "), versions)
            return
        if manifest.active != record.active:
            yield Problem(path, "its active deltas are not those of the ledger", versions)

    def _verify_deltas(self, records: Sequence[VersionRecord], files: Collection[str] | None) -> Iterator[Problem]:
        needed: dict[str, list[int]] = {}
        for record in records:
            for sha256 in named(record.active) if files is None else named(record.active).intersection(files):
                needed.setdefault(sha256, []).append(record.number)
        for sha256, versions in sorted(needed.items()):
            path = self.delta_path(sha256)
            try:
                found = sha256_of(path)
            except OSError as error:
                yield Problem(path, error.strerror or str(error), tuple(versions))
                continue
            if found != sha256:
                yield Problem(path, f"damaged, its sha256 is now {found}", tuple(versions))

    def orphans(
        self, live: Collection[str], numbers: Collection[int], *, older_than: timedelta = ORPHAN_AGE
    ) -> list[Path]:
        """Files that no version names and that nothing has touched for `older_than`: deltas whose sha256 is not in
        `live` (of ALL models: they share the folder) and manifests of this model whose number is not in `numbers`."""
        kept = {self.delta_path(sha256) for sha256 in live} | {self.manifest_path(number) for number in numbers}
        files = [*self.deltas.glob("*.safetensors"), *self.folder.glob("*.json")]
        return sorted(_untouched((path for path in files if path not in kept), older_than))


def stray_targets(folder: Path, requests: Collection[str], *, older_than: timedelta = ORPHAN_AGE) -> list[Path]:
    """Files of target vectors in `folder` that nothing has touched for `older_than`, and whose request's digest, which
    they have in their header, is not among `requests`."""
    files = _untouched(folder.glob("*.safetensors"), older_than)
    return sorted(path for path in files if _header(path).get("__metadata__", {}).get("request") not in requests)


def _untouched(files: Iterable[Path], older_than: timedelta) -> Iterator[Path]:
    before = time.time() - older_than.total_seconds()
    return (path for path in files if path.stat().st_mtime < before)


def _header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file; empty where there is none to read."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, LARGEST_HEADER)))
    except (OSError, ValueError):
        return {}
    return header if isinstance(header, dict) else {}


def _columns(path: Path) -> int:
    """How many facts a delta file has a column for: `left` is [d, n]."""
    return next((entry["shape"][1] for name, entry in _header(path).items() if name.endswith(".left")), 0)


def named(active: Iterable[ActiveDelta]) -> set[str]:
    """The sha256 of every file that these active deltas name, corrections too."""
    return {sha256 for entry in active for sha256 in (entry.delta, entry.corrections) if sha256 is not None}


def _pointer(number: int) -> bytes:
    """What a file that names a version has in it."""
    return f"{number}\n".encode()


def _number(path: Path) -> int:
    text = _read(path).decode(errors="replace").strip()
    if not text.isdecimal():
        raise StoreError(f"{path}: {text!r} is no version number", hint="kbsync sync writes it anew from the ledger")
    return int(text)


def _says(path: Path, number: int) -> bool:
    try:
        return path.read_bytes() == _pointer(number)
    except OSError:
        return False


def _verify_pointer(path: Path, wanted: int | None) -> Iterator[Problem]:
    """Whether HEAD or the file of an alias is as the ledger says; `wanted` None: there is to be none."""
    try:
        found = _number(path) if path.exists() else None
    except StoreError as error:
        yield Problem(path, error.message.removeprefix(f"{path}: "))
        return
    if found != wanted:
        yield Problem(path, f"names {_said(found)}, the ledger {_said(wanted)}")


def _said(number: int | None) -> str:
    return "none" if number is None else f"version {number}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}", hint="kbsync verify") from error


def _problem(error: ValueError) -> str:
    """A validation error in one line: the first field that is wrong, and how."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
