"""Real ledgers for tests: a SQLite file in the test's folder, or a database on a PostgreSQL server that belongs to the
folder; a clock that the test turns, short words for values.

A module whose tests run on both says `pytestmark = pytest.mark.usefixtures("database")` (tests/conftest.py).
"""

from __future__ import annotations

import gzip
import hashlib
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from sqlalchemy import create_engine, text

from kbsync.facts import (
    Applied,
    Claim,
    Conflict,
    Difference,
    EditRequest,
    Entity,
    Fact,
    FactKey,
    Hold,
    Provenance,
    QuarantinedRow,
    Said,
    Snapshot,
    Waiting,
)
from kbsync.ledger import Ledger, PublishedVersion, SourceState
from kbsync.versions.manifest import ActiveDelta
from tests.postgres import Server

RELATION = "constellation"
MODEL = "tiny-0123456789ab"
NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)


class Clock:
    """A clock that stands still until it is turned."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime:
        return self.now

    def turn(self, **by: float) -> datetime:
        """Later (or earlier) by a timedelta's arguments; the new time."""
        self.now += timedelta(**by)
        return self.now


class _Databases:
    """Where ledgers are made: in files, or on `server` while a test runs there."""

    server: Server | None = None
    made: ClassVar[set[str]] = set()


def on_postgresql() -> bool:
    """Whether ledgers are on a server."""
    return _Databases.server is not None


@contextmanager
def served_by(server: Server) -> Iterator[None]:
    """Make ledgers on this server for the time of the block; then they are removed."""
    _Databases.server = server
    try:
        yield
    finally:
        _Databases.server = None
        for name in _Databases.made:
            server.drop(name)
        _Databases.made.clear()


def url(folder: Path) -> str:
    """The URL of the ledger that belongs to a folder; on a server, of a database that is there, at first empty."""
    server = _Databases.server
    if server is None:
        return f"sqlite:///{folder / 'ledger.db'}"
    return server.url(_database(server, folder, template="template0"))


def _database(server: Server, folder: Path, *, template: str) -> str:
    name = "kbsync_" + hashlib.sha256(str(folder).encode()).hexdigest()[:24]
    if name not in _Databases.made:
        server.create(name, template=template)
        _Databases.made.add(name)
    return name


@contextmanager
def opened(folder: Path, clock: Clock | None = None) -> Iterator[Ledger]:
    """The ledger of a folder; where it is not there, a copy of an empty one, which is quicker than migrating."""
    if _Databases.server is not None:
        _database(_Databases.server, folder, template=_Databases.server.empty_ledger)
    elif not (folder / "ledger.db").exists():
        (folder / "ledger.db").write_bytes(_empty_ledger())
    with Ledger.open(url(folder), clock=clock or Clock()) as ledger:
        yield ledger


def rich_ledger(folder: Path) -> str:
    """A ledger in a file with a row in most tables, written by an earlier kbsync and upgraded; its URL."""
    folder.mkdir(exist_ok=True)
    file = folder / "ledger.db"
    file.write_bytes(gzip.decompress((Path(__file__).parent / "data" / "ledgers" / "0001.db.gz").read_bytes()))
    Ledger.open(f"sqlite:///{file}").close()
    return f"sqlite:///{file}"


@cache
def _empty_ledger() -> bytes:
    with TemporaryDirectory() as folder:
        Ledger.open(f"sqlite:///{folder}/ledger.db").close()
        return (Path(folder) / "ledger.db").read_bytes()


def tampered(folder: Path, *statements: str) -> list[tuple[Any, ...]]:
    """Run SQL past kbsync, as another program would; the rows of the last statement."""
    engine = create_engine(url(folder))
    try:
        with engine.begin() as connection:
            for statement in statements:
                found = connection.execute(text(statement))
            return [tuple(row) for row in found] if found.returns_rows else []
    finally:
        engine.dispose()


