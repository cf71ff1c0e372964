"""Ledgers as earlier versions of kbsync wrote them, one per schema: `tests/data/ledgers/<revision>.db.gz`.

python -m tests.old_ledgers      # writes that of today's schema: before a new revision follows a release
"""

from __future__ import annotations

import gzip
import sqlite3
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from kbsync.ledger import Ledger
from kbsync.ledger.migrate import REVISION
from tests.ledgers import Clock, fill, register

FOLDER = Path(__file__).parent / "data" / "ledgers"


def main() -> None:
    """A ledger with a row in most tables, written by this kbsync, compressed so that the same ledger gives the same
    file."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "ledger.db"
        clock = Clock()
        with Ledger.open(f"sqlite:///{file}", clock=clock) as ledger:
            register(ledger)
            fill(ledger, clock)
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("VACUUM")
        target = FOLDER / f"{REVISION}.db.gz"
        target.write_bytes(gzip.compress(file.read_bytes(), mtime=0))
        print(f"wrote {target}")  # noqa: T201  # a program's output


if __name__ == "__main__":
    main()
