"""Facts in the formats of other programs: CSV for spreadsheets, JSON, Parquet, RDF as N-Triples. Row by row, so that a
ledger of any size passes through and is never all in memory.

    write_csv(COLUMNS, map(flat, rows), sys.stdout)
    write_ntriples(rows, out, Namer({"hip": "https://example.org/hip/"}))
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote

from kbsync.connectors.text import printable
from kbsync.errors import UsageError
from kbsync.ledger.records import FactRow

__all__ = ["COLUMNS", "Namer", "flat", "write_csv", "write_json", "write_ntriples", "write_parquet"]

COLUMNS = (
    "relation",
    "subject",
    "subject_id",
    "object",
    "object_id",
    "status",
    "source",
    "origin",
    "since",
    "until",
    "valid_from",
    "valid_to",
    "run",
    "rule",
    "location",
    "fetched_at",
    "body_sha256",
)
"""The columns of an exported fact, in order."""
TIMES = frozenset({"since", "until", "fetched_at"})
"""Those that are times, in UTC."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""What makes a spreadsheet take a cell for a formula (OWASP, CSV Injection)."""
_IRI = re.compile(r"""[A-Za-z][A-Za-z0-9+.-]*:[^\s<>"{}|\\^`\x00-\x20]+""")
"""What N-Triples takes for an absolute IRI."""
_BATCH = 20_000


def flat(row: FactRow) -> dict[str, Any]:
    """A fact as one flat row; times are datetimes."""
    fact, source = row.fact, row.provenance
    return {
        "relation": fact.relation,
        "subject": fact.subject.label,
        "subject_id": fact.subject.id,
        "object": fact.object.label,
        "object_id": fact.object.id,
        "status": fact.status,
        "source": fact.source,
        "origin": fact.origin,
        "since": row.since,
        "until": row.until,
        "valid_from": row.start,
        "valid_to": row.end,
        "run": row.run_id,
        "rule": fact.rule or None,
        "location": source.location if source else None,
        "fetched_at": source.fetched_at if source else None,
        "body_sha256": source.body_sha256 if source else None,
    }


def write_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], out: TextIO) -> None:
    """RFC 4180 with a header. A text that a spreadsheet would run as a formula gets a `'` in front (R6.5)."""
    writer = csv.writer(out)
    writer.writerow(columns)
    writer.writerows([_cell(row[name]) for name in columns] for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def write_json(rows: Iterable[Mapping[str, Any]], out: TextIO) -> None:
    """One JSON array, an object per row, sorted keys."""
    separator = "["
    for row in rows:
        text = json.dumps(row, indent=2, sort_keys=True, ensure_ascii=False, default=_iso)
        out.write(separator + "\n  " + text.replace("\n", "\n  "))
        separator = ","
    out.write("[]\n" if separator == "[" else "\n]\n")


def _iso(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def write_parquet(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """A Parquet file; times are timestamps in UTC, `run` an integer, all else text. Raises UsageError where pyarrow is
    not installed."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UsageError("Parquet needs pyarrow", hint='pip install "kbsync[parquet]"') from None
    types = {"run": pa.int64()} | dict.fromkeys(TIMES, pa.timestamp("us", tz="UTC"))
    schema = pa.schema([(name, types.get(name, pa.string())) for name in columns])
    left = iter(rows)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while batch := list(islice(left, _BATCH)):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))


@dataclass(frozen=True, slots=True)
class Namer:
    """IRIs of ids and relations. `prefixes`: id space -> what its local ids are put behind; `relation` is the space of
    the relations. Spaces that it does not name get `urn:kbsync:SPACE:ID`; `wikidata` is known."""

    prefixes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises UsageError for a prefix that is no absolute IRI."""
        for space, prefix in self.prefixes.items():
            if not _IRI.fullmatch(prefix):
                raise UsageError(
                    f"--iri {space}: {printable(prefix, 60)!r} is no IRI", hint="write https://example.org/"
                )

    def entity(self, id_: str) -> str:
        """The IRI of a subject or object."""
        space, colon, local = id_.partition(":")
        return self._iri(space, local) if colon else self._iri("entity", id_)

    def relation(self, name: str) -> str:
        """The IRI of a relation, as a property."""
        return self._iri("relation", name)

    def _iri(self, space: str, local: str) -> str:
        if space == "iri" and _IRI.fullmatch(local):
            return local
        known = {"wikidata": "http://www.wikidata.org/entity/"} | dict(self.prefixes)
        return known.get(space, f"urn:kbsync:{quote(space, safe='')}:") + quote(local, safe="")


def write_ntriples(rows: Iterable[FactRow], out: TextIO, namer: Namer) -> None:
    """RDF 1.1 N-Triples: each fact and its labels, and where it comes from as a reified statement (RDF Schema 5.3) with
    PROV-O's `wasDerivedFrom` and `generatedAtTime`. https://www.w3.org/TR/n-triples/, https://www.w3.org/TR/prov-o/"""
    from rdflib import PROV, RDF, RDFS, XSD, BNode, Literal, URIRef

    for row in rows:
        fact, source = row.fact, row.provenance
        subject, object_ = URIRef(namer.entity(fact.subject.id)), URIRef(namer.entity(fact.object.id))
        relation = URIRef(namer.relation(fact.relation))
        statement = BNode(f"fact{row.id}" if row.id is not None else f"claim{fact.claim}")  # of this ledger alone
        triples = [
            (subject, relation, object_),
            (subject, RDFS.label, Literal(fact.subject.label)),
            (object_, RDFS.label, Literal(fact.object.label)),
            (statement, RDF.type, RDF.Statement),
            (statement, RDF.subject, subject),
            (statement, RDF.predicate, relation),
            (statement, RDF.object, object_),
            (statement, PROV.generatedAtTime, Literal(row.since.isoformat(), datatype=XSD.dateTime)),
            (statement, PROV.wasDerivedFrom, URIRef(_origin(fact.source, source.location if source else ""))),
        ]
        out.writelines(" ".join(_term(term) for term in one) + " .\n" for one in triples)


def _term(term: Any) -> str:
    """A term as N-Triples writes it; the escapes of its strings are those of JSON."""
    text = str(term)
    if type(term).__name__ == "BNode":
        return f"_:{text}"
    if not hasattr(term, "datatype"):
        return f"<{text}>"
    escaped = json.dumps(text, ensure_ascii=False)
    return f"{escaped}^^<{term.datatype}>" if term.datatype else escaped


def _origin(source: str, location: str) -> str:
    """The URL that was fetched; for a file, whose path means nothing elsewhere, the source."""
    return quote(location, safe="%:/?#[]@!$&'()*+,;=~") if "://" in location else f"urn:kbsync:source:{quote(source)}"
