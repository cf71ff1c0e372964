"""The text of SPARQL queries (pure): what a source's query must be, and how it is asked in parts.

    restricted(query, ["http://www.wikidata.org/entity/Q99"])       the rows of these subjects
    page(query, key="?subject", after=None, size=5000)              the first rows in the order of ?subject

Parts are cut by a key and never by OFFSET: rows shift under an offset when the data changes, and between servers.
All that is added is standard SPARQL 1.1 with whole IRIs, so that it needs no PREFIX line of the query's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime

__all__ = [
    "MODIFIED",
    "VARIABLES",
    "check_select",
    "is_iri",
    "last_modified",
    "listed",
    "modified_subjects",
    "page",
    "redirects",
    "restricted",
    "spoken",
    "subjects_of",
]

VARIABLES = ("subject", "subjectLabel", "object", "objectLabel")
"""What a query must give; it may also give ?statement ?rank ?start ?end ?subjectAltLabel."""
MODIFIED = "http://schema.org/dateModified"
"""When an item was changed last: https://www.mediawiki.org/wiki/Wikibase/Indexing/RDF_Dump_Format#Header"""

_SAME_AS = "http://www.w3.org/2002/07/owl#sameAs"
_DATE_TIME = "http://www.w3.org/2001/XMLSchema#dateTime"
# Comments, IRIs and strings: where a keyword is none. https://www.w3.org/TR/sparql11-query/#rComment
_SILENT = re.compile(
    r'"""[\s\S]*?"""|\'\'\'[\s\S]*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\''
    r"|<[^<>\"{}|^`\\\s]*>|#[^\n]*"
)
_FORM = re.compile(r"(?<![?$:\w])(SELECT|ASK|CONSTRUCT|DESCRIBE|INSERT|DELETE|LOAD|CLEAR|DROP|CREATE)\b", re.IGNORECASE)
_IRI = re.compile(r"[^\x00-\x20<>\"{}|^`\\]+")


def spoken(query: str) -> str:
    """The query with its comments, IRIs and strings blanked out; every other character stays at its place."""
    return _SILENT.sub(lambda silent: " " * len(silent[0]), query)


def check_select(name: str, query: str, variables: Sequence[str] = VARIABLES) -> None:
    """Raises ValueError for what is no SELECT query, lacks a variable, or pages by OFFSET."""
    words = spoken(query)
    form = _FORM.search(words)
    if form is None or form[1].upper() != "SELECT":
        raise ValueError(f"{name} is not a SELECT query")
    missing = [f"?{variable}" for variable in variables if not re.search(rf"[?$]{variable}\b", words)]
    if missing:
        raise ValueError(f"{name} does not give {', '.join(missing)}")
    if re.search(r"(?<![?$:\w])OFFSET\b", words, re.IGNORECASE):
        raise ValueError(f"{name} pages by OFFSET: rows shift under it and seem to be gone; use `page` or `chunks`")


def restricted(query: str, subjects: Iterable[str]) -> str:
    """The query for these subjects (IRIs) alone: VALUES as the first pattern of its WHERE."""
    words = spoken(query)
    start = words.index("{", _select(words)) + 1
    return f"{query[:start]} {_values('?subject', subjects)} {query[start:]}"


def page(query: str, *, key: str, after: str | None, size: int) -> str:
    """The query's first `size` rows by the text of `key`, of those beyond `after`."""
    start = _select(spoken(query))
    beyond = "" if after is None else f" FILTER(STR({key}) > {_literal(after)})"
    return f"{query[:start]}SELECT * WHERE {{ {{ {query[start:]}\n}}{beyond} }} ORDER BY STR({key}) LIMIT {size}"


def subjects_of(query: str, by: str) -> str:
    """Every ?subject of a query, with the time of its last change as ?modified where it has one."""
    return _with_each(query, f"OPTIONAL {{ ?subject <{by}> ?modified }}")


def modified_subjects(query: str, by: str, since: datetime) -> str:
    """The ?subject of a query that have been changed at `since` or later, and when."""
    moment = f"{_literal(since.isoformat())}^^<{_DATE_TIME}>"
    return _with_each(query, f"?subject <{by}> ?modified FILTER(?modified >= {moment})")


def _with_each(query: str, pattern: str) -> str:
    start = _select(spoken(query))
    return f"{query[:start]}SELECT DISTINCT ?subject ?modified WHERE {{ {{ {query[start:]}\n}} {pattern} }}"


def last_modified(thing: str) -> str:
    """When `thing` was changed last: of Wikidata itself, how far a server of the query service has come."""
    return f"SELECT ?modified {{ <{_checked(thing)}> <{MODIFIED}> ?modified }}"


def redirects(old: Iterable[str]) -> str:
    """Which of these things have been merged into which others (?old, ?new)."""
    return f"SELECT ?old ?new {{ {_values('?old', old)} ?old <{_SAME_AS}> ?new }}"


def listed(subjects: Iterable[str]) -> str:
    """A query that gives exactly these subjects."""
    return f"SELECT ?subject {{ {_values('?subject', subjects)} }}"


def _select(words: str) -> int:
    """Where the query proper begins, after its PREFIX lines."""
    form = _FORM.search(words)
    if form is None:
        raise ValueError("not a SELECT query")
    return form.start()


def _values(variable: str, iris: Iterable[str]) -> str:
    return f"VALUES {variable} {{ {' '.join(f'<{_checked(iri)}>' for iri in iris)} }}"


def is_iri(text: str) -> bool:
    """Whether a text can stand between < and > in a query (https://www.w3.org/TR/sparql11-query/#rIRIREF)."""
    return _IRI.fullmatch(text) is not None


def _checked(iri: str) -> str:
    if not _IRI.fullmatch(iri):
        raise ValueError(f"{iri!r} is no IRI")
    return iri


def _literal(text: str) -> str:
    """A string as SPARQL writes it; its escapes are JSON's (https://www.w3.org/TR/sparql11-query/#grammarEscapes)."""
    return json.dumps(text)
