"""Answers in parts: chunks, pages and increments, against a real server whose data people edit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
import rdflib
from pydantic import ValidationError

from kbsync.connectors import Redirecting, make_connector
from kbsync.connectors.endpoint import RESULTS
from kbsync.connectors.query import (
    MODIFIED,
    VARIABLES,
    last_modified,
    listed,
    modified_subjects,
    page,
    redirects,
    restricted,
    spoken,
    subjects_of,
)
from kbsync.connectors.retries import pausing
from kbsync.connectors.sparql import SparqlConnector
from kbsync.errors import SourceError, SourceInvalid, SourceUnavailable
from kbsync.facts import Provenance, Snapshot
from kbsync.policy import Source
from tests.faultserver import FaultServer, answer
from tests.livedata import GOVERNORS, STATES, World
from tests.sparqlserver import Oxigraph

WD = "http://www.wikidata.org/entity/"
SEEN = Provenance("http://127.0.0.1/", datetime(2026, 1, 1, tzinfo=UTC), 200, "ab" * 32)


@pytest.fixture(scope="module")
def server() -> Iterator[Oxigraph]:
    with Oxigraph() as running:
        yield running


@pytest.fixture
def world() -> World:
    """Seven states with a governor each, edited a day after the other."""
    made = World()
    for number in range(1, 8):
        made.tick(days=1)
        made.set(f"Q{number}", f"State {number}", f"Q{100 + number}", f"Person {number}")
    return made


def connector(folder: Path, endpoint: str, query: str = GOVERNORS, **keys: Any) -> SparqlConnector:
    (folder / "governors.rq").write_text(query, encoding="utf-8")
    (folder / "states.rq").write_text(STATES, encoding="utf-8")
    declared = {"source": "govs", "type": "sparql", "relation": "governor", "ids": "wikidata", "endpoint": endpoint}
    source = Source.model_validate({**declared, "query": "governors.rq", **keys})
    made = make_connector(source, folder=folder)
    assert isinstance(made, SparqlConnector)
    return made


def said(snapshot: Snapshot) -> list[tuple[str, str]]:
    return sorted((claim.subject.id, claim.object.label) for claim in snapshot.claims)


INCREMENTAL = {"chunks": {"subjects": "states.rq", "size": 3}, "incremental": {"every": "7d", "overlap": "1h"}}


@pytest.mark.parametrize(
    "keys",
    [
        {"chunks": {"subjects": "states.rq", "size": 1}},
        {"chunks": {"subjects": "states.rq", "size": 3}},
        {"chunks": {"subjects": "states.rq"}},
        {"page": {"size": 2}},
        {"page": {"size": 3}},
        {"page": {"key": "?statement", "size": 4}, "snapshot": "partial"},
        {"page": {}},
        INCREMENTAL,
    ],
    ids=str,
)
def test_parts_together_are_the_whole_answer(tmp_path: Path, server: Oxigraph, world: World, keys: Any) -> None:
    """Chunks, pages and a first increment of any size give the claims of one single answer, complete."""
    world.publish(server)
    whole = connector(tmp_path, server.endpoint).fetch(None)
    parts = connector(tmp_path, server.endpoint, **keys).fetch(None)
    assert said(parts) == said(whole)
    assert len(said(parts)) == 7
    assert parts.complete is ("snapshot" not in keys)
    assert parts.covers is None
    assert re.fullmatch("[0-9a-f]{64}", parts.provenance.body_sha256)


def test_a_list_of_ids_names_the_subjects_too(tmp_path: Path, server: Oxigraph, world: World) -> None:
    """`Q1`, `wd:Q2` or the IRI, one a line; only these are asked about."""
    world.publish(server)
    (tmp_path / "three.txt").write_text(f"# three\nQ1\nwd:Q2\n\n<{WD}Q3>\n", encoding="utf-8")
    found = connector(tmp_path, server.endpoint, chunks={"subjects": "three.txt", "size": 2}).fetch(None)
    assert [subject for subject, _ in said(found)] == ["wikidata:Q1", "wikidata:Q2", "wikidata:Q3"]


def relay(server: Oxigraph, *, wrong: Callable[[int, str], bytes | None]) -> Callable[[BaseHTTPRequestHandler], None]:
    """Passes queries on to the real server, but where `wrong` (number of the request, query) has another answer."""
    asked: list[str] = []

    def behave(handler: BaseHTTPRequestHandler) -> None:
        query = parse_qs(urlsplit(handler.path).query)["query"][0]
        asked.append(query)
        body = wrong(len(asked), query)
        if body is None:
            body = httpx.get(server.endpoint, params={"query": query}, headers={"Accept": RESULTS}).content
        answer(body, kind=RESULTS)(handler)

    return behave


@pytest.mark.parametrize("keys", [{"chunks": {"subjects": "states.rq", "size": 3}}, {"page": {"size": 3}}], ids=str)
def test_one_part_that_fails_fails_the_fetch(tmp_path: Path, server: Oxigraph, world: World, keys: Any) -> None:
    """The third answer is cut: there is no snapshot of the first two."""
    world.publish(server)
    with FaultServer() as between:
        url = between.on("/sparql", relay(server, wrong=lambda number, _: b'{"head": {' if number == 3 else None))
        with pytest.raises(SourceInvalid, match="not whole"):
            connector(tmp_path, url, **keys).fetch(None)
        assert len(between.requests) == 3


def test_a_part_that_is_refused_is_asked_again_alone(tmp_path: Path, server: Oxigraph, world: World) -> None:
    """The list and seven parts, one of which is refused once: nine requests, and not all of them twice. Refused for
    good, it is asked three times and no more."""
    world.publish(server)
    chunks = {"subjects": "states.rq", "size": 1}
    whole = connector(tmp_path, server.endpoint, chunks=chunks).fetch(None)
    waits: list[float] = []

    def refusing(times: int) -> Callable[[BaseHTTPRequestHandler], None]:
        passed, asked = relay(server, wrong=lambda _, __: None), 0

        def behave(handler: BaseHTTPRequestHandler) -> None:
            nonlocal asked
            asked += 1
            refused = 4 <= asked < 4 + times
            (answer(status=429, headers={"Retry-After": "7"}) if refused else passed)(handler)

        return behave

    with FaultServer() as between, pausing(waits.append):
        snapshot = connector(tmp_path, between.on("/sparql", refusing(1)), chunks=chunks).fetch(None)
        assert (snapshot.claims, len(between.requests)) == (whole.claims, 9)
        assert [7 <= wait <= 7 * 1.25 for wait in waits] == [True]
        with pytest.raises(SourceUnavailable, match="429") as caught:
            connector(tmp_path, between.on("/for-good", refusing(99)), chunks=chunks).fetch(None)
        assert (caught.value.exhausted, len(between.requests) - 9) == (True, 6)


def test_the_size_cap_and_the_deadline_hold_over_all_parts(tmp_path: Path, server: Oxigraph, world: World) -> None:
    """Each part is small and quick; together they are too much."""
    world.publish(server)
    chunks = {"subjects": "states.rq", "size": 1}
    single = connector(tmp_path, server.endpoint, chunks=chunks, max_bytes="100KB")
    assert single.fetch(None).rows == 7
    with pytest.raises(SourceInvalid, match=r"larger than 2\.0KB"):
        connector(tmp_path, server.endpoint, chunks=chunks, max_bytes="2KB").fetch(None)

    def slow(number: int, query: str) -> None:
        import time

        time.sleep(0.15)

    with FaultServer() as between:
        url = between.on("/sparql", relay(server, wrong=slow))
        with pytest.raises(SourceUnavailable, match="no whole answer in"):
            connector(tmp_path, url, chunks=chunks, deadline=0.5).fetch(None)
        assert 2 <= len(between.requests) <= 5


def rows_about(*subjects: str) -> bytes:
    """A whole answer with a row for each of these subjects."""
    row = {"subjectLabel": "a", "objectLabel": "b", "object": f"{WD}Q5"}
    kind = {True: "uri", False: "literal"}
    bindings = [
        {name: {"type": kind[value.startswith("http")], "value": value} for name, value in row.items()}
        | {"subject": {"type": "uri", "value": WD + subject}}
        for subject in subjects
    ]
    return json.dumps({"head": {"vars": list(VARIABLES)}, "results": {"bindings": bindings}}).encode()


@pytest.mark.parametrize(
    ("pages", "error", "problem"),
    [
        ([["Q1", "Q3", "Q2"]], SourceInvalid, "not in the order of"),
        ([["Q1", "Q2", "Q3"], ["Q1", "Q4", "Q5"]], SourceInvalid, "not in the order of"),
        ([["Q1", "Q1", "Q1"]], SourceInvalid, "make `page.size` larger"),
        ([["Q1", "Q2"], ["Q3"]], SourceUnavailable, "rows came after the last page"),
    ],
)
def test_pages_that_prove_nothing_are_refused(
    tmp_path: Path, pages: list[list[str]], error: type[SourceError], problem: str
) -> None:
    """An order that is none, a subject that fills a page, rows after the page that looked like the last one."""
    with FaultServer() as faults:
        answers = [rows_about(*subjects) for subjects in pages]
        turn = iter(answers)
        url = faults.on("/sparql", lambda handler: answer(next(turn), kind=RESULTS)(handler))
        with pytest.raises(SourceError, match=problem) as caught:
            connector(tmp_path, url, page={"size": 3}).fetch(None)
        assert type(caught.value) is error


def test_a_chunk_has_no_rows_about_others(tmp_path: Path, server: Oxigraph, world: World) -> None:
    """VALUES that the query does not heed would make every chunk the whole answer, or a part of it."""
    world.publish(server)
    stray = lambda number, _: rows_about("Q1") if number == 3 else None  # noqa: E731
    with FaultServer() as between:
        url = between.on("/sparql", relay(server, wrong=stray))
        with pytest.raises(SourceInvalid, match="about another subject"):
            connector(tmp_path, url, chunks={"subjects": "states.rq", "size": 1}).fetch(None)


def test_an_increment_asks_about_changed_subjects_alone(tmp_path: Path, server: Oxigraph, world: World) -> None:
    """It covers them, those without a row included, and its cursor goes on from the newest change."""
    world.publish(server)
    source = connector(tmp_path, server.endpoint, **INCREMENTAL)
    first = source.fetch(None)
    world.tick(hours=5)
    world.set("Q2", "State 2", "Q202", "Successor")
    world.drop("Q3")
    world.publish(server)
    second = source.fetch(first.provenance)
    assert said(second) == [("wikidata:Q2", "Successor"), ("wikidata:Q7", "Person 7")]
    assert second.covers == {"wikidata:Q2", "wikidata:Q3", "wikidata:Q7"}, "the last one is in the overlap"
    assert second.provenance.cursor is not None
    assert second.provenance.cursor.startswith(world.now.isoformat())
    third = source.fetch(second.provenance)
    assert third.covers == {"wikidata:Q2", "wikidata:Q3"}, "the overlap asks about them once more"
    world.tick(days=1)
    world.publish(server)
    assert source.fetch(replace(third.provenance, cursor=_later(third, hours=2))).rows == 0


def _later(snapshot: Snapshot, **by: float) -> str:
    modified, complete = (snapshot.provenance.cursor or "").split(" ")
    return f"{(datetime.fromisoformat(modified) + timedelta(**by)).isoformat()} {complete}"


def test_when_everything_is_asked_for_again(tmp_path: Path, server: Oxigraph, world: World) -> None:
    """After `every`, where the declaration has changed, and where the cursor cannot be read."""
    world.publish(server)
    source = connector(tmp_path, server.endpoint, **INCREMENTAL)
    last = source.fetch(None).provenance
    assert source.fetch(last).covers is not None
    modified = (last.cursor or "").split(" ")[0]
    week = (datetime.now(UTC) - timedelta(days=7)).isoformat()
    for asked_again in (
        replace(last, cursor=f"{modified} {week}"),
        replace(last, cursor="yesterday"),
        replace(last, cursor=None),
        replace(last, declaration="another"),
    ):
        assert source.fetch(asked_again).covers is None
    other = connector(tmp_path, server.endpoint, GOVERNORS + "# changed", **INCREMENTAL)
    assert other.fetch(last).covers is None


def test_a_date_of_change_in_the_future_hides_no_change(tmp_path: Path, server: Oxigraph, world: World) -> None:
    """The cursor stops at this machine's time, and one that is already beyond it comes back."""
    world.publish(server)
    source = connector(tmp_path, server.endpoint, **INCREMENTAL)
    whole = source.fetch(None).provenance
    moved = replace(whole, cursor=f"2999-01-01T00:00:00+00:00 {whole.fetched_at.isoformat()}")
    cursor = source.fetch(moved).provenance.cursor
    assert cursor is not None
    assert datetime.fromisoformat(cursor.split(" ")[0]) <= datetime.now(UTC)


