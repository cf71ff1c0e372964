"""Recording snapshots: which claims begin, end, stay and count; provenance; quarantine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbsync.errors import LedgerError
from kbsync.facts import Claim, Entity, Provenance, QuarantinedRow, Snapshot
from kbsync.ledger import Ledger, RecordCounts, ScheduleState, SourceState
from tests.ledgers import NOON, RELATION, Clock, claim, claims, difference, dump, opened, snapshot, sync, tampered

pytestmark = pytest.mark.usefixtures("database")


def said(ledger: Ledger, source: str = "feed") -> dict[str, str]:
    """Subject -> object of a source's live claims."""
    with ledger.read() as db:
        return {one.subject.label: one.object.label for one in db.claims_of(source)}


def seen(ledger: Ledger) -> dict[str, int]:
    """Subject -> how often its live claim was seen."""
    with ledger.read() as db:
        return {one.subject.label: one.seen for one in db.claims_of("feed")}


def record(ledger: Ledger, one: Snapshot) -> RecordCounts:
    """Record a snapshot in a run of its own; the counts."""
    with ledger.write() as db:
        return db.record(db.start_run("astronomy", model=None, trigger="sync", user="me"), one)


def bad(subject: str | None, origin: str = "line 9") -> QuarantinedRow:
    """A row of `subject` that cannot be used."""
    return QuarantinedRow(origin, "no label", "raw text", subject and f"feed:{subject}")


def test_claims_come_back_as_they_were_said(tmp_path: Path) -> None:
    """Every field of a claim survives, in the order of the source."""
    full = claim("Vega", "Lyra", "wds:Q3427-1", rank="preferred", start="1930-01-01", end="2030")
    plain = claim("Deneb", "Cygnus", "line 7")
    with opened(tmp_path) as ledger:
        assert record(ledger, snapshot(full, plain)) == RecordCounts(rows=2, added=2, ended=0, seen=0, quarantined=0)
        with ledger.read() as db:
            assert db.claims([RELATION]) == db.claims_of("feed") == [full, plain]
            assert db.claims(["governor"]) == db.claims([]) == db.claims_of("other") == []


def test_saying_the_same_again_writes_nothing_but_the_fetch(tmp_path: Path) -> None:
    """An unchanged pass counts every claim as seen once more without touching the claim table."""
    with opened(tmp_path) as ledger:
        record(ledger, snapshot(*claims(Vega="Lyra", Deneb="Cygnus")))
        before = _claim_rows(tmp_path)
        assert record(ledger, snapshot(*claims(Vega="Lyra", Deneb="Cygnus"))).seen == 2
        assert _claim_rows(tmp_path) == before
        assert seen(ledger) == {"Vega": 2, "Deneb": 2}


def _claim_rows(folder: Path) -> list[str]:
    return [line for line in dump(folder) if line.startswith('INSERT INTO "claim"')]


def test_a_changed_claim_ends_and_another_begins(tmp_path: Path) -> None:
    """A new object, label, rank or date is a new claim, seen once; the old one stays in the table with its end."""
    first, second = claim("Vega", "Lyra"), claim("Deneb", "Cygnus", "line 3")
    for changed in (
        replace(first, object=Entity("feed:Draco", "Draco")),
        replace(first, object=Entity("feed:Lyra", "the Lyre")),
        replace(first, rank="deprecated"),
        replace(first, end="2026"),
    ):
        with TemporaryDirectory(dir=tmp_path) as name, opened(Path(name)) as ledger:
            record(ledger, snapshot(first, second))
            assert record(ledger, snapshot(changed, second)) == RecordCounts(2, added=1, ended=1, seen=1, quarantined=0)
            with ledger.read() as db:
                assert set(db.claims_of("feed")) == {changed, replace(second, seen=2)}
            assert len(_claim_rows(Path(name))) == 3


def test_an_absent_subject_ends_only_in_a_complete_snapshot(tmp_path: Path) -> None:
    """A partial snapshot ends the old claim of a subject that it speaks about, and of no other."""
    with opened(tmp_path) as ledger:
        record(ledger, snapshot(*claims(Vega="Lyra", Deneb="Cygnus")))
        record(ledger, snapshot(*claims(Vega="Draco"), complete=False))
        assert said(ledger) == {"Deneb": "Cygnus", "Vega": "Draco"}
        record(ledger, snapshot(*claims(Vega="Draco")))
        assert said(ledger) == {"Vega": "Draco"}


