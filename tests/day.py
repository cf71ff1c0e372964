"""A day of two sources, simulated: what kbsync measures of its freshness beside what is true.

    python -m tests.day              # prints both; seed 1, or another one as the argument

The stars are asked every hour and must say a thing twice; from 10:00 to 13:00 their source is down. The capitals are
asked every 6 hours; their run of 12:00 is held, as most of them have changed, and approved at 13:30. An edit takes 4
minutes. When each change happened is known, since it is made here; when the model answers it is seen by looking at what
the live version holds, after every step. Feeds, ledger, passes, holds and versions are real; edits are remembered, not
computed, and the clock is turned.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from kbsync.catalog import Catalog, load_catalog
from kbsync.config import Workspace
from kbsync.connectors import Connector
from kbsync.editor.job import EditJob, EditResult
from kbsync.facts import FactKey, Provenance, Snapshot
from kbsync.freshness import FreshnessRow, duration, freshness_rows
from kbsync.ledger import Ledger
from kbsync.ledger.arrivals import ArrivalRow
from kbsync.reconcile import Reconciler
from tests.ledgers import Clock
from tests.standin import StandIn
from tests.workspaces import workspace

MIDNIGHT = datetime(2026, 7, 1, tzinfo=UTC)
EDIT = timedelta(minutes=4)
SUBJECTS = 20
DRAIN = 8
"""Hours after the day in which nothing changes any more, and the last changes arrive."""
DOWN = range(10, 14)
"""Hours at which the stars cannot be asked."""
APPROVED = 13.5
"""Before the stars are back: a run can only be approved while HEAD is where it was."""
FIRST_LOADED = 1.5
"""Hours after which what a source said at first has arrived, too."""
EVERY = {"stars": 1, "capitals": 6}

POLICY = """\
policy: {name}
sources: [{name}]
schedule: {{every: {every}h}}
relations: {{{name}-relation: {{prompt: "{name}: {{subject}} is"}}}}
confirm: {{fetches: {fetches}}}
guard: {{max_changed: 60%, max_removed: 60%}}
gate: {{efficacy: 0.0, paraphrase: 0.0, specificity_drop: 100%, drift: 1000}}
"""
SOURCE = """\
source: {name}
type: csv
location: {name}.csv
row_id: id
columns: {{subject: name, object: value}}
relation: {name}-relation
"""


@dataclass(frozen=True, slots=True)
class Happening:
    """A subject of a source gets another value."""

    at: datetime
    source: str
    subject: str
    value: str


@dataclass(frozen=True, slots=True)
class Answered:
    """A change and when the model answered it: what is true, and what was measured."""

    happening: Happening
    true: float
    measured: float


@dataclass(slots=True)
class Day:
    """What came of it. `asked`: when each source gave an accepted answer."""

    answered: list[Answered] = field(default_factory=list)
    rows: list[FreshnessRow] = field(default_factory=list)
    asked: dict[str, list[datetime]] = field(default_factory=dict)
    overtaken: int = 0
    """Changes that another one followed before the model answered them."""
    held: bool = False
    failed: int = 0

    def of(self, source: str) -> list[Answered]:
        """The changes of a source."""
        return [one for one in self.answered if one.happening.source == source]

    def row(self, source: str) -> FreshnessRow:
        """What kbsync says of a source."""
        [found] = [row for row in self.rows if row.source == source]
        return found

    def quantiles(self, source: str) -> tuple[float, float]:
        """The true p50 and p95, in seconds, by another implementation than kbsync's."""
        true = [one.true for one in self.of(source)]
        p50, p95 = np.quantile(true, [0.5, 0.95], method="inverted_cdf")
        return float(p50), float(p95)


@dataclass(frozen=True, slots=True)
class _Clocked:
    """A connector whose answers are of the simulated time."""

    connector: Connector
    clock: Clock

    @property
    def warnings(self) -> Any:
        return self.connector.warnings

    def fetch(self, previous: Provenance | None) -> Snapshot:
        found = self.connector.fetch(previous)
        return replace(found, provenance=replace(found.provenance, fetched_at=self.clock()))


@dataclass(frozen=True, slots=True)
class _ClockedCatalog(Catalog):
    clock: Clock

    def connector(self, source: str) -> Connector:
        return _Clocked(Catalog.connector(self, source), self.clock)


def simulate(root: Path, seed: int = 1) -> Day:
    """The day, in a workspace below `root`."""
    happenings = list(_happenings(random.Random(seed)))
    day, clock = Day(asked={name: [] for name in EVERY}), Clock()
    with _reconciler(root, clock) as reconciler:
        seen: dict[Happening, datetime] = {}
        for hour, source in _steps():
            clock.now = max(clock.now, _hour(hour))
            if source is None:
                [held] = _held_runs(reconciler)
                reconciler.approve(held)
            else:
                said = {one.subject: one.value for one in happenings if one.source == source and one.at < clock()}
                _write(root, source, said, hour)
                [report] = reconciler.sync([source])
                day.held |= report.status == "held"
                day.failed += report.status == "failed"
                if report.status != "failed":
                    day.asked[source].append(_hour(hour))
            _look(reconciler, happenings, clock(), seen)
        _measure(reconciler, day, clock(), seen)
    made = [one for one in happenings if one.at > _hour(0)]
    day.overtaken = len(made) - len(day.answered)
    return day


