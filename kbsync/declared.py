"""The files that a workspace declares: kbsync.yaml, sources, policies, what these name, and what of that is secret.

    taken, left_out = declared_files(workspace)
    # ["feeds/stars.csv", "kbsync.yaml", …], {"sources/token": "holds a secret"}

What a text names is seen without knowing the keys of each source type: it is a file if there is one of that name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from kbsync.config import CONFIG, Workspace
from kbsync.documents import read_document
from kbsync.errors import ConfigError
from kbsync.references import FILE

__all__ = ["SECRET", "declared_files", "place_in_workspace"]

SECRET = "holds a secret"  # noqa: S105  # why a file is left out
OUTSIDE = "lies outside the workspace"
NO_PLACE = "lies where a backup has its own files, or is hidden"

_PLACES = re.compile(
    r"data/ledger\.db|data/deltas/sha256/[0-9a-f]{64}\.safetensors|data/versions/[^/]+/\d{6,}\.json"
    r"|(?!data/|index\.json$)[^/.][^/]*(?:/[^/.][^/]*)*"
)
"""Where files of a backup may lie, and so where a restore writes: nothing hidden, and of `data/` what is known."""
_SUFFIXES = {".yaml", ".yml"}
_SQLITE = "sqlite:///"
_SIGNATURE = ".minisig"
"""Behind a file's name, that of its signature."""


def place_in_workspace(path: str) -> str:
    """The path, relative to a workspace, of a file of a backup. Raises ValueError where none may lie there."""
    parts = PurePosixPath(path).parts
    if path != "/".join(parts) or ".." in parts or "\0" in path or "\\" in path or not _PLACES.fullmatch(path):
        raise ValueError(f"{path!r} is no place in a workspace")
    return path


def declared_files(workspace: Workspace) -> tuple[list[str], dict[str, str]]:
    """Files to save, by their place in the workspace; and those that are left out, with why: secrets, and what has no
    place there. A hidden file that nothing names is neither."""
    root, found = _plain(workspace.root), dict(_named(workspace))
    for path in _listed(workspace):
        found.setdefault(_plain(path), False)
    taken, left_out = [], {}
    for path, secret in sorted(found.items()):
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
        if why := SECRET if secret else _why_not(workspace, path, name):
            left_out[name] = why
        else:
            taken.append(name)
    return taken, left_out


def _why_not(workspace: Workspace, path: Path, name: str) -> str:
    """Why a file that is no secret cannot be in a backup; nothing where it can."""
    if not path.is_relative_to(_plain(workspace.root)):
        return OUTSIDE
    try:
        place_in_workspace(name)
    except ValueError:
        return NO_PLACE
    return NO_PLACE if path.is_relative_to(_plain(workspace.data)) else ""


def _listed(workspace: Workspace) -> Iterator[Path]:
    """kbsync.yaml and what is in sources/ and policies/, but for hidden files."""
    yield workspace.root / CONFIG
    for folder in (workspace.sources, workspace.policies):
        for path in folder.rglob("*"):
            hidden = any(part.startswith(".") for part in path.relative_to(workspace.root).parts)
            if path.is_file() and not hidden:
                yield path


def _named(workspace: Workspace) -> Iterator[tuple[Path, bool]]:
    """(file that is there and is named, whether it holds a secret), secrets last: they win."""
    named = list(_named_by_settings(workspace))
    for path in (workspace.root / CONFIG, *_documents(workspace)):
        try:
            texts = list(_texts(read_document(path).value))
        except ConfigError:  # half-written: what is secret can still be told
            named += [(file, True) for file in _mentioned(workspace, path)]
            continue
        for key, text in texts:
            if text.startswith(FILE) and key != "corpus":
                bases = (path.parent, workspace.root)
                named += [(file, True) for base in bases for file in _file(base, text.removeprefix(FILE))]
            elif path.name != CONFIG:
                named += [(file, False) for file in _with_signature(path.parent, text)]
    yield from sorted(named, key=lambda one: one[1])


def _named_by_settings(workspace: Workspace) -> Iterator[tuple[Path, bool]]:
    settings, root = workspace.settings, workspace.root
    corpora = [settings.statistics.corpus or ""]
    if (settings.preset or "").endswith(".yaml"):
        for preset in _file(root, settings.preset or ""):
            yield preset, False
            try:
                corpora.append(str(read_document(preset).value.get("corpus", "")))
            except ConfigError:  # the edit says so
                continue
    for corpus in corpora:
        if corpus.startswith(FILE):
            yield from ((file, False) for file in _file(root, corpus.removeprefix(FILE)))
    if settings.server is not None and settings.server.tls is not None:
        yield from ((file, False) for file in _file(root, str(settings.server.tls.certificate)))
        yield from ((file, True) for file in _file(root, str(settings.server.tls.key)))


def _documents(workspace: Workspace) -> Iterator[Path]:
    for folder in (workspace.sources, workspace.policies):
        yield from (path for path in folder.rglob("*") if path.suffix in _SUFFIXES and path.is_file())


def _mentioned(workspace: Workspace, document: Path) -> Iterator[Path]:
    """Files beside a document that is no YAML, behind a `file:` anywhere in it."""
    text = document.read_text(encoding="utf-8", errors="replace")
    for path in _listed(workspace):
        names = {os.path.relpath(path, base) for base in (document.parent, workspace.root)}
        if any(f"{FILE}{name}" in text for name in names):
            yield _plain(path)


def _with_signature(folder: Path, text: str) -> Iterator[Path]:
    for name in (text.removeprefix(_SQLITE), text + _SIGNATURE):
        yield from _file(folder, name)


def _file(folder: Path, name: str) -> Iterator[Path]:
    """The file of that name, where there is one."""
    try:
        path = _plain(folder / name)
        if path.is_file():
            yield path
    except (OSError, ValueError):  # a text that no file can be named by
        return


def _plain(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100  # `resolve` would follow links, and lose the place


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(the innermost key, text) of every text in a document."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _texts(part, str(name))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts(part, key)
