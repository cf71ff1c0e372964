"""Real daemon processes for tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE = 90.0
"""Seconds that a step may take on a busy machine before the test gives up."""


class Running:
    """A daemon process and the events that it has logged. `command`: what Python runs instead of `kbsync daemon`."""

    def __init__(self, root: Path, *command: str, **environment: str) -> None:
        self.root = root
        self.log = root / "daemon.log"
        with self.log.open("wb") as log:
            command = command or ("-m", "kbsync", "daemon", "--workspace", str(root))
            environment = os.environ | environment
            self.process = subprocess.Popen([sys.executable, *command], stderr=log, stdout=log, env=environment)

    def events(self, name: str = "") -> list[dict[str, Any]]:
        """What it logged so far."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [event for event in lines if name in ("", event["event"])]

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Until `condition` holds; fails with the log where it does not in time."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


def children(pid: int) -> list[int]:
    """The live child processes of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found
