"""The questions on the command line: filters, exports to files, kinds of changes, and their mistakes in one line."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Engine, event

from kbsync.facts import Conflict
from kbsync.ledger import Ledger
from kbsync.versions.manifest import ActiveDelta
from tests.ledgers import Clock, applied, claim, decide, facts, key, opened, register, snapshot, sync, version
from tests.test_cli import Line


@pytest.fixture
def line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Line:
    """A workspace without a model whose ledger has 60 facts, one of them changed since."""
    (tmp_path / "kbsync.yaml").write_text("model: smollm2-135m\n")
    (tmp_path / "data").mkdir()
    clock, names = Clock(), {f"S{number:02}": "Lyra" for number in range(60)}
    with opened(tmp_path / "data", clock) as ledger:
        sync(ledger, snapshot(*(claim(name, place) for name, place in names.items())))
        decide(ledger, facts(**names))
        clock.turn(hours=1)
        decide(ledger, facts(**names | {"S07": "=Draco"}))
    return Line(tmp_path, capsys)


def test_a_long_list_is_a_page_and_a_count(line: Line) -> None:
    """50 rows unless asked for more; exports have all."""
    said = line.run("facts")
    assert "60 facts, the first 50" in said
    assert len(said.splitlines()) == 53
    assert "the first" not in line.run("facts", "--limit", "0")
    assert len(line.json("facts")) == 60
    assert [row["subject"] for row in line.json("facts", "--object", "=Draco")] == ["S07"]
    assert [row["object"] for row in line.json("facts", "--subject", "S07", "--as-of", "2026-07-01T12:30")] == ["Lyra"]


def test_exports_go_to_stdout_or_whole_into_a_file(line: Line, tmp_path: Path) -> None:
    """One form at a time; the file has what stdout would have."""
    printed = line.run("facts", "--csv")
    assert len(list(csv.DictReader(io.StringIO(printed)))) == 60
    assert "'=Draco" in printed
    assert line.run("facts", "--csv", "--out", str(tmp_path / "facts.csv")) == ""
    assert (tmp_path / "facts.csv").read_bytes().decode() == printed.replace("\r\n", "\n").replace("\n", "\r\n")
    line.run("facts", "--parquet", str(tmp_path / "facts.parquet"))
    assert (tmp_path / "facts.parquet").read_bytes()[:4] == b"PAR1"
    assert len(line.run("facts", "--ntriples", "--limit", "1").splitlines()) == 9
    assert "one at a time" in line.fails("facts", "--csv", "--ntriples", code=2)[0]
    assert "--out is for" in line.fails("facts", "--out", "x", code=2)[0]
    assert "SPACE=PREFIX" in line.fails("facts", "--ntriples", "--iri", "hip", code=2)[0]


def test_changes_are_told_apart_by_kind_and_summed_up(line: Line) -> None:
    """Kinds may be given more than once; an unknown one names those there are."""
    since = ("changes", "--since", "2026-01-01")
    assert line.json(*since, "--summary") == {"added": 60, "changed": 1}
    assert [row["after"] for row in line.json(*since, "--kind", "changed", "--kind", "held")] == ["=Draco"]
    assert "60 added, 1 changed" in line.run(*since, "--summary")
    assert "'=Draco" in line.run(*since, "--kind", "changed", "--csv")
    error, hint = line.fails(*since, "--kind", "moved", code=2)
    assert "moved" in error
    assert "relabelled" in hint


def test_a_thing_is_shown_with_its_names_and_relations(line: Line) -> None:
    """As text and as JSON."""
    assert "constellation" in line.run("entity", "S07")
    assert json.loads(line.run("entity", "feed:S07", "--json"))["names"][0]["name"] == "S07"
    assert "nothing of that" in line.fails("history", "Nobody", code=2)[0]


def test_what_was_true_then_is_a_page_and_a_count_of_claims(line: Line) -> None:
    """Like the list of facts: nothing is cut without a word."""
    said = line.run("facts", "--valid-at", "2020")
    assert "60 claims, the first 50" in said
    assert "60 claims" in line.run("facts", "--valid-at", "2020", "--limit", "0").splitlines()[-1]
    assert len(line.json("facts", "--valid-at", "2020")) == 60


@contextmanager
def many(root: Path) -> Iterator[Ledger]:
    """The ledger of a workspace with three thousand facts: more than a pipe takes."""
    (root / "kbsync.yaml").write_text("model: smollm2-135m\n")
    (root / "data").mkdir()
    names = {f"S{number:04}": "Lyra" for number in range(3000)}
    with opened(root / "data") as ledger:
        sync(ledger, snapshot(*(claim(name, place) for name, place in names.items())))
        decide(ledger, facts(**names))
        yield ledger


@pytest.mark.parametrize(
    "asked",
    [("--csv",), ("--json",), ("--ntriples",), ("--limit", "0"), ("--valid-at", "2020", "--csv")],
    ids=" ".join,
)
def test_a_reader_that_has_enough_ends_a_long_answer_quietly(asked: tuple[str, ...], tmp_path: Path) -> None:
    """As `kbsync facts … | head -1` does: no traceback, no log, and the exit code of a closed pipe."""
    with many(tmp_path):
        pass
    command = [sys.executable, "-m", "kbsync", "facts", *asked, "--workspace", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout
        assert running.stderr
        assert running.stdout.readline()
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 141


def test_who_reads_an_export_slowly_keeps_no_writer_waiting(tmp_path: Path) -> None:
    """The command waits for its reader, and no longer reads the ledger."""
    with many(tmp_path) as ledger:
        command = [sys.executable, "-m", "kbsync", "facts", "--json", "--workspace", str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as running:
            assert running.stdout
            first = running.stdout.read(1)
            with ledger.write() as db:
                db.audit("a pass", "publish", {})
            assert len(json.loads(first + running.stdout.read())) == 3000


def test_a_change_names_the_version_that_it_led_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fact that came back is held by an earlier version, too, which is not the one that brought it back; what no
    version holds yet has none."""
    (tmp_path / "kbsync.yaml").write_text("model: tiny\n")
    (tmp_path / "data").mkdir()
    clock = Clock()
    with opened(tmp_path / "data", clock) as ledger:
        register(ledger)
        for number, place in enumerate(("Orion", "Rome", "Orion")):
            sync(ledger, snapshot(claim("Vega", place)))
            decide(ledger, facts(Vega=place))
            clock.turn(hours=1)
            put, delta = applied("Vega", place, f"{number}" * 64, 0), ActiveDelta(delta=f"{number}" * 64)
            with ledger.write() as db:
                db.publish(version(number + 1, number, put, active=[delta]))
            clock.turn(hours=1)
        decide(ledger, facts(Vega="Rome"))
    changes = Line(tmp_path, capsys).json("changes", "--since", "2026-01-01")
    assert [(row["after"], row["version"]) for row in changes] == [
        ("Orion", 1),
        ("Rome", 2),
        ("Orion", 3),
        ("Rome", None),
    ]