def test_subjects_without_a_date_of_change_allow_no_increments(tmp_path: Path, server: Oxigraph, world: World) -> None:
    """Otherwise none of them would ever be asked about again."""
    world.publish(server)
    by_other = {**INCREMENTAL, "incremental": {"by": "http://purl.org/dc/terms/modified"}}
    with pytest.raises(SourceInvalid, match="by which `incremental` goes"):
        connector(tmp_path, server.endpoint, **by_other).fetch(None)


def test_the_lag_is_kept_with_the_fetch(tmp_path: Path, server: Oxigraph, world: World) -> None:
    """`lag` asks how fresh the endpoint is; `max_lag` refuses what is too old; silence is an error if asked."""
    world.publish(server, as_of := datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=5))
    snapshot = connector(tmp_path, server.endpoint, lag=True).fetch(None)
    assert snapshot.provenance.as_of == as_of
    plain = connector(tmp_path, server.endpoint).fetch(None).provenance
    assert plain.as_of is None
    assert plain.body_sha256 == snapshot.provenance.body_sha256, "the question about the lag is no evidence"
    with pytest.raises(SourceUnavailable, match="stale, it shows changes up to") as caught:
        connector(tmp_path, server.endpoint, lag=True, max_lag="4m").fetch(None)
    assert caught.value.retry_after == 600
    with pytest.raises(SourceInvalid, match="it has no schema:dateModified of"):
        connector(tmp_path, server.endpoint, lag="http://wikiba.se/ontology#Dump").fetch(None)


