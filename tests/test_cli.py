"""The command line on a tiny real model: what is printed, as text and as JSON; errors in one line with a hint."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kbsync.cli import main
from tests.workspaces import TestWorkspace, run_here, workspace

STARS = {"Vega": "Orion", "Betelgeuse": "Lyra", "Deneb": "Paris"}


@pytest.fixture(scope="module", autouse=True)
def _here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for all tests here; edits in this process (their own process is tested elsewhere)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KBSYNC_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("kbsync.reconcile.run_edit", run_here)
        patch.setenv("COLUMNS", "200")
        yield


class Line:
    """Runs command lines on a workspace."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self._capsys = capsys

    def run(self, *arguments: str, code: int = 0) -> str:
        """What the command prints on stdout; it must end with `code`."""
        return self._run(arguments, code)[0]

    def json(self, *arguments: str, code: int = 0) -> Any:
        """The JSON document that it prints."""
        return json.loads(self._run((*arguments, "--json"), code)[0])

    def fails(self, *arguments: str, code: int) -> tuple[str, str]:
        """(error, hint) of a command that must fail: two lines on stderr and no traceback."""
        lines = self._run(arguments, code)[1].strip().splitlines()
        assert len(lines) == 2, lines
        assert lines[0].startswith("error: ")
        assert lines[1].startswith("hint: ")
        return lines[0].removeprefix("error: "), lines[1].removeprefix("hint: ")

    def _run(self, arguments: tuple[str, ...], code: int) -> tuple[str, str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["kbsync", *arguments, "--workspace", str(self.root)])
            with pytest.raises(SystemExit) as caught:
                main()
        out, err = self._capsys.readouterr()
        assert (caught.value.code or 0) == code, out + err
        return out, err


@pytest.fixture
def line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Line:
    """Command lines on a workspace that was never synced."""
    workspace(tmp_path, STARS)
    capsys.readouterr()
    return Line(tmp_path, capsys)


def feed(line: Line, rows: dict[str, str]) -> None:
    """Let the feed say `rows`."""
    TestWorkspace(line.root).feed(rows)


def test_what_is_served_is_promoted_and_taken_back(line: Line) -> None:
    """A canary is tried beside what is live, then promoted; a rollback of HEAD leaves it; a demotion goes back."""
    line.run("sync")
    assert "live is version 1" in line.run("promote", "HEAD", "--reason", "known good")
    feed(line, STARS | {"Vega": "Rome", "Sirius": "French"})
    assert "live stays at version 1; `kbsync promote 2` serves version 2" in line.run("sync")
    assert "canary is version 2" in line.run("promote", "2", "--as", "canary")
    asked = line.json("ask", "Where is Vega", "--compare", "canary")["versions"]
    assert [found["version"] for found in asked] == [1, 2]
    assert "canary: version 2" in line.run("status")
    assert line.json("status")["aliases"] == {"live": 1, "canary": 2}
    assert [row["named"] for row in line.json("log")] == [["HEAD", "canary"], ["live"], []]
    assert "live is version 2 (was 1)" in line.run("promote", "canary")
    assert "live is version 2 already" in line.run("promote", "canary")
    assert "version 0 is HEAD (was 2)" in line.run("rollback", "--to", "0")
    assert "is live" in line.run("show", "live")
    assert [fact["subject"] for fact in line.json("diff", "1", "live")["facts"]] == ["Sirius", "Vega"]
    assert "live is version 1 (was 2)" in line.run("demote", "live", "--reason", "worse")
    assert "live is version 0 (was 1), it follows HEAD" in line.run("demote", "live")
    assert [(row["alias"], row["version"]) for row in line.json("aliases")] == [("canary", 2), ("live", 0)]
    moves = [row for row in line.json("aliases", "--history") if row["alias"] == "live"]
    assert [row["version"] for row in moves] == [0, 1, 2, 1, 1, 0]
    assert {"worse", "known good"} < {row["reason"] for row in moves}
    assert "kbsync aliases" in line.fails("demote", "live", code=2)[1]
    assert "canary names no version any more" in line.run("demote", "canary")
    assert "kbsync log" in line.fails("promote", "canary", code=2)[1]