def test_an_increment_speaks_about_what_it_covers_alone(tmp_path: Path) -> None:
    """A covered subject without a row has ended; every other claim counts as said again, and keeps its bad rows."""
    with opened(tmp_path) as ledger:
        first = snapshot(*claims(Vega="Lyra", Deneb="Cygnus", Altair="Aquila"), quarantined=[bad("Rigel")])
        record(ledger, first)
        covers = frozenset({"feed:Vega", "feed:Deneb", "feed:Sirius"})
        counts = record(ledger, snapshot(*claims(Vega="Draco", Sirius="Canis Major"), covers=covers))
        assert counts == RecordCounts(rows=2, added=2, ended=2, seen=1, quarantined=0)
        assert said(ledger) == {"Vega": "Draco", "Altair": "Aquila", "Sirius": "Canis Major"}
        assert seen(ledger) == {"Vega": 1, "Altair": 2, "Sirius": 1}
        with ledger.read() as db:
            assert [row.row.subject_id for row in db.quarantined("feed")] == ["feed:Rigel"]
        record(ledger, snapshot(covers=frozenset({"feed:Rigel"})))
        with ledger.read() as db:
            assert db.quarantined("feed") == []
        assert seen(ledger) == {"Vega": 2, "Altair": 3, "Sirius": 2}


def test_an_increment_with_an_unreadable_row_ends_nothing(tmp_path: Path) -> None:
    """The bad row may be about any subject that it covers."""
    with opened(tmp_path) as ledger:
        record(ledger, snapshot(*claims(Vega="Lyra", Deneb="Cygnus")))
        record(ledger, snapshot(quarantined=[bad(None)], covers=frozenset({"feed:Vega"})))
        assert said(ledger) == {"Vega": "Lyra", "Deneb": "Cygnus"}
        assert seen(ledger) == {"Vega": 1, "Deneb": 2}


def test_a_quarantined_row_keeps_its_subject(tmp_path: Path) -> None:
    """A subject that is only there in a row that cannot be used loses nothing; its claim was not seen, though, and goes
    on counting when it is readable again."""
    with opened(tmp_path) as ledger:
        record(ledger, snapshot(*claims(Vega="Lyra", Deneb="Cygnus")))
        record(ledger, snapshot(*claims(Vega="Lyra"), quarantined=[bad("Deneb")]))
        record(ledger, snapshot(*claims(Vega="Lyra"), quarantined=[bad("Deneb")]))
        assert seen(ledger) == {"Vega": 3, "Deneb": 1}
        record(ledger, snapshot(*claims(Vega="Lyra", Deneb="Cygnus")))
        assert seen(ledger) == {"Vega": 4, "Deneb": 2}
        record(ledger, snapshot(*claims(Vega="Lyra"), quarantined=[bad("Altair")]))
        assert said(ledger) == {"Vega": "Lyra"}


def test_a_bad_row_that_names_no_subject_keeps_every_subject(tmp_path: Path) -> None:
    """It may be about any of them."""
    with opened(tmp_path) as ledger:
        record(ledger, snapshot(*claims(Vega="Lyra", Deneb="Cygnus")))
        record(ledger, snapshot(*claims(Vega="Lyra"), quarantined=[bad(None)]))
        assert said(ledger) == {"Vega": "Lyra", "Deneb": "Cygnus"}


def test_a_good_row_ends_the_old_claim_beside_a_bad_row(tmp_path: Path) -> None:
    """Where a subject has a good row too, only the claim whose own row is the bad one is kept."""
    with opened(tmp_path) as ledger:
        record(ledger, snapshot(claim("Vega", "Lyra", "s1"), claim("Deneb", "Cygnus", "s2")))
        now = [claim("Vega", "Draco", "s3"), claim("Deneb", "Draco", "s4")]
        record(ledger, snapshot(*now, quarantined=[bad("Vega", "s1"), bad("Deneb", "s9")]))
        with ledger.read() as db:
            found = {(one.subject.label, one.object.label) for one in db.claims_of("feed")}
        assert found == {("Vega", "Lyra"), ("Vega", "Draco"), ("Deneb", "Draco")}


def test_identical_rows_are_one_claim(tmp_path: Path) -> None:
    """The first of them is the claim's place, also when they move."""
    rows = [claim("Vega", "Lyra", f"line {row}") for row in (5, 3, 8)]
    with opened(tmp_path) as ledger:
        assert record(ledger, snapshot(*rows)).added == 1
        assert record(ledger, snapshot(*rows)).seen == 1
        with ledger.read() as db:
            assert db.claims_of("feed") == [replace(rows[0], seen=2)]
        record(ledger, snapshot(*rows[1:]))
        with ledger.read() as db:
            assert db.claims_of("feed") == [replace(rows[1], seen=3)]


def test_a_row_that_moved_is_the_same_claim(tmp_path: Path) -> None:
    """The place is brought up to date; the count goes on; where it was first said is kept."""
    with opened(tmp_path) as ledger:
        record(ledger, snapshot(claim("Vega", "Lyra", "line 2")))
        assert record(ledger, snapshot(claim("Vega", "Lyra", "line 40"))) == RecordCounts(1, 0, 0, 1, 0)
        with ledger.read() as db:
            assert db.claims_of("feed") == [claim("Vega", "Lyra", "line 40", seen=2)]
    assert tampered(tmp_path, "SELECT first_origin FROM claim") == [("line 2",)]


