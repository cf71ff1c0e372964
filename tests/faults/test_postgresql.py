"""PostgreSQL is restarted, or crashes, in the middle of record and of publish: the transaction is undone, the pass has
failed in one line, the daemon lives and the next pass does it."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kbsync.ledger.copy import copy_ledger
from tests import postgres
from tests.faults.aftermath import aftermath, committed
from tests.faults.amount import points
from tests.faults.test_disk import living, problem_of_a_pass
from tests.faults.world import Nursery, World
from tests.postgres import Server

STAGES = ("record", "publish")
ENDS = {"restart": signal.SIGINT, "crash": signal.SIGQUIT}


@dataclass
class Database:
    """A server of this module's own, with a ledger to copy."""

    server: Server
    restart: Callable[[int], None]
    statements: dict[str, int] = field(default_factory=dict)
    """Stage -> how many statements a pass sends in it."""
    made: int = 0

    def world(self, nursery: Nursery, folder: Path) -> World:
        """A world whose ledger lies on the server."""
        folder.mkdir(exist_ok=True)
        world = nursery.world(folder)
        file = world.workspace.data / "ledger.db"
        name = f"world_{self.made}"
        self.made += 1
        if self.made == 1:
            self.server.create("filled")
            copy_ledger(f"sqlite:///{file}", self.server.url("filled"))
        self.server.create(name, template="filled")
        file.unlink()
        config = world.root / "kbsync.yaml"
        config.write_text(f"{config.read_text()}ledger: {self.server.url(name)}\n")
        return world

    def count(self, nursery: Nursery, folder: Path, stage: str) -> int:
        """How many statements a pass of a daemon sends in a stage."""
        if stage not in self.statements:
            world = self.world(nursery, folder)
            with living(nursery, world):
                nursery.count_statements(stage)
                assert problem_of_a_pass(world) == ""
            self.statements[stage] = nursery.control.get("statements")
        return self.statements[stage]


@pytest.fixture(scope="module")
def _database() -> Iterator[Database | str]:
    try:
        with postgres.restartable() as (server, restart):
            yield Database(server, restart)
    except postgres.Unavailable as error:
        yield str(error)


@pytest.fixture
def database(_database: Database | str) -> Database:
    """The server; skips where there is none."""
    if isinstance(_database, str):
        pytest.skip(_database)
    return _database


@pytest.mark.parametrize("point", range(points(2)))
def test_a_server_that_restarts_in_a_transaction_leaves_nothing_half_applied(
    nursery: Nursery, database: Database, tmp_path: Path, point: int
) -> None:
    """Before a statement that is drawn among those of the stage, or before a commit."""
    stage, end = STAGES[point % 2], list(ENDS)[point // 2 % 2]
    at = random.Random(point).randint(1, database.count(nursery, tmp_path / "whole", stage))
    world = database.world(nursery, tmp_path)
    before = committed(world)
    with living(nursery, world) as daemon:
        nursery.count_statements(stage, hold_at=at)
        asking = nursery.start(world, ("sync", {}))
        daemon.until(lambda: nursery.control.get("held"))
        database.restart(ENDS[end])
        nursery.go_on()
        asking.wait()
        [said] = [*asking.said("error"), *asking.said("result")]
        problem = said.get("error") or next(iter(said["result"]["reports"][0]["problems"]), None)
        assert problem is not None, said
        assert len(problem["message"].splitlines()) == 1
        assert problem_of_a_pass(world) == ""
    assert aftermath(world, before, fault=f"PostgreSQL: {end}", stage=stage) == "new"
