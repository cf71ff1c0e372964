"""Retention: which versions stay restorable, what goes, and what is refused afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kbsync.config import Settings, Workspace
from kbsync.errors import StoreError
from kbsync.garbage import collect
from kbsync.ledger import Ledger
from kbsync.retention import Retention
from kbsync.versions.delta import Delta, read_delta, write_delta
from kbsync.versions.manifest import ActiveDelta
from kbsync.versions.store import named
from kbsync.versions.weights import rebuild, weights_sha256
from tests.deltas import random_factors
from tests.ledgers import MODEL, NOON, Clock, opened, register, version

MODULE = "model.layers.1.mlp.down_proj"
DAY = timedelta(days=1)


def test_versions_stay_while_they_are_new_young_or_pinned_and_the_base_always_does() -> None:
    made = {0: NOON} | {number: NOON + number * DAY for number in range(1, 11)}
    rule = Retention(versions=2, days=3)
    assert rule.keeps(made, {4}, NOON + 10 * DAY) == {0, 4, 8, 9, 10}
    assert rule.keeps(made, {4}, NOON + 11 * DAY) == {0, 4, 9, 10}
    assert rule.keeps(made, {4}, NOON + 99 * DAY) == {0, 4, 9, 10}
    assert Retention(versions=1, days=0).keeps(made, (), NOON + 10 * DAY) == {0, 10}


class Line:
    """A line of versions as publication leaves it, files and rows, without an editor; what each one's weights are."""

    def __init__(self, root: Path, ledger: Ledger, clock: Clock) -> None:
        self.workspace = Workspace(root, Settings(model="tiny"))
        self.ledger, self.clock, self.made = ledger, clock, 0
        self.hashes: dict[int, str] = {}
        register(ledger)
        self.hashes[0] = self.weights(0)

    def weights(self, number: int) -> str:
        """The hash of a version's weights, rebuilt from its files. Raises StoreError where one is not there."""
        with self.ledger.read() as db:
            active = db.active(MODEL, number)
        pristine = {MODULE: torch.ones(4, 9)}
        return weights_sha256(rebuild(pristine, active, partial(read_delta, self.workspace.deltas)))

    def publish(self, *active: ActiveDelta) -> int:
        """A new version with these deltas on HEAD."""
        with self.ledger.write() as db:
            number = 1 + max(db.made_at(MODEL))
            db.publish(version(number, db.head(MODEL), active=list(active)))
        self.hashes[number] = self.weights(number)
        return number

    def delta(self, columns: int = 2) -> str:
        """A new delta file."""
        self.made += 1
        return write_delta(
            self.workspace.deltas, Delta({MODULE: random_factors(columns, d=4, f=9, seed=self.made)}), compact=False
        )

    def live(self) -> list[ActiveDelta]:
        """HEAD's deltas."""
        with self.ledger.read() as db:
            return db.active(MODEL, db.head(MODEL))

    def edit(self) -> int:
        """A new delta on those of HEAD."""
        return self.publish(*self.live(), ActiveDelta(delta=self.delta()))

    def rebase(self) -> int:
        """A new delta alone."""
        return self.publish(ActiveDelta(delta=self.delta()))

    def take_out(self, which: int) -> None:
        """A column leaves one of HEAD's deltas, and the others are corrected for it."""
        if active := self.live():
            entry = active[which % len(active)]
            active[which % len(active)] = ActiveDelta(delta=entry.delta, excluded=(0,), corrections=self.delta(1))
            self.publish(*active)

    def again(self, which: int) -> None:
        """A version with just the deltas of an earlier one that is restorable."""
        with self.ledger.read() as db:
            kept = sorted(db.restorable(MODEL))
            active = db.active(MODEL, kept[which % len(kept)])
        self.publish(*active)

    def roll_back(self, which: int) -> None:
        """HEAD moves to a restorable version."""
        with self.ledger.write() as db:
            kept = sorted(db.restorable(MODEL))
            db.move_head(MODEL, kept[which % len(kept)], user="me", reason="")

    def pin(self, which: int) -> None:
        """One alias or the other names a restorable version."""
        with self.ledger.write() as db:
            kept = sorted(db.restorable(MODEL))
            alias = ("canary", "best")[which % 2]
            db.note_promotion(MODEL, alias, "promote", kept[which % len(kept)], user="me", reason="")

    def wait(self, days: int) -> None:
        """Time passes."""
        self.clock.turn(days=days)

    def collect(self, **rule: Any) -> dict[str, Any]:
        """Garbage collection with this retention."""
        kept = Settings(model="tiny", retention=Retention(**rule))
        workspace = Workspace(self.workspace.root, kept)
        return collect(workspace, self.ledger, timedelta(hours=1), user="me")


