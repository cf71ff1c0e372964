"""Asking sources: retries, cooldowns that outlive the process, and a ledger that no failure changes."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from kbsync import observe as module
from kbsync.connectors import Connector, make_connector
from kbsync.connectors.endpoint import RESULTS
from kbsync.errors import Cancelled, SourceBlocked, SourceError, SourceInvalid, SourceUnavailable
from kbsync.facts import Provenance, Snapshot
from kbsync.ledger import Ledger, SourceState
from kbsync.observe import observe
from kbsync.policy import Source
from tests.faultserver import FaultServer, answer, big, cut, drip, redirect, reset
from tests.ledgers import NOON, claims, opened, settled, snapshot, sync
from tests.livedata import GOVERNORS, World
from tests.sparqlserver import Oxigraph

HOUR = timedelta(hours=1)


@pytest.fixture(scope="module")
def server() -> Iterator[Oxigraph]:
    with Oxigraph() as running:
        yield running


@pytest.fixture(scope="module")
def faults() -> Iterator[FaultServer]:
    with FaultServer() as running:
        yield running


@dataclass
class Scripted:
    """A connector that fails as it is told, one error a fetch, and then answers."""

    errors: list[SourceError]
    answer: Snapshot = field(default_factory=lambda: snapshot(*claims(Vega="Lyra")))
    warnings: tuple[str, ...] = ()
    fetches: int = 0

    def fetch(self, previous: Provenance | None) -> Snapshot:  # noqa: ARG002 (the protocol's)
        """The next error, or the answer."""
        self.fetches += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.answer


class Clock(threading.Event):
    """A cancellation that never comes, and on which nobody really waits; `cancel_in` sets it in that wait."""

    def __init__(self, cancel_in: int = 0) -> None:
        super().__init__()
        self.waits: list[float] = []
        self.cancel_in = cancel_in

    def wait(self, timeout: float | None = None) -> bool:
        """Note the wait."""
        if timeout:
            self.waits.append(timeout)
        return bool(timeout) and len(self.waits) == self.cancel_in


def refused(seconds: float | None) -> SourceUnavailable:
    return SourceUnavailable("feed", "status 429", retry_after=seconds)


def look(ledger: Ledger, connector: Connector) -> tuple[list[Snapshot], list[SourceError], list[float]]:
    """One pass: what came, what failed, and how long was waited in between."""
    clock = Clock()
    snapshots, failures = observe({"feed": connector}, ledger, cancelled=clock)
    return snapshots, failures, clock.waits


def state(ledger: Ledger) -> SourceState:
    with ledger.read() as db:
        return db.source_state("feed")


def let_pass(ledger: Ledger, host: str = "") -> None:
    """The cooldown is over, of the source and of its host."""
    with ledger.write() as db:
        for name in ("feed", f"host {host}"):
            db.set_source_state(replace(db.source_state(name), retry_at=datetime.now(UTC)))


def test_what_may_work_later_is_tried_three_times(tmp_path: Path) -> None:
    """With growing waits, and a success in the end leaves no trace."""
    with opened(tmp_path) as ledger:
        source = Scripted([refused(None), refused(None)])
        snapshots, failures, waits = look(ledger, source)
        assert (len(snapshots), failures, source.fetches, len(waits)) == (1, [], 3, 2)
        assert state(ledger) == SourceState("feed")
        source = Scripted([refused(None)] * 3)
        snapshots, failures, _ = look(ledger, source)
        assert (snapshots, source.fetches, state(ledger).failures) == ([], 3, 1)
        assert state(ledger).retry_at is None, "the schedule says when it is asked again"


def test_a_wished_pause_is_kept_doubled_and_jittered(tmp_path: Path) -> None:
    """The second refusal doubles it; nobody comes back at the very second."""
    with opened(tmp_path) as ledger:
        _, _, waits = look(ledger, Scripted([refused(5), refused(5)]))
    assert 5 <= waits[0] <= 5 * 1.25
    assert 10 <= waits[1] <= 10 * 1.25


def test_a_long_pause_ends_the_run_and_not_the_process(tmp_path: Path) -> None:
    """Over a minute nothing is tried again; the pause is kept in the ledger and doubles with every run that fails."""
    with opened(tmp_path) as ledger:
        for failures, pause in enumerate((120, 240, 480)):
            source = Scripted([refused(120)])
            _, [error], waits = look(ledger, source)
            assert (source.fetches, waits, type(error)) == (1, [], SourceUnavailable)
            now = state(ledger)
            assert now.failures == failures + 1
            assert now.retry_at is not None
            left = (now.retry_at - datetime.now(UTC)).total_seconds()
            assert pause - 5 <= left <= pause * 1.25
            let_pass(ledger)
        assert look(ledger, Scripted([]))[1] == []
        assert state(ledger) == SourceState("feed")


def test_who_refuses_us_is_left_alone_for_an_hour_then_longer_and_a_restart_changes_nothing(tmp_path: Path) -> None:
    """403: one request, no retry; 1 h doubling to 24 h; the cooldown is in the ledger, not in the process."""
    for failures in range(7):
        with opened(tmp_path) as ledger:
            source = Scripted([SourceBlocked("feed", "status 403")])
            _, [error], waits = look(ledger, source)
            assert (type(error), source.fetches, waits) == (SourceBlocked, 1, [])
        with opened(tmp_path) as ledger:
            again = Scripted([])
            _, [error], _ = look(ledger, again)
            assert again.fetches == 0
            assert isinstance(error, SourceBlocked)
            assert "not asked again before" in error.message
            until = state(ledger).retry_at
            assert until is not None
            assert abs(until - datetime.now(UTC) - min(HOUR * 2**failures, 24 * HOUR)) < timedelta(minutes=1)
            let_pass(ledger)
    with opened(tmp_path) as ledger:
        assert len(look(ledger, Scripted([]))[0]) == 1
        assert state(ledger) == SourceState("feed")


def test_a_cooldown_ends_though_the_clock_was_a_year_ahead_when_it_began(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        look(ledger, Scripted([SourceBlocked("feed", "status 403")]))
        with ledger.write() as db:
            db.set_source_state(replace(db.source_state("feed"), retry_at=datetime.now(UTC) + timedelta(days=365)))
        assert len(look(ledger, Scripted([]))[0]) == 1
        assert state(ledger) == SourceState("feed")


def test_an_invalid_answer_is_not_asked_for_again_at_once(tmp_path: Path) -> None:
    """It would be as invalid; the next pass asks again."""
    with opened(tmp_path) as ledger:
        source = Scripted([SourceInvalid("feed", "cut")])
        assert (len(look(ledger, source)[1]), source.fetches) == (1, 1)
        assert len(look(ledger, source)[0]) == 1


def test_one_source_that_fails_does_not_keep_the_others(tmp_path: Path) -> None:
    """What answered is there, and why the other one is not."""
    with opened(tmp_path) as ledger:
        good, bad = Scripted([]), Scripted([SourceInvalid("bad", "cut")])
        snapshots, failures = observe({"bad": bad, "feed": good}, ledger)
    assert (len(snapshots), [error.source for error in failures]) == (1, ["bad"])


def test_an_answer_older_than_the_accepted_one_is_refused_whatever_gave_it(tmp_path: Path) -> None:
    """Any connector that says how fresh its answer is: the ledger does not go back, and the source is asked later."""

    def as_of(moment: datetime) -> Snapshot:
        return snapshot(*claims(Vega="Lyra"), provenance=Provenance("feed", NOON, 200, "ab" * 32, as_of=moment))

    with opened(tmp_path) as ledger:
        sync(ledger, as_of(NOON))
        before = settled(tmp_path)
        _, [error], _ = look(ledger, Scripted([], as_of(NOON - HOUR)))
        assert "stale" in error.message
        assert state(ledger).retry_at is not None
        assert settled(tmp_path) == before
        let_pass(ledger)
        assert len(look(ledger, Scripted([], as_of(NOON)))[0]) == 1


@pytest.mark.parametrize("status", [403, 429])
def test_a_host_that_wants_to_be_left_alone_is_asked_by_no_source_of_it(
    tmp_path: Path, faults: FaultServer, status: int
) -> None:
    """The second source of the host is not asked, by another process neither; one of another host is."""
    one = governors(tmp_path, faults.on("/one", answer(status=status, headers={"Retry-After": "900"})))
    two = governors(tmp_path, faults.on("/two", answer(WHOLE, kind=RESULTS)), source="two")
    sent = len(faults.requests)
    with opened(tmp_path) as ledger:
        _, failures = observe({"feed": one, "two": two}, ledger, cancelled=Clock())
        assert [error.source for error in failures] == ["feed", "two"]
        assert all(f"status {status}" in error.message for error in failures)
        assert len(faults.requests) - sent == 1
    with opened(tmp_path) as ledger:
        _, [error] = observe({"two": two}, ledger)
        assert "not asked again before" in error.message
        assert len(faults.requests) - sent == 1
        with Oxigraph() as own:
            own.load(b"")
            other = governors(tmp_path, own.endpoint.replace("127.0.0.1", "localhost"), source="three")
            assert observe({"three": other}, ledger)[1] == []


class Broken:
    """A connector with a mistake."""

    warnings = ()

    def fetch(self, previous: Provenance | None) -> Snapshot:  # noqa: ARG002 (the protocol's)
        """Fails as no connector should."""
        raise ZeroDivisionError("postgresql://me:secret@host")


def test_a_mistake_in_a_connector_is_that_sources_failure(tmp_path: Path) -> None:
    """Tried again with the limit, told without the text of a foreign error, and no reason to stop for the others."""
    with opened(tmp_path) as ledger:
        snapshots, failures = observe({"bad": Broken(), "feed": Scripted([])}, ledger, cancelled=Clock())
    [error] = failures
    assert "its connector failed: ZeroDivisionError at test_observe.py:" in error.message
    assert "secret" not in error.message
    assert len(snapshots) == 1


class Lazy:
    """A connector whose mistake shows only when its rows are read."""

    warnings = ()

    def fetch(self, previous: Provenance | None) -> Snapshot:  # noqa: ARG002 (the protocol's)
        """A good first row, and then a mistake."""

        class Rows:
            def __iter__(self) -> Iterator[Any]:
                yield from snapshot(*claims(Vega="Lyra")).content
                raise KeyError("postgresql://me:secret@host")

        return replace(snapshot(), content=Rows())


def test_a_mistake_while_rows_are_read_is_that_sources_failure_too(tmp_path: Path) -> None:
    """Wherever they are read: it is a SourceError with type and place, and without the text of the foreign one."""
    with opened(tmp_path) as ledger:
        [found], _, _ = look(ledger, Lazy())
    with pytest.raises(
        SourceUnavailable, match=r"source feed: its connector failed: KeyError at test_observe"
    ) as caught:
        list(found.content)
    assert "secret" not in caught.value.message


def test_a_cancelled_pass_does_not_wait_for_a_pause(tmp_path: Path) -> None:
    """The wait itself ends, nothing is asked again, and no cooldown is written for what nobody refused."""
    source = Scripted([refused(55)] * 3)
    with opened(tmp_path) as ledger:
        with pytest.raises(Cancelled):
            observe({"feed": source}, ledger, cancelled=Clock(cancel_in=1))
        assert source.fetches == 1
        assert state(ledger) == SourceState("feed")
        stopped = threading.Event()
        stopped.set()
        with pytest.raises(Cancelled):
            observe({"feed": source}, ledger, cancelled=stopped)
        assert source.fetches == 1


@pytest.mark.parametrize("seconds", [0.0, 20.0, 60.0])
def test_every_wait_is_at_least_a_second_and_at_most_a_minute(tmp_path: Path, seconds: float) -> None:
    """Also where the source asks for none, or twice its wish would be longer."""
    with opened(tmp_path) as ledger:
        _, _, waits = look(ledger, Scripted([refused(seconds)] * 3))
    assert len(waits) == 2
    assert all(max(1.0, seconds) <= wait <= 60.0 for wait in waits)


def test_only_refusals_make_the_pause_after_a_refusal_longer(tmp_path: Path) -> None:
    """Failures of another kind before a 403 do not count; the hint and the ledger say until when it is left alone."""
    with opened(tmp_path) as ledger:
        for _ in range(3):
            look(ledger, Scripted([refused(None)] * 3))
        for hours in (1, 2, 4):
            _, [error], _ = look(ledger, Scripted([SourceBlocked("feed", "status 403", hint="see `user_agent`")]))
            until = state(ledger).retry_at
            assert until is not None
            assert abs(until - datetime.now(UTC) - hours * HOUR) < timedelta(minutes=1)
            assert error.hint == f"it is not asked again before {until:%Y-%m-%d %H:%M} UTC; see `user_agent`"
            assert state(ledger).last_error == "status 403"
            _, [error], _ = look(ledger, Scripted([]))
            assert error.message.count("source feed") == 1
            let_pass(ledger)


def test_feeds_of_one_host_rest_together(tmp_path: Path, faults: FaultServer) -> None:
    """A 403 to one CSV feed keeps the others of its host from asking; a file has no host."""

    def feed(name: str, location: str) -> Connector:
        declared = {"source": name, "type": "csv", "relation": "r", "columns": {"subject": "s", "object": "o"}}
        return make_connector(Source.model_validate({**declared, "location": location}), folder=tmp_path)

    (tmp_path / "own.csv").write_text("s,o\nVega,Lyra\n")
    one = feed("one", faults.on("/one.csv", answer(status=403)))
    two = feed("two", faults.on("/two.csv", answer(b"s,o\nVega,Lyra\n")))
    sent = len(faults.requests)
    with opened(tmp_path) as ledger:
        own = feed("own", "own.csv")
        snapshots, failures = observe({"one": one, "two": two, "own": own}, ledger, cancelled=Clock())
    assert ([snapshot.source for snapshot in snapshots], [error.source for error in failures]) == (
        ["own"],
        ["one", "two"],
    )
    assert len(faults.requests) - sent == 1


# The fault matrix: sources ----------------------------------------------------------------------------------------


def governors(folder: Path, endpoint: str, **keys: Any) -> Connector:
    (folder / "governors.rq").write_text(GOVERNORS, encoding="utf-8")
    declared = {"source": "feed", "type": "sparql", "relation": "governor", "ids": "wikidata", "query": "governors.rq"}
    return make_connector(Source.model_validate({**declared, "endpoint": endpoint, **keys}), folder=folder)


def governor(name: str) -> bytes:
    """A whole answer: who governs Texas."""
    row = {"subjectLabel": "Texas", "objectLabel": name, "rank": "normal"}
    terms = {variable: {"type": "literal", "value": value} for variable, value in row.items()}
    terms |= {
        variable: {"type": "uri", "value": f"http://www.wikidata.org/entity/{item}"}
        for variable, item in {"subject": "Q1439", "object": "Q5"}.items()
    }
    return json.dumps({"head": {"vars": list(terms)}, "results": {"bindings": [terms]}}).encode()


def unreachable() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/sparql"


WHOLE = governor("Ann")
FAULTS: Mapping[str, tuple[Any, type[SourceError], int]] = {
    "429 with 0": (answer(status=429, headers={"Retry-After": "0"}), SourceUnavailable, 3),
    "429 with 7": (answer(status=429, headers={"Retry-After": "7"}), SourceUnavailable, 3),
    "429 with a date": (
        answer(status=429, headers={"Retry-After": "Thu, 01 Jan 2099 00:00:00 GMT"}),
        SourceUnavailable,
        1,
    ),
    "429 without": (answer(status=429), SourceUnavailable, 3),
    "429 with garbage": (answer(status=429, headers={"Retry-After": "soon"}), SourceUnavailable, 3),
    "403": (answer(b"Please set a user-agent", status=403, kind="text/plain"), SourceBlocked, 1),
    "500": (answer(b"java.lang.Exception\n\tat", status=500, kind="text/plain"), SourceUnavailable, 3),
    "502": (answer(status=502), SourceUnavailable, 3),
    "reset": (reset(), SourceUnavailable, 3),
    "short length": (cut(WHOLE, promised=len(WHOLE) + 9, kind=RESULTS), SourceInvalid, 1),
    "cut JSON": (answer(WHOLE[:-9], kind=RESULTS), SourceInvalid, 1),
    "timeout inside a value": (
        answer(governor("SPARQL-QUERY: queryStr=SELECT java.util.concurrent.TimeoutException"), kind=RESULTS),
        SourceInvalid,
        1,
    ),
    "timeout as the body": (answer(b"SPARQL-QUERY: queryStr=SELECT", kind=RESULTS), SourceInvalid, 1),
    "XML": (answer(b"<?xml version='1.0'?><sparql/>", kind="application/sparql-results+xml"), SourceInvalid, 1),
    "HTML 200": (answer(b"<html>Sorry</html>", kind="text/html"), SourceInvalid, 1),
    "drip": (drip(0.05, kind=RESULTS), SourceUnavailable, 3),
    "1 GB": (big(1_000_000_000, kind=RESULTS), SourceInvalid, 1),
    "redirect off the host": (redirect("http://localhost:1/sparql"), SourceInvalid, 1),
    "redirect to metadata": (redirect("http://169.254.169.254/latest/"), SourceInvalid, 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_changes_no_ledger_and_the_next_run_works(tmp_path: Path, faults: FaultServer, fault: str) -> None:
    """The error has its class, so many requests went out, the ledger is as it was, and the next answer is read."""
    behaviour, error, requests = FAULTS[fault]
    deadline = 0.3 if fault == "drip" else 20.0
    url = faults.on("/sparql", answer(WHOLE, kind=RESULTS))
    source = governors(tmp_path, url, deadline=deadline, max_bytes="1MB")
    with opened(tmp_path) as ledger:
        sync(ledger, *look(ledger, source)[0])
        before = settled(tmp_path)
        faults.on("/sparql", behaviour)
        sent = len(faults.requests)
        snapshots, [failure], _ = look(ledger, source)
        assert (snapshots, type(failure), len(faults.requests) - sent) == ([], error, requests)
        assert settled(tmp_path) == before
        faults.on("/sparql", answer(governor("Benjamin"), kind=RESULTS, zipped=True))
        let_pass(ledger, f"127.0.0.1:{faults.port}")
        sync(ledger, *look(ledger, source)[0])
        with ledger.read() as db:
            assert [claim.object.label for claim in db.claims_of("feed")] == ["Benjamin"]


@pytest.mark.parametrize("fault", ["refused", "no address", "a server that restarts", "a query that takes too long"])
def test_a_server_that_is_away_changes_no_ledger_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Refused connections, a name that does not resolve, oxigraph killed or out of time: and then it works again."""
    world = World()
    world.set("Q1439", "Texas", "Q101", "Ann")
    with Oxigraph(timeout_s=1) as own, opened(tmp_path) as ledger:
        world.publish(own)
        sync(ledger, *look(ledger, governors(tmp_path, own.endpoint))[0])
        before = settled(tmp_path)
        source, error = governors(tmp_path, own.endpoint), SourceUnavailable
        with monkeypatch.context() as patch:
            if fault == "refused":
                source = governors(tmp_path, unreachable())
            elif fault == "no address":
                failing = socket.gaierror(-2, "Name or service not known")
                patch.setattr(socket, "getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(failing))
            elif fault == "a server that restarts":
                own.stop()
            else:
                error = SourceInvalid
                many = " ".join(f"wd:Q{n} wd:P{n} wd:Q{n + 1} ." for n in range(300))
                own.load(f"@prefix wd: <http://www.wikidata.org/entity/> . {many}".encode())
                product = " ".join(f"?a{n} ?b{n} ?c{n} ." for n in range(9))
                same = f"FILTER(?a0 = ?c1 && ?a2 = ?c3 && ?a4 = ?c5) {{ {product} }}"
                (tmp_path / "slow.rq").write_text(
                    f"SELECT ?subject ?subjectLabel ?object ?objectLabel {{ {same} BIND(?a0 AS ?subject) "
                    "BIND(1 AS ?subjectLabel) BIND(?c0 AS ?object) BIND(1 AS ?objectLabel) }"
                )
                source = governors(tmp_path, own.endpoint, query="slow.rq")
            _, [failure], _ = look(ledger, source)
            assert type(failure) is error
        assert settled(tmp_path) == before
        own.stop()
        own.start()
        world.set("Q1439", "Texas", "Q102", "Ben")
        world.publish(own)
        sync(ledger, *look(ledger, governors(tmp_path, own.endpoint))[0])
        with ledger.read() as db:
            assert [claim.object.label for claim in db.claims_of("feed")] == ["Ben"]


# Merged items -----------------------------------------------------------------------------------------------------


def test_ids_that_are_gone_are_asked_about(tmp_path: Path, server: Oxigraph) -> None:
    """A complete snapshot without an id that was claimed comes with what the source has merged it into."""
    world = World()
    for number in range(1, 4):
        world.set(f"Q{number}", f"State {number}", f"Q10{number}", f"Person {number}")
    world.publish(server)
    source = governors(tmp_path, server.endpoint)
    with opened(tmp_path) as ledger:
        [first], _, _ = look(ledger, source)
        assert first.redirects == {}
        sync(ledger, first)
        world.merge("Q2", "Q1")
        world.merge("Q103", "Q203")
        world.delete("Q1")
        world.publish(server)
        [second], _, _ = look(ledger, source)
    assert second.redirects == {"wikidata:Q2": "wikidata:Q1", "wikidata:Q103": "wikidata:Q203"}


def test_what_is_gone_in_bulk_is_not_asked_about(
    tmp_path: Path, server: Oxigraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a source does not merge overnight: the guard holds it, and the endpoint is spared."""
    monkeypatch.setattr(module, "MOST_GONE", 1)
    world = World()
    for number in range(1, 4):
        world.set(f"Q{number}", f"State {number}", f"Q10{number}", f"Person {number}")
    world.publish(server)
    source = governors(tmp_path, server.endpoint)
    with opened(tmp_path) as ledger:
        sync(ledger, *look(ledger, source)[0])
        world.merge("Q2", "Q1")
        world.publish(server)
        [second], _, _ = look(ledger, source)
    assert second.redirects == {}
