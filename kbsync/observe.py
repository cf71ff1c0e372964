"""Fetch the sources of a policy: retries with backoff, cooldowns that survive a restart, nothing written but those.

A source that fails does not keep the others waiting: the pass goes on with what answered, and what did not is tried
again next time on the claims that it made last. No transaction is open while a source is asked.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import structlog
from tenacity import RetryCallState, Retrying, retry_if_exception_type
from tenacity.wait import wait_random_exponential

from kbsync.connectors import Connector, Redirecting, refuse_older
from kbsync.errors import KbsyncError, SourceBlocked, SourceError, SourceUnavailable
from kbsync.facts import Provenance, Snapshot
from kbsync.ledger import Ledger
from kbsync.ledger.records import SourceState
from kbsync.progress import Progress, silent

__all__ = ["observe"]

ATTEMPTS = 3
FIRST_WAIT_SECONDS = 2.0
LONGEST_WAIT_SECONDS = 60.0
"""A source that asks for a longer pause than this is left alone until then; the pass goes on without it."""
JITTER = 0.25
"""Every wait is longer by up to this share, so that those who were refused together do not come back together."""
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
    sleep: Callable[[float], None] | None = None,
) -> tuple[list[Snapshot], list[SourceError]]:
    """(snapshots, errors) of the connectors by source name, asked one after the other.

    Raises nothing for a source that fails: its error is among the errors and its cooldown in the ledger.
    """
    snapshots: list[Snapshot] = []
    failures: list[SourceError] = []
    for done, (name, connector) in enumerate(connectors.items()):
        progress("fetch", done, len(connectors))
        host = getattr(connector, "host", None)
        with ledger.read() as db:
            state = db.source_state(name)
            rest = db.source_state(_as_source(host)) if host else SourceState("")
            previous = db.last_accepted(name)
        if cooling := _cooling(name, state) or _cooling(name, rest):
            failures.append(cooling)
            continue
        try:
            snapshots.append(_retrying(sleep)(_fetch, name, connector, previous, ledger))
        except SourceError as error:
            failures.append(error)
            log.warning("source_failed", source=name, problem=error.message)
            _note(ledger, state, after := _after_failure(state, error))
            if error.resting is not None:
                _note(ledger, rest, replace(after, source=_as_source(error.resting)))
        else:
            _note(ledger, state, SourceState(name))
            if host:
                _note(ledger, rest, SourceState(_as_source(host)))
    progress("fetch", len(connectors), len(connectors))
    return snapshots, failures


def _fetch(name: str, connector: Connector, previous: Provenance | None, ledger: Ledger) -> Snapshot:
    """What the connector gives; whatever else than a KbsyncError goes wrong in it may work later, and ends no pass."""
    try:
        return _complemented(connector, previous, ledger)
    except KbsyncError:
        raise
    except Exception as error:
        # Where, not what: the text of a foreign error may have an address with a password in it.
        place = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"its connector failed: {type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
        raise SourceUnavailable(name, problem, hint="this is a mistake in the connector, or in kbsync") from error


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
    """A source or a host that asked to be left alone is left alone."""
    until = state.retry_at
    if until is None or datetime.now(UTC) >= until:
        return None
    kind = SourceBlocked if state.blocked else SourceUnavailable
    problem = f"not asked again before {until:%Y-%m-%d %H:%M} UTC ({state.last_error})"
    return kind(source, problem, hint="kbsync status shows the sources and their cooldowns")


def _retrying(sleep: Callable[[float], None] | None) -> Retrying:
    retrying = Retrying(
        stop=_enough,
        wait=_wait,
        retry=retry_if_exception_type(SourceUnavailable),
        reraise=True,
    )
    return retrying.copy(sleep=sleep) if sleep else retrying


def _enough(state: RetryCallState) -> bool:
    """Tried often enough, or asked to wait for longer than a pass should last."""
    return state.attempt_number >= ATTEMPTS or (_wish(state) or 0.0) > LONGEST_WAIT_SECONDS


def _wait(state: RetryCallState) -> float:
    """Exponential backoff; where the source says how long, that, doubled with every refusal."""
    wish = _wish(state)
    if wish is None:
        return wait_random_exponential(multiplier=FIRST_WAIT_SECONDS, max=LONGEST_WAIT_SECONDS)(state)
    return _jittered(wish * 2 ** (state.attempt_number - 1))


def _jittered(seconds: float) -> float:
    return seconds * (1 + random.uniform(0, JITTER))  # noqa: S311 (no secret)


def _wish(state: RetryCallState) -> float | None:
    error = state.outcome.exception() if state.outcome else None
    return error.retry_after if isinstance(error, SourceUnavailable) else None


def _after_failure(state: SourceState, error: SourceError) -> SourceState:
    """The cooldown that follows: 1 h where the source refuses us, its own wish where it has one; doubled with every
    failure in a row, up to 24 h."""
    now = datetime.now(UTC)
    retry_at = None
    blocked = isinstance(error, SourceBlocked)
    wish = error.retry_after if isinstance(error, SourceUnavailable) else None
    if blocked or wish:
        first = BLOCKED_FIRST.total_seconds() if blocked else _jittered(wish or 0.0)
        pause = first * 2 ** min(state.failures, 20)
        retry_at = now + min(timedelta(seconds=pause), COOLDOWN_LONGEST)
    return SourceState(
        source=state.source,
        failures=state.failures + 1,
        blocked=blocked,
        retry_at=retry_at,
        last_error=error.message,
    )


def _note(ledger: Ledger, before: SourceState, after: SourceState) -> None:
    if after != before:
        with ledger.write() as db:
            db.set_source_state(after)