def test_a_long_log_is_a_page_that_takes_as_many_questions_as_a_short_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """50 versions unless asked for more; the facts of all of them are counted at once."""
    (tmp_path / "kbsync.yaml").write_text("model: tiny\n")
    (tmp_path / "data").mkdir()
    line, asked = Line(tmp_path, capsys), []

    def count(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        asked.append(statement)

    def questions(*arguments: str) -> int:
        asked.clear()
        event.listen(Engine, "before_cursor_execute", count)
        try:
            line.run(*arguments)
        finally:
            event.remove(Engine, "before_cursor_execute", count)
        return len(asked)

    with opened(tmp_path / "data") as ledger:
        register(ledger)
        for number in range(1, 61):
            if number == 4:
                short = questions("log")
            name = f"{number:064x}"
            with ledger.write() as db:
                put = applied(f"S{number}", "Lyra", name, 0)
                db.publish(version(number, number - 1, put, active=[ActiveDelta(delta=name)]))
    assert questions("log") == short
    said = line.run("log")
    assert "61 versions, the newest 50" in said
    assert len(line.json("log")) == 50
    assert [row["number"] for row in line.json("log", "--limit", "2")] == [60, 59]
    assert len(line.json("log", "--all")) == 61
    assert "the newest" not in line.run("log", "--all")


def test_a_conflict_has_each_claim_once(line: Line) -> None:
    """In JSON, with its provenance."""
    sides = (claim("S07", "Lyra"), claim("S07", "Draco", "line 3"))
    with opened(line.root / "data") as ledger:
        decide(ledger, facts(S08="Lyra"), Conflict(key("S07"), "rows", sides, "two objects"))
    [row] = line.json("conflicts", "list")["conflicts"]
    assert [side["object"] for side in row["claims"]] == ["Lyra", "Draco"]
    assert "claims" not in row["conflict"]
