"""The daemon: `kbsync daemon`. `run_daemon(root)` runs it; `chores` is what it does beside its policies' passes."""

from __future__ import annotations

from kbsync.daemon.daemon import Daemon, run_daemon

__all__ = ["Daemon", "run_daemon"]
