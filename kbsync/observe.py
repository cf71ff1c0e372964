"""Fetch the sources of a policy: retries with backoff, cooldowns that survive a restart, nothing written but those.

A source that fails does not keep the others waiting: the pass goes on with what answered, and what did not is tried
again next time on the claims that it made last. No transaction is open while a source is asked.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import structlog

from kbsync.connectors import Connector, Redirecting, refuse_older
from kbsync.connectors.retries import jittered, pausing, retrying
from kbsync.errors import Cancelled, KbsyncError, SourceBlocked, SourceError, SourceUnavailable, place_of
from kbsync.facts import Entry, Provenance, Snapshot
from kbsync.ledger import Ledger
from kbsync.ledger.records import SourceState
from kbsync.progress import Progress, silent

__all__ = ["observe"]

BLOCKED_FIRST = timedelta(hours=1)
COOLDOWN_LONGEST = timedelta(hours=24)
MOST_GONE = 2_000
"""Ids that a source is asked about when they are gone from it: more at once are no merges, and the guard's business."""

log = structlog.get_logger()


def observe(
    connectors: Mapping[str, Connector],
    ledger: Ledger,
    *,
    progress: Progress = silent,
    cancelled: threading.Event | None = None,
) -> tuple[list[Snapshot], list[SourceError]]:
    """(snapshots, errors) of the connectors by source name, asked one after the other.

    Raises nothing for a source that fails: its error is among the errors and its cooldown in the ledger. Raises
    Cancelled where `cancelled` is set, also in the middle of a wait.
    """
    snapshots: list[Snapshot] = []
    failures: list[SourceError] = []
    asking = _Asking(ledger, cancelled or threading.Event())
    for done, (name, connector) in enumerate(connectors.items()):
        progress("fetch", done, len(connectors))
        asking.pause(0.0)
        try:
            snapshots.append(asking.ask(name, connector))
        except SourceError as error:
            failures.append(error)
    progress("fetch", len(connectors), len(connectors))
    return snapshots, failures


@dataclass(frozen=True, slots=True)
class _Asking:
    """One pass over the sources."""

    ledger: Ledger
    cancelled: threading.Event

    def pause(self, seconds: float) -> None:
        """Wait; a rollback or the end of the daemon does not wait for it. Raises Cancelled."""
        if self.cancelled.wait(seconds):
            raise Cancelled("cancelled while the sources were asked", hint="the next pass asks them again")

    def ask(self, name: str, connector: Connector) -> Snapshot:
        """What the source says, if it may be asked now; the ledger learns how it behaved. Raises SourceError."""
        host = getattr(connector, "host", None)
        with self.ledger.read() as db:
            states = [db.source_state(one) for one in (name, host and _as_source(host)) if one]
            previous = db.last_accepted(name)
        for state in states:
            if cooling := _cooling(name, state):
                raise cooling
        answers: Counter[str] = Counter()
        try:
            with pausing(self.pause):
                snapshot = retrying()(_fetch, name, connector, previous, self.ledger, answers)
        except SourceError as error:
            self._note_failure(states[0], error)
            raise
        finally:
            with self.ledger.write() as db:
                db.note_answers(name, answers)
        for state in states:
            _note(self.ledger, state, SourceState(state.source))
        return snapshot

    def _note_failure(self, state: SourceState, error: SourceError) -> None:
        log.warning("source_failed", source=state.source, problem=error.message)
        after = [(state, _after_failure(state, error))]
        if error.resting is not None:
            with self.ledger.read() as db:
                rest = db.source_state(_as_source(error.resting))
            after.append((rest, _after_failure(rest, error)))
        until = max((new.retry_at for _, new in after if new.retry_at), default=None)
        if until is not None:
            error.hint = "; ".join(
                filter(None, (f"it is not asked again before {until:%Y-%m-%d %H:%M} UTC", error.hint))
            )
        for before, new in after:
            _note(self.ledger, before, new)