@contextmanager
def line() -> Iterator[Line]:
    """A line in a folder of its own."""
    with TemporaryDirectory() as folder, opened(Path(folder), clock := Clock()) as ledger:
        yield Line(Path(folder), ledger, clock)


STEPS = st.lists(
    st.tuples(st.sampled_from(["edit", "edit", "rebase"]), st.just(()))
    | st.tuples(st.sampled_from(["take_out", "again", "roll_back", "pin"]), st.tuples(st.integers(0, 9)))
    | st.tuples(st.just("wait"), st.tuples(st.integers(1, 20))),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(STEPS, st.integers(1, 4), st.integers(0, 30)), min_size=1, max_size=3))
def test_whatever_the_history_what_must_stay_is_restorable_to_the_byte_and_nothing_else_stays(
    history: list[tuple[list[tuple[str, tuple[int, ...]]], int, int]],
) -> None:
    """HEAD, the base, named, newest and young versions are; no file is left that no restorable version needs."""
    with line() as made:
        for steps, newest, days in history:
            for name, arguments in steps:
                step = getattr(made, name)
                step(*arguments)
            with made.ledger.write() as db:
                before, now = db.restorable(MODEL), db.now
            made.collect(versions=newest, days=days)
            with made.ledger.read() as db:
                ages = {number: now - at for number, at in db.made_at(MODEL).items()}
                must = {number for number, age in ages.items() if age < days * DAY}
                must |= {0, db.head(MODEL), *db.aliases(MODEL).values(), *sorted(ages)[-newest:]}
                restorable, files = db.restorable(MODEL), db.files(MODEL)
            assert must & before <= restorable <= before
            assert {number: made.weights(number) for number in restorable} == {n: made.hashes[n] for n in restorable}
            needed = {name for number in restorable for name in files[number]}
            assert {path.stem for path in made.workspace.deltas.glob("*")} == needed
            for number in ages.keys() - restorable:
                with pytest.raises(StoreError, match="cannot be read"):
                    made.weights(number)


def test_deltas_that_a_kept_version_shares_stay_and_so_do_the_older_versions_that_need_no_other() -> None:
    with line() as made:
        for _ in range(4):
            made.edit()
        assert made.collect(versions=1, days=0)["versions"] == {}
        made.rebase()
        done = made.collect(versions=1, days=0)
        assert (done["versions"], len(done["dropped"])) == ({MODEL: [1, 2, 3, 4]}, 4)
        assert made.collect(versions=1, days=0)["files"] == []
        with made.ledger.read() as db:
            [entry] = [entry for entry in db.audit_log(9) if entry.action == "retention"]
            assert (entry.user, entry.detail["deltas"], entry.detail["bytes"]) == ("me", 4, done["bytes"])


def test_a_dry_run_says_what_would_go_and_changes_nothing() -> None:
    with line() as made:
        made.edit()
        made.rebase()
        rule = Settings(model="tiny", retention=Retention(versions=1, days=0))
        workspace = Workspace(made.workspace.root, rule)
        would = collect(workspace, made.ledger, timedelta(hours=1), user="me", dry=True)
        assert made.weights(1) == made.hashes[1]
        assert collect(workspace, made.ledger, timedelta(hours=1), user="me") == would
        assert would["bytes"] > 0


def test_a_crash_between_the_row_and_the_removal_leaves_a_file_that_the_next_collection_removes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What cannot be removed any more is an orphan; the versions that needed it are not restorable all the same."""
    with line() as made:
        made.edit()
        made.rebase()

        def die(_path: Path, *, missing_ok: bool = False) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Path, "unlink", die)
        with pytest.raises(KeyboardInterrupt):
            made.collect(versions=1, days=0)
        monkeypatch.undo()
        with made.ledger.read() as db:
            assert db.restorable(MODEL) == {0, 2}
        assert len(list(made.workspace.deltas.iterdir())) == 2
        rule = Settings(model="tiny", retention=Retention(versions=1, days=0))
        collect(Workspace(made.workspace.root, rule), made.ledger, timedelta(0), user="me")
        assert {path.stem for path in made.workspace.deltas.iterdir()} == named(made.live())


def test_the_same_edit_made_again_brings_back_a_dropped_delta_and_all_that_need_it() -> None:
    with line() as made:
        made.edit()
        made.rebase()
        made.collect(versions=1, days=0)
        made.made = 0
        assert made.publish(ActiveDelta(delta=made.delta())) == 3
        with made.ledger.read() as db:
            assert (db.restorable(MODEL), db.dropped(MODEL)) == ({0, 1, 2, 3}, {})
        made.made = 9
        made.rebase()
        assert made.collect(versions=1, days=0)["versions"] == {MODEL: [1, 2, 3]}
        with made.ledger.read() as db:
            assert db.restorable(MODEL) == {0, 4}
