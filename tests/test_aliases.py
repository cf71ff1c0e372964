"""Aliases: what is served stays where somebody put it, and what was served when can be told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbsync.aliases import demote, history, promote
from kbsync.config import Settings, Workspace
from kbsync.errors import StoreError, UsageError
from kbsync.garbage import collect, retire
from kbsync.ledger import HeadMove, PromotionRow
from kbsync.ledger.aliases import standing
from kbsync.line import Line
from kbsync.reconcile import Reconciler
from kbsync.retention import Retention
from kbsync.serving import Versions, verify_workspace
from kbsync.undo import rollback
from kbsync.versions.store import VersionStore
from tests.ledgers import MODEL, NOON
from tests.standin import StandIn
from tests.tiny import save, tiny_gpt2
from tests.workspaces import TestWorkspace, workspace

STARS = {"Vega": "Orion", "Deneb": "Paris"}


# What the log says --------------------------------------------------------------------------------------------------

STEPS = st.lists(st.tuples(st.sampled_from(("promote", "demote", "end", "head")), st.integers(0, 5)), max_size=30)


def replay(steps: list[tuple[str, int]]) -> tuple[list[PromotionRow], list[HeadMove], list[tuple[datetime, int]]]:
    """The log and HEAD's moves that these steps leave, and what `live` named after each, kept as a plain stack."""
    log: list[PromotionRow] = []
    heads = [HeadMove(MODEL, 0, NOON, "kbsync", "the base model")]
    stack: list[int] = []
    named = [(NOON, 0)]
    for step, (kind, number) in enumerate(steps, 1):
        at = NOON + timedelta(seconds=step)
        if kind == "head":
            heads.append(HeadMove(MODEL, number, at, "me", ""))
        elif kind == "promote":
            stack.append(number)
        elif stack:
            stack = stack[:-1] if kind == "demote" else []
        else:
            continue
        if kind != "head":
            log.append(PromotionRow(MODEL, "live", kind, stack[-1] if stack else None, "ada", "", at))  # type: ignore[arg-type]
        named.append((at, stack[-1] if stack else heads[-1].number))
    return log, heads, named


@given(STEPS)
def test_the_newest_row_is_the_promotion_that_still_holds(steps: list[tuple[str, int]]) -> None:
    log, _, _ = replay(steps)
    holding = standing(log)
    assert (holding[-1].version if holding else None) == (log[-1].version if log else None)


@given(STEPS)
def test_the_history_says_what_was_live_at_every_moment(steps: list[tuple[str, int]]) -> None:
    log, heads, named = replay(steps)
    moves = history("live", log, heads)
    for at, version in named:
        [then] = [move for move in moves if move.since <= at and (move.until is None or at < move.until)]
        assert then.version == version


@given(STEPS)
def test_a_history_has_no_gap_and_only_its_last_entry_is_open(steps: list[tuple[str, int]]) -> None:
    log, heads, _ = replay(steps)
    moves = history("live", log, heads)
    assert [move.until for move in moves] == [*(move.since for move in moves[1:]), None]


def test_an_alias_that_follows_nothing_names_nothing_once_its_promotions_are_taken_back() -> None:
    first = PromotionRow(MODEL, "canary", "promote", 2, "ada", "try", NOON)
    over = replace(first, kind="demote", version=None, at=NOON + timedelta(hours=1))
    assert [move.version for move in history("canary", [first, over])] == [2, None]


# On a workspace -----------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TestWorkspace:
    """A workspace whose `on_publish` writes down what it is told."""
    monkeypatch.setenv("KBSYNC_CACHE", str(tmp_path / "cache"))
    found = workspace(tmp_path, STARS)
    config = tmp_path / "kbsync.yaml"
    config.write_text(config.read_text() + 'on_publish: "echo $KBSYNC_ALIAS $KBSYNC_VERSION >> told"\n')
    return found


@pytest.fixture
def three(made: TestWorkspace) -> Iterator[Reconciler]:
    """Three versions, HEAD on the newest."""
    with made.open() as reconciler:
        reconciler.run_edit = StandIn()
        for extra in ({}, {"Sirius": "Rome"}, {"Rigel": "French"}):
            made.feed(STARS | extra)
            assert reconciler.sync()[0].versions
        yield reconciler