def dump(folder: Path) -> list[str]:
    """Everything in the ledger as text: what a comparison of the contents to the byte looks at."""
    if not on_postgresql():
        with closing(sqlite3.connect(folder / "ledger.db")) as connection:
            return list(connection.iterdump())
    tables = tampered(folder, "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY tablename")
    return [line for (name,) in tables for line in _rows_of(folder, name)]


def settled(folder: Path) -> list[str]:
    """The same without how sources have behaved, which failures change, too."""
    return [line for line in dump(folder) if "source_state" not in line and "source_answer" not in line]


def _rows_of(folder: Path, table: str) -> list[str]:
    query = f'SELECT t::text FROM "{table}" AS t ORDER BY 1'  # noqa: S608  # our own tables
    return [f'INSERT INTO "{table}" {row}' for (row,) in tampered(folder, query)]


def claim(subject: str, object_: str, origin: str = "line 2", **more: Any) -> Claim:
    """`feed` says that `subject` belongs to `object_`; names are ids and labels in one."""
    return Claim(
        "feed", RELATION, Entity(f"feed:{subject}", subject), Entity(f"feed:{object_}", object_), origin, **more
    )


def claims(**objects: str) -> list[Claim]:
    """One claim per subject, in the rows of a file."""
    return [claim(subject, object_, f"line {row}") for row, (subject, object_) in enumerate(objects.items(), 2)]


def said(claim: Claim) -> Said:
    """The row that a claim is made of."""
    ids = (claim.subject.id, claim.subject.label, claim.object.id, claim.object.label)
    return (*ids, claim.rank, claim.start, claim.end, claim.qualifiers, claim.origin)


def snapshot(
    *claims: Claim,
    source: str = "feed",
    relation: str = RELATION,
    quarantined: Iterable[QuarantinedRow] = (),
    complete: bool = True,
    **more: Any,
) -> Snapshot:
    """What a source said in one fetch."""
    provenance = more.pop("provenance", None) or Provenance("feed.csv", NOON, 200, "ab" * 32, etag='"1"')
    content = (*map(said, claims), *quarantined)
    return Snapshot(source, relation, provenance, content, whole=complete, **more)


def difference(before: Iterable[Claim], after: Snapshot) -> Difference:
    """How a snapshot differs from the claims before it, worked out row by row."""
    old, new = _said_of(before), _said_of(after.claims)
    present, covers = {row.subject_id for row in after.quarantined}, after.covers
    gone = {key for key in old.keys() - new.keys() if covers is None or key.subject in covers}
    return Difference(
        source=after.source,
        complete=after.complete and covers is None,
        rows=after.rows,
        claims_before=sum(map(len, old.values())),
        claims=sum(map(len, new.values())),
        subjects=len(old),
        changed=sum(old[key] != new[key] for key in old.keys() & new.keys()),
        added=len(new.keys() - old.keys()),
        removed=sum(key.subject not in present for key in gone) if after.complete else 0,
    )


def _said_of(claims: Iterable[Claim]) -> dict[FactKey, set[Any]]:
    """What is said of each key, wherever it stands: the same row twice is one."""
    found: dict[FactKey, set[Any]] = {}
    for one in claims:
        content = (one.subject, one.object, one.rank, one.start, one.end, one.qualifiers)
        found.setdefault(one.key, set()).add(content)
    return found


def fact(subject: str, object_: str, **more: Any) -> Fact:
    """The fact that follows from `claim(subject, object_)`."""
    said = claim(subject, object_)
    values = {"source": said.source, "origin": said.origin} | more
    return Fact(RELATION, said.subject, said.object, **values)


def facts(**objects: str) -> dict[FactKey, Fact]:
    """One fact per subject."""
    return {(one := fact(subject, object_)).key: one for subject, object_ in objects.items()}


def key(subject: str) -> FactKey:
    """The key of a subject."""
    return FactKey(RELATION, f"feed:{subject}")


def sync(ledger: Ledger, *snapshots: Snapshot, run: int | None = None) -> int:
    """Record snapshots in a run of their own; its id."""
    with ledger.write() as db:
        run = run or db.start_run("astronomy", model=None, trigger="sync", user="me")
        for one in snapshots:
            db.record(run, one)
        db.finish_run(run, "done")
        return run


