"""`kbsync bisect` on a tiny real model: the version that broke an answer, and the fact in it that did."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kbsync.cli import main
from kbsync.cli.bisect import next_commands
from kbsync.lock import writer_lock
from tests.workspaces import TestWorkspace, run_here, workspace

PROBE = "Where is Vega => Orion"
FEEDS = (
    {"Vega": "Orion"},
    {"Vega": "Orion", "Betelgeuse": "Lyra"},
    {"Vega": "Rome", "Betelgeuse": "Lyra", "Deneb": "Paris"},
    {"Vega": "Rome", "Betelgeuse": "Lyra", "Deneb": "Paris", "Sirius": "French"},
)
"""Version 3 puts a wrong object in the place of the first fact's, beside a new fact."""


@pytest.fixture(scope="module")
def synced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestWorkspace]:
    """Four versions; no edit runs after that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KBSYNC_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("kbsync.reconcile.run_edit", run_here)
        patch.setenv("COLUMNS", "200")
        made = workspace(tmp_path_factory.mktemp("workspace"), {})
        policy = made.root / "policies" / "sky.yaml"
        policy.write_text(policy.read_text().replace("max_changed: 60%", "max_changed: 100%"))
        for rows in FEEDS:
            made.feed(rows)
            with made.open() as reconciler:
                [report] = reconciler.sync()
            assert len(report.versions) == 1
        yield made


def run(made: TestWorkspace, capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What `kbsync bisect` prints; it must end with `code`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kbsync", "bisect", *arguments, "--workspace", str(made.root)])
        with pytest.raises(SystemExit) as caught:
            main()
    out, err = capsys.readouterr()
    assert (caught.value.code or 0) == code, out + err
    return out + err


def found(made: TestWorkspace, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The JSON document that it prints."""
    value: dict[str, Any] = json.loads(run(made, capsys, *arguments, "--json"))
    return value


def test_the_version_and_the_fact_that_broke_an_answer_are_found(
    synced: TestWorkspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """While another process holds the workspace, too: only the ledger and files are read."""
    with writer_lock(synced.root / "data" / "lock"):
        result = found(synced, capsys, "--probe", PROBE)
    assert (result["good"], result["bad"], result["skipped"], result["run"]) == (2, 3, [], 3)
    vega, deneb = result["facts"]
    assert (vega["subject"], vega["before"], vega["after"], vega["same_subject"]) == ("Vega", "Orion", "Rome", True)
    assert (deneb["subject"], deneb["before"], deneb["after"]) == ("Deneb", None, "Paris")
    assert vega["influence"] + deneb["influence"] == pytest.approx(1)
    assert vega["influence"] > deneb["influence"]
    assert (vega["without"], deneb["without"]) == (True, False)
    said = {row["version"]: row["answers"][0] for row in result["asked"]}
    assert said[2]["right"]
    assert said[2]["probability"] > said[3]["probability"]
    assert not said[3]["right"]


def test_the_text_names_the_version_its_facts_and_the_next_commands(
    synced: TestWorkspace, capsys: pytest.CaptureFixture[str]
) -> None:
    text = run(synced, capsys, "--probe", PROBE, "--good", "1", "--bad", "4")
    assert "version 3 broke it (edit of" in text
    assert "Where is Vega" in text
    assert "kbsync revert --fact stars:vega constellation; kbsync revert 3" in text


def test_all_probes_have_to_hold(synced: TestWorkspace, capsys: pytest.CaptureFixture[str]) -> None:
    """The second fact came with version 2, so that only version 2 answers both."""
    result = found(synced, capsys, "--probe", PROBE, "--probe", "Where is Betelgeuse => Lyra")
    assert (result["good"], result["bad"]) == (2, 3)


def without_manifest(synced: TestWorkspace, version: int, folder: Path) -> TestWorkspace:
    """A copy in which this version cannot be put together."""
    shutil.copytree(synced.root, folder / "copy")
    [manifest] = (folder / "copy" / "data" / "versions").glob(f"*/{version:06}.json")
    manifest.unlink()
    return TestWorkspace(folder / "copy")


def test_a_version_that_cannot_be_put_together_is_skipped(
    synced: TestWorkspace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The search says that it may be the one."""
    copy = without_manifest(synced, 3, tmp_path)
    result = found(copy, capsys, "--probe", PROBE)
    assert (result["good"], result["bad"], result["skipped"]) == (2, 4, [3])
    assert {row["subject"] for row in result["facts"]} == {"Vega", "Deneb", "Sirius"}
    [skipped] = [row for row in result["asked"] if row["right"] is None]
    assert "000003.json" in skipped["problem"]
    assert "or one of 3, which cannot be asked any more" in run(copy, capsys, "--probe", PROBE)


def test_a_good_version_that_cannot_be_put_together_is_not_called_wrong(
    synced: TestWorkspace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = run(without_manifest(synced, 2, tmp_path), capsys, "--probe", PROBE, "--good", "2", code=2)
    assert "version 2 cannot be asked: " in text
    assert "hint: another --good" in text


@pytest.mark.parametrize(
    ("changed", "commands"),
    [
        ({}, ["blame 'the star' in", "revert --fact 'the star' in", "revert 3"]),
        ({"facts": [{"subject_id": "star", "relation": "in", "after": None}]}, ["history star in", "revert 3"]),
        ({"kind": "rebase"}, ["blame 'the star' in", "revert --fact 'the star' in", "rollback --to 2"]),
        ({"facts": []}, ["revert 3"]),
    ],
)
def test_the_next_commands_are_ones_that_work(changed: dict[str, Any], commands: list[str]) -> None:
    """Nothing can be taken out that the version itself took out, and undoing a rebase is to go back."""
    fact = {"subject_id": "the star", "relation": "in", "after": "Lyra"}
    found = {"good": 2, "bad": 3, "kind": "edit", "facts": [fact]} | changed
    assert next_commands(found) == [f"kbsync {command}" for command in commands]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--bad", "2"), "version 2 answers as expected"),
        (("--good", "3"), "version 3 does not answer as expected either"),
        (("--good", "4", "--bad", "3"), "version 3 was not made on version 4"),
        (("--good", "live"), "version 4 cannot be right and wrong"),
        (("--bad", "9"), "there is no such version"),
        (("--bad", "1", "--probe", "Where is Sirius => French"), "no version up to 1"),
    ],
)
def test_ends_that_are_not_as_said_are_refused_in_one_line(
    synced: TestWorkspace, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    text = run(synced, capsys, "--probe", PROBE, *arguments, code=2)
    assert said in text
    assert len(text.strip().splitlines()) == 2