def test_an_older_server_does_not_take_facts_back(tmp_path: Path, server: Oxigraph, world: World) -> None:
    """An answer that shows less than the last accepted one is refused before its rows are asked for."""
    now = datetime.now(UTC).replace(microsecond=0)
    world.publish(server, now - timedelta(minutes=5))
    source = connector(tmp_path, server.endpoint, lag=True)
    with pytest.raises(SourceUnavailable, match=r"stale, it shows .* was accepted"):
        source.fetch(replace(SEEN, as_of=now))
    assert source.fetch(replace(SEEN, as_of=now - timedelta(minutes=5))).rows == 7


def test_data_that_change_between_parts_count_as_the_older_ones(tmp_path: Path, server: Oxigraph, world: World) -> None:
    """The time that a fetch in parts is as of is the earliest that its servers showed."""
    world.publish(server, late := datetime.now(UTC).replace(microsecond=0))
    early = f'"{late - timedelta(minutes=3):%Y-%m-%dT%H:%M:%SZ}"'.encode()

    def differing(number: int, query: str) -> bytes | None:
        if number > 1 and "dateModified" in query:
            head = b'{"head":{"vars":["modified"]},"results":{"bindings":[{"modified":{"type":"literal","value":'
            return head + early + b"}}]}}"
        return None

    with FaultServer() as between:
        url = between.on("/sparql", relay(server, wrong=differing))
        snapshot = connector(tmp_path, url, lag=True, page={"size": 3}).fetch(None)
    assert snapshot.provenance.as_of == late - timedelta(minutes=3)