def named(reconciler: Reconciler) -> dict[str, int]:
    """What aliases name: by the ledger, by the files and by who loads them, which must agree."""
    line = reconciler.line()
    with reconciler.ledger.read() as db:
        found = db.aliases(line.model)
    assert line.store.aliases() == found
    versions = Versions.open(reconciler.workspace, reconciler.ledger)
    rows = {alias: versions.row(alias) for alias in found}
    assert {alias: row.number for alias, row in rows.items() if row} == found
    assert list(verify_workspace(reconciler.workspace, reconciler.ledger, weights=False)) == []
    return found


def told(made: TestWorkspace) -> list[str]:
    """What `on_publish` was told so far."""
    return (made.root / "told").read_text().splitlines()


def test_live_follows_head_until_promoted_and_a_pinned_alias_survives_a_rollback(
    made: TestWorkspace, three: Reconciler
) -> None:
    line = three.line()
    assert named(three) == {"live": 3}
    assert rollback(line, 2)["live"] == 2
    promote(line, 2, "canary")
    promote(line, "HEAD")
    assert rollback(line, 0)["live"] == 2
    assert named(three) == {"live": 2, "canary": 2}
    assert rollback(line, "live")["version"] == 2
    assert told(made) == ["live 1", "live 2", "live 3", "live 2"]


def test_an_edit_leaves_what_is_pinned_alone(made: TestWorkspace, three: Reconciler) -> None:
    promote(three.line(), 1)
    made.feed(STARS | {"Polaris": "Italy"})
    assert three.sync()[0].versions == [4]
    assert named(three) == {"live": 1}
    assert told(made)[-1] == "live 1"


def test_a_demotion_takes_one_promotion_back_and_the_first_one_back_lets_live_follow_head(
    made: TestWorkspace, three: Reconciler
) -> None:
    line = three.line()
    for number in (1, 2):
        promote(line, number)
    assert demote(line, "live") == {"alias": "live", "from": 2, "version": 1, "pinned": True}
    assert demote(line, "live") == {"alias": "live", "from": 1, "version": 3, "pinned": False}
    with pytest.raises(UsageError, match="nothing is promoted to 'live'"):
        demote(line, "live")
    for number in (1, 2):
        promote(line, number)
    assert demote(line, "live", end=True)["version"] == 3
    assert told(made)[3:] == ["live 1", "live 2", "live 1", "live 3", "live 1", "live 2", "live 3"]


def test_another_alias_is_gone_once_taken_back_and_moves_no_server(made: TestWorkspace, three: Reconciler) -> None:
    line, before = three.line(), told(made)
    promote(line, 1, "canary")
    assert demote(line, "canary") == {"alias": "canary", "from": 1, "version": None, "pinned": False}
    assert named(three) == {"live": 3}
    assert told(made) == before


def test_a_promotion_to_what_it_is_already_writes_nothing(three: Reconciler) -> None:
    line = three.line()
    assert promote(line, 3)["moved"]  # it followed HEAD; now it is pinned
    assert not promote(line, 3)["moved"]
    with three.ledger.read() as db:
        assert len(db.promotions(line.model)) == 1


@pytest.mark.parametrize("alias", ["HEAD", "7", "Canary", "", "-x", "a/b", "..", "a" * 64, "café", "live\n"])
def test_what_cannot_be_a_name_is_refused(three: Reconciler, alias: str) -> None:
    with pytest.raises(UsageError, match="cannot be an alias"):
        promote(three.line(), 1, alias)


@pytest.mark.parametrize("version", ["7", "canary", "head", "latest"])
def test_what_is_no_version_is_refused(three: Reconciler, version: str) -> None:
    with pytest.raises(UsageError, match="version"):
        promote(three.line(), version)


def test_a_version_whose_files_are_damaged_is_not_promoted_and_not_gone_back_to(three: Reconciler) -> None:
    line = three.line()
    for number in (2, 1):
        promote(line, number)
    for file in line.store.deltas.iterdir():
        file.unlink()
    for act in (lambda: promote(line, 3), lambda: demote(line, "live")):
        with pytest.raises(StoreError, match="No such file"):
            act()
    assert demote(line, "live", end=True)["version"] == 3  # what HEAD is was decided elsewhere
    with three.ledger.read() as db:
        assert db.aliases(line.model) == {"live": 3}


