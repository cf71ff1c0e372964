"""The `sparql` connector: the answer of one SELECT query of a SPARQL 1.1 endpoint, taken whole or not at all.

    source: us-governors
    type: sparql
    endpoint: https://query.wikidata.org/sparql
    query: us-governors.rq        # ?subject ?subjectLabel ?object ?objectLabel [?statement ?rank ?start ?end]
    ids: wikidata
    user_agent: "kbsync/1.0 (mailto:ops@example.org)"

A public endpoint that runs out of time sends status 200 and half an answer, so an answer counts only if all of it is
SPARQL JSON (https://www.w3.org/TR/sparql11-results-json/) with every variable and no trace of a timeout in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import httpx
from pydantic import ValidationInfo, field_validator
from SPARQLWrapper import JSON, POST, SPARQLWrapper

from kbsync.connectors import Place
from kbsync.connectors.http import HttpOptions, check_url, send
from kbsync.connectors.rows import UNKNOWN, Row, snapshot_of
from kbsync.connectors.text import printable
from kbsync.errors import SourceInvalid
from kbsync.facts import Provenance, Snapshot, digest_of
from kbsync.policy import Source

__all__ = ["SparqlConnector", "SparqlOptions", "Term", "fetch_rows", "parse_answer"]

VARIABLES = ("subject", "subjectLabel", "object", "objectLabel")
"""What a query must give; it may also give ?statement ?rank ?start ?end."""
RESULTS = "application/sparql-results+json"
"""The only format asked for: CSV and TSV end well wherever they are cut."""
LONGEST_GET = 1_500
"""Characters of a query that may still go into a URL; servers and proxies refuse long ones (status 414)."""
LONGEST_QUERY = 1_000_000
TRACES = ("TimeoutException", "SPARQL-QUERY:")
"""What Blazegraph leaves inside an answer that it gave up under status 200."""

_ENTITY = re.compile(r"https?://www\.wikidata\.org/entity/([QPL]\d+)")
_STATEMENT = "http://www.wikidata.org/entity/statement/"
_GENID = "/.well-known/genid/"
_RANK = re.compile(r"http://wikiba\.se/ontology#(Preferred|Normal|Deprecated)Rank")
# Comments, IRIs and strings: where a keyword is none. https://www.w3.org/TR/sparql11-query/#rComment
_SILENT = re.compile(
    r'"""[\s\S]*?"""|\'\'\'[\s\S]*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\''
    r"|<[^<>\"{}|^`\\\s]*>|#[^\n]*"
)
_FORM = re.compile(r"(?<![?$:\w])(SELECT|ASK|CONSTRUCT|DESCRIBE|INSERT|DELETE|LOAD|CLEAR|DROP|CREATE)\b", re.IGNORECASE)


class SparqlOptions(HttpOptions):
    """The keys of a `type: sparql` source."""

    endpoint: str
    """Address of the SPARQL 1.1 protocol: Wikidata's, QLever's, a mirror of one's own."""
    query: str
    """A file beside the source file, with a SELECT query; once validated, the query itself."""

    @field_validator("endpoint")
    @classmethod
    def _endpoint(cls, value: str, info: ValidationInfo) -> str:
        if "?" in value or "#" in value:
            raise ValueError("must have no query string and no fragment")
        return check_url(value, info.data)

    @field_validator("query")
    @classmethod
    def _query(cls, value: str, info: ValidationInfo) -> str:
        path = Place.of(info).path(value)
        try:
            if path.stat().st_size > LONGEST_QUERY:
                raise ValueError(f"{value} is larger than {LONGEST_QUERY:,} bytes")
            query = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"{value} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{value} is not UTF-8") from error
        _check_query(value, query)
        return query