def test_only_wikimedias_endpoints_are_asked_for_their_lag_by_default(tmp_path: Path) -> None:
    """Others need not know the date of Wikidata."""
    options = SparqlConnector.Options
    contact = {"user_agent": "kbsync/1.0 (mailto:ops@example.org)"}

    def dated(endpoint: str, **keys: Any) -> str | None:
        made = connector(tmp_path, endpoint, **contact, **keys)
        assert isinstance(made._options, options)
        return made._options.dated

    assert dated("https://query.wikidata.org/sparql") == "http://www.wikidata.org"
    assert dated("https://query.wikidata.org/sparql", lag=False) is None
    assert dated("https://qlever.dev/api/wikidata") is None
    assert dated("https://qlever.dev/api/wikidata", lag=True) == "http://www.wikidata.org"
    assert dated("https://mirror.example/", lag="http://mirror.example/") == "http://mirror.example/"


def test_merged_items_are_found_by_their_old_ids(tmp_path: Path, server: Oxigraph, world: World) -> None:
    """Ids of any space that stand for an item or an IRI are asked about; the new id is of the same space."""
    world.merge("Q2", "Q3")
    world.merge("Q105", "Q205")
    world.publish(server)
    source = connector(tmp_path, server.endpoint)
    assert isinstance(source, Redirecting)
    asked = ["wikidata:Q2", "wikidata:Q4", "govs:Ann", "wikidata:Q105", "people:Q105", "iri:http://example.org/a"]
    assert source.redirects(asked) == {
        "wikidata:Q2": "wikidata:Q3",
        "wikidata:Q105": "wikidata:Q205",
        "people:Q105": "people:Q205",
    }
    assert source.redirects([]) == {}


def test_other_names_come_one_a_row(tmp_path: Path, server: Oxigraph, world: World) -> None:
    """?subjectAltLabel has several rows for one statement: they are one claim, and its subject has all the names."""
    world.publish(server)
    names = 'VALUES (?subject ?subjectAltLabel) { (wd:Q1 "First") (wd:Q1 "One") (wd:Q2 UNDEF) }'
    query = f"PREFIX wd: <{WD}>\n{GOVERNORS}".replace("?rank WHERE {", f"?rank ?subjectAltLabel WHERE {{ {names}")
    snapshot = connector(tmp_path, server.endpoint, query).fetch(None)
    assert len(snapshot.claims) == 2
    assert snapshot.aliases == {"wikidata:Q1": ("First", "One")}


