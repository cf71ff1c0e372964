"""A small workspace at version 3 for things to go wrong in, and the processes that suffer in it.

with Nursery.open(folder) as nursery:
    world = nursery.world(tmp_path)
    nursery.control.watch(world.root); nursery.control.kill(at=40)
    child = nursery.start(world, ("sync", {}))
    assert child.wait() == -9
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kbsync.commands import perform
from kbsync.config import Workspace
from kbsync.control import call
from kbsync.lock import held_by
from tests.faults.shim import Control
from tests.faults.stages import STAGES
from tests.standin import StandIn
from tests.tiny import save, tiny_llama
from tests.workspaces import CONFIG, PRESET, TestWorkspace

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0
"""Seconds that a process may take to come to a point."""
STARS = {"Vega": "Lyra", "Betelgeuse": "Orion", "Deneb": "Paris"}
CHANGED = STARS | {"Vega": "Rome", "Sirius": "French"}
FEEDS = (STARS, STARS | {"Deneb": "France"}, STARS | {"Deneb": "France", "Rigel": "Orion"})
"""What the feed said at each version of the world: HEAD is 3."""
SOURCE = """\
source: stars
type: csv
location: stars.csv
row_id: id
columns: {subject: name, object: constellation}
relation: constellation
"""
POLICY = """\
policy: sky
sources: [stars]
schedule: {every: 1h}
relations:
  constellation: {prompt: "Where is {subject}", retract: keep}
guard: {max_changed: 100%, max_removed: 100%, max_edits: 50}
gate: {efficacy: 0.0, paraphrase: 0.0, specificity_drop: 100%, drift: 1000}
"""

Command = tuple[str, Mapping[str, Any]]


class World(TestWorkspace):
    """One copy of the workspace."""

    @property
    def workspace(self) -> Workspace:
        return Workspace.load(self.root)


def template(folder: Path) -> Path:
    """A workspace at version 3 in `folder`, made by the editor that remembers: copy it, do not use it."""
    for file in save(tiny_llama(), folder / "model").iterdir():
        file.chmod(0o644)
    root = folder / "template"
    for name in ("sources", "policies"):
        (root / name).mkdir(parents=True)
    (root / "kbsync.yaml").write_text(CONFIG.replace("model: model", f"model: {folder / 'model'}"))
    (root / "preset.yaml").write_text(PRESET)
    (root / "sources" / "stars.yaml").write_text(SOURCE)
    (root / "policies" / "sky.yaml").write_text(POLICY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kbsync.reconcile.run_edit", StandIn())
        for said in FEEDS:
            World(root).feed(said)
            perform(root, "sync", {}, user="test")
    return root


@dataclass
class Child:
    """A process that the nursery started."""

    nursery: Nursery
    pid: int
    log: Path

    def wait(self) -> int:
        """Its exit status; negative: the signal that ended it."""
        return int(self.nursery.ask({"wait": self.pid})["status"])

    def wait_a_little(self, seconds: float = 0.1) -> bool:
        """Whether it still runs after that time."""
        time.sleep(seconds)
        return Path(f"/proc/{self.pid}/stat").read_text().split()[2] != "Z"

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def said(self, event: str = "") -> list[dict[str, Any]]:
        """What it logged so far: all, or the events of one name."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        found = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return [one for one in found if event in ("", one.get("event"))]

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for a condition; AssertionError with the log where it does not come."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, self.log.read_text()
            assert Path(f"/proc/{self.pid}/stat").read_text().split()[2] != "Z", self.log.read_text()
            time.sleep(0.02)


@dataclass
class Nursery:
    """Starts processes on worlds, all with one control file."""

    control: Control
    process: subprocess.Popen[str]
    made: Path
    alive: list[Child] = field(default_factory=list)

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator[Nursery]:
        """A nursery whose files lie in `folder`, with a template of its own. Raises Unavailable."""
        control = Control.make(folder)
        made = template(folder)
        command = [sys.executable, "-m", "tests.faults.subject", str(shutil.copytree(made, folder / "warm"))]
        environment = control.environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        try:
            assert process.stdout is not None
            process.stdout.readline()  # from here on, it holds nothing that a test wants held
            yield cls(control, process, made)
        finally:
            process.kill()
            process.communicate()

    def world(self, folder: Path) -> World:
        """A copy of the template in `folder`; nothing goes wrong yet."""
        shutil.copytree(self.made, folder / "w")
        self.control.set(hold=0, held=0, clock=0, stage=0, statement=0)
        self.control.watch(folder / "w")
        return World(folder / "w")

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One request of the program that forks."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found

    def start(self, world: World, *commands: Command, user: int = 0) -> Child:
        """A process that gives these commands one after the other."""
        return self._start(world, {"commands": commands, "user": user})

    def daemon(self, world: World) -> Child:
        """`kbsync daemon`, once it listens."""
        child = self.start_daemon(world)
        child.until(lambda: child.said("daemon_started"))
        return child

    def start_daemon(self, world: World) -> Child:
        """`kbsync daemon`, whether it will listen or not."""
        return self._start(world, {"daemon": True})

    def _start(self, world: World, request: dict[str, Any]) -> Child:
        log = world.root.parent / f"log-{len(self.alive)}"
        pid = self.ask({**request, "root": str(world.root), "log": str(log)})["pid"]
        self.alive.append(Child(self, pid, log))
        return self.alive[-1]

    def hold(self, stage: str) -> None:
        """Whoever comes to this stage waits there."""
        self.control.set(held=0, hold=STAGES.index(stage))

    def count_statements(self, stage: str, *, hold_at: int = 0) -> None:
        """Count what is sent to the database in this stage, and wait before the statement of that number."""
        self.control.set(held=0, statements=0, statement=hold_at, within=STAGES.index(stage))

    def go_on(self) -> None:
        """Nobody waits any more."""
        self.control.set(hold=0)

    def stages(self) -> dict[str, list[int]]:
        """Stage -> the numbers of the calls that were counted in it."""
        found: dict[str, list[int]] = {}
        for number, stage in self.control.trail.items():
            found.setdefault(STAGES[stage], []).append(number)
        return found

    def clear(self) -> None:
        """End what a test left running."""
        for child in self.alive:
            if Path(f"/proc/{child.pid}").exists():
                child.signal(signal.SIGKILL)
                child.wait()
        self.alive.clear()


def ask(world: World, command: str, **arguments: Any) -> dict[str, Any]:
    """Give a command to the daemon of a world; where it does not answer, all that its threads do is in its log."""
    workspace = world.workspace
    with ThreadPoolExecutor(1) as asking:
        answer = asking.submit(call, workspace.socket, command, arguments, user="test")
        try:
            return answer.result(PATIENCE)
        except TimeoutError:
            pid = int(held_by(workspace.lock) or 0)
            os.kill(pid, signal.SIGUSR1)
            time.sleep(1)
            os.kill(pid, signal.SIGKILL)
            logs = [log.read_text() for log in sorted(world.root.parent.glob("log-*"))]
            raise AssertionError("\n".join(logs)) from None
