"""Aliases: which version is served under which name, whatever HEAD does.

    promote(line, 7)                         # `live` is version 7 from now on
    promote(line, 8, "canary")
    promote(line, "canary", reason="measured")
    demote(line, "live")                     # back to what it named before its last promotion

`live` follows HEAD until something is promoted to it. Nothing is computed, so neither waits for an edit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from kbsync.errors import UsageError
from kbsync.ledger import HeadMove, PromotionKind, PromotionRow, Reader
from kbsync.ledger.aliases import HEAD, LIVE, standing
from kbsync.line import Line

__all__ = ["AliasMove", "demote", "history", "promote"]

_NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")


@dataclass(frozen=True, slots=True)
class AliasMove:
    """From `since` to `until` (None: still) an alias named `version`; None: none."""

    alias: str
    version: int | None
    since: datetime
    until: datetime | None
    how: PromotionKind | Literal["follows HEAD"]
    user: str
    reason: str


def history(alias: str, log: Sequence[PromotionRow], heads: Sequence[HeadMove] = ()) -> list[AliasMove]:
    """What an alias named when, oldest first, each from the end of the one before. `log`: its promotions, oldest first;
    `heads`: the moves of HEAD, oldest first, of an alias that follows it while no promotion stands."""
    moves = list(_moves(alias, log, heads))
    ends = [*(move.since for move in moves[1:]), None]
    return [
        AliasMove(move.alias, move.version, move.since, end, move.how, move.user, move.reason)
        for move, end in zip(moves, ends, strict=True)
    ]


def _moves(alias: str, log: Sequence[PromotionRow], heads: Sequence[HeadMove]) -> Iterator[AliasMove]:
    pinned: int | None = None
    head: int | None = None
    events: list[HeadMove | PromotionRow] = [*heads, *log]
    for event in sorted(events, key=lambda event: event.at):
        if isinstance(event, HeadMove):
            head = event.number
            if pinned is None:
                yield AliasMove(alias, head, event.at, None, "follows HEAD", event.user, event.reason)
        else:
            pinned = event.version
            version = head if pinned is None else pinned
            yield AliasMove(alias, version, event.at, None, event.kind, event.user, event.reason)


def promote(line: Line, version: int | str, alias: str = LIVE, reason: str = "") -> dict[str, Any]:
    """Let `alias` name a version (its number, another alias, or HEAD), whatever HEAD does, until it is promoted or
    demoted again. Where it does already, nothing is written.

    Raises UsageError for a name that cannot be one and for a version that is not there, StoreError where its files are
    not as recorded.
    """
    if not _NAME.fullmatch(alias):
        raise UsageError(
            f"{alias!r} cannot be an alias: {_why_not(alias)}",
            hint="kbsync promote 7 --as canary",
        )
    with line.ledger.read() as db:
        number = db.number_of(line.model, version)
        db.require_restorable(line.model, number)
        manifest = db.version(line.model, number).manifest_sha256
    line.store.require(number, manifest)
    with line.ledger.write() as db:
        db.require_restorable(line.model, number)  # once more: retention may have come first
        before, moved = db.aliases(line.model), db.pinned(line.model).get(alias) != number
        if moved:
            db.note_promotion(line.model, alias, "promote", number, user=line.user, reason=reason)
    line.point()
    line.announce(before)
    return {"alias": alias, "from": before.get(alias), "version": number, "moved": moved}


def _why_not(alias: str) -> str:
    if alias == HEAD:
        return "HEAD is where edits go on"
    return "it begins with a letter a-z, then letters a-z, digits and hyphens, 63 at most"


def demote(line: Line, alias: str, reason: str = "", *, end: bool = False) -> dict[str, Any]:
    """Take the last promotion of `alias` back: it names what it named before that; the first one taken back, it ends,
    and `live` follows HEAD again. `end`: take all of them back at once.

    Raises UsageError where nobody promoted anything to it, StoreError where the files of the version that it goes back
    to are not as recorded.
    """
    with line.ledger.read() as db:
        log = db.promotions(line.model, alias)
        version = _left(log, alias, end=end)
        if version is not None:
            _require_restorable(db, line.model, version, alias)
            manifest = db.version(line.model, version).manifest_sha256
    if version is not None:
        line.store.require(version, manifest)
    with line.ledger.write() as db:
        if db.promotions(line.model, alias) != log:
            raise UsageError(f"{alias!r} was moved by somebody else meanwhile", hint="kbsync aliases --history")
        if version is not None:
            _require_restorable(db, line.model, version, alias)  # once more: retention may have come first
        before = db.aliases(line.model)
        db.note_promotion(line.model, alias, "end" if end else "demote", version, user=line.user, reason=reason)
        after = db.aliases(line.model)
    line.point()
    line.announce(before)
    return {"alias": alias, "from": before[alias], "version": after.get(alias), "pinned": version is not None}


def _require_restorable(db: Reader, model: str, version: int, alias: str) -> None:
    """What `db.require_restorable` does, with the ways out of a promotion."""
    try:
        db.require_restorable(model, version)
    except UsageError as error:
        error.hint = f"kbsync promote V --as {alias} names another version; kbsync demote {alias} --end, none"
        raise


def _left(log: Sequence[PromotionRow], alias: str, *, end: bool) -> int | None:
    """What a demotion leaves an alias pinned at. Raises UsageError where it has nothing to take back."""
    holding = standing(log)
    if not holding:
        raise UsageError(f"nothing is promoted to {alias!r}", hint="kbsync aliases lists what is")
    return holding[-2].version if len(holding) > 1 and not end else None
