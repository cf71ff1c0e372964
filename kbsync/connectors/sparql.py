"""The `sparql` connector: the answer of one SELECT query of a SPARQL 1.1 endpoint, taken whole or not at all.

    source: us-governors
    type: sparql
    endpoint: https://query.wikidata.org/sparql
    query: us-governors.rq        # ?subject ?subjectLabel ?object ?objectLabel [?statement ?rank ?start ?end …]
    ids: wikidata
    user_agent: "kbsync/1.0 (mailto:ops@example.org)"

What is too large for one answer is asked for in parts (`chunks` of subjects, or one `page` after the other), and what
changes little by its changed subjects alone (`incremental`); see `parts`. docs/wikidata.md tells how to use them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import httpx
from pydantic import ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from kbsync.connectors import STALE_RETRY_SECONDS, Place, refuse_older
from kbsync.connectors.endpoint import NOTHING, Answer, Endpoint, Term
from kbsync.connectors.http import HttpOptions, check_url, is_wikimedia
from kbsync.connectors.parts import Chunks, Incremental, Pages, Parts, ask, instants
from kbsync.connectors.query import check_select, last_modified, redirects, spoken
from kbsync.connectors.rows import UNKNOWN, Row, snapshot_of
from kbsync.errors import SourceUnavailable
from kbsync.facts import Provenance, Snapshot, digest_of
from kbsync.policy import Seconds, Source

__all__ = ["SparqlConnector", "SparqlOptions"]

WIKIDATA = "http://www.wikidata.org"
"""What Wikidata's endpoints date by the last change that they have seen."""
OLD_IDS = 200
"""Ids that one query about merged items names."""

_ITEM = re.compile(r"[QPL]\d+")
_STATEMENT = "http://www.wikidata.org/entity/statement/"
_RANK = re.compile(r"http://wikiba\.se/ontology#(Preferred|Normal|Deprecated)Rank")


class SparqlOptions(HttpOptions):
    """The keys of a `type: sparql` source."""

    endpoint: str
    """Address of the SPARQL 1.1 protocol: Wikidata's, QLever's, a mirror of one's own."""
    query: str
    """A file beside the source file, with a SELECT query; once validated, the query itself."""
    chunks: Chunks | None = None
    page: Pages | None = None
    incremental: Incremental | None = None
    lag: bool | str | None = None
    """Whether the endpoint is asked how fresh it is, or the IRI of the thing that it dates so; default: Wikimedia's
    own endpoints are."""
    max_lag: Seconds = 3600.0
    """An answer whose server is further behind than this is refused."""

    @field_validator("endpoint")
    @classmethod
    def _endpoint(cls, value: str, info: ValidationInfo) -> str:
        if "?" in value or "#" in value:
            raise ValueError("must have no query string and no fragment")
        return check_url(value, info.data)

    @field_validator("query")
    @classmethod
    def _query(cls, value: str, info: ValidationInfo) -> str:
        query = Place.of(info).text(value)
        check_select(value, query)
        return query

    @model_validator(mode="after")
    def _together(self) -> SparqlOptions:
        if self.chunks and self.page:
            raise ValueError("`chunks` and `page` are two ways to do one thing; choose one")
        if self.incremental and not self.chunks:
            raise ValueError("`incremental` needs `chunks`, whose subjects are those whose changes count")
        return self

    @property
    def dated(self) -> str | None:
        """The IRI of the thing whose last change says how fresh the endpoint is; None: it is not asked."""
        if isinstance(self.lag, str):
            return self.lag
        return WIKIDATA if self.lag or (self.lag is None and is_wikimedia(self.endpoint)) else None


