"""Notices in the ledger: told once while a trouble lasts, given to each channel once, never to one that came later."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbsync.ledger import Ledger
from kbsync.ledger.notices import DeliveryRow, NoticeRow, in_turn
from tests.ledgers import NOON, Clock, opened

pytestmark = pytest.mark.usefixtures("database")

ALL = ("held", "rejected", "conflict", "failed", "stale", "faded")
THREAD = "stale sky stars constellation"


@pytest.fixture
def clock() -> Clock:
    """Noon, until it is turned."""
    return Clock()


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock, database: str) -> Iterator[Ledger]:
    """An empty ledger."""
    with opened(tmp_path, clock) as made:
        yield made


def tell(ledger: Ledger, thread: str = THREAD) -> bool:
    """A notice; whether it was told."""
    with ledger.write() as db:
        return db.notify("stale", thread, f"{thread} is late")


def over(ledger: Ledger, thread: str = THREAD) -> bool:
    """The trouble is over; whether that was told."""
    with ledger.write() as db:
        return db.recovered(thread, f"{thread} is in time")


def kinds(ledger: Ledger) -> list[str]:
    """The kinds of all notices, oldest first."""
    with ledger.read() as db:
        return [notice.kind for notice in reversed(db.notices(None))]


def waiting(ledger: Ledger, channel: str, clock: Clock, **on: tuple[str, ...]) -> list[NoticeRow]:
    """What is due on a channel, which takes these kinds (default: all)."""
    with ledger.write() as db:
        db.enqueue({name: on.get(name, ALL) for name in db.channels()})
    with ledger.read() as db:
        return [notice for notice, _ in db.due(channel, clock())]


def channels(ledger: Ledger, *names: str) -> None:
    """What kbsync.yaml names."""
    with ledger.write() as db:
        db.set_channels(names)


def test_what_lasts_is_told_once_and_told_again_after_it_had_recovered(ledger: Ledger) -> None:
    assert [tell(ledger), tell(ledger), over(ledger), over(ledger), tell(ledger)] == [True, False, True, False, True]
    assert kinds(ledger) == ["stale", "recovered", "stale"]


def test_nothing_recovers_that_nobody_was_told_of(ledger: Ledger) -> None:
    assert not over(ledger)


def test_what_happens_anew_each_time_is_told_each_time(ledger: Ledger) -> None:
    for _ in range(2):
        with ledger.write() as db:
            assert db.notify("conflict", "conflict sky", "2 new conflicts", again=True)
    assert kinds(ledger) == ["conflict", "conflict"]


def test_threads_stand_for_themselves_and_troubles_are_those_that_have_not_recovered(ledger: Ledger) -> None:
    for thread in ("one", "two", "three"):
        tell(ledger, thread)
    over(ledger, "two")
    with ledger.read() as db:
        assert [notice.thread for notice in db.troubles()] == ["three", "one"]
        assert db.newest_of("two") == db.notices(1)[0]
        assert db.newest_of("four") is None


def test_a_notice_has_an_id_of_its_own_that_stays(ledger: Ledger) -> None:
    tell(ledger, "one")
    tell(ledger, "two")
    with ledger.read() as db:
        first, second = db.notices()
        assert first.uid != second.uid
        assert first.uid == db.notices()[0].uid


def test_a_channel_gets_each_notice_once_but_none_from_before_it_was_there(ledger: Ledger, clock: Clock) -> None:
    tell(ledger, "before")
    channels(ledger, "ops")
    tell(ledger, "after")
    assert [one.thread for one in waiting(ledger, "ops", clock)] == ["after"]
    assert [one.thread for one in waiting(ledger, "ops", clock)] == ["after"]
    channels(ledger, "ops", "new")
    assert waiting(ledger, "new", clock) == []
    channels(ledger, "new")
    tell(ledger, "while it was away")
    channels(ledger, "new", "ops")
    assert waiting(ledger, "ops", clock) == []


def test_a_channel_gets_the_kinds_that_it_takes_and_hears_of_their_end(ledger: Ledger, clock: Clock) -> None:
    channels(ledger, "ops", "pager")
    tell(ledger)
    with ledger.write() as db:
        db.notify("held", "held sky", "run 3 waits")
    over(ledger)
    on = {"pager": ("stale",), "ops": ("held",)}
    assert [one.kind for one in waiting(ledger, "pager", clock, **on)] == ["stale", "recovered"]
    assert [one.kind for one in waiting(ledger, "ops", clock, **on)] == ["held"]


def test_what_was_delivered_given_up_or_is_for_later_is_not_due(ledger: Ledger, clock: Clock) -> None:
    channels(ledger, "ops")
    for thread in ("delivered", "given up", "later", "now"):
        tell(ledger, thread)
    waiting(ledger, "ops", clock)
    later = clock.turn(hours=1)
    ends = {"delivered": {"delivered_at": NOON, "next_at": None}, "given up": {"next_at": None}, "later": {}, "now": {}}
    with ledger.write() as db:
        for notice, row in db.due("ops", later):
            tried = replace(row, attempts=1, next_at=later, error="503")
            db.note_delivery(replace(tried, **ends[notice.thread]))
    assert [one.thread for one in waiting(ledger, "ops", clock)] == ["later", "now"]
    clock.turn(seconds=-1)
    assert waiting(ledger, "ops", clock) == []
    with ledger.read() as db:
        rows = [row for rows in db.deliveries([one.id for one in db.notices()]).values() for row in rows]
    assert sorted(row.given_up for row in rows) == [False, False, False, True]


def test_what_was_never_tried_is_due_though_the_clock_went_back(ledger: Ledger, clock: Clock) -> None:
    channels(ledger, "ops")
    tell(ledger)
    clock.turn(hours=-1)
    assert len(waiting(ledger, "ops", clock)) == 1


def test_a_wait_that_a_clock_far_ahead_wrote_holds_nothing_up(ledger: Ledger, clock: Clock) -> None:
    channels(ledger, "ops")
    tell(ledger, "one")
    tell(ledger, "two")
    waiting(ledger, "ops", clock)
    with ledger.write() as db:
        _, row = db.due("ops", clock())[0]
        db.note_delivery(replace(row, attempts=1, next_at=clock() + timedelta(days=365), error="503"))
    assert [one.thread for one in waiting(ledger, "ops", clock)] == ["two", "one"]


WAITING = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.integers(-9, 9)), max_size=8)


@given(WAITING, st.integers(0, 9))
def test_a_thread_goes_out_in_order_and_not_while_its_first_notice_or_the_whole_channel_waits(
    rows: list[tuple[str, int, int]], delivered: int
) -> None:
    """Rows: thread, attempts, minutes until the next one."""
    found = [
        (
            NoticeRow(number, "stale", thread, None, None, "", {}, NOON),
            DeliveryRow(number, "ops", attempts, NOON + timedelta(minutes=minutes), None, ""),
        )
        for number, (thread, attempts, minutes) in enumerate(rows, 1)
    ]
    free = in_turn(found, delivered, NOON)
    waits = {row.notice_id for _, row in found if row.attempts and row.next_at is not None and row.next_at > NOON}
    whole = {
        thread: [notice.id for notice, _ in found if notice.thread == thread] for thread in {row[0] for row in rows}
    }
    for thread, ids in whole.items():
        expected = [] if ids[0] in waits or any(number > delivered for number in waits) else ids
        assert [notice.id for notice, _ in free if notice.thread == thread] == expected


def test_a_stopped_channel_gets_nothing_until_it_is_resumed_and_then_only_what_is_new(
    ledger: Ledger, clock: Clock
) -> None:
    channels(ledger, "ops")
    tell(ledger, "waiting")
    waiting(ledger, "ops", clock)
    with ledger.write() as db:
        db.stop_channel("ops", "410")
    tell(ledger, "meanwhile")
    assert waiting(ledger, "ops", clock) == []
    with ledger.write() as db:
        assert db.channels()["ops"].stopped == "410"
        db.resume_channel("ops")
    tell(ledger, "new")
    assert [one.thread for one in waiting(ledger, "ops", clock)] == ["new"]