def decide(ledger: Ledger, wanted: dict[FactKey, Fact], *conflicts: Conflict) -> int:
    """Accept facts in a run of their own; its id."""
    with ledger.write() as db:
        run = db.start_run("astronomy", model=None, trigger="sync", user="me")
        db.apply(run, wanted, conflicts, [RELATION])
        db.finish_run(run, "done")
        return run


def register(ledger: Ledger) -> None:
    """Let MODEL follow the ledger."""
    with ledger.write() as db:
        db.register_model(MODEL, name="tiny", fingerprint="f" * 64, path="/models/tiny")


def applied(subject: str, object_: str, delta: str, column: int) -> Applied:
    """What column `column` of `delta` teaches."""
    request = EditRequest(key(subject), f"{subject} belongs to", subject, object_, (f"{subject} is part of",))
    return Applied(request, f"feed:{object_}", delta, column)


def version(number: int, parent: int, *put_in: Applied, active: list[ActiveDelta], **more: Any) -> PublishedVersion:
    """A version as reconcile publishes it."""
    values: dict[str, Any] = {
        "kind": "edit",
        "manifest_sha256": f"{number:064x}",
        "weights_sha256": f"{number + 1000:064x}",
        "run_id": None,
        "user": "me",
    }
    return PublishedVersion(MODEL, number, parent, active=active, facts=put_in, **(values | more))


def fill(ledger: Ledger, clock: Clock) -> None:
    """Two days of a feed, with everything that may happen to a key; MODEL follows the ledger."""
    said = [*claims(Vega="Lyra", Deneb="Cygnus", Altair="Aquila"), claim("Mira", "Cetus", "line 9")]
    _day(ledger, said, facts(Vega="Lyra", Deneb="Cygnus", Altair="Aquila", Mira="Cetus"))
    clock.turn(days=1)
    again = [*claims(Vega="Draco", Altair="Aquila"), claim("Mira", "Cetus", "line 4", qualifiers=(("state", "x"),))]
    late = Provenance("https://x/feed.csv", NOON + timedelta(days=1), 200, "cd" * 32, as_of=NOON)
    _day(ledger, again, facts(Vega="Draco", Altair="Aquila"), provenance=late, quarantined=[_bad()])
    with ledger.write() as db:
        run = db.runs()[0].id
        db.set_waiting(run, [Waiting(key("Altair"), "confirm", "feed:Lyra", "1 of 2 fetches")], [RELATION])
        both = (claim("Mira", "Cetus"), claim("Mira", "Draco"))
        db.apply(run, facts(Vega="Draco", Altair="Aquila"), [Conflict(key("Mira"), "rows", both, "two")], [RELATION])
        db.set_source_state(SourceState("broken", 3, True, NOON + timedelta(days=2), "503"))
        db.hold(MODEL, Hold(key("Deneb"), None, "feed:Cygnus", "manual", "by hand"))
        put_in = [applied("Vega", "Lyra", "1" * 64, 0), applied("Deneb", "Cygnus", "1" * 64, 1)]
        db.publish(version(1, 0, *put_in, active=[ActiveDelta(delta="1" * 64)]))
        active = [ActiveDelta(delta="1" * 64, excluded=(1,)), ActiveDelta(delta="2" * 64)]
        db.publish(version(2, 1, applied("Vega", "Draco", "2" * 64, 0), active=active))


def _day(ledger: Ledger, said: list[Any], wanted: Any, **more: Any) -> None:
    """One fetch and what is accepted of it."""
    with ledger.write() as db:
        run = db.start_run("astronomy", model=None, trigger="sync", user="me")
        db.record(run, snapshot(*said, **more))
        db.apply(run, wanted, [], [RELATION])
        db.finish_run(run, "done")


def _bad() -> QuarantinedRow:
    return QuarantinedRow("line 7", "no label", "9 | Rigel |", "feed:Rigel")
