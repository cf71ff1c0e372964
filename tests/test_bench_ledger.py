"""The benchmark of the ledger, on few rows."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from kbsync.bench.ledger import PHASES, measure
from kbsync.cli import app
from kbsync.ledger import Ledger


def test_every_phase_does_what_it_is_named_for(tmp_path: Path) -> None:
    """A load, two passes that change nothing, a star in a hundred moved, a tenth of them gone and kept as withdrawn."""
    found = measure(500, tmp_path)
    changes = {phase["phase"]: phase["changes"] for phase in found["phases"] if "changes" in phase}
    assert changes == {"first load": 500, "no change": 0, "identical body": 0, "1 % changed": 5, "10 % removed": 50}
    assert [phase["phase"] for phase in found["phases"]] == list(PHASES)
    assert all(phase["peak_mb"] > 0 for phase in found["phases"])
    with Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}") as ledger, ledger.read() as db:
        assert len(db.facts()) == 500


def test_the_command_writes_json() -> None:
    """One entry for each size."""
    done = CliRunner().invoke(app, ["bench", "ledger", "--rows", "100", "--json"])
    assert done.exit_code == 0, done.output
    assert [size["rows"] for size in json.loads(done.stdout)["sizes"]] == [100]