def test_not_modified_counts_as_seen_and_keeps_the_validators(tmp_path: Path) -> None:
    """A 304 lets every claim count one fetch more; what it does not repeat (ETag, body, declaration) is kept."""
    first = Provenance("https://x/feed.csv", NOON, 200, "ab" * 32, etag='"1"', declaration="d1")
    later = NOON + timedelta(hours=6)
    with opened(tmp_path) as ledger:
        record(ledger, snapshot(*claims(Vega="Lyra"), provenance=first, quarantined=[bad("Deneb")]))
        empty = Provenance("https://x/feed.csv", later, 304, "", last_modified="Wed, 01 Jul 2026 12:00:00 GMT")
        assert record(ledger, snapshot(provenance=empty, not_modified=True)) == RecordCounts(0, 0, 0, 1, 1)
        assert seen(ledger) == {"Vega": 2}
        with ledger.read() as db:
            assert db.last_accepted("feed") == replace(
                first, fetched_at=later, status=304, last_modified="Wed, 01 Jul 2026 12:00:00 GMT"
            )
            assert [row.row for row in db.quarantined("feed")] == [bad("Deneb")]


def test_not_modified_without_an_earlier_fetch_is_refused(tmp_path: Path) -> None:
    """There is nothing that such an answer could vouch for."""
    with opened(tmp_path) as ledger, pytest.raises(LedgerError, match="does not have"):
        record(ledger, snapshot(not_modified=True))


def test_sources_do_not_touch_each_other(tmp_path: Path) -> None:
    """A snapshot ends claims of its own source only, and every source counts its own fetches."""
    other = [replace(one, source="other") for one in claims(Vega="Lyra", Altair="Aquila")]
    with opened(tmp_path) as ledger:
        record(ledger, snapshot(*other, source="other"))
        record(ledger, snapshot(*claims(Vega="Lyra")))
        record(ledger, snapshot(*claims(Deneb="Cygnus")))
        assert said(ledger) == {"Deneb": "Cygnus"}
        assert said(ledger, "other") == {"Vega": "Lyra", "Altair": "Aquila"}
        with ledger.read() as db:
            assert {(one.source, one.seen) for one in db.claims([RELATION])} == {("other", 1), ("feed", 1)}
            assert db.last_accepted("nobody") is None


def test_quarantine_tells_what_is_wrong_now_and_what_was(tmp_path: Path) -> None:
    """A bad row waits from the fetch that first had it to the one that no longer has it; a run's own can be asked."""
    clock = Clock()
    with opened(tmp_path, clock) as ledger:
        first = sync(ledger, snapshot(quarantined=[bad("Vega"), bad(None, "line 4"), bad(None, "line 4")]))
        later = clock.turn(hours=1)
        second = sync(ledger, snapshot(quarantined=[bad("Vega"), bad("Deneb")]))
        with ledger.read() as db:
            rows = db.quarantined("feed")
            assert [(row.row, row.since, row.run_id) for row in rows] == [
                (bad("Vega"), NOON, first),
                (bad("Deneb"), later, second),
            ]
            assert [row.row for row in db.quarantined(run_id=first)] == [bad("Vega"), bad(None, "line 4")]
            assert [row.row for row in db.quarantined(run_id=second)] == [bad("Vega"), bad("Deneb")]
            assert db.quarantined(run_id=first)[1].until == later
            assert db.quarantined("other") == []


def test_the_state_of_sources_and_schedules_is_kept(tmp_path: Path) -> None:
    """A cooldown and the truth about a schedule survive a restart; nothing known means nothing wrong."""
    blocked = SourceState("feed", failures=2, blocked=True, retry_at=NOON + timedelta(hours=1), last_error="403")
    schedule = ScheduleState("astronomy", NOON, None, NOON + timedelta(hours=6))
    with opened(tmp_path) as ledger, ledger.write() as db:
        db.set_source_state(SourceState("feed", failures=1))
        db.set_source_state(blocked)
        db.set_schedule_state(schedule)
    with opened(tmp_path) as ledger, ledger.read() as db:
        assert db.source_state("feed") == blocked
        assert db.schedule_state("astronomy") == schedule
        assert db.source_state("other") == SourceState("other")
        assert db.schedule_state("other") == ScheduleState("other")