def _check_query(name: str, query: str) -> None:
    """Raises ValueError for what is no SELECT query, lacks a variable, or pages by OFFSET."""
    spoken = _SILENT.sub(" ", query)
    form = _FORM.search(spoken)
    if form is None or form[1].upper() != "SELECT":
        raise ValueError(f"{name} is not a SELECT query")
    missing = [f"?{variable}" for variable in VARIABLES if not re.search(rf"[?$]{variable}\b", spoken)]
    if missing:
        raise ValueError(f"{name} does not give {', '.join(missing)}")
    if re.search(r"(?<![?$:\w])OFFSET\b", spoken, re.IGNORECASE):
        raise ValueError(f"{name} pages by OFFSET: rows shift between pages and seem to be gone; ask for all at once")


class Term(NamedTuple):
    """One value of an answer; `kind` is uri, literal or bnode."""

    kind: str
    value: str

    @property
    def is_unknown(self) -> bool:
        """Whether it stands for a value that exists and nobody knows (a blank node, or Wikidata's IRI for one)."""
        return self.kind == "bnode" or (self.kind == "uri" and _GENID in self.value)

    @property
    def entity(self) -> tuple[str, str]:
        """(id space, local id) of an IRI: `wikidata`, `Q42`; of other IRIs `iri` and the whole."""
        found = _ENTITY.fullmatch(self.value)
        return ("wikidata", found[1]) if found else ("iri", self.value)


NOTHING = Term("literal", "")


class SparqlConnector:
    """Asks an endpoint its one query, each time anew."""

    Options = SparqlOptions

    def __init__(self, source: Source, options: SparqlOptions, place: Place) -> None:  # noqa: ARG002 (the protocol's)
        self._source = source
        self._options = options
        self._declaration = digest_of([source.model_dump(mode="json"), options.query])

    @property
    def warnings(self) -> Sequence[str]:
        """What makes a query slow, or its answer not the complete snapshot that the source file declares."""
        spoken = _SILENT.sub(" ", self._options.query)
        found = []
        if re.search(r"SERVICE\s+wikibase:label", spoken):
            found.append("query: SERVICE wikibase:label is slow and Wikidata's alone; use rdfs:label with a language")
        if self._source.snapshot == "complete" and re.search(r"\bLIMIT\s+\d+\s*$", spoken, re.IGNORECASE):
            found.append("query: rows beyond its LIMIT seem to be gone; say `snapshot: partial` or drop the LIMIT")
        return found

    def fetch(self, previous: Provenance | None) -> Snapshot:  # noqa: ARG002 (endpoints have no validators)
        """All rows of the answer.

        Raises SourceUnavailable, SourceBlocked (see `http.send`), and SourceInvalid for an answer that is not whole.
        """
        rows, sha256 = fetch_rows(self._source.source, self._options)
        provenance = Provenance(
            location=self._options.endpoint,
            fetched_at=datetime.now(UTC),
            status=200,
            body_sha256=sha256,
            declaration=self._declaration,
        )
        return snapshot_of(self._source, lambda: self._rows(rows), provenance)

    def _rows(self, rows: Sequence[dict[str, Term]]) -> Iterator[Row]:
        for terms in rows:
            subject, thing = terms.get("subject", NOTHING), terms.get("object", NOTHING)
            row = Row(
                origin=_origin(terms.get("statement", NOTHING), subject),
                raw=[f"{name}={term.value}" for name, term in terms.items()],
                subject=_label(terms.get("subjectLabel", NOTHING), subject),
                subject_id=subject.entity[1],
                object=_label(terms.get("objectLabel", NOTHING), thing),
                object_space=self._source.source,
                rank=_rank(terms.get("rank", NOTHING)),
                start=_date(terms.get("start", NOTHING), unknown=""),
                end=_date(terms.get("end", NOTHING), unknown=UNKNOWN),
                problem=_problem(subject, thing),
            )
            if thing.kind == "uri":
                row.object_id = ":".join(thing.entity)
            yield row


