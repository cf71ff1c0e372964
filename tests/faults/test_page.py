"""docs/faults.md says what is tested, and by what."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "faults.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (?!fault \|)([^|-][^|]*) \| ([^|]+) \| ([^|]+) \|$", PAGE, re.MULTILINE)
NAMED = re.compile(r"`((?:faults/)?test_\w+\.py)::(test_\w+)`")
OWN = sorted(path.name for path in Path(__file__).parent.glob("test_*.py"))


@cache
def functions(file: str) -> set[str]:
    """Those of a file below tests/."""
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("fault", "tests"), [(fault, tests) for fault, _, tests in ROWS], ids=lambda text: text[:24])
def test_every_fault_names_tests_that_exist(fault: str, tests: str) -> None:
    named = NAMED.findall(tests)
    assert named or "security.md" in tests, f"{fault} names no test"
    for file, test in named:
        assert test in functions(file), f"{file}::{test}"


def test_what_is_said_elsewhere_on_the_page_exists_too() -> None:
    assert all(test in functions(file) for file, test in NAMED.findall(PAGE))


@pytest.mark.parametrize("file", [file for file in OWN if file not in ("test_page.py", "test_table.py")])
def test_every_test_of_the_suite_is_on_the_page(file: str) -> None:
    named = {test for place, test in NAMED.findall(PAGE) if place == f"faults/{file}"}
    assert {name for name in functions(f"faults/{file}") if name.startswith("test_")} == named
