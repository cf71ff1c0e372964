"""What an undo means: which facts the weights are to hold afterwards, and which keys are held. Pure.

What is rolled back or reverted is held, or the next pass would put it back: a hold freezes the key at what the model
will hold, and names what the ledger wants instead.
"""

from __future__ import annotations

from collections.abc import Mapping

from kbsync.facts import Applied, Fact, FactKey, Hold, HoldReason

__all__ = ["holds_after", "without_version"]


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
