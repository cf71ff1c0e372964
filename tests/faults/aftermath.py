"""The invariant of the whole matrix, in one place: what must hold after any fault.

    before = committed(world)
    ...                                   # something goes wrong
    aftermath(world, before, fault="kill -9", stage="publish")      # asserts, and notes it for the table

HEAD is the old version or the next one; every row that was committed is still there; once a writer has opened the
workspace again no run says `running`, nothing unfinished lies about and `verify` is clean; at most one delta belongs to
no version; the next pass does what is left and the one after it nothing; `gc` collects what no version names.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import select

from kbsync.commands import perform
from kbsync.facts import FactKey
from kbsync.ledger import Reader, schema
from kbsync.reconcile import Reconciler, open_workspace
from kbsync.serving import Versions, verify_workspace
from kbsync.versions.files import TEMPORARY
from kbsync.versions.store import VersionStore
from tests.workspaces import TestWorkspace

TALLY = "FAULTS_TALLY"
"""The file that faults and what became of them are noted in, one JSON line each."""
_ENDS = {"until", "until_fetch", "until_run", "seen_to", "origin", "status", "message", "counts", "finished_at"}
"""What may be written to a row that was committed: that it ended, and where it was last said."""
_FOREVER = ("audit", "head", "run", "fetch", "claim", "fact", "version", "applied", "delta_fact")
"""Tables that no row ever leaves."""


@dataclass(frozen=True)
class Before:
    """What was committed, and the version that was live."""

    head: int
    rows: frozenset[tuple[Any, ...]]


def committed(world: TestWorkspace) -> Before:
    """What is in the ledger now, without what may still be written to its rows."""
    with open_workspace(world.root, user="test") as reconciler, reconciler.ledger.read() as db:
        model = _model(reconciler)
        return Before(db.head(model), frozenset(_rows(db)))


def _model(reconciler: Reconciler) -> str:
    return Versions.open(reconciler.workspace, reconciler.ledger).model


def _rows(db: Reader) -> list[tuple[Any, ...]]:
    found = []
    for name in _FOREVER:
        table = schema.metadata.tables.get(name)
        if table is not None:
            kept = [column for column in table.c if column.name not in _ENDS]
            found += [(name, *map(repr, row)) for row in db.execute(select(*kept))]
    return found


def aftermath(world: TestWorkspace, before: Before, *, fault: str, stage: str = "", weights: bool = False) -> str:
    """Assert the invariant, note it, and say whether HEAD was "old" or "new". `weights`: also rebuild the weights of
    HEAD, which is only possible where a real editor made them."""
    wrong: list[str] = []
    with open_workspace(world.root, user="test") as reconciler, reconciler.ledger.read() as db:
        head = db.head(_model(reconciler))
        lost = before.rows - set(_rows(db))
    if head not in (before.head, before.head + 1, before.head - 1):  # an edit or a revert, a rollback
        wrong.append(f"HEAD is {head}, was {before.head}")
    wrong += [f"lost: {row}" for row in sorted(lost)[:3]]
    with open_workspace(world.root, user="test") as reconciler:
        reconciler.recover()
        reconciler.line()
        wrong += _untidy(reconciler, weights=weights)
        wrong += _orphans(reconciler, at_most=1)
    converged = _converges(world, wrong)
    perform(world.root, "gc", {"older_than": 0.0}, user="test")
    with open_workspace(world.root, user="test") as reconciler:
        wrong += _untidy(reconciler, weights=weights)
        wrong += _orphans(reconciler, at_most=0)
    moved = "old" if head == before.head else "new"
    note(fault, stage, moved, wrong, converged=converged)
    assert not wrong, "\n".join(wrong)
    assert converged
    return moved


def _untidy(reconciler: Reconciler, *, weights: bool) -> list[str]:
    """What a start should have put right."""
    ledger, workspace = reconciler.ledger, reconciler.workspace
    with ledger.read() as db:
        running = [f"run {run.id} says running" for run in db.runs(limit=None, status="running")]
    litter = [f"left behind: {path}" for path in workspace.data.rglob(f"{TEMPORARY}*")]
    return [*verify_workspace(workspace, ledger, weights=weights), *running, *litter]


def _orphans(reconciler: Reconciler, *, at_most: int) -> list[str]:
    """Deltas that no version names, where there are more than that."""
    with reconciler.ledger.read() as db:
        model = _model(reconciler)
        numbers = {row.number for row in db.versions(model)}
        live = db.kept_files(model)
    store = VersionStore(reconciler.workspace.data, model)
    found = store.orphans(live, numbers, older_than=timedelta(seconds=-1))
    deltas = [path for path in found if path.suffix == ".safetensors"]
    return [f"orphan: {path}" for path in deltas] if len(deltas) > at_most else []


def _converges(world: TestWorkspace, wrong: list[str]) -> bool:
    """Whether one pass does what is left, and then the weights hold what the ledger wants."""
    [first] = perform(world.root, "sync", {}, user="test")["reports"]
    [second] = perform(world.root, "sync", {}, user="test")["reports"]
    if first["status"] != "done" or second["status"] != "done":
        wrong.append(f"the next passes: {first}, {second}")
    with open_workspace(world.root, user="test") as reconciler:
        missing = _missing(reconciler)
    wrong += missing
    return second["counts"]["edits"] == 0 and not second["versions"] and not missing


def _missing(reconciler: Reconciler) -> list[str]:
    """Keys at which the weights neither hold what the ledger wants nor are held."""
    model = _model(reconciler)
    with reconciler.ledger.read() as db:
        wanted = {key: fact.object.id for key, fact in db.facts().items()}
        holds, applied = db.holds(model), db.applied(model, db.head(model))
    has: dict[FactKey, str] = {key: one.object_id for key, one in applied.items()}
    keys = {key for key in wanted.keys() | has.keys() if wanted.get(key) != has.get(key)}
    return [
        f"{key}: the ledger wants {wanted.get(key)}, the weights hold {has.get(key)}" for key in keys - holds.keys()
    ]


def note(fault: str, stage: str, head: str, wrong: list[str], *, converged: bool) -> None:
    """For the table of `make faults`."""
    if file := os.environ.get(TALLY):
        line = {"fault": fault, "stage": stage, "head": head, "violations": wrong, "converged": converged}
        with Path(file).open("a") as opened:
            opened.write(json.dumps(line) + "\n")
