"""Copying a whole ledger between databases: the same contents, all of it or nothing, and the copy can be written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection
from typer.testing import CliRunner

from kbsync.cli import app
from kbsync.errors import Busy, KbsyncError, LedgerError, UsageError
from kbsync.ledger import Ledger, copy, database, schema
from kbsync.ledger.copy import copy_ledger
from kbsync.lock import writer_lock
from tests.ledgers import Clock, decide, dump, facts, on_postgresql, rich_ledger, tampered, url

pytestmark = pytest.mark.usefixtures("database")


def everything(address: str) -> list[list[tuple[Any, ...]]]:
    """All rows of all tables as values, read without the code under test."""
    with Ledger.open(address, create=False) as ledger, ledger.read() as db:
        return [
            [tuple(row) for row in db._connection.execute(table.select().order_by(*table.primary_key))]
            for table in schema.metadata.sorted_tables
        ]


def test_a_copy_there_and_back_is_the_same_ledger(tmp_path: Path) -> None:
    """From SQLite to each database and from there to SQLite again: every row, and the same counts and hashes."""
    source = rich_ledger(tmp_path / "old")
    there, back = url(tmp_path), f"sqlite:///{tmp_path}/back.db"
    first = copy_ledger(source, there)
    assert copy_ledger(there, back) == first
    assert everything(there) == everything(source) == everything(back)
    assert {one.name: one.rows for one in first if one.rows} == {
        table.name: len(rows)
        for table, rows in zip(schema.metadata.sorted_tables, everything(source), strict=True)
        if rows
    }


def test_the_copy_is_a_ledger_that_goes_on(tmp_path: Path) -> None:
    """It is sound, new rows get ids after the old ones, and its rules are in force."""
    copy_ledger(rich_ledger(tmp_path / "old"), url(tmp_path))
    with Ledger.open(url(tmp_path), create=False, clock=Clock()) as ledger:
        assert ledger.check() == []
        with ledger.read() as db:
            newest = db.runs(limit=1)[0].id
            live = db.facts()
        assert live
        assert decide(ledger, {**live, **facts(Vega="Draco")}) == newest + 1
    with pytest.raises(Exception, match="append-only"):
        tampered(tmp_path, "DELETE FROM audit")


def test_the_hash_depends_on_what_is_said_alone(tmp_path: Path) -> None:
    """Rows in another physical order hash the same; one changed letter does not, and its table is the one named."""
    source = rich_ledger(tmp_path / "old")
    before = copy_ledger(source, url(tmp_path))
    tampered(tmp_path, "UPDATE fact SET subject_label = subject_label || 'x' WHERE id = 1")
    changed = contents(url(tmp_path))
    assert [one.name for one, other in zip(before, changed, strict=True) if one != other] == ["fact"]
    tampered(tmp_path, "UPDATE fact SET subject_label = rtrim(subject_label, 'x') WHERE id = 1")
    assert contents(url(tmp_path)) == before


def contents(address: str) -> list[copy.TableContent]:
    with Ledger.open(address) as ledger, ledger.read() as db:
        return copy.content_of(db._connection)


@pytest.mark.parametrize("harm", ["changes", "drops", "doubles"])
def test_a_row_that_does_not_arrive_as_it_was_ends_the_copy(
    harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that alters, loses or repeats a row is found out, and nothing is left in the target."""
    source, insert = rich_ledger(tmp_path / "old"), database.bulk_insert

    def harmful(connection: Connection, table: Any, columns: Sequence[str], rows: Any) -> int:
        given = [tuple(row) for row in rows]
        if table.name == "audit":
            *others, last = given
            who = columns.index("who")
            changed, again = (*last[:who], "x", *last[who + 1 :]), (last[0] + 1000, *last[1:])
            given = {"changes": [*others, changed], "drops": others, "doubles": [*given, again]}[harm]
        return insert(connection, table, columns, given)

    monkeypatch.setattr(database, "bulk_insert", harmful)
    with pytest.raises(LedgerError, match="table audit is not what the source holds"):
        copy_ledger(source, url(tmp_path))
    _assert_nothing_there(tmp_path)


def _assert_nothing_there(folder: Path) -> None:
    if on_postgresql():
        assert dump(folder) == []
    else:
        assert not (folder / "ledger.db").exists()


def test_a_copy_that_fails_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No table and no file of a target that was not there."""
    source, insert = rich_ledger(tmp_path / "old"), database.bulk_insert

    def failing(connection: Connection, table: Any, columns: Sequence[str], rows: Any) -> int:
        if table.name == "fact":
            raise OSError("no space left on device")
        return insert(connection, table, columns, rows)

    monkeypatch.setattr(database, "bulk_insert", failing)
    with pytest.raises(OSError, match="no space"):
        copy_ledger(source, url(tmp_path))
    _assert_nothing_there(tmp_path)


def test_a_target_with_tables_is_refused_and_left_alone(tmp_path: Path) -> None:
    """Whatever is in it, a ledger included."""
    source = rich_ledger(tmp_path / "old")
    tampered(tmp_path, "CREATE TABLE recipe (name TEXT)")
    before = dump(tmp_path)
    with pytest.raises(UsageError, match="is not empty"):
        copy_ledger(source, url(tmp_path))
    assert dump(tmp_path) == before


def test_a_source_that_is_no_ledger_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    """No target appears."""
    with pytest.raises(KbsyncError, match="no ledger here"):
        copy_ledger(f"sqlite:///{tmp_path}/nothing.db", url(tmp_path))
    _assert_nothing_there(tmp_path)


def test_the_command_prints_counts_and_hashes_and_what_to_write(tmp_path: Path) -> None:
    """A table for people with the line for kbsync.yaml; one document with --json."""
    source = rich_ledger(tmp_path / "old")
    done = CliRunner().invoke(app, ["ledger", "copy", source, url(tmp_path), "-w", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "To use the copy, write in kbsync.yaml:\nledger: " in done.output
    again = f"sqlite:///{tmp_path}/again.db"
    done = CliRunner().invoke(app, ["ledger", "copy", url(tmp_path), again, "--json", "-w", str(tmp_path)])
    found = json.loads(done.output)
    assert found["ledger"] == again
    assert {one["name"] for one in found["tables"]} == set(schema.metadata.tables)


def test_a_workspace_that_is_written_is_not_copied(tmp_path: Path) -> None:
    """While the daemon holds the workspace, copying its ledger is refused; another ledger may be copied."""
    source = rich_ledger(tmp_path / "data")
    (tmp_path / "kbsync.yaml").write_text("model: smollm2-135m\n", encoding="utf-8")
    words = ["ledger", "copy", source, url(tmp_path), "-w", str(tmp_path)]
    with writer_lock(tmp_path / "data" / "lock"):
        done = CliRunner().invoke(app, words)
        assert isinstance(done.exception, Busy)
        elsewhere = rich_ledger(tmp_path / "elsewhere")
        assert CliRunner().invoke(app, [*words[:2], elsewhere, *words[3:]]).exit_code == 0
