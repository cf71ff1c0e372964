"""Who may work now."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from kbsync.daemon.turns import Turns
from kbsync.errors import Busy, Cancelled

PATIENCE = 60.0


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Those who want a turn."""
    with ThreadPoolExecutor(8) as found:
        yield found


class Worker:
    """Works, once it is its turn, until it may end."""

    def __init__(self, pool: ThreadPoolExecutor, turns: Turns, what: str, *, undo: bool = False) -> None:
        self.began, self.may_end, self.gone = threading.Event(), threading.Event(), threading.Event()
        self.found_cancelled = False

        def work() -> None:
            with turns.one(what, undo=undo, gone=self.gone.is_set):
                self.found_cancelled = turns.cancelled.is_set()
                self.began.set()
                assert self.may_end.wait(PATIENCE)

        self.done: Future[None] = pool.submit(work)


def test_an_undo_cancels_what_runs_and_goes_before_all_that_wait(pool: ThreadPoolExecutor) -> None:
    turns = Turns()
    running = Worker(pool, turns, "edit")
    assert running.began.wait(PATIENCE)
    waiting = [Worker(pool, turns, f"sync {number}") for number in range(4)]
    undo = Worker(pool, turns, "rollback", undo=True)
    assert turns.cancelled.wait(PATIENCE)
    running.may_end.set()
    assert undo.began.wait(PATIENCE)
    assert not any(one.began.is_set() for one in waiting)
    for one in (undo, *waiting):
        one.may_end.set()
    for one in (undo, *waiting):
        one.done.result(PATIENCE)
        assert not one.found_cancelled


def test_who_hangs_up_before_its_turn_is_dropped_and_the_next_work_is_not_cancelled(pool: ThreadPoolExecutor) -> None:
    turns = Turns()
    running = Worker(pool, turns, "edit")
    assert running.began.wait(PATIENCE)
    undo = Worker(pool, turns, "rollback", undo=True)
    assert turns.cancelled.wait(PATIENCE)
    undo.gone.set()
    with pytest.raises(Cancelled, match="hung up"):
        undo.done.result(PATIENCE)
    running.may_end.set()
    after = Worker(pool, turns, "sync")
    after.may_end.set()
    after.done.result(PATIENCE)
    assert after.began.is_set()
    assert not undo.began.is_set()
    assert not after.found_cancelled


def test_a_daemon_that_stops_gives_no_more_turns_and_says_what_goes_on(pool: ThreadPoolExecutor) -> None:
    turns = Turns()
    running = Worker(pool, turns, "edit")
    assert running.began.wait(PATIENCE)
    waiting = Worker(pool, turns, "sync")
    turns.stopping.set()
    with pytest.raises(Busy, match="is stopping"):
        waiting.done.result(PATIENCE)
    with pytest.raises(Busy, match="is stopping"), turns.beside("chore"):
        pass
    assert turns.left(0.1) == ["edit"]
    running.may_end.set()
    assert turns.left(PATIENCE) == []
