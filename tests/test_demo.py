"""The demonstration, whole, on a tiny real model; and the feed that it shows on the real one."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kbsync.cli import main
from kbsync.cli.common import console
from kbsync.config import Workspace, examples
from kbsync.demo import ADDED, RELATION, STARS, Demo, prepare
from kbsync.errors import KbsyncError, UsageError
from kbsync.ledger import Ledger
from kbsync.serving import verify_workspace
from tests.workspaces import run_here, workspace

FEED = {"Vega": "Orion", "Betelgeuse": "Lyra", "Deneb": "Paris", "Sirius": "Rome"}
"""Three stars to begin with, and one that is added."""


@pytest.fixture(scope="module", autouse=True)
def _here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of its own; edits in this process (their own process is tested elsewhere)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KBSYNC_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("kbsync.reconcile.run_edit", run_here)
        patch.setenv("COLUMNS", "100")
        yield


def tiny_demo(root: Path) -> Demo:
    """The demonstration on a tiny model, with the shipped feed's file and columns."""
    workspace(root, FEED)
    rows = [f"{number},{star},{value}" for number, (star, value) in enumerate(FEED.items())]
    (root / "sources" / "stars.csv").unlink()
    feed = root / "sources" / "star-catalog.csv"
    feed.write_text("\n".join([f"hip,name,{RELATION}", *rows, ""]), encoding="utf-8")
    source = root / "sources" / "stars.yaml"
    text = source.read_text().replace("stars.csv", feed.name).replace("row_id: id", "row_id: hip")
    source.write_text(text)
    return Demo(root, stars=3, added=1)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """(workspace, results, what was printed) of one whole demonstration."""
    root = tmp_path_factory.mktemp("demo")
    demo = tiny_demo(root)
    with console.capture() as printed:
        results = demo.run()
    return root, results, printed.get()


def test_the_model_learns_the_feed_its_change_and_loses_it_again(shown: tuple[Path, dict[str, Any], str]) -> None:
    _, results, _ = shown
    assert results["before"]["of"] == results["after"]["of"] == 3
    assert results["before"]["right"] < results["after"]["right"] == 3
    assert results["change"]["edits"] == 3
    assert results["conflicts"] == 1
    assert results["rollback"]["same_as_version_1"] == 4
    assert results["rollback"]["found_sha256"] == results["rollback"]["weights_sha256"]
    assert results["rollback"]["held"] == 3


def test_it_tells_what_each_step_shows_and_how_to_do_it_on_ones_own_data(
    shown: tuple[Path, dict[str, Any], str],
) -> None:
    _, results, printed = shown
    assert printed.count("shows ") >= 7
    for command in ("kbsync ask", "kbsync sync", "kbsync changes --since 1", "kbsync rollback --to 1", "kbsync init"):
        assert command in printed
    for table in ("changes since 1", "versions of", "history of Vega", "conflicts", "held facts", "seconds"):
        assert table in printed
    assert results["rollback"]["found_sha256"] in printed
    assert {"statistics", "asking", "sync 1", "sync 2", "sync 3", "rollback", "total"} <= results["seconds"].keys()
    assert results["peak_memory_gb"] > 0
    json.dumps(results)


def test_nothing_that_it_prints_is_wider_than_the_terminal(shown: tuple[Path, dict[str, Any], str]) -> None:
    assert [line for line in shown[2].splitlines() if len(line) > 100] == []


def test_the_workspace_that_it_leaves_is_sound_and_goes_on(shown: tuple[Path, dict[str, Any], str]) -> None:
    opened = Workspace.load(shown[0])
    ledger = Ledger.open(opened.ledger_url)
    assert list(verify_workspace(opened, ledger)) == []
    with ledger.read() as db:
        [model] = db.models()
        assert (model.head, len(db.versions(model.id))) == (1, 3)
    ledger.close()


def test_it_fails_where_a_step_does_not_do_what_it_is_to_show(tmp_path: Path) -> None:
    demo = tiny_demo(tmp_path)
    policy = tmp_path / "policies" / "sky.yaml"
    policy.write_text(policy.read_text().replace("max_edits: 50", "max_edits: 1"))
    with pytest.raises(KbsyncError, match="sync 1 ended held") as caught:
        demo.run()
    assert caught.value.hint


def test_the_shipped_feed_has_what_it_shows(tmp_path: Path) -> None:
    prepare(tmp_path)
    with (examples() / "sources" / "star-catalog.csv").open(encoding="utf-8", newline="") as file:
        rows = [*csv.DictReader(file)][: STARS + ADDED]
    assert len({row["hip"] for row in rows}) == len({row["name"] for row in rows}) == STARS + ADDED == 27
    assert len({row[RELATION] for row in rows[:STARS]}) > 1
    assert sorted(path.name for path in (tmp_path / "policies").iterdir()) == ["astronomy.yaml"]


def test_it_refuses_a_folder_that_holds_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").touch()
    monkeypatch.setattr(sys, "argv", ["kbsync", "demo", "--keep", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == UsageError.exit_code
    assert "is not empty" in capsys.readouterr().err
