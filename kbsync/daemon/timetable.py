"""What the daemon begins when: passes by their policies' schedules, chores by their periods.

Schedules live in memory and are rebuilt from the policies at every start; what was due meanwhile is in the ledger,
which learns when each policy is due next as soon as that changes.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import structlog
from apscheduler.events import EVENT_JOB_ERROR, EVENT_JOB_MAX_INSTANCES, EVENT_JOB_MISSED, JobEvent
from apscheduler.executors.debug import DebugExecutor
from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.jobstores.memory import MemoryJobStore
from apscheduler.schedulers import SchedulerNotRunningError
from apscheduler.schedulers.background import BackgroundScheduler

from kbsync.daemon.chores import Chore
from kbsync.errors import KbsyncError, place_of
from kbsync.ledger import Ledger
from kbsync.policy import Policy
from kbsync.pulse import BEAT
from kbsync.schedule import Cron, Every, next_due, trigger

__all__ = ["Planned", "Timetable"]

UNFINISHED = ("failed", "cancelled")
"""How a pass ended that the next start, or a reload, begins again at once."""
AGAIN = ", again"
"""What the job of a pass that begins again has after the policy's name."""
EVENTS = {
    EVENT_JOB_ERROR: "job_error",
    EVENT_JOB_MISSED: "job_missed",
    EVENT_JOB_MAX_INSTANCES: "job_skipped_still_running",
}

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Planned:
    """A policy's passes: when, and the first of them. `noted`: whether the ledger has that one."""

    times: Cron | Every
    first: datetime
    noted: bool