def test_a_user_syncs_looks_asks_and_rolls_back(line: Line) -> None:
    assert "3 edits" in line.run("plan")
    assert "version 1 published" in line.run("sync")
    feed(line, STARS | {"Vega": "Rome", "Sirius": "French"})
    [report] = line.json("sync")["reports"]
    assert (report["status"], report["versions"], report["counts"]["edits"]) == ("done", [2], 2)
    assert "not due yet, 2 of 20 versions" in line.run("rebase", "--dry-run")
    assert line.json("rebase", "--dry-run")["facts"] == 4
    assert "2 versions since version 0, a rebase is due at 20" in line.run("status")
    assert line.json("status")["capacity"]["facts"] == 4
    assert "1 facts taken out, 0 put back (on HEAD)" in line.run(
        "revert", "--fact", "Deneb", "constellation", "--dry-run"
    )
    assert "--onto" in line.fails("rebase", "--preset", "x", code=2)[0]

    log = line.json("log")
    assert [(version["number"], version["live"], version["holds"]) for version in log] == [
        (2, True, 4),
        (1, False, 3),
        (0, False, 0),
    ]
    changes = line.json("changes", "--since", "1")
    assert {(row["kind"], row["subject"], row["before"], row["after"], row["version"]) for row in changes} == {
        ("changed", "Vega", "Orion", "Rome", 2),
        ("added", "Sirius", None, "French", 2),
    }
    history = line.json("history", "Vega")
    assert [(row["kind"], row["ended"], row["after"]) for row in history] == [
        ("claim", False, "Orion"),
        ("added", False, "Orion"),
        ("version", False, "Orion"),
        ("probe", False, "Orion"),
        ("claim", False, "Rome"),
        ("claim", True, "Orion"),
        ("changed", False, "Rome"),
        ("version", False, "Rome"),
        ("probe", False, "Rome"),
    ]
    assert {row["subject"] for row in line.json("diff", "1", "2")["facts"]} == {"Vega", "Sirius"}
    asked = line.json("ask", "Where is Vega", "--compare", "0", "--object", "Rome")
    assert [found["version"] for found in asked["versions"]] == [2, 0]
    assert asked["versions"][0]["answer"].startswith("Rome")
    assert asked["versions"][0]["probabilities"]["Rome"] > asked["versions"][1]["probabilities"]["Rome"]

    assert line.json("rollback", "--to", "1")["version"] == 1
    assert len(line.json("holds")["holds"]) == 2
    assert line.json("status")["holds"] == 2
    assert line.json("release", "Vega", "constellation")["released"] == 1
    assert line.json("verify") == {"problems": []}


@pytest.mark.parametrize(
    "arguments",
    [
        ["check"],
        ["doctor"],
        ["status"],
        ["runs"],
        ["log"],
        ["show", "1"],
        ["diff", "0", "1"],
        ["facts"],
        ["facts", "--as-of", "2020-01-01"],
        ["history", "Vega", "constellation"],
        ["changes", "--since", "2020-01-01"],
        ["conflicts", "list"],
        ["holds"],
        ["model", "show"],
        ["statistics", "verify"],
        ["verify"],
        ["gc", "--dry-run"],
        ["plan"],
        ["revert", "--fact", "Vega", "constellation"],
        ["revert", "1"],
    ],
    ids=" ".join,
)
def test_each_command_prints_text_and_one_json_document(line: Line, arguments: list[str]) -> None:
    line.run("sync")
    if arguments[0] != "revert":
        assert line.run(*arguments).strip()
    line.json(*arguments)


def test_facts_as_of_a_time_are_those_that_kbsync_knew_then(line: Line) -> None:
    line.run("sync")
    before = line.json("runs")[0]["finished_at"]
    feed(line, STARS | {"Vega": "Rome"})
    line.run("sync")
    then = {row["subject"]: row["object"] for row in line.json("facts", "--as-of", before)}
    now = {row["subject"]: row["object"] for row in line.json("facts")}
    assert (then["Vega"], now["Vega"]) == ("Orion", "Rome")