@pytest.mark.parametrize(
    "act", [lambda line: promote(line, 1), lambda line: demote(line, "live"), lambda line: rollback(line, 1)]
)
def test_a_pass_can_publish_while_the_files_of_a_version_are_hashed(
    three: Reconciler, act: Callable[[Line], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = three.line()
    for number in (2, 3):
        promote(line, number)
    hashed = []

    def require(_store: VersionStore, number: int, _sha256: str | None) -> None:
        with three.ledger.write() as db:
            db.audit("a pass", "publish", {})
        hashed.append(number)

    monkeypatch.setattr(VersionStore, "require", require)
    act(line)
    assert len(hashed) == 1


def test_a_version_that_retention_gives_up_while_it_is_hashed_is_not_gone_back_to(
    three: Reconciler, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = three.line()
    for number in (1, 2):
        promote(line, number)

    def require(_store: VersionStore, number: int, _sha256: str | None) -> None:
        with three.ledger.write() as db:
            db.drop_deltas(line.model, {db.active(line.model, number)[0].delta: 0}, user="me", reason="retention")

    monkeypatch.setattr(VersionStore, "require", require)
    for act in (lambda: demote(line, "live"), lambda: rollback(line, 1), lambda: promote(line, 1)):
        with pytest.raises(UsageError, match="version 1 is not restorable"):
            act()
    with three.ledger.read() as db:
        assert (db.aliases(line.model), db.head(line.model)) == ({"live": 2}, 3)


def test_one_demotion_is_possible_whatever_retention_took_and_where_none_is_the_hint_says_what_is(
    made: TestWorkspace,
) -> None:
    with made.open() as reconciler:
        reconciler.run_edit = StandIn()
        for home in ("Orion", "Lyra", "Paris", "Rome", "Italy"):
            made.feed({"Vega": home})
            assert reconciler.sync()[0].versions
        line = reconciler.line()
        for number in (1, 2, 3):
            promote(line, number)
        keep_one = Settings(model="model", retention=Retention(versions=1, days=0))
        collect(Workspace(made.root, keep_one), reconciler.ledger, timedelta(hours=1), user="me")
        with reconciler.ledger.read() as db:
            assert {2, 3, 5} <= db.restorable(line.model)
            assert 1 not in db.restorable(line.model)
        assert demote(line, "live")["version"] == 2
        with pytest.raises(UsageError, match="version 1 is not restorable") as caught:
            demote(line, "live")
        assert caught.value.hint == "kbsync promote V --as live names another version; kbsync demote live --end, none"


def test_files_of_aliases_that_a_crash_left_behind_are_put_right_at_the_next_start(three: Reconciler) -> None:
    line = three.line()
    promote(line, 1, "canary")
    folder = line.store.folder / "aliases"
    (folder / "live").write_text("1\n")
    (folder / "canary").unlink()
    (folder / "over").write_text("2\n")
    problems = list(verify_workspace(three.workspace, three.ledger, weights=False))
    assert [problem.rsplit("/", 1)[1] for problem in problems] == [
        "canary: names none, the ledger version 1",
        "live: names version 1, the ledger version 3",
        "over: names version 2, the ledger none",
    ]
    assert named(three) == {"live": 3, "canary": 1}


def test_a_file_that_is_right_is_not_written_again(three: Reconciler) -> None:
    file = three.line().store.folder / "aliases" / "live"
    before = file.stat()
    three.line()
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_retired_model_has_no_alias_left(made: TestWorkspace, three: Reconciler) -> None:
    line = three.line()
    promote(line, 2)
    config = made.root / "kbsync.yaml"
    (made.root / "model").rename(made.root / "former")
    (made.root / "model").symlink_to("former")
    config.write_text(config.read_text().replace("model: model", "model: other"))
    save(tiny_gpt2(), made.root / "other")
    with made.open() as other:
        retire(other.workspace, other.ledger, line.model, user="ada")
        with other.ledger.read() as db:
            assert db.aliases(line.model) == {"live": 0} == line.store.aliases()


def test_history_of_the_ledger_is_what_the_pure_function_says(three: Reconciler) -> None:
    line = three.line()
    promote(line, 1, reason="known good")
    rollback(line, 2)
    demote(line, "live")
    with three.ledger.read() as db:
        moves = history("live", db.promotions(line.model), db.head_moves(line.model)[::-1])
    told: list[tuple[Any, ...]] = [(move.version, move.how, move.reason) for move in moves[-3:]]
    assert [version for version, _, _ in told] == [3, 1, 2]
    assert told[1] == (1, "promote", "known good")
    assert told[2][1] == "demote"
