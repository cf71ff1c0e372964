"""A source that is read by increments says in the end what it would have said whole: lives of edits, a real server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kbsync.connectors import Connector, make_connector
from kbsync.facts import Provenance
from kbsync.ledger import Ledger
from kbsync.policy import Source
from tests.ledgers import opened, sync
from tests.livedata import GOVERNORS, STATES, World
from tests.sparqlserver import Oxigraph

STATE = st.integers(1, 6).map(lambda number: f"Q{number}")
EDIT = st.one_of(
    st.tuples(st.just("set"), STATE, st.integers(1, 4)),
    st.tuples(st.just("rank"), STATE, st.sampled_from(["Normal", "Preferred", "Deprecated"])),
    st.tuples(st.just("drop"), STATE, st.none()),
    st.tuples(st.just("delete"), STATE, st.none()),
    st.tuples(st.just("merge"), STATE, STATE),
)
DAYS = st.lists(st.lists(EDIT, max_size=3), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def server() -> Iterator[Oxigraph]:
    with Oxigraph() as running:
        yield running


def source(folder: Path, server: Oxigraph, name: str, **keys: object) -> Connector:
    (folder / "governors.rq").write_text(GOVERNORS, encoding="utf-8")
    (folder / "states.rq").write_text(STATES, encoding="utf-8")
    declared = {"source": name, "type": "sparql", "relation": "governor", "ids": "wikidata", "query": "governors.rq"}
    return make_connector(Source.model_validate({**declared, "endpoint": server.endpoint, **keys}), folder=folder)


def edit(world: World, edits: Sequence[tuple[str, str, object]]) -> bool:
    """What people do in a day; whether an increment cannot see all of it."""
    unseen = False
    for what, state, other in edits:
        if what == "set":
            world.set(state, f"State {state}", f"Q10{other}", f"Person {other}")
        elif state not in world.states:
            continue
        elif what == "rank":
            label, _, governor, _ = world.states[state]
            if governor:
                world.set(state, label, governor, world.people[governor], str(other))
        elif what == "drop":
            world.drop(state)
        elif what == "delete":
            world.delete(state)
            unseen = True
        elif state != other and str(other) in world.states:
            world.merge(state, str(other))
            unseen = True
    return unseen


def long_ago(last: Provenance) -> Provenance:
    """As if the last complete snapshot were of eight days ago."""
    modified = (last.cursor or "").split(" ")[0]
    return replace(last, cursor=f"{modified} {(datetime.now(UTC) - timedelta(days=8)).isoformat()}")


def read(ledger: Ledger, one: Connector, name: str, *, complete: bool = False) -> None:
    with ledger.read() as db:
        last = db.last_accepted(name)
    sync(ledger, one.fetch(long_ago(last) if last and complete else last))


def said(ledger: Ledger, name: str) -> set[tuple[str, str, str, str]]:
    with ledger.read() as db:
        return {(one.subject.id, one.subject.label, one.object.id, one.rank) for one in db.claims_of(name)}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(days=DAYS)
@example(days=[[], [], [("delete", "Q1", None)], [("set", "Q1", 1)]])
def test_increments_and_a_complete_snapshot_now_and_then_come_to_the_same(
    server: Oxigraph, tmp_path: Path, days: list[list[tuple[str, str, object]]]
) -> None:
    """After every day the claims are those of a source that is read whole each time, but for what is deleted or merged:
    that follows with the next complete snapshot, every third day."""
    world = World()
    with TemporaryDirectory(dir=tmp_path) as name, opened(Path(name)) as ledger:
        folder = Path(name)
        chunks = {"subjects": "states.rq", "size": 2}
        by_parts = source(folder, server, "parts", chunks=chunks, incremental={"every": "7d", "overlap": "1h"})
        whole = source(folder, server, "whole")
        world.set("Q1", "State Q1", "Q101", "Person 1")
        world.publish(server)
        unseen = False
        for day, edits in enumerate(days):
            world.tick(days=1)
            unseen |= edit(world, edits)
            world.publish(server)
            complete = day % 3 == 2
            if world.states or complete:
                read(ledger, by_parts, "parts", complete=complete)
                read(ledger, whole, "whole")
                unseen &= not complete
                if not unseen:
                    assert said(ledger, "parts") == said(ledger, "whole")
        read(ledger, by_parts, "parts", complete=True)
        read(ledger, whole, "whole")
        assert said(ledger, "parts") == said(ledger, "whole")
        with ledger.read() as db:
            last = db.last_accepted("parts")
        assert last is not None
        assert (last.cursor is not None) == bool(world.states)  # where there is nothing, all is asked for again


def test_a_failed_or_undone_run_does_not_move_the_cursor(server: Oxigraph, tmp_path: Path) -> None:
    """The cursor is part of the fetch that is accepted: what was not recorded is asked for again."""
    world = World()
    world.set("Q1", "Texas", "Q101", "Ann")
    world.publish(server)
    one = source(tmp_path, server, "parts", chunks={"subjects": "states.rq"}, incremental={})
    with opened(tmp_path) as ledger:
        read(ledger, one, "parts")
        with ledger.read() as db:
            before = db.last_accepted("parts")
        world.tick(days=1)
        world.set("Q1", "Texas", "Q102", "Ben")
        world.publish(server)
        with ledger.write() as db:
            db.record(db.start_run("politics", model=None, trigger="plan", user="me"), one.fetch(before))
            db.rollback()
        with ledger.read() as db:
            assert db.last_accepted("parts") == before
        assert said(ledger, "parts") == {("wikidata:Q1", "Texas", "wikidata:Q101", "normal")}
        read(ledger, one, "parts")
        assert said(ledger, "parts") == {("wikidata:Q1", "Texas", "wikidata:Q102", "normal")}
