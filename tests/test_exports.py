"""Facts for other programs: spreadsheets, Parquet, RDF; read back by the programs that they are for."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rdflib import RDF, RDFS, BNode, Graph, Literal, URIRef

from kbsync.errors import UsageError
from kbsync.exports import COLUMNS, Namer, flat, write_csv, write_json, write_ntriples, write_parquet
from kbsync.facts import Entity, Fact, Provenance
from kbsync.ledger import FactRow

NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)


def row(label: str = "Vega", id_: str = "hip:91262", **changes: object) -> FactRow:
    """A fact of a star with this label."""
    fact = Fact("constellation", Entity(id_, label), Entity("label:Lyra", "Lyra"), "feed", "line 2", rule="first")
    provenance = Provenance("https://example.org/stars.csv", NOON, 200, "ab" * 32)
    return replace(FactRow(fact, NOON, None, 1, None, provenance, 7, "1900", None), **changes)


def as_csv(*rows: FactRow) -> list[dict[str, str]]:
    out = io.StringIO(newline="")
    write_csv(COLUMNS, map(flat, rows), out)
    return list(csv.DictReader(io.StringIO(out.getvalue(), newline="")))


@pytest.mark.parametrize("label", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx", "\n=1", "＝1", "＋1", "－1", "＠x"])
def test_what_a_spreadsheet_would_run_is_text(label: str) -> None:
    """A cell that begins like a formula gets a quote in front; others stay as they are."""
    [found] = as_csv(row(label))
    assert found["subject"] == f"'{label}"
    assert found["object"] == "Lyra"
    assert found["since"] == "2026-07-01T12:00:00+00:00"


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"])), max_size=4))
def test_every_format_gives_back_what_was_put_in(labels: list[str]) -> None:
    """CSV, JSON and N-Triples keep any label, whatever quotes and newlines it has."""
    rows = [row(label, f"hip:{place}") for place, label in enumerate(labels)]
    assert [one["subject"].removeprefix("'") for one in as_csv(*rows)] == [label.removeprefix("'") for label in labels]
    out = io.StringIO()
    write_json(map(flat, rows), out)
    assert [one["subject"] for one in json.loads(out.getvalue())] == labels
    assert {(f"urn:kbsync:hip:{place}", label) for place, label in enumerate(labels)} <= names(rows)


def names(rows: list[FactRow], namer: Namer = Namer()) -> set[tuple[str, str]]:
    """The labels that rdflib finds in the N-Triples of these facts."""
    graph = Graph().parse(data=ntriples(rows, namer), format="nt")
    return {(str(thing), str(label)) for thing, label in graph.subject_objects(RDFS.label)}


def ntriples(rows: list[FactRow], namer: Namer) -> str:
    """The facts as N-Triples."""
    out = io.StringIO()
    write_ntriples(rows, out, namer)
    return out.getvalue()


def asked(query: str, rows: list[FactRow], namer: Namer, folder: Path) -> list[dict[str, str]]:
    """What oxigraph answers of the facts: variable -> value, per solution."""
    (folder / "facts.nt").write_text(ntriples(rows, namer), encoding="utf-8")
    store = ["--location", str(folder / "store")]
    program = str(Path(sys.executable).with_name("oxigraph"))
    subprocess.run([program, "load", *store, "--file", str(folder / "facts.nt")], check=True, capture_output=True)
    form = ["--query", query, "--results-format", "json"]
    done = subprocess.run([program, "query", *store, *form], check=True, capture_output=True)
    return [
        {name: one["value"] for name, one in found.items()} for found in json.loads(done.stdout)["results"]["bindings"]
    ]


def test_sparql_finds_facts_and_where_they_come_from(tmp_path: Path) -> None:
    """Wikidata's own IRIs, configured ones, and `urn:kbsync:` for the rest; provenance as a reified statement."""
    ohio = Fact("governor", Entity("wikidata:Q1397", "Ohio"), Entity("wikidata:Q1175805", "DeWine"), "wd", "wds:1")
    local = replace(row(), fact=ohio, provenance=Provenance("/srv/a file.csv", NOON, 200, "ab" * 32), id=8)
    rows, namer = [row('Vega "α"\n\\', "hip:9 1/2"), local], Namer({"hip": "https://example.org/hip/"})
    query = """
        PREFIX prov: <http://www.w3.org/ns/prov#> PREFIX rdf: <http://www.w3.org/1999/02/22-rdf-syntax-ns#>
        SELECT ?s ?p ?o ?from ?at { ?s ?p ?o . ?statement rdf:subject ?s ; rdf:predicate ?p ; rdf:object ?o ;
                                    prov:wasDerivedFrom ?from ; prov:generatedAtTime ?at } ORDER BY ?s"""
    found = [tuple(one.values()) for one in asked(query, rows, namer, tmp_path)]
    assert found == [
        (
            "http://www.wikidata.org/entity/Q1397",
            "urn:kbsync:relation:governor",
            "http://www.wikidata.org/entity/Q1175805",
            "urn:kbsync:source:wd",
            "2026-07-01T12:00:00Z",
        ),
        (
            "https://example.org/hip/9%201%2F2",
            "urn:kbsync:relation:constellation",
            "urn:kbsync:label:Lyra",
            "https://example.org/stars.csv",
            "2026-07-01T12:00:00Z",
        ),
    ]
    assert ("https://example.org/hip/9%201%2F2", 'Vega "α"\n\\') in names(rows, namer)


def test_parquet_has_typed_times(tmp_path: Path) -> None:
    """Times are UTC timestamps, `run` is a number, an empty ledger is an empty table."""
    write_parquet(COLUMNS, map(flat, [row(), row("Deneb", "hip:1", until=NOON)]), tmp_path / "facts.parquet")
    table = pq.read_table(tmp_path / "facts.parquet")
    assert table.column_names == list(COLUMNS)
    assert str(table.schema.field("since").type) == "timestamp[us, tz=UTC]"
    assert str(table.schema.field("run").type) == "int64"
    assert table.to_pylist()[1] == flat(row("Deneb", "hip:1", until=NOON))
    write_parquet(COLUMNS, [], tmp_path / "none.parquet")
    assert pq.read_table(tmp_path / "none.parquet").num_rows == 0


def test_without_pyarrow_a_hint_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named, and no file appears."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError) as caught:
        write_parquet(COLUMNS, [], tmp_path / "facts.parquet")
    assert "kbsync[parquet]" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_an_iri_stays_what_it_is_and_a_statement_has_none() -> None:
    """What RDF names already is not named anew; facts of two ledgers with one number are not one statement."""
    out = io.StringIO()
    write_ntriples([row(id_="iri:http://example.org/a#b?c=%20d")], out, Namer())
    graph = Graph().parse(data=out.getvalue(), format="nt")
    assert (URIRef("http://example.org/a#b?c=%20d"), RDFS.label, Literal("Vega")) in graph
    [statement] = graph.subjects(RDF.type, RDF.Statement)
    assert isinstance(statement, BNode)
    assert Namer().entity("iri:not an <iri>") == "urn:kbsync:iri:not%20an%20%3Ciri%3E"


@pytest.mark.parametrize("prefix", ["", "example.org", "https://example.org/<x>", "https://a b/"])
def test_a_prefix_that_is_no_iri_is_refused(prefix: str) -> None:
    """It would make N-Triples that nothing can read."""
    with pytest.raises(UsageError, match="--iri hip"):
        Namer({"hip": prefix})