class Timetable:
    """Begins passes by `begin(policy)` and chores by `do(chore)`, in threads of its own, and calls `beat` as long as it
    lives. `tell(kind, job, problem)` hears what could not be begun.

    A pass waits for its turn in `begin` and says by `begun` that it has come. What is due meanwhile is the same pass;
    what is due after that is another one, which follows at once.
    """

    def __init__(
        self,
        ledger: Ledger,
        begin: Callable[[str], None],
        do: Callable[[Chore], None],
        beat: Callable[[], None],
        tell: Callable[[str, str, str], None],
    ) -> None:
        self.due: dict[str, datetime] = {}
        """When each policy is due: the scheduler itself may hang, with its lock held, while the main loop asks."""
        self._under_way: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._waiting: set[str] = set()
        """Policies whose pass has not had its turn yet."""
        self._ledger = ledger
        self._begin = begin
        self._do = do
        self._beat = beat
        self._tell = tell
        self._scheduler = BackgroundScheduler(
            jobstores={"default": MemoryJobStore()},
            # "beside": chores that do not wait for the work, however many passes do. "own": in the scheduler's own
            # thread, which so beats itself, however busy the pools are.
            executors={
                "default": ThreadPoolExecutor(max_workers=4),
                "beside": ThreadPoolExecutor(max_workers=2),
                "own": DebugExecutor(),
            },
            job_defaults={"misfire_grace_time": None, "coalesce": True, "max_instances": 1},
            timezone=UTC,
        )
        self._scheduler.add_listener(self._hear, sum(EVENTS))

    def start(self) -> None:
        """Begin what is due from now on."""
        self._scheduler.start()

    def stop(self) -> None:
        """Begin nothing more; what runs goes on."""
        self._scheduler.shutdown(wait=False)

    def plan(self, policies: Mapping[str, Policy], *, anew: bool = True) -> dict[str, Planned]:
        """The passes of these policies; nothing changes yet. Due now, unless a pass is under way, is a policy that
        never ran, one that is overdue by the ledger, and with `anew` one whose last pass was interrupted, put back or
        failed. Raises LedgerError and Busy."""
        now, planned = datetime.now(UTC), {}
        for name, policy in policies.items():
            with self._ledger.read() as db:
                state = db.schedule_state(name)
                latest = db.runs(1, policy=name)
            last, due = state.last_started, self.due.get(name, state.next_due)
            if self._under_way[name]:
                last = now
            elif anew and latest and latest[0].status in UNFINISHED:
                last = None
            first = next_due(policy.schedule, last, now, due)
            planned[name] = Planned(trigger(policy.schedule), first, first == state.next_due)
        return planned

    def set_passes(self, planned: Mapping[str, Planned]) -> None:
        """Passes are these, and no others. One that the scheduler has begun since they were planned is not due twice:
        the scheduler and who minds the clock may both find that it is time."""
        now = datetime.now(UTC)
        with self._nothing_begins():
            for job in self._scheduler.get_jobs():
                if job.func == self._run and job.args[0] not in planned:
                    job.remove()
            for name, passes in planned.items():
                job = self._scheduler.get_job(name)
                begun = job is not None and name in self.due and job.next_run_time > self.due[name]
                following = passes.times.get_next_fire_time(now, now) if begun else None
                self.due[name] = first = following or passes.first
                self._scheduler.add_job(
                    self._run,
                    passes.times,
                    args=[name],
                    id=name,
                    replace_existing=True,
                    next_run_time=first,
                )
        if changed := [name for name, passes in planned.items() if not passes.noted]:
            self.note(*changed)

    def set_chores(self, chores: Iterable[Chore]) -> None:
        """Chores are these, each first due in one period of its own."""
        beats = Every(seconds=BEAT, timezone=UTC)
        self._scheduler.add_job(self._beat, beats, id="pulse", executor="own", replace_existing=True)
        for chore in chores:
            self._scheduler.add_job(
                self._do,
                Every(seconds=chore.every.total_seconds(), timezone=UTC),
                [chore],
                id=f"chore {chore.name}",
                executor="default" if chore.alone else "beside",
                replace_existing=True,
            )

    def again(self, name: str, seconds: float = 1.0) -> None:
        """A pass begins again in a second, after the command that cancelled it. A job of its own: the policy's job
        would be skipped while it is still ending."""
        soon = datetime.now(UTC) + timedelta(seconds=seconds)
        self._scheduler.add_job(self._run, "date", [name], run_date=soon, id=name + AGAIN, replace_existing=True)

    def begun(self, name: str) -> None:
        """The turn of the policy's pass has come."""
        self._waiting.discard(name)
        self.look_ahead(name)

    def look_ahead(self, name: str) -> None:
        """When the scheduler will begin the policy's next pass."""
        job = self._scheduler.get_job(name)
        if job is not None and job.next_run_time is not None:
            self.due[name] = job.next_run_time

    def note(self, *names: str) -> None:
        """Tell the ledger when policies are due. Where it cannot be told, that is logged: nothing depends on it."""
        try:
            with self._ledger.write() as db:
                for name in names:
                    db.set_schedule_state(replace(db.schedule_state(name), next_due=self.due.get(name)))
        except KbsyncError as error:
            log.error("not_noted", problem=error.message, hint=error.hint)

    @contextmanager
    def _nothing_begins(self) -> Iterator[None]:
        """What the scheduler is about to begin is begun by now, or after the block."""
        with suppress(SchedulerNotRunningError):  # before the start and after the end
            self._scheduler.pause()
        try:
            yield
        finally:
            with suppress(SchedulerNotRunningError):
                self._scheduler.resume()

    def _run(self, name: str) -> None:
        with self._counting:
            self._under_way[name] += 1
        self._waiting.add(name)
        try:
            self._begin(name)
        finally:
            self._waiting.discard(name)
            with self._counting:
                self._under_way[name] -= 1

    def _hear(self, event: JobEvent) -> None:
        name = event.job_id.removesuffix(AGAIN)
        if event.code == EVENT_JOB_MAX_INSTANCES and name in self.due:
            if name not in self._waiting:
                # At once, to wait for its turn; but in a second where the job for that is itself still ending.
                self.again(name, 0.0 if name == event.job_id else 1.0)
            return
        error = getattr(event, "exception", None)
        self._tell(EVENTS[event.code], event.job_id, place_of(error) if error else "")
