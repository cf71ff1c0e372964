"""Rollback, revert, release: which facts the weights are to hold afterwards, and which keys are held.

What is rolled back or reverted is held, or the next pass would put it back: a hold freezes the key at what the model
will hold, and names what the ledger wants instead.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from kbsync.errors import Cancelled, KbsyncError, UsageError
from kbsync.facts import Applied, Fact, FactKey, Hold, HoldReason
from kbsync.line import Edit, Line

__all__ = ["holds_after", "release", "revert_fact", "revert_version", "rollback", "without_version"]


def without_version(
    head: Mapping[FactKey, Applied], version: Mapping[FactKey, Applied], parent: Mapping[FactKey, Applied]
) -> dict[FactKey, Applied]:
    """What `head` holds once the work of `version` (made on `parent`) is undone: a three-way merge, key by key.

    Where a key is still as `version` left it, it goes back to what `parent` held; where a later version has taken it
    further, it stays. Equal to `head` where nothing of `version` is live any more.
    """
    result = dict(head)
    for key in sorted({*version, *parent}):
        left, found = version.get(key), parent.get(key)
        if _column(left) == _column(found) or _column(head.get(key)) != _column(left):
            continue
        if found is None:
            del result[key]
        else:
            result[key] = found
    return result


def holds_after(
    now: Mapping[FactKey, Applied],
    then: Mapping[FactKey, Applied],
    desired: Mapping[FactKey, Fact],
    *,
    reason: HoldReason,
    evidence: str,
) -> tuple[list[Hold], list[FactKey]]:
    """(holds to place, keys to release) when the weights go from holding `now` to holding `then`.

    Only keys that differ are touched. A key at which `then` holds just what the ledger wants needs no hold any more;
    every other one is frozen at `then` against what the ledger wants (None: nothing).
    """
    holds, released = [], []
    for key in sorted({*now, *then}):
        after = then.get(key)
        if _column(now.get(key)) == _column(after):
            continue
        fact = desired.get(key)
        wanted = fact.object.id if fact else None
        if wanted == (after.object_id if after else None):
            released.append(key)
        else:
            holds.append(Hold(key=key, frozen=after, held_out=wanted, reason=reason, evidence=evidence))
    return holds, released


def _column(applied: Applied | None) -> tuple[str, int] | None:
    return (applied.delta, applied.column) if applied else None


def rollback(line: Line, to: int, reason: str = "") -> dict[str, Any]:
    """Move HEAD to version `to`: nothing is computed anew. What that takes out of the weights, or puts back, is held.

    Raises UsageError for a version that is not there, StoreError where its files are not as recorded.
    """
    with line.ledger.read() as db:
        line.store.require(to, db.version(line.model, to).manifest_sha256)
    with line.ledger.write() as db:
        head, row = db.head(line.model), db.version(line.model, to)
        holds, releases = holds_after(
            db.applied(line.model, head),
            db.applied(line.model, to),
            db.facts(),
            reason="rollback",
            evidence=f"rolled back from {head} to {to}",
        )
        for hold in holds:
            db.hold(line.model, hold)
        db.release(line.model, releases)
        db.move_head(line.model, to, user=line.user, reason=reason or f"rollback from {head}")
    line.store.write_head(to)
    line.announce(to)
    return {
        "from": head,
        "version": to,
        "held": len(holds),
        "released": len(releases),
        "weights_sha256": row.weights_sha256,
    }


def revert_version(line: Line, number: int, reason: str = "") -> dict[str, Any]:
    """A new version without the work of version `number`; later ones are kept. What leaves is held.

    Raises UsageError where nothing of it is live any more.
    """
    with line.ledger.read() as db:
        row, head = db.version(line.model, number), db.head(line.model)
        if row.parent is None:
            raise UsageError("version 0 is the pristine base: there is nothing to revert", hint="kbsync log")
        now = db.applied(line.model, head)
        keep = without_version(now, db.applied(line.model, number), db.applied(line.model, row.parent))
    if keep == now:
        raise UsageError(f"nothing of version {number} is live in version {head}", hint="kbsync log")
    return _revert(line, keep, reason or f"revert {number}")


def revert_fact(line: Line, key: FactKey, reason: str = "") -> dict[str, Any]:
    """A new version without the fact of `key`, which is held. Raises UsageError where the live version lacks it."""
    with line.ledger.read() as db:
        now = db.applied(line.model, db.head(line.model))
    if key not in now:
        raise UsageError(f"the live version holds no {key.relation} of {key.subject}", hint="kbsync facts")
    keep = {other: applied for other, applied in now.items() if other != key}
    return _revert(line, keep, reason or f"revert {key.relation} of {key.subject}")


def release(line: Line, keys: Collection[FactKey] = (), *, everything: bool = False) -> dict[str, Any]:
    """End holds, so that the next pass applies what the ledger wants. Raises UsageError where none matches."""
    with line.ledger.write() as db:
        held = db.holds(line.model)
        chosen = list(held) if everything else [key for key in keys if key in held]
        if not chosen:
            raise UsageError("nothing is held there", hint="kbsync holds")
        count = db.release(line.model, chosen)
        db.audit(line.user, "release", {"keys": [list(key) for key in chosen]})
    return {"released": count}


def _revert(line: Line, keep: Mapping[FactKey, Applied], reason: str) -> dict[str, Any]:
    """Make the version that holds just `keep`. A revert is a person's decision: it is probed, not gated."""
    with line.ledger.write() as db:
        run_id = db.start_run(None, model=line.model, trigger="revert", user=line.user)
        now = db.applied(line.model, db.head(line.model))
        holds, releases = holds_after(now, keep, db.facts(), reason="revert", evidence=reason)
    edit = Edit("revert", run_id, keep, holds=holds, releases=releases, reason=reason)
    try:
        outcome = line.make(edit, gate=None)
    except KbsyncError as error:
        with line.ledger.write() as db:
            db.finish_run(run_id, "cancelled" if isinstance(error, Cancelled) else "failed", error.message)
        raise
    with line.ledger.write() as db:
        db.finish_run(run_id, "done", reason)
    return {
        "run": run_id,
        "version": outcome.version,
        "held": len(holds),
        "released": len(releases),
        "weights_sha256": outcome.result.weights_sha256,
        "probe": outcome.result.probe,
    }
