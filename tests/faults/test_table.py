"""The table of `make faults`."""

from __future__ import annotations

import json

from tests.faults.__main__ import table, tallied


def test_the_table_counts_what_became_of_each_kind_of_fault() -> None:
    noted = [("kill", "edit", "old", [], True), ("kill", "edit", "new", [], True), ("full", "", "new", ["lost"], False)]
    names = ("fault", "stage", "head", "violations", "converged")
    rows = tallied(json.dumps(dict(zip(names, one, strict=True))) for one in noted)
    assert [line.split() for line in table(rows).splitlines()[1:]] == [
        ["full", "1", "0", "1", "1", "0"],
        ["kill", "edit", "2", "1", "1", "0", "2"],
        ["all", "3", "1", "2", "1", "2"],
    ]
