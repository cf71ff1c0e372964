"""`make faults`: the whole fault suite, each kind of fault at 100 points, and what became of them.

    python -m tests.faults [--points N] [WHAT PYTEST TAKES]

Ends with pytest's status. What has to hold after each fault: docs/faults.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.faults.aftermath import TALLY

HEADS = ("fault", "stage", "injected", "HEAD old", "HEAD new", "violations", "converged")


@dataclass
class Row:
    """What became of one kind of fault in one stage."""

    injected: int = 0
    old: int = 0
    new: int = 0
    violations: int = 0
    converged: int = 0

    def add(self, line: dict[str, Any]) -> None:
        """Count one fault."""
        self.injected += 1
        self.old += line["head"] == "old"
        self.new += line["head"] == "new"
        self.violations += len(line["violations"])
        self.converged += line["converged"]

    def cells(self) -> list[str]:
        """Its numbers, in the order of HEADS."""
        return [str(n) for n in (self.injected, self.old, self.new, self.violations, self.converged)]


def tallied(lines: Iterable[str]) -> list[list[str]]:
    """A row of cells per fault and stage, and their sum."""
    rows: dict[tuple[str, str], Row] = {}
    total = Row()
    for line in map(json.loads, lines):
        rows.setdefault((line["fault"], line["stage"]), Row()).add(line)
        total.add(line)
    return [[*place, *rows[place].cells()] for place in sorted(rows)] + [["all", "", *total.cells()]]


def table(rows: list[list[str]]) -> str:
    """The rows under HEADS: words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(HEADS, *rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{'<' if n < 2 else '>'}{widths[n]}}" for n, cell in enumerate(row)).rstrip()
        for row in [list(HEADS), *rows]
    )


def main() -> None:
    """Run it and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=100, metavar="N")
    given, options = parser.parse_known_args()
    began = time.monotonic()
    with TemporaryDirectory() as folder:
        tally = Path(folder) / "tally"
        tally.touch()
        environment = os.environ | {"FAULTS": str(given.points), TALLY: str(tally)}
        command = [sys.executable, "-m", "pytest", "-q", "-n2", "--dist=worksteal", "tests/faults", *options]
        status = subprocess.run(command, env=environment, check=False).returncode
        rows = tallied(tally.read_text().splitlines())
    sys.stdout.write(f"\n{table(rows)}\n\n{time.monotonic() - began:.0f} s\n")
    sys.exit(status)


if __name__ == "__main__":
    main()
