"""Real Wikidata: its items in a real SPARQL server, its query service's recorded answers, its redirects."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import rdflib
from rdflib.namespace import OWL, RDFS

from kbsync.connectors import make_connector
from kbsync.connectors.endpoint import parse_answer
from kbsync.connectors.sparql import SparqlConnector
from kbsync.facts import Snapshot
from kbsync.policy import Policy, Source
from kbsync.resolve import resolve
from tests.conftest import shared_data
from tests.sparqlserver import Oxigraph

WD = "http://www.wikidata.org/entity/"
SHIPPED = (Path(__file__).parents[1] / "sources" / "us-governors.rq").read_text(encoding="utf-8")
EVERY = SHIPPED.replace("wdt:P31 wd:Q35657 ;\n           ", "").replace("FILTER(", "# FILTER(", 2)
"""The shipped query, about everything that has a statement, ended and future ones included."""

PROPERTIES = ["P6", "P35", "P1082", "P463"]


@pytest.fixture(scope="module")
def triples() -> bytes:
    return gzip.decompress(shared_data("wikidata/entities.nt.gz").read_bytes())


@pytest.fixture(scope="module")
def wikidata(triples: bytes) -> Iterator[Oxigraph]:
    """A real server that holds 99 real items."""
    with Oxigraph() as server:
        server.load(triples, kind="application/n-triples")
        yield server


def connector(folder: Path, server: Oxigraph, query: str, **keys: Any) -> SparqlConnector:
    (folder / "real.rq").write_text(query, encoding="utf-8")
    declared = {"source": "real", "type": "sparql", "relation": "real", "ids": "wikidata", "endpoint": server.endpoint}
    source = Source.model_validate({**declared, "query": "real.rq", **keys})
    made = make_connector(source, folder=folder)
    assert isinstance(made, SparqlConnector)
    return made


@dataclass
class Statement:
    """One statement as the triples have it."""

    subject: str = ""
    object: str = ""
    rank: str = ""
    starts: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)


def statements(triples: bytes, name: str) -> list[Statement]:
    """The statements of a property, read line by line: no SPARQL, no library."""
    found: dict[str, Statement] = defaultdict(Statement)
    for line in triples.decode().splitlines():
        subject, predicate, value = line.rstrip(" .").split(" ", 2)
        subject, predicate = subject.strip("<>"), predicate.strip("<>")
        value = value.strip("<>") if value.startswith("<") else value.split('"')[1]
        if predicate == f"http://www.wikidata.org/prop/{name}":
            found[value].subject = subject
        elif predicate == f"http://www.wikidata.org/prop/statement/{name}":
            found[subject].object = value
        elif predicate == "http://wikiba.se/ontology#rank":
            found[subject].rank = value.rpartition("#")[2]
        elif predicate == "http://www.wikidata.org/prop/qualifier/P580":
            found[subject].starts.append(value)
        elif predicate == "http://www.wikidata.org/prop/qualifier/P582":
            found[subject].ends.append(value)
    return [one for one in found.values() if one.subject and one.object]


def by_rule(all_of_them: list[Statement]) -> dict[str, set[str]]:
    """Which objects are current, by the rule of Help:Ranking and of kbsync, written down once more: the best rank but
    deprecated, of these without an end if any, of these the latest start."""
    current = {}
    for subject, group in groupby(sorted(all_of_them, key=lambda one: one.subject), key=lambda one: one.subject):
        kept = [one for one in group if one.rank != "DeprecatedRank"]
        kept = [one for one in kept if one.rank == "PreferredRank"] or kept
        kept = [one for one in kept if not one.ends] or kept
        latest = max((start for one in kept for start in one.starts), default="")
        kept = [one for one in kept if max(one.starts, default="") == latest]
        if kept:
            current[subject.removeprefix(WD)] = {one.object.removeprefix(WD) for one in kept}
    return current


def current(snapshot: Snapshot) -> dict[str, set[str]]:
    """What the resolver makes of the claims: the object of each fact, both sides of each conflict."""
    declared = {"policy": "real", "sources": ["real"], "schedule": {"every": "1h"}}
    policy = Policy.model_validate({**declared, "relations": {"real": {"prompt": "{subject} is"}}})
    resolution = resolve(snapshot.claims, {}, policy)
    found = {key.subject: {fact.object.id} for key, fact in resolution.facts.items()}
    for conflict in resolution.conflicts:
        assert conflict.kind != "prompt"
        found[conflict.key.subject] = {claim.object.id for claim in conflict.claims}
    return {
        subject.removeprefix("wikidata:"): {id_.rpartition(":")[2] for id_ in ids} for subject, ids in found.items()
    }


def with_ids_as_labels(query: str) -> str:
    """Few of the referenced items have labels in the sample; the id as the label lets every statement count."""
    query = query.replace("?subjectMul) AS ?subjectLabel", '?subjectMul, CONCAT("s ", STR(?subject))) AS ?subjectLabel')
    return query.replace("?objectMul) AS ?objectLabel", '?objectMul, CONCAT("o ", STR(?object))) AS ?objectLabel')


@pytest.mark.parametrize("name", ["P6", "P35", "P26", "P39", "P36", "P38", "P138", "P69"])
def test_the_current_statement_is_the_one_that_an_independent_rule_finds(
    tmp_path: Path, wikidata: Oxigraph, triples: bytes, name: str
) -> None:
    """Heads of government and of state, spouses, positions, capitals, schools: rank, then no end, then latest start."""
    query = with_ids_as_labels(EVERY.replace("p:P6", f"p:{name}").replace("ps:P6", f"ps:{name}"))
    snapshot = connector(tmp_path, wikidata, query).fetch(None)
    # A value that nobody knows is no claim.
    told = [one for one in statements(triples, name) if one.object.startswith(WD) and "genid" not in one.object]
    expected = by_rule(told)
    assert current(snapshot) == expected
    assert len(expected) >= 3


@pytest.mark.parametrize(("name", "least"), [("P6", 114), ("P530", 768), ("P463", 479)])
@pytest.mark.parametrize("keys", [{"page": {"size": 250}}, {"chunks": {"subjects": "all.rq", "size": 10}}], ids=str)
def test_real_items_in_parts_are_the_whole_answer(
    tmp_path: Path, wikidata: Oxigraph, name: str, least: int, keys: dict[str, Any]
) -> None:
    """115 heads of government, 768 diplomatic relations, 479 memberships: pages and chunks lose and double nothing."""
    query = with_ids_as_labels(EVERY.replace("p:P6", f"p:{name}").replace("ps:P6", f"ps:{name}"))
    (tmp_path / "all.rq").write_text(
        f"PREFIX p: <http://www.wikidata.org/prop/> SELECT DISTINCT ?subject {{ ?subject p:{name} ?statement }}"
    )
    whole = connector(tmp_path, wikidata, query).fetch(None)
    parts = connector(tmp_path, wikidata, query, **keys).fetch(None)
    assert len({claim.origin for claim in whole.claims}) + len(whole.quarantined) >= least
    # Two statements that say the same are one claim, with the place of whichever came first.
    assert {replace(claim, origin="") for claim in parts.claims} == {
        replace(claim, origin="") for claim in whole.claims
    }
    assert len(parts.claims) == len(whole.claims)
    assert sorted(parts.quarantined, key=repr) == sorted(whole.quarantined, key=repr)


def test_every_recorded_answer_is_read_whole() -> None:
    """56 answers of the Wikidata Query Service: rows, variables and values are those of a plain JSON reader."""
    files = sorted(shared_data("wikidata/sparql-results").rglob("*.json"))
    assert len(files) == 56
    rows = 0
    for file in files:
        body = file.read_bytes()
        document = json.loads(body)
        read = parse_answer(body, document["head"]["vars"])
        assert [{name: (term.kind, term.value) for name, term in row.items()} for row in read] == [
            {name: (term["type"].replace("typed-", ""), term["value"]) for name, term in row.items()}
            for row in document["results"]["bindings"]
        ]
        rows += len(read)
    assert rows == sum(len(json.loads(file.read_bytes())["results"]["bindings"]) for file in files) > 1000


def test_the_real_redirects_of_an_item_are_found(tmp_path: Path) -> None:
    """Q42 was merged from four items, as Special:EntityData says: each leads to it, and its own id to nothing."""
    turtle = shared_data("wikidata/entitydata/Q42.ttl").read_bytes()
    graph = rdflib.Graph().parse(data=turtle, format="turtle")
    old = {
        str(subject).removeprefix(WD): str(new).removeprefix(WD) for subject, new in graph.subject_objects(OWL.sameAs)
    }
    assert set(old.values()) == {"Q42"}
    with Oxigraph() as server:
        server.load(turtle)
        source = connector(tmp_path, server, SHIPPED)
        found = source.redirects([f"wikidata:{id_}" for id_ in [*old, "Q42", "Q5"]])
    assert found == {f"wikidata:{id_}": "wikidata:Q42" for id_ in old}
    assert len(found) == 4


def test_a_real_item_has_its_names(tmp_path: Path) -> None:
    """Label and other names of Q42, which are in the language `mul` by now, as they are in the RDF."""
    turtle = shared_data("wikidata/entitydata/Q42.ttl").read_bytes()
    query = """PREFIX p: <http://www.wikidata.org/prop/>
