"""From rows to a snapshot: which rows are claims, which wait in quarantine, and what the snapshot still vouches for."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbsync.connectors.rows import UNKNOWN, Row, snapshot_of
from kbsync.facts import Provenance, Snapshot
from kbsync.policy import Source

PROVENANCE = Provenance("feed.csv", datetime(2026, 1, 1, tzinfo=UTC), 200, "0" * 64)


def source(**keys: Any) -> Source:
    return Source.model_validate({"source": "stars", "type": "csv", "relation": "constellation", **keys})


def row(**fields: Any) -> Row:
    return Row(
        **{
            "origin": "line 2",
            "raw": ["Vega", "Lyra"],
            "subject": "Vega",
            "object": "Lyra",
            "object_space": "iau",
            **fields,
        }
    )


def read(*rows: Row, **keys: Any) -> Snapshot:
    return snapshot_of(source(**keys), lambda: rows, PROVENANCE)


def test_a_good_row_is_a_claim() -> None:
    """Ids are `space:local`, labels are clean, and the origin is the row's."""
    snapshot = read(row(subject_id="91262", subject=" Vega "), ids="hip")
    (claim,) = snapshot.claims
    assert (claim.subject.id, claim.subject.label) == ("hip:91262", "Vega")
    assert (claim.object.id, claim.object.label) == ("iau:Lyra", "Lyra")
    assert (claim.source, claim.relation, claim.origin) == ("stars", "constellation", "line 2")
    assert (claim.rank, claim.start, claim.end, claim.seen) == ("normal", None, None, 1)
    assert snapshot.complete
    assert not snapshot.not_modified


def test_without_an_id_the_label_is_the_id() -> None:
    """The source's own name is then the space."""
    assert read(row()).claims[0].key == ("constellation", "stars:Vega")


def test_matching_by_label_ignores_ids_and_case() -> None:
    """Both sides are identified by how they are written, so that sources without common ids agree."""
    a, b = (
        read(one, match="label").claims[0]
        for one in (row(subject_id="1", object_id="wikidata:Q10484"), row(subject="VEGA", object="LYRA"))
    )
    assert (a.subject.id, a.object.id) == (b.subject.id, b.object.id) == ("label:vega", "label:lyra")


def test_equal_rows_are_one_claim() -> None:
    """The first row's origin stays; another object, date or rank is another claim."""
    snapshot = read(
        row(), row(origin="line 3"), row(origin="line 4", object="Cygnus"), row(origin="line 5", end="2020")
    )
    assert [claim.origin for claim in snapshot.claims] == ["line 2", "line 4", "line 5"]


def test_rank_and_dates_are_kept() -> None:
    """They are what a policy decides by; an end that nobody knows is still an end."""
    (claim,) = read(row(rank="preferred", start="2019-01-20T00:00:00Z", end=UNKNOWN)).claims
    assert (claim.rank, claim.start, claim.end) == ("preferred", "2019-01-20T00:00:00Z", "unknown")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"object": "   "}, "the label of the object is empty"),
        ({"object": "Ly\x07ra"}, "control character"),
        ({"object": "{object}"}, "braces"),
        ({"object": "x" * 600}, "at most 512"),
        ({"object": "Vega"}, "the object is the subject itself"),
        ({"object": "VEGA"}, "the object is the subject itself"),
        ({"rank": "best"}, "the rank is best"),
        ({"start": "long ago"}, "ISO 8601"),
        ({"end": "soon"}, "ISO 8601"),
        ({"problem": "the object is an unknown value"}, "the object is an unknown value"),
    ],
)
def test_a_bad_row_waits_and_its_subject_counts_as_present(fields: dict[str, str], reason: str) -> None:
    """The reason and the place are kept; nothing of the subject may be withdrawn for it."""
    snapshot = read(row(subject_id="91262", **fields), ids="hip")
    (bad,) = snapshot.quarantined
    assert not snapshot.claims
    assert (bad.origin, bad.raw, bad.subject_id) == ("line 2", "Vega | Lyra", "hip:91262")
    assert reason in bad.reason
    assert snapshot.complete
    assert snapshot.rows == 1


@pytest.mark.parametrize("fields", [{"subject": " "}, {"subject_id": "\0"}, {"subject": "", "problem": "has 3 fields"}])
def test_a_row_that_names_no_subject_makes_the_snapshot_partial(fields: dict[str, str]) -> None:
    """Whoever the row was about would otherwise seem to be gone."""
    snapshot = read(row(**fields), row(subject="Deneb", object="Cygnus"))
    assert snapshot.quarantined[0].subject_id is None
    assert "nothing is withdrawn" in snapshot.quarantined[0].reason
    assert len(snapshot.claims) == 1
    assert not snapshot.complete


def test_the_object_may_be_written_like_the_subject() -> None:
    """Where both have ids, only equal ids are the same thing: the capital of Luxembourg is Luxembourg."""
    assert read(row(subject_id="Q32", object_id="wikidata:Q1842", object="Vega"), ids="wikidata").claims
    assert not read(row(subject_id="Q32", object_id="wikidata:Q32", object="Lyra"), ids="wikidata").claims


def test_a_partial_source_is_never_complete() -> None:
    """`snapshot: partial` means that a missing row means nothing."""
    assert not read(row(), snapshot="partial").complete


@given(st.lists(st.builds(row, subject=st.text(max_size=8), object=st.text(max_size=8), origin=st.just("x"))))
def test_no_row_is_lost(rows: list[Row]) -> None:
    """Every row is a claim, or equal to one, or in quarantine with a reason."""
    snapshot = read(*rows)
    labels = {(claim.subject.label, claim.object.label) for claim in snapshot.claims}
    assert len(labels) + len(snapshot.quarantined) <= len(rows)
    assert bool(snapshot.claims or snapshot.quarantined) == bool(rows)
    assert all(bad.reason for bad in snapshot.quarantined)


def test_an_origin_is_safe_on_a_terminal() -> None:
    """A place that the source made up has no escapes and no direction marks, of a good row or a bad one."""
    snapshot = read(row(origin="x\x1b]0;y\x07\u202ez"), row(origin="x\x1b[2J", object=""))
    assert [claim.origin for claim in snapshot.claims] == ["x\\x1b]0;y\\x07z"]
    assert [bad.origin for bad in snapshot.quarantined] == ["x\\x1b[2J"]
