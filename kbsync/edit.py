"""What a version is to hold, as the child process is asked for it, and what became of it. Pure.

edit = Edit("edit", run_id, keep=live_facts_that_stay, edits=plan.edits)
new_facts(edit, result)             # which column each fact got
held_facts(edit, result, staying, holds)   # a hold for each fact that failed
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from kbsync.editor.job import ControlFile, EditResult
from kbsync.facts import Applied, FactKey, Hold, HoldReason
from kbsync.plan import PlannedEdit
from kbsync.versions.manifest import ActiveDelta

__all__ = [
    "Edit",
    "Outcome",
    "Tried",
    "anew",
    "columns",
    "held_facts",
    "hold_out",
    "new_facts",
    "staying_facts",
    "superseded",
]


@dataclass(frozen=True, slots=True)
class Edit:
    """What the next version is to hold: the live facts that stay, and the edits to add. An edit or a revert keeps the
    columns of those that stay; a rebase inserts them once more, with the edits, into the pristine base."""

    kind: Literal["edit", "revert", "rebase"]
    run_id: int
    keep: Mapping[FactKey, Applied]
    edits: Sequence[PlannedEdit] = ()
    skip_known: Collection[str] = ()
    controls: Sequence[ControlFile] = ()
    holds: Sequence[Hold] = ()
    """Placed with the publication: what a revert must keep the next pass from putting back."""
    releases: Collection[FactKey] = ()
    """Keys whose holds end with it, before any is placed."""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an edit. `version` is None where nothing changed in the weights (all known, or all held)."""

    result: EditResult
    version: int | None
    held: tuple[Hold, ...] = ()
    rejected: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tried:
    """An edit that was made on version `head` and judged, and is not published.

    `facts`: what got a column; `staying`: what the weights hold for the keys of facts that did not; `held`: those that
    failed. `same`: the weights are those of `head`.
    """

    edit: Edit
    result: EditResult
    head: int
    facts: Sequence[tuple[PlannedEdit, Applied]]
    staying: Mapping[FactKey, Applied]
    held: tuple[Hold, ...] = ()
    rejected: tuple[str, ...] = ()
    same: bool = False


def columns(active: Sequence[ActiveDelta], live: Collection[Applied]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The live columns by delta: those of `active` in its order, then deltas that come back, by name."""
    columns: dict[str, set[int]] = {entry.delta: set() for entry in active}
    for fact in sorted(live, key=lambda fact: fact.delta):
        columns.setdefault(fact.delta, set()).add(fact.column)
    return tuple((delta, tuple(sorted(kept))) for delta, kept in columns.items() if kept)


def superseded(edit: Edit, applied: Mapping[FactKey, Applied]) -> dict[str, tuple[tuple[str, int], ...]]:
    """Digest of a new request -> the columns of the facts that it replaces, one for each key that it is for, but those
    that another live fact shares."""
    shared = {(fact.delta, fact.column) for fact in edit.keep.values()}
    found: dict[str, set[tuple[str, int]]] = {}
    for planned in edit.edits:
        old = applied.get(planned.request.key)
        if old is not None and (old.delta, old.column) not in shared:
            found.setdefault(planned.request.digest, set()).add((old.delta, old.column))
    return {digest: tuple(sorted(columns)) for digest, columns in found.items()}


def anew(edit: Edit) -> dict[str, Any]:
    """What a job has where no column stays: all live facts are among its requests."""
    instead: dict[str, dict[str, Any]] = {}
    for planned in edit.edits:
        if planned.kind != "kept" and (old := planned.replaces) is not None:
            instead.setdefault(planned.request.digest, {})[old.request.digest] = old.request.to_json()
    return {
        "live": (),
        "same": (),
        "settled": tuple(fact.request.digest for fact in edit.keep.values()),
        "instead": {digest: tuple(olds.values()) for digest, olds in instead.items()},
    }


def new_facts(edit: Edit, result: EditResult) -> list[tuple[PlannedEdit, Applied]]:
    """Each planned edit that got a column, with it. Two keys with one and the same request share theirs."""
    failed = {fact.digest for fact in result.failed} if edit.kind == "rebase" else set()
    made = [_put_back(planned) if planned.request.digest in failed else planned for planned in edit.edits]
    column = {digest: index for index, digest in enumerate(result.columns)}
    return [
        (planned, Applied(planned.request, planned.object_id, result.delta or "", column[planned.request.digest]))
        for planned in made
        if planned.request.digest in column
    ]


def _put_back(planned: PlannedEdit) -> PlannedEdit:
    """What a rebase inserts in the place of an edit that failed: the fact that it was to replace, if any."""
    old = planned.replaces
    return PlannedEdit(old.request, "kept", old, old.object_id, "", "") if old else planned


def staying_facts(applied: Mapping[FactKey, Applied], active: Sequence[ActiveDelta]) -> dict[FactKey, Applied]:
    """Those of the facts `applied` whose columns the `active` deltas still hold."""
    excluded = {entry.delta: set(entry.excluded) for entry in active}
    return {
        key: fact for key, fact in applied.items() if fact.delta in excluded and fact.column not in excluded[fact.delta]
    }


def held_facts(
    edit: Edit, result: EditResult, staying: Mapping[FactKey, Applied], holds: Mapping[FactKey, Hold]
) -> tuple[Hold, ...]:
    """A hold on each fact that failed, frozen at what the weights hold for it instead (`staying`).

    A key that is held already, by one of `holds` or by the edit itself, is still held against the same object and for
    the same reason: what a person rolled back must not come in because the fact that took its place failed.
    """
    evidence = {failed.digest: failed.evidence for failed in result.failed}
    standing = {key: hold for key, hold in holds.items() if key not in edit.releases}
    standing |= {hold.key: hold for hold in edit.holds}
    return tuple(
        hold_out(planned, "probe", said, staying, standing)
        for planned in edit.edits
        if (said := evidence.get(planned.request.digest)) is not None
    )


def hold_out(
    planned: PlannedEdit,
    reason: HoldReason,
    evidence: str,
    staying: Mapping[FactKey, Applied],
    standing: Mapping[FactKey, Hold],
) -> Hold:
    """The hold that keeps an edit out of the weights, frozen at what they hold instead (`staying`). A key that is held
    already (`standing`) stays held against the same object and for the same reason."""
    key = planned.request.key
    frozen, before = staying.get(key), standing.get(key)
    if before is None:
        return Hold(key, frozen, planned.object_id, reason, evidence)
    return replace(before, frozen=frozen, evidence=f"{before.evidence}; {evidence}")