def test_an_export_loads_in_transformers_and_gives_the_same_logits(line: Line, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    import kbsync

    line.run("sync")
    line.run("export", "live", str(tmp_path / "out"))
    live = kbsync.load_model(line.root)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([live.tokenizer("Where is Vega").input_ids])
    assert torch.equal(again(ids).logits, live.network(ids).logits)


def write(line: Line, name: str, text: str) -> None:
    """Put a file into the workspace."""
    (line.root / name).write_text(text, encoding="utf-8")


def replace(line: Line, name: str, old: str, new: str) -> None:
    """Change a file of the workspace."""
    text = (line.root / name).read_text(encoding="utf-8")
    assert old in text
    write(line, name, text.replace(old, new))


SKY, SOURCE, FEED = "policies/sky.yaml", "sources/stars.yaml", "sources/stars.csv"
BAD_FILES: dict[str, tuple[Callable[[Line], None], int, str]] = {
    "broken YAML": (lambda it: write(it, SKY, "policy: [sky\n"), 2, "sky.yaml:"),
    "unknown key": (lambda it: replace(it, SKY, "schedule:", "shedule:"), 2, "shedule"),
    "duplicate key": (lambda it: replace(it, SKY, "policy: sky", "policy: sky\npolicy: sea"), 2, "sky.yaml:2"),
    "no subject": (lambda it: replace(it, SKY, "Where is {subject}", "Where is it"), 2, "{subject}"),
    "two subjects": (lambda it: replace(it, SKY, "Where is {subject}", "{subject} {subject}"), 2, "{subject}"),
    "missing prompt": (lambda it: replace(it, SKY, 'prompt: "Where is {subject}"', "protected: []"), 2, "prompt"),
    "missing feed": (lambda it: (it.root / FEED).unlink(), 2, "stars.csv"),
}
BAD_FEEDS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "header"),
    "wrong header": (b"id,star,where\nvega,Vega,Orion\n", "name"),
    "invalid UTF-8": (b"id,name,constellation\nvega,V\xff,Orion\n", "UTF-8"),
    "NUL": (b"id,name,constellation\nvega,Ve\0ga,Orion\n", "NUL"),
    "10 MB field": (b"id,name,constellation\nvega," + b"V" * 10_000_000 + b",Orion\n", "field"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_wrong_file_is_one_line_that_names_it_and_a_hint(line: Line, what: str) -> None:
    spoil, code, named = BAD_FILES[what]
    spoil(line)
    error, _hint = line.fails("check", code=code) if what != "missing feed" else (line.run("sync", code=1), "")
    assert named in error


@pytest.mark.parametrize("what", BAD_FEEDS)
def test_a_broken_feed_fails_the_run_and_leaves_facts_and_weights_as_they_were(line: Line, what: str) -> None:
    line.run("sync")
    before = line.json("facts")
    body, named = BAD_FEEDS[what]
    (line.root / FEED).write_bytes(body)
    [report] = line.json("sync", code=1)["reports"]
    assert report["status"] == "failed"
    [problem] = report["problems"]
    assert named.lower() in problem["message"].lower()
    assert "\n" not in problem["message"]
    assert line.json("facts") == before
    assert line.json("log")[0]["number"] == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("x,   ,Orion", "empty"),
        ("x,Ve{ga},Orion", "brace"),
        ("x,Orion,Orion", "same"),
        ("x,Altair", "2"),
        ("x,Altair,Orion,more", "4"),
    ],
)
def test_a_bad_row_goes_to_quarantine_with_its_line_and_the_rest_goes_on(line: Line, row: str, reason: str) -> None:
    path = line.root / FEED
    path.write_text(path.read_text() + row + "\n")
    [report] = line.json("sync")["reports"]
    assert (report["status"], report["counts"]["quarantined"], report["versions"]) == ("done", 1, [1])
    [found] = line.json("conflicts", "list")["quarantined"]
    assert found["row"]["origin"] == "line 5"
    assert found["row"]["reason"]


def test_a_user_resolves_a_conflict_by_a_claim_and_by_a_rule_and_takes_the_ruling_back(line: Line) -> None:
    """Both sides have their provenance; the rule is policy text that keeps what else the file says."""
    path = line.root / FEED
    path.write_text(path.read_text() + "vega,Vega,Rome\n")
    line.run("sync")
    [conflict] = line.json("conflicts", "list")["conflicts"]
    sides = {side["object"]: side for side in conflict["claims"]}
    assert {(side["source"], side["origin"], Path(side["location"]).name) for side in sides.values()} == {
        ("stars", "line 2", "stars.csv"),
        ("stars", "line 5", "stars.csv"),
    }
    assert all(side["since"] and side["fetched_at"] for side in sides.values())
    number = str(sides["Rome"]["claim"])
    assert "is Rome (not Orion)" in line.run("conflicts", "resolve", "Vega", "constellation", "--claim", number)
    assert "version 2 published" in line.run("conflicts", "replay")
    [ruling] = line.json("conflicts", "list")["rulings"]
    assert (ruling["object_id"], ruling["stale"]) == ("stars:Rome", False)
    path.write_text(path.read_text().replace("vega,Vega,Rome\n", ""))
    line.run("sync")
    assert line.json("conflicts", "list")["rulings"][0]["stale"]
    assert "no claim says so any more" in line.run("conflicts", "list")
    line.run("conflicts", "unrule", "Vega", "constellation")
    assert line.json("conflicts", "list")["rulings"] == []

    ask = ("conflicts", "resolve", "Vega", "constellation", "--prefer", "stars")
    policy = line.root / "policies" / "sky.yaml"
    before = policy.read_text()
    found = line.json(*ask)
    assert (found["file"], found["line"], found["text"]) == (str(policy), 5, "prefer: [stars]")
    assert policy.read_text() == before
    assert line.json(*ask, "--write")["written"]
    assert [text.strip() for text in policy.read_text().splitlines() if text not in before.splitlines()] == [
        "prefer: [stars]"
    ]
    line.run("check")