PREFIX ps: <http://www.wikidata.org/prop/statement/>
PREFIX rdfs: <http://www.w3.org/2000/01/rdf-schema#>
PREFIX skos: <http://www.w3.org/2004/02/skos/core#>
SELECT ?subject ?subjectLabel ?subjectAltLabel ?object ?objectLabel ?statement WHERE {
  ?subject p:P31 ?statement . ?statement ps:P31 ?object .
  ?subject rdfs:label ?subjectLabel FILTER(LANG(?subjectLabel) = "mul")
  BIND("human" AS ?objectLabel)
  OPTIONAL { ?subject skos:altLabel ?subjectAltLabel FILTER(LANG(?subjectAltLabel) IN ("en", "mul")) }
}"""
    with Oxigraph() as server:
        server.load(turtle)
        snapshot = connector(tmp_path, server, query).fetch(None)
    graph = rdflib.Graph().parse(data=turtle, format="turtle")
    item = rdflib.URIRef(WD + "Q42")
    names = {
        str(name)
        for name in graph.objects(item, rdflib.URIRef("http://www.w3.org/2004/02/skos/core#altLabel"))
        if isinstance(name, rdflib.Literal) and name.language in ("en", "mul")
    }
    assert [row.reason for row in snapshot.quarantined] == []
    [claim] = [one for one in snapshot.claims if one.subject.id == "wikidata:Q42"]
    assert claim.object.id == "wikidata:Q5"
    labels = [str(name) for name in graph.objects(item, RDFS.label) if getattr(name, "language", "") == "mul"]
    assert [claim.subject.label] == labels
    assert set(snapshot.aliases["wikidata:Q42"]) == names
    assert "Douglas Noel Adams" in names