def test_a_large_change_is_found_by_the_indexes(tmp_path: Path) -> None:
    """Ten thousand claims, one in a hundred changed, a tenth gone, the rest moved by a line: exact, in seconds."""
    stars = {f"Star{number}": f"C{number % 88}" for number in range(10_000)}
    with opened(tmp_path) as ledger:
        assert record(ledger, snapshot(*claims(**stars))).added == 10_000
        now = {name: "Draco" if number % 100 == 0 else c for number, (name, c) in enumerate(stars.items())}
        moved = [replace(one, origin=f"{one.origin}b") for one in claims(**now)][:9000]
        assert record(ledger, snapshot(*moved)) == RecordCounts(9000, added=90, ended=1090, seen=8910, quarantined=0)
        with ledger.read() as db:
            assert {replace(one, seen=1) for one in db.claims_of("feed")} == set(moved)


Row = tuple[str, str]
_ROWS = st.lists(st.tuples(st.sampled_from("ABCD"), st.sampled_from("xyz")), max_size=6)
_FETCHES = st.lists(
    st.tuples(_ROWS, st.sets(st.sampled_from("ABCD"), max_size=2), st.sampled_from(["complete", "partial", "same"])),
    max_size=8,
)


def _expected(live: dict[Row, int], rows: Iterable[Row], unreadable: set[str], kind: str) -> dict[Row, int]:
    """What `record` must make of the live claims (row -> times seen), written down plainly."""
    now = {row: live.get(row, 0) + 1 for row in rows}
    present = {subject for subject, _ in now}
    for (subject, object_), times in live.items():
        silent = subject not in present and (kind == "partial" or subject in unreadable)
        if (subject, object_) not in now and silent:
            now[subject, object_] = times
    return now


def test_any_sequence_of_snapshots(tmp_path: Path) -> None:
    """For complete, partial and unchanged snapshots with unreadable rows, in any order, the live claims and their
    counts are those of a plain Python model; a 304 counts for what the last answer with rows said."""
    names = count()

    @settings(max_examples=30, deadline=None)
    @given(_FETCHES)
    def check(fetches: list[tuple[list[Row], set[str], str]]) -> None:
        _follow(ledger, f"source{next(names)}", fetches)

    with opened(tmp_path) as ledger:
        check()


def _follow(ledger: Ledger, source: str, fetches: list[tuple[list[Row], set[str], str]]) -> None:
    live: dict[Row, int] = {}
    last: set[Row] = set()
    for rows, unreadable, kind in fetches:
        if kind == "same":
            if not last:
                continue
            live = {row: times + (row in last) for row, times in live.items()}
            record(ledger, snapshot(source=source, not_modified=True))
        else:
            live, last = _expected(live, rows, unreadable, kind), set(rows)
            lines = [replace(claim(*row, f"line {line}"), source=source) for line, row in enumerate(rows)]
            bad_rows = [bad(subject, f"bad {subject}") for subject in sorted(unreadable)]
            record(ledger, snapshot(*lines, source=source, quarantined=bad_rows, complete=kind == "complete"))
        with ledger.read() as db:
            found = {(one.subject.label, one.object.label): one.seen for one in db.claims_of(source)}
        assert found == live


_PLAIN = st.builds(
    claim, st.sampled_from("ABCD"), st.sampled_from("xyz"), rank=st.sampled_from(["normal", "preferred"])
)
_BAD = st.sampled_from("ABCD").map(bad)


def test_the_guard_is_told_what_differs(tmp_path: Path) -> None:
    """For any two snapshots, whole or partial or increments, with rows that cannot be read and rows said twice, the
    numbers from the database are those worked out row by row; before the first snapshot there are none."""
    names = count()
    rows = st.lists(_PLAIN, max_size=8)

    @settings(max_examples=60, deadline=None)
    @given(rows, rows, st.lists(_BAD, max_size=2), st.booleans(), st.none() | st.sets(st.sampled_from("ABCD")))
    def check(
        old: list[Claim], new: list[Claim], unreadable: list[QuarantinedRow], whole: bool, covers: set[str] | None
    ) -> None:
        source = f"source{next(names)}"
        if covers is not None:
            new = [one for one in new if one.subject.label in covers]
        first = snapshot(*old, source=source)
        after = snapshot(*new, source=source, quarantined=unreadable, complete=whole)
        if covers is not None:
            after = replace(after, covers=frozenset(f"feed:{name}" for name in covers))
        assert record(ledger, first).difference is None
        found = record(ledger, after).difference
        expected = difference(first.claims, after)
        if not (expected.changed or expected.added or expected.removed):
            expected = replace(expected, subjects=0)  # not counted where nothing is compared with it
            found = found and replace(found, subjects=0)
        assert found == expected

    with opened(tmp_path) as ledger:
        check()


def test_an_answer_that_vouches_differs_in_nothing(tmp_path: Path) -> None:
    """A 304 has no rows, and no guard looks at it."""
    with opened(tmp_path) as ledger:
        record(ledger, snapshot(*claims(Vega="Lyra")))
        assert record(ledger, snapshot(not_modified=True)).difference is None
