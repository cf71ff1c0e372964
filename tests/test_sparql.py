"""SPARQL sources: against a real server, and against one that does what public endpoints do under load."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kbsync.connectors import Connector, make_connector
from kbsync.connectors.endpoint import RESULTS, parse_answer
from kbsync.connectors.query import VARIABLES
from kbsync.errors import SourceBlocked, SourceError, SourceInvalid, SourceUnavailable
from kbsync.facts import Claim, Snapshot
from kbsync.policy import Source
from tests.conftest import shared_data
from tests.faultserver import SPARQL_JSON, FaultServer, answer, big, cut, drip, redirect
from tests.sparqlserver import Oxigraph

PREFIXES = """# Heads of government. OFFSET is a word in a comment, "LIMIT 5" too.
PREFIX p: <http://www.wikidata.org/prop/>
PREFIX pq: <http://www.wikidata.org/prop/qualifier/>
PREFIX ps: <http://www.wikidata.org/prop/statement/>
PREFIX rdfs: <http://www.w3.org/2000/01/rdf-schema#>
PREFIX wikibase: <http://wikiba.se/ontology#>
"""
EVERY_HEAD = (
    PREFIXES
    + """SELECT ?subject ?subjectLabel ?object ?objectLabel ?statement ?rank ?start ?end WHERE {
  ?subject p:P6 ?statement . ?statement ps:P6 ?object ; wikibase:rank ?rank .
  OPTIONAL { ?statement pq:P580 ?start } OPTIONAL { ?statement pq:P582 ?end }
  OPTIONAL { ?subject rdfs:label ?se FILTER(LANG(?se) = "en") }
  OPTIONAL { ?subject rdfs:label ?sm FILTER(LANG(?sm) = "mul") }
  OPTIONAL { ?object rdfs:label ?oe FILTER(LANG(?oe) = "en") }
  OPTIONAL { ?object rdfs:label ?om FILTER(LANG(?om) = "mul") }
  BIND(COALESCE(?se, ?sm) AS ?subjectLabel) BIND(COALESCE(?oe, ?om) AS ?objectLabel)
}"""
)
PLAIN = (
    "SELECT ?subject ?subjectLabel ?object ?objectLabel { ?subject ?subjectLabel ?object . BIND(1 AS ?objectLabel) }"
)
Q42, Q5 = ("http://www.wikidata.org/entity/Q42", "http://www.wikidata.org/entity/Q5")


@pytest.fixture(scope="module")
def faults() -> Iterator[FaultServer]:
    with FaultServer() as running:
        yield running


@pytest.fixture(scope="module")
def leaders() -> Iterator[Oxigraph]:
    with Oxigraph() as running:
        running.load((Path(__file__).parent / "data" / "leaders.ttl").read_bytes())
        yield running


def connector(folder: Path, endpoint: str, query: str = PLAIN, **keys: Any) -> Connector:
    (folder / "heads.rq").write_text(query, encoding="utf-8")
    declared = {
        "source": "heads",
        "type": "sparql",
        "relation": "head_of_government",
        "ids": "wikidata",
        "endpoint": endpoint,
        "query": "heads.rq",
        **keys,
    }
    return make_connector(Source.model_validate(declared), folder=folder)


def results(*rows: dict[str, Any], names: tuple[str, ...] = VARIABLES) -> bytes:
    """A whole SPARQL JSON answer; values that look like IRIs are IRIs, `_:x` is a blank node."""

    def term(value: str) -> dict[str, str]:
        kind = "uri" if value.startswith("http") else "bnode" if value.startswith("_:") else "literal"
        return {"type": kind, "value": value}

    bindings = [{name: term(value) for name, value in row.items()} for row in rows]
    return json.dumps({"head": {"vars": list(names)}, "results": {"bindings": bindings}}).encode()


GOOD = {"subject": Q42, "subjectLabel": "Douglas Adams", "object": Q5, "objectLabel": "human"}


def read(folder: Path, faults: FaultServer, body: bytes, **keys: Any) -> Snapshot:
    return connector(folder, faults.on("/sparql", answer(body, kind=RESULTS)), **keys).fetch(None)


def by_origin(snapshot: Snapshot) -> dict[str, Claim]:
    return {claim.origin: claim for claim in snapshot.claims}


def test_a_real_server_gives_claims(tmp_path: Path, leaders: Oxigraph) -> None:
    """Ids are Q-ids, the origin is the statement, rank and dates are kept."""
    snapshot = connector(tmp_path, leaders.endpoint, EVERY_HEAD).fetch(None)
    claims = by_origin(snapshot)
    former, present = claims["wds:Q99-former"], claims["wds:Q99-present"]
    assert (former.subject.id, former.subject.label) == ("wikidata:Q99", "California")
    assert (former.object.id, former.object.label) == ("wikidata:Q990000001", "Carla Past")
    assert (former.rank, former.start, former.end) == ("normal", "2011-01-03T00:00:00Z", "2019-01-07T00:00:00Z")
    assert (present.rank, present.end) == ("preferred", None)
    assert claims["wds:Q1439-false"].rank == "deprecated"
    assert claims["wds:Q797-present"].object.label == "Alex Multilingual"
    assert snapshot.complete
    assert snapshot.provenance.location == leaders.endpoint
    assert len(snapshot.provenance.body_sha256) == 64


def test_unknown_values_are_no_facts(tmp_path: Path, leaders: Oxigraph) -> None:
    """An unknown person waits, an unknown start is none, an unknown end is an end."""
    snapshot = connector(tmp_path, leaders.endpoint, EVERY_HEAD).fetch(None)
    claims = by_origin(snapshot)
    assert (claims["wds:Q1384-present"].start, claims["wds:Q829-ended"].end) == (None, "unknown")
    waiting = {bad.origin: (bad.subject_id, bad.reason) for bad in snapshot.quarantined}
    assert waiting == {
        "wds:Q1397-unknown": ("wikidata:Q1397", "the object is an unknown value"),
        "wds:Q812-present": ("wikidata:Q812", "the label of the object is empty"),
    }
    assert not any("genid" in claim.object.id for claim in snapshot.claims)


def test_a_long_query_goes_by_post(tmp_path: Path, leaders: Oxigraph, faults: FaultServer) -> None:
    """A URL has its limits; a POST reads the same."""
    long = EVERY_HEAD + "\n#" + "x" * 2_000
    short = connector(tmp_path, leaders.endpoint, EVERY_HEAD).fetch(None)
    assert connector(tmp_path, leaders.endpoint, long).fetch(None).claims == short.claims
    read(tmp_path, faults, results(GOOD))
    assert faults.requests[-1].method == "GET"
    assert parse_qs(urlsplit(faults.requests[-1].path).query) == {"query": [PLAIN]}
    connector(tmp_path, faults.url("/sparql"), long).fetch(None)
    assert faults.requests[-1].method == "POST"
    assert parse_qs(faults.requests[-1].body.decode()) == {"query": [long]}


def test_the_server_is_told_who_asks_and_for_what(tmp_path: Path, faults: FaultServer) -> None:
    """The user agent is the declared one, and only SPARQL JSON is asked for."""
    agent = "kbsync/1.0 (mailto:ops@example.org)"
    read(tmp_path, faults, results(GOOD), user_agent=agent)
    assert faults.requests[-1].headers["user-agent"] == agent
    assert faults.requests[-1].headers["accept"] == SPARQL_JSON


def test_a_real_server_that_runs_out_of_time_gives_no_snapshot(tmp_path: Path) -> None:
    """oxigraph breaks off its answer in the middle under status 200; that is no answer."""
    endless = (
        "SELECT ?subject ?subjectLabel ?object ?objectLabel { ?subject ?subjectLabel ?object . ?a ?b ?objectLabel . "
    )
    endless += (
        "?c ?d ?e . ?f ?g ?h . ?i ?j ?k FILTER(?subject = ?c && ?a != ?c && ?e = ?h && ?k = ?objectLabel && ?k = ?d) }"
    )
    with Oxigraph(timeout_s=1) as server:
        server.load((Path(__file__).parent / "data" / "leaders.ttl").read_bytes())
        with pytest.raises(SourceInvalid, match=r"the answer is not whole: it ends with .*cancelled"):
            connector(tmp_path, server.endpoint, endless).fetch(None)


def test_a_server_that_restarts_is_read_again(tmp_path: Path) -> None:
    """While it is away the source is unavailable; afterwards the next run works."""
    data = (Path(__file__).parent / "data" / "leaders.ttl").read_bytes()
    with Oxigraph() as server:
        server.load(data)
        source = connector(tmp_path, server.endpoint, EVERY_HEAD)
        before = source.fetch(None).claims
        server.stop()
        with pytest.raises(SourceUnavailable, match="cannot be reached"):
            source.fetch(None)
        server.start()
        server.load(data)
        assert sorted(source.fetch(None).claims, key=lambda claim: claim.origin) == sorted(
            before, key=lambda c: c.origin
        )


def test_a_syntax_error_is_reported_in_the_servers_words(tmp_path: Path, leaders: Oxigraph) -> None:
    """The server says where; the message stays one line."""
    with pytest.raises(SourceInvalid, match="status 400 Bad Request: error at") as caught:
        connector(tmp_path, leaders.endpoint, PLAIN + "}").fetch(None)
    assert "\n" not in caught.value.message


WHOLE = results(GOOD)


@pytest.mark.parametrize(
    ("behaviour", "error", "problem"),
    [
        (answer(WHOLE[:-20], kind=RESULTS), SourceInvalid, "not whole"),
        (answer(WHOLE + b"java.util.concurrent.TimeoutException", kind=RESULTS), SourceInvalid, "ran out of time"),
        (answer(WHOLE + b" trailing", kind=RESULTS), SourceInvalid, "not whole"),
        (answer(b"SPARQL-QUERY: queryStr=SELECT", kind=RESULTS), SourceInvalid, "ran out of time"),
        (answer(results({**GOOD, "objectLabel": "SPARQL-QUERY: x"}), kind=RESULTS), SourceInvalid, "ran out of time"),
        (answer(results(GOOD, names=VARIABLES[:3]), kind=RESULTS), SourceInvalid, r"lacks \?objectLabel"),
        (answer(b'{"head": {}, "boolean": true}', kind=RESULTS), SourceInvalid, "no head.vars"),
        (answer(b"[" * 100_000, kind=RESULTS), SourceInvalid, "not whole"),
        (answer(b"\xff\xfe", kind=RESULTS), SourceInvalid, "not whole"),
        (answer(b"", kind=RESULTS), SourceInvalid, "not whole"),
        (answer(WHOLE, kind="application/json"), SourceInvalid, "says that it is application/json"),
        (answer(b"<html>Sorry</html>", kind="text/html"), SourceInvalid, "says that it is text/html"),
        (answer(gzip.compress(WHOLE), kind=RESULTS), SourceInvalid, "not whole"),
        (cut(WHOLE, promised=len(WHOLE) + 1, kind=RESULTS), SourceInvalid, "cut"),
        (big(3_000_000, kind=RESULTS), SourceInvalid, "larger than"),
        (drip(0.05, kind=RESULTS), SourceUnavailable, "no whole answer"),
        (redirect("http://localhost:1/sparql"), SourceInvalid, "redirects to"),
        (answer(status=403), SourceBlocked, "status 403"),
        (answer(status=429, headers={"Retry-After": "0"}), SourceUnavailable, "status 429"),
        (answer(b"java.lang.RuntimeException", status=500, kind="text/plain"), SourceUnavailable, "status 500"),
        (answer(status=502), SourceUnavailable, "status 502"),
    ],
)
def test_an_answer_that_is_not_whole_fails_the_run(
    tmp_path: Path, faults: FaultServer, behaviour: Any, error: type[SourceError], problem: str
) -> None:
    """Each way in which public endpoints break has its error; none gives a snapshot."""
    source = connector(tmp_path, faults.on("/sparql", behaviour), deadline=0.4, max_bytes="1MB")
    with pytest.raises(SourceError, match=problem) as caught:
        source.fetch(None)
    assert type(caught.value) is error
    assert "\n" not in caught.value.message


@given(st.integers(0, len(WHOLE) - 1))
def test_no_part_of_an_answer_is_an_answer(length: int) -> None:
    """Wherever an answer is cut, it is refused."""
    with pytest.raises(ValueError, match="not whole"):
        parse_answer(WHOLE[:length], VARIABLES)


NO_ROWS = st.none() | st.integers() | st.text() | st.dictionaries(st.text(max_size=3), st.integers(), min_size=1)


@given(NO_ROWS)
def test_other_json_is_refused(value: object) -> None:
    """Answers that are no answers, rows that are no rows, terms that are no terms: a ValueError and nothing else."""
    head = {"head": {"vars": list(VARIABLES)}}
    for results_value in (value, {"bindings": value}, {"bindings": [value]}, {"bindings": [{"subject": value}]}):
        with pytest.raises(ValueError, match="the answer"):
            parse_answer(json.dumps({**head, "results": results_value}).encode(), VARIABLES)
    with pytest.raises(ValueError, match="the answer"):
        parse_answer(json.dumps(value).encode(), VARIABLES)


def test_the_empty_answer_is_an_empty_snapshot(tmp_path: Path, faults: FaultServer) -> None:
    """That the source has become empty is for the guard to judge."""
    snapshot = read(tmp_path, faults, results())
    assert (snapshot.rows, snapshot.complete) == (0, True)


@pytest.mark.parametrize(
    ("changes", "reason", "subject_id"),
    [
        ({"object": "_:b0"}, "the object is an unknown value", "wikidata:Q42"),
        ({"object": "http://www.wikidata.org/.well-known/genid/1"}, "the object is an unknown value", "wikidata:Q42"),
        ({"subject": "_:b0"}, "the subject is an unknown value", "wikidata:_:b0"),
        ({"subject": "Douglas"}, "the subject is no IRI", "wikidata:Douglas"),
        ({"objectLabel": "Q5"}, "the label of the object is empty", "wikidata:Q42"),
        ({"objectLabel": "  "}, "the label of the object is empty", "wikidata:Q42"),
        ({"objectLabel": "{object}"}, "braces", "wikidata:Q42"),
        ({"object": Q42}, "the object is the subject itself", "wikidata:Q42"),
        ({"rank": "http://wikiba.se/ontology#BestRank"}, "BestRank", "wikidata:Q42"),
    ],
)
def test_a_row_that_is_no_fact_waits(
    tmp_path: Path, faults: FaultServer, changes: dict[str, str], reason: str, subject_id: str
) -> None:
    """Its reason is kept, and its subject counts as present."""
    snapshot = read(tmp_path, faults, results({**GOOD, **changes}))
    (bad,) = snapshot.quarantined
    assert (bad.subject_id, bad.origin) == (subject_id, changes.get("subject", "wd:Q42"))
    assert reason in bad.reason
    assert "subjectLabel=Douglas Adams" in bad.raw
    assert snapshot.complete


def test_other_iris_and_literals_have_ids_of_their_own(tmp_path: Path, faults: FaultServer) -> None:
    """An IRI is its own id; a literal is identified by its text."""
    rows = [
        {**GOOD, "object": "http://dbpedia.org/resource/Human"},
        {**GOOD, "object": "42", "subject": "http://dbpedia.org/resource/D"},
    ]
    snapshot = read(tmp_path, faults, results(*rows), ids="things")
    assert [(claim.subject.id, claim.object.id) for claim in snapshot.claims] == [
        ("things:Q42", "iri:http://dbpedia.org/resource/Human"),
        ("things:http://dbpedia.org/resource/D", "heads:human"),
    ]


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("ASK { ?s ?p ?o }", "not a SELECT query"),
        ("DROP ALL", "not a SELECT query"),
        ("", "not a SELECT query"),
        ("# SELECT\nCONSTRUCT { ?s ?p ?o } WHERE { ?s ?p ?o }", "not a SELECT query"),
        ("SELECT ?subject ?object { ?subject ?p ?object }", r"does not give \?subjectLabel, \?objectLabel"),
        (PLAIN + " OFFSET 100", "OFFSET"),
        (PLAIN + " limit 10 offset 100", "OFFSET"),
    ],
)
def test_a_query_that_cannot_work_is_refused_when_declared(tmp_path: Path, query: str, problem: str) -> None:
    """Only SELECT with the four variables, all rows at once."""
    with pytest.raises(ValidationError, match=problem) as caught:
        connector(tmp_path, "http://127.0.0.1/", query)
    assert caught.value.errors()[0]["loc"] == ("query",)


@pytest.mark.parametrize(
    ("keys", "loc"),
    [
        ({"query": "absent.rq"}, "query"),
        ({"query": "../heads.rq"}, "query"),
        ({"endpoint": "https://query.wikidata.org/sparql"}, "endpoint"),
        ({"endpoint": "https://query.wikidata.org/sparql", "user_agent": "kbsync/1.0"}, "endpoint"),
        ({"endpoint": "https://example.org/sparql?default-graph-uri=x"}, "endpoint"),
        ({"endpoint": "http://example.org/sparql"}, "endpoint"),
        ({"endpoints": "https://example.org/sparql"}, "endpoints"),
    ],
)
def test_a_wrong_declaration_names_its_key(tmp_path: Path, keys: dict[str, Any], loc: str) -> None:
    """Wikimedia without a contact, plain http, files elsewhere and unknown keys are refused before anything is sent."""
    with pytest.raises(ValidationError) as caught:
        connector(tmp_path, **{"endpoint": "https://example.org/sparql", **keys})
    assert caught.value.errors()[0]["loc"] == (loc,)


def test_a_doubtful_query_is_warned_of(tmp_path: Path) -> None:
    """The label service, and a LIMIT on what is declared complete; not words in comments and strings."""
    service = PLAIN.replace("BIND", "SERVICE wikibase:label { } BIND")
    (warning,) = connector(tmp_path, "http://127.0.0.1/", service).warnings
    assert "label" in warning
    (warning,) = connector(tmp_path, "http://127.0.0.1/", PLAIN + " LIMIT 10 # ten").warnings
    assert "LIMIT" in warning
    assert not connector(tmp_path, "http://127.0.0.1/", PLAIN + " LIMIT 10", snapshot="partial").warnings
    assert not connector(tmp_path, "http://127.0.0.1/", EVERY_HEAD).warnings


def test_real_wikidata_items_are_read(tmp_path: Path) -> None:
    """115 statements of heads of government of real countries: dated, ranked, and labelled or waiting."""
    triples = gzip.decompress(shared_data("wikidata/entities.nt.gz").read_bytes())
    with Oxigraph() as server:
        server.load(triples, kind="application/n-triples")
        snapshot = connector(tmp_path, server.endpoint, EVERY_HEAD).fetch(None)
    assert snapshot.rows == 115
    assert all(bad.reason == "the label of the object is empty" and bad.subject_id for bad in snapshot.quarantined)
    assert all(
        claim.subject.id.startswith("wikidata:Q") and claim.origin.startswith("wds:") for claim in snapshot.claims
    )
    assert snapshot.complete


def test_real_answers_of_the_query_service_are_whole() -> None:
    """Every recorded answer is read to its last row, and none of them cut in half."""
    for file in sorted(shared_data("wikidata/sparql-results").rglob("*.json")):
        body = file.read_bytes()
        assert len(parse_answer(body, needed=())) == len(json.loads(body)["results"]["bindings"])
        with pytest.raises(ValueError, match="not whole"):
            parse_answer(body[: len(body) // 2], needed=())


@pytest.mark.parametrize("value", ["x\x1b]0;y", "http://e/a b", "http://e/<1>", ""])
def test_a_uri_that_is_no_iri_is_refused(value: str) -> None:
    """It would go into queries and onto terminals; the answer as a whole is not trusted."""
    answer = {"head": {"vars": ["subject"]}, "results": {"bindings": [{"subject": {"type": "uri", "value": value}}]}}
    with pytest.raises(ValueError, match="the answer has a uri that is no IRI"):
        parse_answer(json.dumps(answer).encode(), ["subject"])
