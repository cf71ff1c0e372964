"""What a user sees of retention: versions that are not restorable, what is refused, what works all the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import kbsync
from kbsync.cli import main
from kbsync.daemon.chores import CHORES
from kbsync.errors import UsageError
from tests.workspaces import TestWorkspace, run_here, workspace

STARS = {"Vega": "Orion", "Deneb": "Paris"}
pytestmark = pytest.mark.usefixtures("one_cache")


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TestWorkspace:
    """Three versions, each with all facts changed, and a retention that keeps only the live one."""
    monkeypatch.setattr("kbsync.reconcile.run_edit", run_here)
    monkeypatch.setenv("COLUMNS", "200")
    made = workspace(tmp_path, STARS)
    for rows in (STARS, {"Vega": "Rome", "Deneb": "Lyra"}, {"Vega": "French", "Deneb": "Italy"}):
        made.feed(rows)
        with made.open() as reconciler:
            reconciler.sync()
    config = tmp_path / "kbsync.yaml"
    config.write_text(config.read_text() + "retention: {versions: 1, days: 0}\n")
    return made


def run(made: TestWorkspace, capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What a command prints, on stderr where it fails; it must end with `code`."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kbsync", *arguments, "--workspace", str(made.root)])
        with pytest.raises(SystemExit) as caught:
            main()
    out, err = capsys.readouterr()
    assert (caught.value.code or 0) == code, out + err
    return err if code else out


def as_json(made: TestWorkspace, capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The JSON document that a command prints."""
    return json.loads(run(made, capsys, *arguments, "--json"))


def test_what_is_not_restorable_is_shown_so_and_nothing_goes_back_to_it(
    made: TestWorkspace, capsys: pytest.CaptureFixture[str]
) -> None:
    would = as_json(made, capsys, "gc", "--dry-run")
    assert all(version["restorable"] for version in as_json(made, capsys, "log"))
    assert "not restorable any more: 2 versions" in run(made, capsys, "gc")
    assert (len(would["dropped"]), list(would["versions"].values())) == (2, [[1, 2]])
    assert {row["number"] for row in as_json(made, capsys, "log") if row["restorable"]} == {0, 3}
    assert run(made, capsys, "log").count("not restorable") == 2
    assert "not restorable" in run(made, capsys, "show", "1")
    assert as_json(made, capsys, "show", "1")["restorable"] is False
    assert "version 1 is not restorable" in run(made, capsys, "diff", "1", "3")
    for arguments in (
        ["rollback", "--to", "1"],
        ["ask", "x", "--version", "2"],
        ["export", "1", str(made.root / "out")],
    ):
        error = run(made, capsys, *arguments, code=2).splitlines()
        assert error[0].startswith(
            f"error: version {arguments[-1] if arguments[0] != 'export' else 1} is not restorable"
        )
        assert error[1].startswith("hint: kbsync log")
    with pytest.raises(UsageError, match="version 1 is not restorable"):
        kbsync.load_model(made.root, 1)
    assert as_json(made, capsys, "verify") == {"problems": []}


def test_a_version_whose_parent_is_not_restorable_is_reverted_by_a_rebase(
    made: TestWorkspace, capsys: pytest.CaptureFixture[str]
) -> None:
    run(made, capsys, "gc")
    done = as_json(made, capsys, "revert", "3")
    assert (done["rebase"], done["version"]) == ("the deltas of what comes back are gone", 4)
    assert "Rome" in run(made, capsys, "ask", "Where is Vega")
    assert as_json(made, capsys, "verify") == {"problems": []}


def test_the_daemon_collects_by_itself(made: TestWorkspace, capsys: pytest.CaptureFixture[str]) -> None:
    [chore] = [chore for chore in CHORES if chore.name == "retention"]
    with made.open() as reconciler:
        chore.act(reconciler)
    assert {row["number"] for row in as_json(made, capsys, "log") if row["restorable"]} == {0, 3}
    assert chore.alone
