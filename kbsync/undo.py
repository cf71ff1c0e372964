"""Rollback, revert, release: which facts the weights are to hold afterwards, and which keys are held.

What is rolled back or reverted is held, or the next pass would put it back: a hold freezes the key at what the model
will hold, and names what the ledger wants instead.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from kbsync.edit import Edit
from kbsync.errors import Inseparable, UsageError
from kbsync.facts import Applied, Fact, FactKey, Hold, HoldReason
from kbsync.ledger.aliases import LIVE
from kbsync.line import Line
from kbsync.plan import carried
from kbsync.rebase import make_as_run

__all__ = ["holds_after", "release", "revert_fact", "revert_version", "rollback", "without_version"]


def without_version(
    head: Mapping[FactKey, Applied],
    version: Mapping[FactKey, Applied],
    parent: Mapping[FactKey, Applied],
    *,
    anew: bool = False,
) -> dict[FactKey, Applied]:
    """What `head` holds once the work of `version` (made on `parent`) is undone: a three-way merge, key by key.

    Where a key is still as `version` left it, it goes back to what `parent` held; where a later version has taken it
    further, it stays. Equal to `head` where nothing of `version` is live any more. `anew`: a rebase since, or `version`
    itself, has put all facts into columns of its own, so that they are compared by what they say.
    """
    result = dict(head)
    same = _content if anew else _column
    for key in sorted({*version, *parent}):
        left, found = version.get(key), parent.get(key)
        if same(left) == same(found) or same(head.get(key)) != same(left):
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
    faded: Collection[str] = (),
) -> tuple[list[Hold], list[FactKey]]:
    """(holds to place, keys to release) when the weights go from holding `now` to holding `then`.

    Only keys that differ are touched. A key at which `then` holds just what the ledger wants needs no hold any more;
    every other one is frozen at `then` against what the ledger wants (None: nothing). So is one that goes back to the
    column from which it was not answered (`faded`: digests of requests), or the next pass would edit it once more.
    """
    holds, released = [], []
    for key in sorted({*now, *then}):
        before, after = now.get(key), then.get(key)
        again = after is not None and after.request.digest in faded and _column(before) != _column(after)
        if _content(before) == _content(after) and not again:
            continue
        fact = desired.get(key)
        wanted = fact.object.id if fact else None
        if wanted == (after.object_id if after else None) and not again:
            released.append(key)
        else:
            holds.append(Hold(key=key, frozen=after, held_out=wanted, reason=reason, evidence=evidence))
    return holds, released


def _column(applied: Applied | None) -> tuple[str, int] | None:
    return (applied.delta, applied.column) if applied else None


def _content(applied: Applied | None) -> tuple[str, str] | None:
    return (applied.request.digest, applied.object_id) if applied else None


def rollback(line: Line, version: int | str, reason: str = "") -> dict[str, Any]:
    """Move HEAD to a version (its number, or an alias): nothing is computed anew. What that takes out of the weights,
    or puts back, is held. Aliases that somebody pinned stay; `live` is what is served afterwards.

    Raises UsageError for a version that is not there or not restorable, StoreError where its files are not as recorded.
    """
    with line.ledger.read() as db:
        to = db.number_of(line.model, version)
        db.require_restorable(line.model, to)
        manifest = db.version(line.model, to).manifest_sha256
    line.store.require(to, manifest)
    with line.ledger.write() as db:
        db.require_restorable(line.model, to)  # once more: retention may have come first
        before = db.aliases(line.model)
        head, row = db.head(line.model), db.version(line.model, to)
        holds, releases = holds_after(
            db.applied(line.model, head),
            db.applied(line.model, to),
            db.facts(),
            reason="rollback",
            evidence=f"rolled back from {head} to {to}",
            faded=db.faded(line.model, to),
        )
        for hold in holds:
            db.hold(line.model, hold)
        db.release(line.model, releases)
        db.move_head(line.model, to, user=line.user, reason=reason or f"rollback from {head}")
        live = db.aliases(line.model)[LIVE]
    line.point()
    line.announce(before)
    return {
        "from": head,
        "version": to,
        "live": live,
        "held": len(holds),
        "released": len(releases),
        "weights_sha256": row.weights_sha256,
    }


def revert_version(line: Line, number: int, reason: str = "", *, dry: bool = False) -> dict[str, Any]:
    """A new version without the work of version `number`; later ones are kept. What leaves is held.

    Where a rebase has come since, its deltas are not in HEAD any more: the new version is a rebase without its facts.
    `dry`: only say what that would be. Raises UsageError where nothing of it is left in HEAD.
    """
    anchor = line.odometer().anchor
    with line.ledger.read() as db:
        row, head = db.version(line.model, number), db.head(line.model)
        if row.parent is None:
            raise UsageError("version 0 is the pristine base: there is nothing to revert", hint="kbsync log")
        now = db.applied(line.model, head)
        version, parent = db.applied(line.model, number), db.applied(line.model, row.parent)
    anew = number <= anchor
    keep = without_version(now, version, parent, anew=anew)
    if keep == now:
        raise UsageError(
            f"nothing of version {number} is left in HEAD, version {head}",
            hint=f"kbsync rollback --to {row.parent} undoes a rebase" if row.kind == "rebase" else "kbsync log",
        )
    because = f"version {number} is older than the rebase in version {anchor}" if anew and number != anchor else None
    because = f"version {number} is a rebase itself" if number == anchor else because
    return _revert(line, keep, reason or f"revert {number}", because, dry=dry)


def revert_fact(
    line: Line, key: FactKey, reason: str = "", *, exact: bool = False, dry: bool = False
) -> dict[str, Any]:
    """A new version without the fact of `key`, which is held. `exact`: as a rebase without it; else its share alone is
    taken out, which is approximate over several layers. Raises UsageError where HEAD lacks it."""
    with line.ledger.read() as db:
        now = db.applied(line.model, db.head(line.model))
    if key not in now:
        raise UsageError(f"HEAD holds no {key.relation} of {key.subject}", hint="kbsync facts")
    keep = {other: applied for other, applied in now.items() if other != key}
    because = "--exact" if exact else None
    return _revert(line, keep, reason or f"revert {key.relation} of {key.subject}", because, dry=dry)


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


def _revert(
    line: Line, keep: Mapping[FactKey, Applied], reason: str, because: str | None, *, dry: bool
) -> dict[str, Any]:
    """Make the version that holds just `keep`, as a rebase where there is a reason (`because`). A revert is a person's
    decision: it is probed, not gated, but a rebase must not lose other facts."""
    with line.ledger.read() as db:
        head, desired, files = db.head(line.model), db.facts(), db.kept_files(line.model)
        now, faded = db.applied(line.model, head), db.faded(line.model, head, keep)
    holds, releases = holds_after(now, keep, desired, reason="revert", evidence=reason, faded=faded)
    staying = {key: applied for key, applied in keep.items() if _column(now.get(key)) == _column(applied)}
    if because is None and any(applied.delta not in files for applied in keep.values()):
        because = "the deltas of what comes back are gone"
    if because is None and line.stored_whole(now.keys() - staying.keys()):
        because = "its delta is stored whole"
    plan = {
        "rebase": because,
        "taken_out": [list(key) for key in sorted(now.keys() - keep.keys())],
        "put_back": [list(key) for key in sorted(keep.keys() - staying.keys())],
        "held": len(holds),
        "released": len(releases),
    }
    if dry:
        return plan
    edit = Edit("revert", 0, keep, holds=holds, releases=releases, reason=reason)
    try:
        if because is None:
            return plan | make_as_run(line, edit, None, trigger="revert")
    except Inseparable as error:
        plan["rebase"] = because = error.message
    restored = carried({key: applied for key, applied in keep.items() if key not in staying}, desired)
    edit = replace(
        edit,
        kind="rebase",
        keep=staying,
        edits=[replace(planned, kind="changed", replaces=None) for planned in restored],
        reason=f"{reason}, a rebase: {because}",
    )
    return plan | make_as_run(line, edit, None, trigger="revert")
