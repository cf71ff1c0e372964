"""From the rows that a connector reads to a snapshot: one set of rules for every kind of source.

A good row becomes a claim; a bad one goes to quarantine with its place and reason, and its subject still counts as
present where its id can be read. Equal rows are one claim.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from kbsync.connectors.text import clean, clean_date, clean_label, label_key, printable
from kbsync.facts import Claim, Entity, Provenance, QuarantinedRow, Rank, Snapshot
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
    rows: Iterable[Row],
    provenance: Provenance,
    *,
    complete: bool = True,
    redirects: Mapping[str, str] | None = None,
) -> Snapshot:
    """All rows of one fetch as a snapshot. It is complete only where the source file says so, the connector does not
    say otherwise (`complete`), and every bad row names its subject: otherwise the subject of the unreadable row would
    seem to be gone. `redirects`: whole ids that the source has merged into others."""
    claims: dict[tuple[object, ...], Claim] = {}
    quarantined: list[QuarantinedRow] = []
    aliases: dict[str, tuple[str, ...]] = {}
    for row in rows:
        subject_id = None
        try:
            subject_id = _subject_id(source, row)
            claim = _claim(source, row, subject_id)
        except ValueError as error:
            reason = str(error) if subject_id else f"{error}; nothing is withdrawn while a row names no subject"
            quarantined.append(QuarantinedRow(row.origin, reason, printable(" | ".join(row.raw)), subject_id))
        else:
            claims.setdefault(
                (claim.subject, claim.object, claim.rank, claim.start, claim.end, claim.qualifiers), claim
            )
            if row.aliases:
                aliases[claim.subject.id] = tuple(clean_label(alias, "an alias") for alias in row.aliases)
    return Snapshot(
        source=source.source,
        relation=source.relation,
        provenance=provenance,
        claims=tuple(claims.values()),
        quarantined=tuple(quarantined),
        complete=complete and source.snapshot == "complete" and all(row.subject_id for row in quarantined),
        aliases=aliases,
        redirects=dict(redirects or {}),
    )


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


def _claim(source: Source, row: Row, subject_id: str) -> Claim:
    """The claim of a good row. Raises ValueError for what is wrong with a bad one."""
    if row.problem:
        raise ValueError(row.problem)
    subject = Entity(subject_id, clean_label(row.subject, "the label of the subject"))
    label = clean_label(row.object, "the label of the object")
    thing = Entity(_object_id(source, row, label), label)
    if subject.id == thing.id or (not row.object_id and label_key(subject.label) == label_key(label)):
        raise ValueError(f"the object is the subject itself: {label}")
    rank = row.rank or "normal"
    if rank not in _RANKS:
        raise ValueError(f"the rank is {printable(rank, 60)}, not one of {', '.join(_RANKS)}")
    return Claim(
        source=source.source,
        relation=source.relation,
        subject=subject,
        object=thing,
        origin=row.origin,
        rank=cast(Rank, rank),
        start=clean_date(row.start, "the start") if row.start else None,
        end=_end(row.end),
        qualifiers=tuple(
            (name, clean_label(value, f"the {name} of the subject")) for name, value in sorted(row.qualifiers.items())
        ),
    )


def _end(value: str) -> str | None:
    if not value:
        return None
    return value if value == UNKNOWN else clean_date(value, "the end")