class SparqlConnector:
    """Asks an endpoint its query, each time anew."""

    Options = SparqlOptions

    def __init__(self, source: Source, options: SparqlOptions, place: Place) -> None:  # noqa: ARG002 (the protocol's)
        self._source = source
        self._options = options
        if options.incremental and (source.match != "id" or source.snapshot != "complete"):
            problem = PydanticCustomError("incremental", "needs `match: id` and `snapshot: complete`")
            detail = InitErrorDetails(type=problem, loc=("incremental",), input=True)
            raise ValidationError.from_exception_data("Source", [detail])
        if options.page and options.page.key != "?subject" and source.snapshot == "complete":
            # A statement that is replaced by one with an earlier id while pages are read is in none of them.
            problem = PydanticCustomError("page", "`?statement` may lose a subject: `?subject`, or `snapshot: partial`")
            detail = InitErrorDetails(type=problem, loc=("page", "key"), input=options.page.key)
            raise ValidationError.from_exception_data("Source", [detail])
        self._parts = Parts(options.query, options.chunks, options.page, options.incremental)
        subjects = options.chunks.subjects if options.chunks else None
        named = [subjects.query, list(subjects.iris)] if subjects else []
        self._declaration = digest_of([source.model_dump(mode="json"), options.query, *named])

    @property
    def host(self) -> str:
        """The host that is asked, with its port where that is not the usual one."""
        return httpx.URL(self._options.endpoint).netloc.decode()

    @property
    def warnings(self) -> Sequence[str]:
        """What makes a query slow, or its answer not the complete snapshot that the source file declares."""
        words = spoken(self._options.query)
        found = []
        if re.search(r"SERVICE\s+wikibase:label", words):
            found.append("query: SERVICE wikibase:label is slow and Wikidata's alone; use rdfs:label with a language")
        if self._source.snapshot == "complete" and re.search(r"\bLIMIT\s+\d+\s*$", words, re.IGNORECASE):
            found.append("query: rows beyond its LIMIT seem to be gone; say `snapshot: partial` or drop the LIMIT")
        return found

    def fetch(self, previous: Provenance | None) -> Snapshot:
        """All rows of the answer, or with `incremental` those of the subjects that have changed since `previous`.

        Raises SourceUnavailable (too stale, too), SourceBlocked (see `http.send`), and SourceInvalid for an answer
        that is not whole; one part that fails fails the fetch.
        """
        began = datetime.now(UTC)
        endpoint = self._endpoint()
        as_of = self._as_of(endpoint, previous)
        said = ask(endpoint, self._parts, self._since(previous), began)
        if said.in_parts and as_of is not None:
            # The servers of one endpoint differ in age: only what the oldest has seen is in the whole answer for sure.
            as_of = min(as_of, self._as_of(endpoint, previous) or as_of)
        provenance = Provenance(
            location=self._options.endpoint,
            fetched_at=began,
            status=200,
            body_sha256=endpoint.sha256,
            declaration=self._declaration,
            as_of=as_of,
            cursor=said.cursor,
        )
        snapshot = snapshot_of(self._source, lambda: self._rows(said.rows), provenance)
        return snapshot if said.covers is None else replace(snapshot, covers=self._ids(said.covers))

    def redirects(self, ids: Collection[str]) -> Mapping[str, str]:
        """Which of these whole ids the source has merged into which others. Raises what `fetch` raises."""
        by_iri: dict[str, list[str]] = {}
        for id_ in sorted(ids):
            if iri := _iri(id_):
                by_iri.setdefault(iri, []).append(id_)
        found: dict[str, str] = {}
        endpoint, iris = self._endpoint(), list(by_iri)
        for start in range(0, len(iris), OLD_IDS):
            for row in endpoint.ask(redirects(iris[start : start + OLD_IDS]), ("old", "new")):
                old, new = by_iri.get(row.get("old", NOTHING).value), row.get("new", NOTHING)
                if old is None or new.kind != "uri":
                    raise endpoint.invalid("the answer about merged items is about others")
                found |= {id_: f"{id_.partition(':')[0]}:{new.entity[1]}" for id_ in old}
        return found

    def _endpoint(self) -> Endpoint:
        return Endpoint(self._source.source, self._options.endpoint, self._options)

    def _as_of(self, endpoint: Endpoint, previous: Provenance | None) -> datetime | None:
        """Up to when the endpoint shows changes; None where it does not say. Raises SourceUnavailable where that is
        too long ago, or before what the ledger has already seen."""
        if self._options.dated is None:
            return None
        dates = instants(endpoint, endpoint.ask(last_modified(self._options.dated), ("modified",), counts=False))
        if not dates:
            if self._options.lag:
                raise endpoint.invalid(f"it has no schema:dateModified of <{self._options.dated}>, see `lag`")
            return None
        as_of = min(dates)
        behind = datetime.now(UTC) - as_of
        if behind > timedelta(seconds=self._options.max_lag):
            raise SourceUnavailable(
                self._source.source,
                f"{endpoint.host}: stale, it shows changes up to {as_of:%Y-%m-%d %H:%M} UTC only",
                retry_after=STALE_RETRY_SECONDS,
                hint="it is asked again later; `max_lag` in the source file allows more",
            )
        refuse_older(self._source.source, as_of, previous)
        return as_of

    def _since(self, previous: Provenance | None) -> str | None:
        """The cursor to go on from; None where the declaration is another one than that of the last fetch."""
        return previous.cursor if previous and previous.declaration == self._declaration else None

    def _ids(self, iris: Iterable[str]) -> frozenset[str]:
        return frozenset(f"{self._source.space}:{Term('uri', iri).entity[1]}" for iri in iris)

    def _rows(self, rows: Answer) -> Iterator[Row]:
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
                aliases=[terms["subjectAltLabel"].value] if "subjectAltLabel" in terms else (),
                problem=_problem(subject, thing),
            )
            if thing.kind == "uri":
                row.object_id = ":".join(thing.entity)
            yield row


def _iri(id_: str) -> str | None:
    """The IRI that a whole id stands for; None for an id that is none's."""
    local = id_.partition(":")[2]
    if _ITEM.fullmatch(local):
        return f"{WIKIDATA}/entity/{local}"
    return local if local.startswith(("http://", "https://")) else None


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