def _fetch(
    name: str, connector: Connector, previous: Provenance | None, ledger: Ledger, answers: Counter[str]
) -> Snapshot:
    """What the connector gives, counted by kind; whatever else than a KbsyncError goes wrong in it may work later, and
    ends no pass."""
    try:
        snapshot = _complemented(connector, previous, ledger)
    except SourceError as error:
        answers[error.outcome] += 1
        raise
    except KbsyncError:
        raise
    except Exception as error:
        answers["failed"] += 1
        raise _mistake(name, error) from error
    answers["304" if snapshot.not_modified else str(snapshot.provenance.status)] += 1
    return replace(snapshot, content=_Content(name, snapshot.content))


@dataclass(frozen=True, slots=True)
class _Content:
    """The rows of a source, which may fail as they are read: that is the source's failure, too."""

    source: str
    rows: Iterable[Entry]

    def __iter__(self) -> Iterator[Entry]:
        try:
            yield from self.rows
        except KbsyncError:
            raise
        except Exception as error:
            raise _mistake(self.source, error) from error


def _mistake(source: str, error: Exception) -> SourceUnavailable:
    problem = f"its connector failed: {place_of(error)}"
    return SourceUnavailable(source, problem, hint="this is a mistake in the connector, or in kbsync")


def _complemented(connector: Connector, previous: Provenance | None, ledger: Ledger) -> Snapshot:
    """A snapshot that is not older than the last accepted one, with what the source says has become of ids that it no
    longer has."""
    snapshot = connector.fetch(previous)
    refuse_older(snapshot.source, snapshot.provenance.as_of, previous)
    if previous is None or snapshot.not_modified or snapshot.covers is not None:
        return snapshot
    if not (isinstance(connector, Redirecting) and snapshot.complete):
        return snapshot
    with ledger.read() as db:
        gone = db.claimed_ids(snapshot.source)
    for entry in snapshot.content:
        if isinstance(entry, tuple):
            gone -= {entry[0], entry[2]}
    if len(gone) > MOST_GONE:
        log.warning("too_many_gone", source=snapshot.source, ids=len(gone))
        return snapshot
    if not gone:
        return snapshot
    merged = {old: new for old, new in connector.redirects(gone).items() if old in gone}
    return replace(snapshot, redirects={**snapshot.redirects, **merged})


def _as_source(host: str) -> str:
    """The name under which the ledger keeps a host's state among those of the sources; no source can have it."""
    return f"host {host}"


def _cooling(source: str, state: SourceState) -> SourceError | None:
    """A source or a host that asked to be left alone is left alone. What lies further ahead than any cooldown was noted
    by a clock that has been put back since."""
    until = state.retry_at
    if until is None or not timedelta(0) < until - datetime.now(UTC) <= COOLDOWN_LONGEST:
        return None
    kind = SourceBlocked if state.blocked else SourceUnavailable
    problem = f"not asked again before {until:%Y-%m-%d %H:%M} UTC ({state.last_error})"
    return kind(source, problem, hint="kbsync status shows the sources and their cooldowns")


def _after_failure(state: SourceState, error: SourceError) -> SourceState:
    """The cooldown that follows: 1 h where the source refuses us, its own wish where it has one; doubled with every
    such failure in a row, up to 24 h. Failures of other kinds count for themselves."""
    now = datetime.now(UTC)
    blocked = isinstance(error, SourceBlocked)
    wish = error.retry_after if isinstance(error, SourceUnavailable) else None
    pauses = blocked or bool(wish)
    same = (state.blocked, state.retry_at is not None) == (blocked, pauses)
    failures = state.failures + 1 if same else 1
    retry_at = None
    if pauses:
        first = BLOCKED_FIRST.total_seconds() if blocked else jittered(wish or 0.0)
        retry_at = now + min(timedelta(seconds=first * 2 ** min(failures - 1, 20)), COOLDOWN_LONGEST)
    problem = error.message.removeprefix(f"source {error.source}: ")
    return SourceState(
        source=state.source,
        failures=failures,
        blocked=blocked,
        retry_at=retry_at,
        last_error=problem,
    )


def _note(ledger: Ledger, before: SourceState, after: SourceState) -> None:
    if after != before:
        with ledger.write() as db:
            db.set_source_state(after)