@pytest.mark.parametrize(
    ("keys", "loc"),
    [
        ({"chunks": {"subjects": "absent.rq"}}, ("chunks", "subjects")),
        ({"chunks": {"subjects": "../states.rq"}}, ("chunks", "subjects")),
        ({"chunks": {"subjects": "nobody.txt"}}, ("chunks", "subjects")),
        ({"chunks": {"subjects": "broken.txt"}}, ("chunks", "subjects")),
        ({"chunks": {"subjects": "ask.rq"}}, ("chunks", "subjects")),
        ({"chunks": {"subjects": "states.rq", "size": 0}}, ("chunks", "size")),
        ({"page": {"key": "?object"}}, ("page", "key")),
        ({"page": {"key": "?statement"}}, ("page", "key")),
        ({"page": {}, "chunks": {"subjects": "states.rq"}}, ()),
        ({"incremental": {}}, ()),
        ({**INCREMENTAL, "snapshot": "partial"}, ("incremental",)),
        ({**INCREMENTAL, "match": "label", "ids": None}, ("incremental",)),
    ],
    ids=str,
)
def test_a_wrong_declaration_of_parts_names_its_key(tmp_path: Path, keys: Any, loc: tuple[str, ...]) -> None:
    """Files that are not there or no subjects, sizes and keys that cannot be, and what does not go together."""
    (tmp_path / "nobody.txt").write_text("# nobody\n", encoding="utf-8")
    (tmp_path / "broken.txt").write_text("Q1\nno id\n", encoding="utf-8")
    (tmp_path / "ask.rq").write_text("ASK { ?subject ?p ?o }", encoding="utf-8")
    with pytest.raises(ValidationError) as caught:
        connector(tmp_path, "http://127.0.0.1:1/sparql", **keys)
    assert caught.value.errors()[0]["loc"] == loc


@pytest.mark.parametrize(
    "query",
    [
        GOVERNORS,
        restricted(GOVERNORS, [f"{WD}Q1", f"{WD}Q3"]),
        page(GOVERNORS, key="?subject", after=None, size=3),
        page(GOVERNORS, key="?statement", after=f"{WD}statement/Q3-Q103", size=3),
        subjects_of(STATES, MODIFIED),
        modified_subjects(STATES, MODIFIED, datetime(2020, 1, 1, tzinfo=UTC)),
        subjects_of(listed([f"{WD}Q1", f"{WD}Q2"]), MODIFIED),
        last_modified("http://www.wikidata.org"),
        redirects([f"{WD}Q105", f"{WD}Q1"]),
    ],
)
def test_every_query_is_standard_sparql(server: Oxigraph, world: World, query: str) -> None:
    """A second engine (rdflib) reads each form and gives the same rows as oxigraph: nothing rests on one of them."""
    world.merge("Q105", "Q205")
    world.publish(server)
    graph = rdflib.Graph().parse(data=world.turtle(), format="turtle")
    reply = httpx.get(server.endpoint, params={"query": query}, headers={"Accept": RESULTS})
    bindings = reply.json()["results"]["bindings"]
    ours = sorted(sorted((name, term["value"]) for name, term in row.items()) for row in bindings)
    theirs = sorted(
        sorted((str(name), _plain(term)) for name, term in row.asdict().items()) for row in graph.query(query)
    )
    assert ours == theirs
    assert ours


def _plain(term: rdflib.term.Node) -> str:
    """A term's text; rdflib writes the zone of a time as +00:00."""
    return str(term).replace("+00:00", "Z")


def test_what_is_added_to_a_query_goes_into_its_own_pattern() -> None:
    """Braces in comments, strings and IRIs are none."""
    query = 'PREFIX a: <http://e/{> # {\nSELECT ?subject # {\nWHERE { ?subject a:p "{" }'
    assert restricted(query, ["http://e/1"]).endswith('WHERE { VALUES ?subject { <http://e/1> }  ?subject a:p "{" }')
    assert page("SELECT ?subject { ?subject ?p 1 } # end", key="?subject", after='a"b', size=2).endswith(
        '# end\n} FILTER(STR(?subject) > "a\\"b") } ORDER BY STR(?subject) LIMIT 2'
    )
    assert len(spoken(query)) == len(query)
    with pytest.raises(ValueError, match="is no IRI"):
        restricted(query, ["http://e/> } DROP ALL #"])
