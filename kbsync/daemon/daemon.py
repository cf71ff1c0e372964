"""`kbsync daemon`: passes on schedule, write commands through the control socket, one piece of work at a time.

An overdue policy runs once at start. A rollback does not wait: it cancels the running edit, which is planned again
after it. SIGTERM and SIGINT end the current work within the grace time and exit 0 (a second one exits at once);
SIGHUP reads kbsync.yaml, sources and policies again, and a broken file leaves the old ones in force.

systemd is told of all that, and hears from the watchdog only while the parts beat: work without progress for `stall` is
cancelled, and where that does not end it, the beats end and systemd starts the daemon anew.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import structlog

from kbsync import hook
from kbsync.catalog import Catalog, load_catalog
from kbsync.commands import BESIDE, UNDO, execute
from kbsync.config import CONFIG, Workspace
from kbsync.control import Gone, serve
from kbsync.daemon.chores import CHORES, Chore, delivery
from kbsync.daemon.clock import ClockWatch
from kbsync.daemon.ending import CLOSING, forced, leave
from kbsync.daemon.reread import reread
from kbsync.daemon.systemd import Manager, monotonic_usec
from kbsync.daemon.timetable import Timetable
from kbsync.daemon.turns import Turns
from kbsync.daemon.work import Work
from kbsync.errors import Busy, Cancelled, KbsyncError, place_of
from kbsync.ledger import Ledger
from kbsync.ledger.writer import Writer
from kbsync.lock import writer_lock
from kbsync.notify.outbox import Outbox, enroll
from kbsync.progress import Progress, silent
from kbsync.pulse import BEAT, NOTED, Pulse
from kbsync.reconcile import SCHEDULED, Reconciler
from kbsync.web.server import serving

__all__ = ["Daemon", "run_daemon"]

USER = "daemon"
NOTICES = 5.0
"""Seconds that a notice on its way has when the daemon ends; then it counts as not delivered."""
AFTER_GRACE = 15.0
"""Seconds after the grace time in which a daemon that stops still closes what it has open."""
log = structlog.get_logger()


def run_daemon(root: Path) -> None:
    """Run until a signal ends it. Raises Busy where another process holds the workspace, ConfigError and LedgerError
    where it cannot start."""
    workspace = Workspace.load(root)
    catalog = load_catalog(workspace)
    with writer_lock(workspace.lock):
        ledger = Ledger.open(workspace.ledger_url)
        try:
            with ledger.led():
                if not Daemon(catalog, ledger).run():
                    leave()
        finally:
            ledger.close()


class Daemon:
    """The running daemon of one workspace. `run` blocks; `stop` ends it from another thread or a signal handler."""

    def __init__(self, catalog: Catalog, ledger: Ledger) -> None:
        self._catalog = catalog
        """What is in force, the workspace with its settings, too: SIGHUP changes all of it or nothing."""
        self._ledger = ledger
        self._turns = Turns()
        self._reloading = threading.Event()
        self._scheduling = threading.Lock()
        self._wake = threading.Event()
        self._pulse = Pulse()
        self._work = Work()
        self._outbox = Outbox()
        self._stalled: float | None = None
        self._manager = Manager.from_environment()
        self._said = ""
        self._waiting: list[str] = []
        """Keys of kbsync.yaml that were changed and wait for the next start."""
        self._clock = ClockWatch()
        self._timetable = Timetable(
            ledger, self._pass, self._do, partial(self._pulse.beat, "scheduler"), self._note_problem
        )

    @property
    def _workspace(self) -> Workspace:
        return self._catalog.workspace

    def run(self) -> bool:
        """Serve until `stop`; whether all that ran has ended. Where it has not, the process must end before its locks
        are given back."""
        self._tell("starting")
        self._reconciler(USER, silent).recover()
        server = serving(self._ledger, self._pulse, lambda: self._catalog)
        with self._signals(), serve(self._workspace.socket, self._handle, urgent=UNDO | BESIDE), server:
            self._timetable.set_passes(self._timetable.plan(self._catalog.policies))
            self._timetable.set_chores((*CHORES, delivery(self._outbox)))
            self._timetable.start()
            self._pulse.beat("scheduler")
            threading.Thread(target=self._note_beats, name="beats", daemon=True).start()
            log.info("daemon_started", workspace=str(self._workspace.root), policies=len(self._catalog.policies))
            self._pulse.phase = "running"
            self._tell(self._state(), READY="1")
            while not self._turns.stopping.is_set():
                self._wake.wait(self._beat_seconds())
                self._wake.clear()
                self._watch()
                self._pulse.beat("main")
                if self._reloading.is_set():
                    self._reloading.clear()
                    self._tell(
                        "reading kbsync.yaml, sources and policies again",
                        RELOADING="1",
                        MONOTONIC_USEC=monotonic_usec(),
                    )
                    self._aside("reload", self._reload)
                if moved := self._clock.moved():
                    self._aside("clock", partial(self._mind_clock, moved))
            self._pulse.phase = "stopping"
            ended = self._finish() and self._end_beats()
        log.info("daemon_stopped")
        return ended

    def _aside(self, what: str, act: Callable[[], None]) -> None:
        """Do what the main loop is not kept by, whatever the ledger does: a database may hang."""

        def do() -> None:
            with suppress(Busy), self._turns.beside(what):
                try:
                    act()
                except Exception as error:
                    self._note_problem("job_error", what, place_of(error))

        threading.Thread(target=do, name=what, daemon=True).start()

    def _note_beats(self) -> None:
        """Now and then the ledger learns the beats of all parts."""
        while not self._turns.stopping.is_set():
            with suppress(Busy), self._turns.beside("beats"):
                self._write_beats()
            self._turns.stopping.wait(NOTED)

    def _write_beats(self, *, ended: bool = False) -> None:
        """`ended`: what is silent from now on has ended as it should."""
        try:
            with self._ledger.write() as db:
                if ended:
                    db.end_beats()
                for part, seconds in ({} if ended else self._pulse.since()).items():
                    db.beat(part, os.getpid(), ago=seconds)
        except KbsyncError as error:  # alive all the same: the next beat says so
            log.warning("beats_not_noted", problem=error.message)

    def _end_beats(self) -> bool:
        """Whether the ledger has learned that nothing beats any more; a database may hang."""
        thread = threading.Thread(target=self._write_beats, kwargs={"ended": True}, daemon=True)
        thread.start()
        thread.join(CLOSING / 2)
        return not thread.is_alive()

    def stop(self) -> None:
        """Ask `run` to end: no new work is begun, the current one ends or is put back within the grace time."""
        self._turns.stopping.set()
        self._wake.set()

    def _reload(self) -> None:
        """Read kbsync.yaml, sources and policies again; where a file is wrong or the ledger away, the old ones stay in
        force, all of them: what may fail comes first."""
        try:
            with self._scheduling:
                workspace, changes = reread(self._workspace)
                catalog = load_catalog(workspace)
                planned = self._timetable.plan(catalog.policies)
                enroll(workspace, self._ledger)
                self._catalog = catalog
                self._waiting = changes.waiting
                self._timetable.set_passes(planned)
        except KbsyncError as error:
            log.error("reload_failed", problem=error.message, hint=error.hint)
        except Exception as error:
            log.error("reload_failed", problem=place_of(error), hint="this is a mistake in kbsync")
        else:
            log.info("reloaded", policies=sorted(catalog.policies), changed=changes.taken)
            if changes.waiting:
                log.warning("restart_needed", file=CONFIG, keys=changes.waiting)
        finally:
            if not self._turns.stopping.is_set():
                self._tell(self._state(), READY="1")

    def _mind_clock(self, moved: float) -> None:
        """The time of day has jumped: what is due when is worked out again."""
        log.warning("clock_moved", seconds=round(moved))
        with self._scheduling:
            self._timetable.set_chores((*CHORES, delivery(self._outbox)))
            try:
                self._timetable.set_passes(self._timetable.plan(self._catalog.policies, anew=False))
            except KbsyncError as error:
                log.error("not_rescheduled", problem=error.message, hint=error.hint)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT stop (the second one exits at once), SIGHUP reloads; only where run in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def end(number: int, _frame: FrameType | None) -> None:
            if self._turns.stopping.is_set():
                os._exit(128 + number)
            self.stop()

        def again(_number: int, _frame: FrameType | None) -> None:
            self._reloading.set()
            self._wake.set()

        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
        signal.signal(signal.SIGHUP, again)
        try:
            with forced(self._turns.stopping, lambda: float(self._workspace.settings.grace)):
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _finish(self) -> bool:
        """Give what goes on half of the grace time to end by itself, then cancel it: it is put back. Commands that it
        runs have all of the time: what was published is announced. Whether all has ended."""
        self._timetable.stop()
        grace = float(self._workspace.settings.grace)
        doing = self._work.words()
        status = f"stopping, waiting for the {doing}" if doing else "stopping"
        self._tell(status, STOPPING="1", EXTEND_TIMEOUT_USEC=str(round((grace + AFTER_GRACE) * 1e6)))
        end, half = time.monotonic() + grace, grace / 2
        notices = threading.Thread(target=self._outbox.stop, args=(min(NOTICES, half),), name="notices", daemon=True)
        notices.start()
        if self._turns.left(half):
            log.info("cancelling", reason="stopping")
            self._turns.cancelled.set()
        left = self._turns.left(end - time.monotonic())
        if left:  # a command may be all that it waits for
            hook.ENDING.set()
            left = self._turns.left(5 * hook.LOOK)
        notices.join(max(end - time.monotonic(), 5 * hook.LOOK))
        if notices.is_alive():  # one is being noted
            left.append("notices")
        if not left:
            hook.ENDING.clear()
        else:
            log.error("work_abandoned", reason=f"{', '.join(left)}: did not end within {grace:g} s")
        return not left

    # What watches the work, and what the service manager hears ---------------------------------------------------

    def _beat_seconds(self) -> float:
        """How often the main loop comes round: at least three times within the watchdog's patience."""
        return min(BEAT, (self._manager.watchdog or math.inf) / 3)

    def _watch(self) -> None:
        """Cancel work that stalls; let the part `work` beat unless even that did not end it; tell the manager."""
        if not self._hung():
            self._pulse.beat("work")
        if self._manager.watchdog is not None and not self._pulse.stuck():
            self._manager.say(WATCHDOG="1")
        self._tell(self._state())

    def _hung(self) -> bool:
        """Whether the work has gone on without progress for longer than it may, though it was cancelled."""
        limit, quiet = float(self._workspace.settings.stall), self._work.silent_for()
        if quiet is None or quiet <= limit:
            return False
        since = self._stalled  # the work may end at any moment, and this with it
        if since is None:
            since = self._stalled = time.monotonic()
            self._turns.cancelled.set()
            problem = f"no progress for {limit:.0f} s: cancelled (`stall` in kbsync.yaml allows more)"
            self._aside("stall", partial(self._note_problem, "work_stalled", self._work.words(), problem))
        return time.monotonic() - since > float(self._workspace.settings.grace)

    def _state(self) -> str:
        """What is going on, or what comes next, in words."""
        stuck = self._pulse.stuck()
        if stuck:
            return "stuck: " + ", ".join(f"{part} for {seconds:.0f} s" for part, seconds in stuck.items())
        if doing := self._work.words():
            return doing
        restart = f"; a restart takes {', '.join(self._waiting)} of {CONFIG}" if self._waiting else ""
        due = [self._timetable.due[name] for name in self._catalog.policies if name in self._timetable.due]
        coming = f"next pass {min(due):%Y-%m-%d %H:%M} UTC" if due else "no policy is scheduled"
        return f"idle, {coming}{restart}"

    def _tell(self, status: str, **fields: str) -> None:
        """Tell the manager, but not the same status twice."""
        if fields or status != self._said:
            self._said = status
            self._manager.say(**fields, STATUS=status)

    @contextmanager
    def _doing(self, what: str, *, undo: bool = False, gone: Gone = lambda: False) -> Iterator[None]:
        """The one piece of work that goes on. Raises what `Turns.one` raises."""
        with self._turns.one(what, undo=undo, gone=gone):
            self._work.begin(what)
            self._wake.set()
            try:
                yield
            finally:
                self._work.end()
                self._wake.set()
                self._stalled = None

    def _do(self, chore: Chore) -> None:
        """One chore; alone, or beside what else is going on."""
        what = f"chore {chore.name}"
        with suppress(Busy), self._doing(what) if chore.alone else self._turns.beside(what):
            try:
                chore.act(self._reconciler(USER, self._work.progress if chore.alone else silent))
            except Cancelled as error:
                log.info("chore_put_off", chore=chore.name, reason=error.message)
            except KbsyncError as error:
                log.error("chore_failed", chore=chore.name, problem=error.message, hint=error.hint)
            except Exception as error:
                self._note_problem("job_error", what, place_of(error))

    def _pass(self, name: str) -> None:
        """One scheduled pass of a policy."""
        with suppress(Busy), self._doing(f"pass of {name}"):
            if name not in self._catalog.policies:
                return
            self._timetable.begun(name)
            try:
                reports = self._reconciler(USER, self._work.progress).sync([name], trigger=SCHEDULED)
                for report in reports:
                    if report.run_id is None and report.problems:  # no run could begin, so none says how it ended
                        raise report.problems[0]
            except Cancelled as error:
                log.info("pass_put_back", policy=name, reason=error.message)
                # What stalled may stall again: it waits for its next time.
                if self._stalled is None and not self._turns.stopping.is_set():
                    self._timetable.again(name)
            except KbsyncError as error:
                log.error("pass_failed", policy=name, problem=error.message, hint=error.hint)
            except Exception as error:
                self._note_problem("job_error", name, place_of(error))
            self._timetable.look_ahead(name)
            self._timetable.note(name)

    def _handle(
        self, command: str, arguments: dict[str, Any], user: str, progress: Progress, gone: Gone
    ) -> dict[str, Any]:
        """A write command from the control socket. An undo goes before the work that is running."""
        what = f"{command} by {user}"
        if command in BESIDE:
            with self._turns.beside(what):
                return self._execute(command, arguments, user, progress)
        try:
            with self._doing(what, undo=command in UNDO, gone=gone):
                return self._execute(command, arguments, user, self._work.watching(progress))
        except Cancelled as error:
            if gone():
                log.info("command_dropped", command=command, user=user, reason=error.message)
            raise

    def _execute(self, command: str, arguments: dict[str, Any], user: str, progress: Progress) -> dict[str, Any]:
        log.info("command", command=command, user=user)
        try:
            return execute(self._reconciler(user, progress), command, arguments)
        except KbsyncError:
            raise
        except Exception as error:
            # Where, not what: the text of a foreign error may have a secret in it, and its traceback, too.
            log.error("command_failed", command=command, problem=place_of(error))
            raise KbsyncError(f"{command}: {place_of(error)}", hint="this is a mistake in kbsync") from error

    def _reconciler(self, user: str, progress: Progress) -> Reconciler:
        catalog = self._catalog  # one of them, though SIGHUP comes
        return Reconciler(catalog.workspace, catalog, self._ledger, user, progress, self._turns.cancelled)

    def _note(self, write: Callable[[Writer], None]) -> None:
        """Write to the ledger what nothing depends on: a full disk or a server that is away must not end the daemon."""
        try:
            with self._ledger.write() as db:
                write(db)
        except KbsyncError as error:
            log.error("not_noted", problem=error.message, hint=error.hint)

    def _note_problem(self, kind: str, policy: str, problem: str) -> None:
        detail: dict[str, Any] = {"policy": policy, "problem": problem}
        log.error(kind, **detail)
        self._note(lambda db: db.audit(USER, kind, detail))
