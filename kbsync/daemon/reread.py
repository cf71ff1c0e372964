"""kbsync.yaml read again while the daemon runs: what is taken at once, and what waits for the next start.

workspace, changes = reread(workspace)
changes.taken, changes.waiting          # names of keys
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kbsync.config import Settings, Workspace

__all__ = ["AT_START", "Changes", "reread"]

AT_START = frozenset({"model", "data", "ledger", "server"})
"""Keys that hold for the life of a daemon: what it has locked, opened or listens on, and what its versions are of. All
others are looked up when they are used."""


@dataclass(frozen=True, slots=True)
class Changes:
    """Keys of kbsync.yaml whose values are others now, sorted."""

    taken: list[str]
    waiting: list[str]


def reread(workspace: Workspace) -> tuple[Workspace, Changes]:
    """The workspace with what kbsync.yaml says now, but for `AT_START`. Raises ConfigError where the file is wrong."""
    now, before = Workspace.load(workspace.root).settings, workspace.settings
    changed = {key for key in Settings.model_fields if getattr(now, key) != getattr(before, key)}
    waiting = changed & AT_START
    settings = now.model_copy(update={key: getattr(before, key) for key in waiting})
    return replace(workspace, settings=settings), Changes(sorted(changed - waiting), sorted(waiting))
