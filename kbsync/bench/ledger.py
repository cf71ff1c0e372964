"""What the ledger costs: a feed of many rows taken in, unchanged, changed, shortened, and questions about it; beside
two ways to keep the same rows without history, decisions or provenance.

    result = measure(1_000_000, folder)
    result["phases"][1]        # {"phase": "no change", "seconds": …, "rows_per_second": …, "peak_mb": …}
    result["phases"][5]        # {"phase": "as-of of one subject", "ms": …, "slowest_ms": …, "peak_mb": …}

Every phase runs in a process of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
import resource
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from sqlalchemy import make_url

from kbsync.connectors import make_connector
from kbsync.facts import FactKey
from kbsync.intake import take_in
from kbsync.ledger import Ledger, Reader
from kbsync.ledger.lineage import lineage
from kbsync.ledger.read_facts import FactFilter
from kbsync.policy import Policy, Source
from kbsync.progress import Progress, silent

__all__ = ["PHASES", "measure"]

ASKED = 11
"""Times that each question is asked."""

Row = tuple[str, str, str]
Result = dict[str, Any]

_SOURCE = Source.model_validate(
    {
        "source": "stars",
        "type": "csv",
        "relation": "constellation",
        "location": "stars.csv",
        "row_id": "hip",
        "ids": "hip",
        "columns": {"subject": "name", "object": "constellation"},
        "max_bytes": "1GB",
    }
)
_POLICY = Policy.model_validate(
    {
        "policy": "astronomy",
        "sources": ["stars"],
        "schedule": {"every": "1h"},
        "relations": {"constellation": {"prompt": "{subject} belongs to the constellation of"}},
    }
)


def _feed(rows: int, *, changed: bool = False, kept: int | None = None) -> Iterator[Row]:
    """Stars by number; `changed`: one in a hundred lies elsewhere now; `kept`: only so many of them."""
    for number in range(1, (rows if kept is None else kept) + 1):
        elsewhere = changed and number % 100 == 0
        yield str(number), f"Star {number}", f"Constellation {(number * 7919 + elsewhere) % 88}"


def _write(folder: Path, rows: Iterator[Row], end: str = "\n") -> None:
    with (folder / "stars.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator=end)
        writer.writerow(("hip", "name", "constellation"))
        writer.writerows(rows)


def _pass(folder: Path, url: str, rows: int) -> Result:
    with Ledger.open(url) as ledger:
        start = time.perf_counter()
        with ledger.read() as db:
            previous = db.last_accepted("stars")
        snapshot = make_connector(_SOURCE, folder=folder).fetch(previous)
        with ledger.write() as db:
            run = db.start_run("astronomy", model=None, trigger="bench", user="bench")
            taken = take_in(db, _POLICY, run, [snapshot])
            db.finish_run(run, "done", counts=taken.counts)
        return _rate(time.perf_counter() - start, rows) | {"changes": taken.counts["changes"]}


def _first_load(folder: Path, url: str, rows: int) -> Result:
    _write(folder, _feed(rows))
    return _pass(folder, url, rows)


def _no_change(folder: Path, url: str, rows: int) -> Result:
    """Other bytes (other ends of lines), the same rows: all of them are parsed and compared."""
    _write(folder, _feed(rows), end="\r\n")
    return _pass(folder, url, rows)


def _changed(folder: Path, url: str, rows: int) -> Result:
    _write(folder, _feed(rows, changed=True))
    return _pass(folder, url, rows)


def _removed(folder: Path, url: str, rows: int) -> Result:
    _write(folder, _feed(rows, changed=True, kept=rows - rows // 10))
    return _pass(folder, url, rows)


def _ask(question: Callable[[Reader, FactKey], object]) -> Callable[[Path, str, int], Result]:
    """A question about the star in the middle, asked again and again by one reader: the median."""

    def ask(_: Path, url: str, rows: int) -> Result:
        key, taken = FactKey("constellation", f"hip:{rows // 2}"), []
        with Ledger.open(url) as ledger, ledger.read() as db:
            for _again in range(ASKED):
                start = time.perf_counter()
                question(db, key)
                taken.append(1000 * (time.perf_counter() - start))
        return {"ms": median(taken), "slowest_ms": max(taken)}

    return ask


def _first_time(db: Reader) -> datetime:
    """When the ledger first held anything."""
    return db.runs(limit=None)[-1].started_at


def _as_of(db: Reader, key: FactKey) -> object:
    return db.facts(as_of=_first_time(db), keys=[key])


def _how_many(db: Reader, _: FactKey) -> object:
    return db.count_facts(FactFilter(as_of=_first_time(db)))


def _entity(db: Reader, key: FactKey) -> object:
    return db.entity(db.facts(keys=[key])[key].object.id)


def _upsert(folder: Path, _: str, rows: int) -> Result:
    """One table, no history: what SQLite itself takes."""
    start = time.perf_counter()
    with closing(sqlite3.connect(folder / "plain.db")) as connection, connection:
        connection.execute("CREATE TABLE IF NOT EXISTS star (hip TEXT PRIMARY KEY, name TEXT, constellation TEXT)")
        connection.executemany(
            "INSERT INTO star VALUES (?, ?, ?) ON CONFLICT (hip) DO UPDATE SET name = excluded.name, "
            "constellation = excluded.constellation",
            _feed(rows),
        )
    return _rate(time.perf_counter() - start, rows)


def _sqlite_utils(folder: Path, _: str, rows: int) -> Result:
    try:
        import sqlite_utils
    except ImportError:
        return {"skipped": "sqlite-utils is not installed: pip install sqlite-utils"}
    names = ("hip", "name", "constellation")
    start = time.perf_counter()
    database = sqlite_utils.Database(folder / "utils.db")
    database.table("star").upsert_all((dict(zip(names, row, strict=True)) for row in _feed(rows)), pk="hip")
    database.close()
    return _rate(time.perf_counter() - start, rows)


PHASES: dict[str, Callable[[Path, str, int], Result]] = {
    "first load": _first_load,
    "no change": _no_change,
    "identical body": _pass,
    "1 % changed": _changed,
    "10 % removed": _removed,
    "as-of of one subject": _ask(_as_of),
    "history of one subject": _ask(lambda db, key: db.events_of(db.merged(key.subject))),
    "blame of one subject": _ask(lambda db, key: lineage(db, key, model=None)),
    "first page of facts": _ask(lambda db, _: list(db.select_facts(FactFilter(), 50))),
    "one constellation": _ask(_entity),
    "how many facts as of": _ask(_how_many),
    "baseline: upsert, first": _upsert,
    "baseline: upsert, no change": _upsert,
    "baseline: sqlite-utils, first": _sqlite_utils,
    "baseline: sqlite-utils, no change": _sqlite_utils,
}
"""In this order: each finds what the one before left."""


def measure(rows: int, folder: Path, *, url: str | None = None, progress: Progress = silent) -> Result:
    """Every phase on a new ledger in `folder` (or at `url`, which must be empty). MB are 2²⁰ bytes; `load` is how many
    processes wanted a core, before and after (means of a minute)."""
    address = url or f"sqlite:///{folder / 'ledger.db'}"
    found, load = [], [os.getloadavg()[0]]
    for done, name in enumerate(PHASES):
        progress(name, done, len(PHASES))
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found.append({"phase": name} | pool.apply(_run, (name, folder, address, rows)))
    progress("done", len(PHASES), len(PHASES))
    load.append(os.getloadavg()[0])
    database = make_url(address).get_backend_name()
    return {"bench": "ledger", "rows": rows, "database": database, "load": load, "phases": found}


def _run(name: str, folder: Path, url: str, rows: int) -> Result:
    result = PHASES[name](folder, url, rows)
    return result | {"peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}


def _rate(seconds: float, rows: int) -> Result:
    return {"seconds": seconds, "rows_per_second": round(rows / seconds)}
