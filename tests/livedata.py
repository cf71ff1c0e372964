"""A small Wikidata in a real SPARQL server, that tests edit as people edit the real one.

world = World()
world.set("Q1", "Texas", "Q101", "Ann")
world.publish(server)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from tests.sparqlserver import Oxigraph

__all__ = ["GOVERNORS", "STATES", "World"]

PREFIXES = """@prefix owl: <http://www.w3.org/2002/07/owl#> .
@prefix p: <http://www.wikidata.org/prop/> .
@prefix ps: <http://www.wikidata.org/prop/statement/> .
@prefix rdfs: <http://www.w3.org/2000/01/rdf-schema#> .
@prefix schema: <http://schema.org/> .
@prefix wd: <http://www.wikidata.org/entity/> .
@prefix wds: <http://www.wikidata.org/entity/statement/> .
@prefix wdt: <http://www.wikidata.org/prop/direct/> .
@prefix wikibase: <http://wikiba.se/ontology#> .
@prefix xsd: <http://www.w3.org/2001/XMLSchema#> .
"""
GOVERNORS = """PREFIX p: <http://www.wikidata.org/prop/>
PREFIX ps: <http://www.wikidata.org/prop/statement/>
PREFIX rdfs: <http://www.w3.org/2000/01/rdf-schema#>
PREFIX wikibase: <http://wikiba.se/ontology#>
SELECT ?subject ?subjectLabel ?object ?objectLabel ?statement ?rank WHERE {
  ?subject p:P6 ?statement . ?statement ps:P6 ?object ; wikibase:rank ?rank .
  ?subject rdfs:label ?subjectLabel . ?object rdfs:label ?objectLabel .
}
"""
STATES = """PREFIX wd: <http://www.wikidata.org/entity/>
PREFIX wdt: <http://www.wikidata.org/prop/direct/>
SELECT ?subject WHERE { ?subject wdt:P31 wd:Q35657 }
"""


@dataclass
class World:
    """States with governors: id -> (label, statement, governor, rank); who was edited when; who was merged."""

    states: dict[str, tuple[str, str, str, str]] = field(default_factory=dict)
    people: dict[str, str] = field(default_factory=dict)
    modified: dict[str, datetime] = field(default_factory=dict)
    merged: dict[str, str] = field(default_factory=dict)
    now: datetime = field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0) - timedelta(days=300))

    def tick(self, **by: float) -> None:
        """Time passes."""
        self.now += timedelta(**by)

    def set(self, state: str, label: str, governor: str, name: str, rank: str = "Normal") -> None:
        """Somebody edits a state; its governor's item gets a name."""
        self.states[state] = (label, f"{state}-{governor}", governor, rank)
        self.people[governor] = name
        self.modified[state] = self.now

    def drop(self, state: str) -> None:
        """Somebody removes the statement about the governor."""
        label, _, _, rank = self.states[state]
        self.states[state] = (label, "", "", rank)
        self.modified[state] = self.now

    def delete(self, state: str) -> None:
        """The item is deleted: nothing is left of it."""
        del self.states[state], self.modified[state]

    def merge(self, old: str, new: str) -> None:
        """Somebody merges one item into another."""
        if old in self.states:
            label, statement, governor, rank = self.states.pop(old)
            self.modified.pop(old)
            self.states.setdefault(new, (label, statement, governor, rank))
            self.modified[new] = self.now
        name = self.people.pop(old, None)
        if name is not None:
            self.people.setdefault(new, name)
            for state, (label, statement, governor, rank) in self.states.items():
                if governor == old:
                    self.states[state] = (label, statement, new, rank)
                    self.modified[state] = self.now
        self.merged[old] = new

    def turtle(self, as_of: datetime | None = None) -> str:
        """All of it as Wikibase RDF, shown by a server that has seen changes up to `as_of`."""
        lines = [PREFIXES, f"<http://www.wikidata.org> schema:dateModified {_time(as_of or self.now)} ."]
        for state, (label, statement, governor, rank) in self.states.items():
            lines.append(f'wd:{state} wdt:P31 wd:Q35657 ; rdfs:label "{label}"@en .')
            lines.append(f"wd:{state} schema:dateModified {_time(self.modified[state])} .")
            if governor:
                lines.append(f"wd:{state} p:P6 wds:{statement} .")
                lines.append(f"wds:{statement} ps:P6 wd:{governor} ; wikibase:rank wikibase:{rank}Rank .")
        lines += [f'wd:{person} rdfs:label "{name}"@en .' for person, name in self.people.items()]
        lines += [f"wd:{old} owl:sameAs wd:{new} ." for old, new in self.merged.items()]
        return "\n".join(lines)

    def publish(self, server: Oxigraph, as_of: datetime | None = None) -> None:
        """Let the server show this state."""
        server.load(self.turtle(as_of).encode())


def _time(moment: datetime) -> str:
    return f'"{moment:%Y-%m-%dT%H:%M:%SZ}"^^xsd:dateTime'
