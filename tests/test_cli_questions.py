"""The questions on the command line: filters, exports to files, kinds of changes, and their mistakes in one line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from tests.ledgers import Clock, claim, decide, facts, opened, snapshot, sync
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