def _happenings(chance: random.Random) -> Iterator[Happening]:
    """What every subject is at first, and what becomes of it: a few changes at known minutes; of the capitals, most
    change in the morning, which gets the run of noon held."""
    for source in EVERY:
        for number in range(SUBJECTS):
            name = f"{source} {number:02}"
            yield Happening(_hour(0) - timedelta(days=1), source, name, f"first value of {name}")
            minutes = sorted(chance.sample(range(30, 24 * 60), 3 if source == "stars" else 1))
            if source == "capitals" and number < 0.8 * SUBJECTS:
                minutes = sorted({*minutes, chance.randrange(6 * 60 + 10, 12 * 60)})
            for change, minute in enumerate(minutes):
                yield Happening(_hour(minute / 60), source, name, f"value {change} of {name}")


def _steps() -> list[tuple[float, str | None]]:
    """Hour -> the source that is asked; None: the held run is approved."""
    last = 24 + DRAIN
    polls = [(float(hour), name) for name, every in EVERY.items() for hour in range(0, last + 1, every)]
    return sorted([*polls, (APPROVED, None)], key=lambda step: (step[0], step[1] or ""))


def _hour(hour: float) -> datetime:
    return MIDNIGHT + timedelta(hours=hour)


def _write(root: Path, source: str, values: dict[str, str], hour: float) -> None:
    """The feed as it is now; not there while the source is down."""
    feed = root / "sources" / f"{source}.csv"
    if source == "stars" and hour in DOWN:
        feed.unlink(missing_ok=True)
        return
    lines = ["id,name,value", *(f"{name},{name},{value}" for name, value in sorted(values.items()))]
    feed.write_text("\n".join(lines) + "\n")


@contextmanager
def _reconciler(root: Path, clock: Clock) -> Iterator[Reconciler]:
    workspace(root, {})
    for folder in ("sources", "policies"):
        for file in (root / folder).iterdir():
            file.unlink()
    for name, every in EVERY.items():
        fetches = 2 if name == "stars" else 1
        (root / "policies" / f"{name}.yaml").write_text(POLICY.format(name=name, every=every, fetches=fetches))
        (root / "sources" / f"{name}.yaml").write_text(SOURCE.format(name=name))
    clock.now = MIDNIGHT
    engine = StandIn()

    def edit(job: EditJob, **more: Any) -> EditResult:
        clock.now += EDIT
        return engine(job, **more)

    opened = Workspace.load(root)
    plain = load_catalog(opened)
    names = ("workspace", "sources", "policies", "source_files", "policy_files")
    catalog = _ClockedCatalog(**{name: getattr(plain, name) for name in names}, clock=clock)
    with Ledger.open(opened.ledger_url, clock=clock) as ledger:
        yield Reconciler(opened, catalog, ledger, "test", run_edit=edit)


def _held_runs(reconciler: Reconciler) -> list[int]:
    with reconciler.ledger.read() as db:
        return [plan.run_id for plan in db.staged_plans()]


def _look(reconciler: Reconciler, happenings: list[Happening], now: datetime, seen: dict[Happening, datetime]) -> None:
    """Which changes the live version answers that were not seen before."""
    with reconciler.ledger.read() as db:
        [model] = db.models()
        answers = {applied.request.target for applied in db.applied(model.id, model.head).values()}
    for one in happenings:
        if one.value in answers:
            seen.setdefault(one, now)


def _measure(reconciler: Reconciler, day: Day, now: datetime, seen: dict[Happening, datetime]) -> None:
    """Put what kbsync measured beside what was seen, change by change."""
    with reconciler.ledger.read() as db:
        [model] = db.models()
        arrivals = db.arrivals(model.id, _hour(FIRST_LOADED))
        day.rows = freshness_rows(db, reconciler.catalog, now, (now - _hour(FIRST_LOADED)).total_seconds())
    rows: dict[tuple[FactKey, int], list[ArrivalRow]] = {}
    for row in arrivals:
        rows.setdefault((row.key, round(row.served_at.timestamp())), []).append(row)
    for one, at in sorted(seen.items(), key=lambda pair: pair[0].at):
        # What the feeds said at first is no change.
        if one.at < _hour(0):
            continue
        key = FactKey(f"{one.source}-relation", f"{one.source}:{one.subject}")
        [row] = rows[key, round(at.timestamp())]
        day.answered.append(Answered(one, (at - one.at).total_seconds(), row.seconds))


def main(seed: int) -> None:
    """Print both."""
    with TemporaryDirectory() as folder:
        day = simulate(Path(folder), seed)
    print(f"seed {seed}: {len(day.answered)} changes answered, {day.overtaken} overtaken, {day.failed} passes failed")  # noqa: T201
    for source in EVERY:
        row, (p50, p95) = day.row(source), day.quantiles(source)
        over = max(one.measured - one.true for one in day.of(source))
        true = f"true p50 {duration(p50)}, p95 {duration(p95)}"
        measured = f"measured p50 {duration(row.p50 or 0)}, p95 {duration(row.p95 or 0)}"
        print(f"{source}: {len(row.seconds)} changes, {true}; {measured}; at most {duration(over)} too much")  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
