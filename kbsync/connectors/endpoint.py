"""A SPARQL 1.1 endpoint, asked within one budget: each answer is taken whole or not at all.

A public endpoint that runs out of time sends status 200 and half an answer, so an answer counts only if all of it is
SPARQL JSON (https://www.w3.org/TR/sparql11-results-json/) with every variable and no trace of a timeout in it.

    endpoint = Endpoint("us-governors", "https://query.wikidata.org/sparql", options)
    rows = endpoint.ask(query, ["subject", "object"])
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import NamedTuple

import httpx
from SPARQLWrapper import JSON, POST, SPARQLWrapper

from kbsync.connectors.http import Budget, HttpOptions, Reply, send
from kbsync.connectors.query import is_iri
from kbsync.connectors.retries import retrying
from kbsync.connectors.text import printable
from kbsync.errors import SourceInvalid, SourceUnavailable

__all__ = ["NOTHING", "RESULTS", "Answer", "Endpoint", "Term", "parse_answer"]

RESULTS = "application/sparql-results+json"
"""The only format asked for: CSV and TSV end well wherever they are cut."""
LONGEST_GET = 1_500
"""Characters of a query that may still go into a URL; servers and proxies refuse long ones (status 414)."""
TRACES = ("TimeoutException", "SPARQL-QUERY:")
"""What Blazegraph leaves inside an answer that it gave up under status 200."""

_ENTITY = re.compile(r"https?://www\.wikidata\.org/entity/([QPL]\d+)")
_GENID = "/.well-known/genid/"


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
"""The value of a variable that a row does not bind."""

Answer = list[dict[str, Term]]
"""The rows of an answer, each by variable."""


class Endpoint:
    """What one fetch asks of one address."""

    def __init__(self, source: str, url: str, options: HttpOptions) -> None:
        self.source = source
        self.host = httpx.URL(url).host
        self._url = url
        self._options = options
        self._budget = Budget(options)
        self._bodies = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """64 hex digits over the bodies of all answers that count, in their order."""
        return self._bodies.hexdigest()

    def ask(self, query: str, needed: Sequence[str], *, counts: bool = True) -> Answer:
        """The rows of the query's whole answer. `counts`: whether its body is part of `sha256`.

        What may work later is asked again within the budget: one part that is refused does not cost all the others.
        Raises what `http.send` raises, and SourceInvalid where the answer is not SPARQL JSON or not whole.
        """
        reply = self._answer(query)
        if reply.content_type != RESULTS:
            kind = printable(reply.content_type, 60) or "nothing"
            raise self.invalid(f"the answer says that it is {kind}, not {RESULTS}")
        try:
            rows = parse_answer(reply.body, needed)
        except ValueError as error:
            raise self.invalid(str(error)) from error
        if counts:
            self._bodies.update(reply.body)
        return rows

    def _answer(self, query: str) -> Reply:
        again = retrying(self._budget.deadline)
        try:
            return again(send, self.source, self._request(query), self._options, self._budget)
        except SourceUnavailable as error:
            error.exhausted = again.statistics["attempt_number"] > 1
            raise

    def invalid(self, problem: str) -> SourceInvalid:
        """The error of an answer that cannot be what was asked for."""
        hint = "nothing was changed; run `kbsync sync` later, or make the query lighter"
        return SourceInvalid(self.source, f"{self.host}: {problem}", hint=hint)

    def _request(self, query: str) -> httpx.Request:
        """The SPARQL protocol's request for the query: GET, or POST for a long one.

        SPARQLWrapper writes it; sending it would be without a deadline, a size cap or a limit to redirects, and 403
        and 429 would be bare urllib errors, so `http.send` does that. Its method for writing has no public name.
        """
        wrapper = SPARQLWrapper(self._url, returnFormat=JSON, agent=self._options.user_agent)
        wrapper.setOnlyConneg(True)
        wrapper.addCustomHttpHeader("Accept", RESULTS)
        wrapper.setQuery(query)
        if len(query) > LONGEST_GET:
            wrapper.setMethod(POST)
        request = wrapper._createRequest()
        content = request.data if isinstance(request.data, bytes) else None
        headers = dict(request.header_items())
        return httpx.Request(request.get_method(), request.full_url, headers=headers, content=content)


def parse_answer(body: bytes, needed: Sequence[str]) -> Answer:
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
            case {"type": "uri", "value": str() as value} if not is_iri(value):
                raise ValueError(f"the answer has a uri that is no IRI: {printable(value, 80)!r}")
            case {"type": str() as kind, "value": str() as value}:
                found[name] = Term("literal" if kind == "typed-literal" else kind, value)
            case _:
                raise ValueError(f"the answer has a row that is no row: {printable(binding, 80)}")
    return found