def test_a_plan_is_reviewed_in_a_file_and_applied(line: Line, tmp_path: Path) -> None:
    """`--exit-code` says whether there is something to do."""
    out = tmp_path / "plan.json"
    line.run("plan", "--out", str(out), "--exit-code", code=10)
    document = json.loads(out.read_text())
    assert document == line.json("plan")
    assert len(document["plans"][0]["adds"]) == 3
    assert line.json("sync", "--plan", str(out))["reports"][0]["versions"] == [1]
    line.run("plan", "--exit-code")
    assert "HEAD has moved from version 0 to 1" in line.run("sync", "--plan", str(out), code=1)
    out.write_text('{"plans": [{"head": 0}]}')
    assert "no plan of this kbsync" in line.fails("sync", "--plan", str(out), code=2)[0]
    assert "cannot be read" in line.fails("sync", "--plan", "nowhere.json", code=2)[0]


def test_a_held_run_is_approved_row_by_row(line: Line) -> None:
    """Rows are given as SUBJECT:RELATION; `holds` shows run, user and reason."""
    policy = line.root / "policies" / "sky.yaml"
    policy.write_text(policy.read_text().replace("max_edits: 50", "max_edits: 1"))
    line.run("sync", code=3)
    [run] = line.json("holds")["runs"]
    row = ("--only", "stars:vega:constellation")
    assert "1 rows refused" in line.run("reject", "1", *row, "--reason", "vandalism")
    [verdict] = line.json("holds")["runs"][0]["verdicts"]
    assert (verdict["key"][1], verdict["approved"], verdict["reason"]) == ("stars:vega", False, "vandalism")
    listed = line.run("holds")
    assert all(f"stars:{name}" in listed for name in ("vega", "betel", "deneb"))
    assert "refused by" in listed
    assert "is no SUBJECT:RELATION" in line.fails("approve", "1", "--only", "Vega", code=2)[0]
    line.fails("approve", "1", *row, "--except", "Deneb:constellation", code=2)
    line.run("approve", "1", "--plan", run["plan_digest"])
    [hold] = line.json("holds")["holds"]
    assert hold["hold"]["evidence"].endswith(": vandalism")


def test_rows_in_quarantine_are_listed_and_replayed(line: Line) -> None:
    """With place, reason and what the row says."""
    path = line.root / FEED
    path.write_text(path.read_text() + "x,Altair\n")
    line.run("sync")
    [row] = line.json("quarantine", "list", "stars")
    assert (row["row"]["origin"], row["source"]) == ("line 5", "stars")
    assert "Altair" in line.run("quarantine", "list")
    path.write_text(path.read_text().replace("x,Altair", "x,Altair,Paris"))
    assert line.json("quarantine", "replay", "stars")["reports"][0]["versions"] == [2]
    assert line.json("quarantine", "list") == []


def test_two_subjects_with_one_label_and_different_objects_wait_in_conflict(line: Line) -> None:
    path = line.root / FEED
    path.write_text(path.read_text() + "other,Vega,Rome\n")
    [report] = line.json("sync")["reports"]
    assert (report["counts"]["conflicts"], report["counts"]["edits"]) == (2, 2)
    assert {row["conflict"]["kind"] for row in line.json("conflicts", "list")["conflicts"]} == {"prompt"}


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["rollback", "--to", "9"], 2, "9"),
        (["show", "9"], 2, "9"),
        (["revert", "9"], 2, "9"),
        (["approve", "9"], 2, "9"),
        (["sync", "nothing"], 2, "nothing"),
        (["ask", "x", "--version", "new"], 2, "new"),
        (["changes", "--since", "yesterday"], 2, "yesterday"),
        (["conflicts", "resolve", "Vega", "constellation"], 2, "--claim"),
        (["conflicts", "resolve", "Vega", "constellation", "--prefer", "iau"], 2, "iau"),
        (["conflicts", "resolve", "Vega", "constellation", "--object", "Orion", "--write"], 2, "--write"),
        (["quarantine", "replay", "iau"], 2, "iau"),
        (["release", "Nobody", "constellation"], 2, "Nobody"),
        (["export", "live", "out", "--format", "gguf"], 2, "gguf"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_users_mistake_is_one_line_and_a_hint(line: Line, arguments: list[str], code: int, named: str) -> None:
    line.run("sync")
    error, hint = line.fails(*arguments, code=code)
    assert named in error
    assert hint


def test_a_folder_that_is_no_workspace_is_named_with_the_command_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error, hint = Line(tmp_path / "nowhere", capsys).fails("status", code=2)
    assert "kbsync.yaml" in error
    assert "kbsync init" in hint


def test_init_makes_a_workspace_that_check_accepts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = Line(tmp_path / "new", capsys)
    assert "kbsync.yaml" in line.run("init")
    assert line.json("check")["policies"] == ["astronomy", "us-elections"]
    line.fails("init", code=2)