def fetch_rows(source: str, options: SparqlOptions) -> tuple[list[dict[str, Term]], str]:
    """The rows of the query's whole answer, each by variable, and the sha256 of its body.

    Raises what `http.send` raises, and SourceInvalid where the answer is not SPARQL JSON or not whole.
    """
    reply = send(source, _request(options), options)
    host = httpx.URL(options.endpoint).host
    if reply.content_type != RESULTS:
        kind = printable(reply.content_type, 60) or "nothing"
        raise SourceInvalid(source, f"{host}: the answer says that it is {kind}, not {RESULTS}")
    try:
        return parse_answer(reply.body), reply.sha256
    except ValueError as error:
        hint = "nothing was changed; run `kbsync sync` later, or make the query lighter"
        raise SourceInvalid(source, f"{host}: {error}", hint=hint) from error


def _request(options: SparqlOptions) -> httpx.Request:
    """The SPARQL protocol's request for the query: GET, or POST for a long one.

    SPARQLWrapper writes it; sending it would be without a deadline, a size cap or a limit to redirects, and 403 and
    429 would be bare urllib errors, so `http.send` does that. Its method for writing has no public name.
    """
    wrapper = SPARQLWrapper(options.endpoint, returnFormat=JSON, agent=options.user_agent)
    wrapper.setOnlyConneg(True)
    wrapper.addCustomHttpHeader("Accept", RESULTS)
    wrapper.setQuery(options.query)
    if len(options.query) > LONGEST_GET:
        wrapper.setMethod(POST)
    request = wrapper._createRequest()
    content = request.data if isinstance(request.data, bytes) else None
    return httpx.Request(request.get_method(), request.full_url, headers=dict(request.header_items()), content=content)


def parse_answer(body: bytes, needed: Sequence[str] = VARIABLES) -> list[dict[str, Term]]:
    """The rows of a SPARQL JSON answer (https://www.w3.org/TR/sparql11-results-json/), every one of them.

    Raises ValueError where the body is not one whole JSON document, lacks a needed variable, or shows a timeout.
    """
    text = body.decode("utf-8", "replace")
    if any(trace in text for trace in TRACES):
        raise ValueError("the endpoint ran out of time in the middle of its answer")
    try:
        answer = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the answer is not whole: it ends with {printable(text[-80:].strip(), 80)!r}") from error
    match answer:
        case {"head": {"vars": list() as names}, "results": {"bindings": list() as bindings}}:
            missing = [f"?{name}" for name in needed if name not in names]
            if missing:
                raise ValueError(f"the answer lacks {', '.join(missing)}")
            return [_terms(binding) for binding in bindings]
    raise ValueError("the answer has no head.vars or no results.bindings")


def _terms(binding: object) -> dict[str, Term]:
    found = {}
    for name, term in binding.items() if isinstance(binding, dict) else [("", None)]:
        match term:
            case {"type": str() as kind, "value": str() as value}:
                found[name] = Term("literal" if kind == "typed-literal" else kind, value)
            case _:
                raise ValueError(f"the answer has a row that is no row: {printable(binding, 80)}")
    return found


def _origin(statement: Term, subject: Term) -> str:
    """The statement, as Wikidata abbreviates it; without one the subject: rows of an answer have no stable number."""
    if statement.kind == "uri":
        return statement.value.replace(_STATEMENT, "wds:")
    space, local = subject.entity
    return f"wd:{local}" if space == "wikidata" else local


def _label(label: Term, term: Term) -> str:
    """How a term is written. Label services give an item without a label its own id: that is none."""
    if term.kind == "literal":
        return label.value or term.value
    return "" if label.value == term.entity[1] else label.value


def _rank(term: Term) -> str:
    found = _RANK.fullmatch(term.value)
    return found[1].lower() if found else term.value


def _date(term: Term, *, unknown: str) -> str:
    return unknown if term.is_unknown else term.value


def _problem(subject: Term, thing: Term) -> str:
    if subject.is_unknown:
        return "the subject is an unknown value"
    if subject.kind != "uri":
        return "the subject is no IRI"
    return "the object is an unknown value" if thing.is_unknown else ""
