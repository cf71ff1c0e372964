"""From the rows that a connector reads to a snapshot: one set of rules for every kind of source.

A good row becomes a claim; a bad one goes to quarantine with its place and reason, and its subject still counts as
present where its id can be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kbsync.connectors.text import clean, clean_date, clean_label, label_key, printable, same_label
from kbsync.facts import Alias, Entry, Provenance, QuarantinedRow, Said, Snapshot
from kbsync.policy import Source

__all__ = ["UNKNOWN", "Row", "snapshot_of"]

UNKNOWN = "unknown"
"""The end of a statement that ended at a time that nobody knows: not current, though without a date."""

_RANKS = ("preferred", "normal", "deprecated")


@dataclass(slots=True)
class Row:
    """One row as the source gave it, nothing checked. Empty text means: not given; `raw` is all that it said.

    `subject_id` is the id within the source's space (empty: the label is the id), `object_id` a whole id, or empty:
    then the object is its text, in the space `object_space`. `qualifiers` tell subjects apart that are written alike;
    `aliases` are other ways to write the subject. `problem` is what the connector itself found wrong.
    """

    origin: str
    raw: Sequence[str]
    subject: str = ""
    object: str = ""
    subject_id: str = ""
    object_id: str = ""
    object_space: str = ""
    rank: str = ""
    start: str = ""
    end: str = ""
    qualifiers: Mapping[str, str] = field(default_factory=dict)
    aliases: Sequence[str] = ()
    problem: str = ""


def snapshot_of(
    source: Source,
    rows: Callable[[], Iterable[Row]],
    provenance: Provenance,
    *,
    complete: bool = True,
    redirects: Mapping[str, str] | None = None,
) -> Snapshot:
    """All rows of one fetch as a snapshot. `rows` is called each time that they are to be read, and reads them one by
    one from what was fetched: what spoils the answer as a whole must have been found before. `complete`: whether the
    answer speaks about every subject (and the source file says so, too). `redirects`: whole ids that the source has
    merged into others."""
    return Snapshot(
        source=source.source,
        relation=source.relation,
        provenance=provenance,
        content=_Content(source, rows),
        whole=complete and source.snapshot == "complete",
        redirects=dict(redirects or {}),
    )


@dataclass(frozen=True, slots=True)
class _Content:
    """The rows of a fetch, checked and cleaned as they are read."""

    source: Source
    rows: Callable[[], Iterable[Row]]

    def __iter__(self) -> Iterator[Entry]:
        source = self.source
        for row in self.rows():
            subject_id = None
            try:
                subject_id = _subject_id(source, row)
                yield _said(source, row, subject_id)
                for alias in row.aliases:
                    yield Alias(subject_id, clean_label(alias, "an alias"))
            except ValueError as error:
                yield _quarantined(row, subject_id, error)


def _quarantined(row: Row, subject_id: str | None, error: ValueError) -> QuarantinedRow:
    reason = str(error) if subject_id else f"{error}; nothing is withdrawn while a row names no subject"
    return QuarantinedRow(_place(row), reason, printable(" | ".join(row.raw)), subject_id)


def _subject_id(source: Source, row: Row) -> str:
    """`space:local`. Raises ValueError where the row does not say which subject it is about."""
    by_label = source.match == "label" or not row.subject_id
    if row.problem and not (row.subject if by_label else row.subject_id):
        raise ValueError(row.problem)
    if not by_label:
        return f"{source.space}:{clean(row.subject_id, 'the id of the subject')}"
    label = clean_label(row.subject, "the label of the subject")
    return f"{source.space}:{label_key(label) if source.match == 'label' else label}"


def _object_id(source: Source, row: Row, label: str) -> str:
    if source.match == "label":
        return f"{source.space}:{label_key(label)}"
    return clean(row.object_id, "the id of the object") if row.object_id else f"{row.object_space}:{label}"


def _said(source: Source, row: Row, subject_id: str) -> Said:
    """What a good row says. Raises ValueError for what is wrong with a bad one."""
    if row.problem:
        raise ValueError(row.problem)
    subject = clean_label(row.subject, "the label of the subject")
    label = clean_label(row.object, "the label of the object")
    object_id = _object_id(source, row, label)
    if subject_id == object_id or (not row.object_id and same_label(subject, label)):
        raise ValueError(f"the object is the subject itself: {label}")
    rank = row.rank or "normal"
    if rank not in _RANKS:
        raise ValueError(f"the rank is {printable(rank, 60)}, not one of {', '.join(_RANKS)}")
    start = clean_date(row.start, "the start") if row.start else None
    qualifiers = _qualifiers(row) if row.qualifiers else ()
    return subject_id, subject, object_id, label, rank, start, _end(row.end), qualifiers, _place(row)


def _place(row: Row) -> str:
    return row.origin if row.origin.isascii() and row.origin.isprintable() else printable(row.origin)


def _qualifiers(row: Row) -> tuple[tuple[str, str], ...]:
    return tuple(
        (name, clean_label(value, f"the {name} of the subject")) for name, value in sorted(row.qualifiers.items())
    )


def _end(value: str) -> str | None:
    if not value:
        return None
    return value if value == UNKNOWN else clean_date(value, "the end")
