"""What a version is to hold, as the child process is asked for it, and what became of it. Pure.

edit = Edit("edit", run_id, keep=live_facts_that_stay, edits=plan.edits)
new_facts(edit, result)             # which column each fact got
held_facts(edit, result, applied)   # a hold for each fact that failed
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kbsync.editor.job import ControlFile, EditResult
from kbsync.facts import Applied, FactKey, Hold
from kbsync.plan import PlannedEdit
from kbsync.versions.manifest import ActiveDelta

__all__ = ["Edit", "Outcome", "anew", "columns", "held_facts", "new_facts", "superseded"]


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
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an edit. `version` is None where nothing changed in the weights (all known, or all held)."""

    result: EditResult
    version: int | None
    held: tuple[Hold, ...] = ()
    rejected: tuple[str, ...] = ()


def columns(active: Sequence[ActiveDelta], live: Collection[Applied]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The live columns by delta: those of `active` in its order, then deltas that come back, by name."""
    columns: dict[str, set[int]] = {entry.delta: set() for entry in active}
    for fact in sorted(live, key=lambda fact: fact.delta):
        columns.setdefault(fact.delta, set()).add(fact.column)
    return tuple((delta, tuple(sorted(kept))) for delta, kept in columns.items() if kept)


def superseded(edit: Edit, applied: Mapping[FactKey, Applied]) -> dict[str, tuple[str, int]]:
    """Digest of a new request -> the column of the fact that it replaces, unless another live fact shares it."""
    shared = {(fact.delta, fact.column) for fact in edit.keep.values()}
    return {
        planned.request.digest: (old.delta, old.column)
        for planned in edit.edits
        if (old := applied.get(planned.request.key)) is not None and (old.delta, old.column) not in shared
    }


def anew(edit: Edit) -> dict[str, Any]:
    """What a job has where no column stays: all live facts are among its requests."""
    return {
        "live": (),
        "same": (),
        "settled": tuple(fact.request.digest for fact in edit.keep.values()),
        "instead": {
            planned.request.digest: old.request.to_json()
            for planned in edit.edits
            if planned.kind != "kept" and (old := planned.replaces) is not None
        },
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


def held_facts(edit: Edit, result: EditResult, staying: Mapping[FactKey, Applied]) -> tuple[Hold, ...]:
    """A hold on each fact that failed, frozen at what the weights hold for it instead."""
    evidence = {failed.digest: failed.evidence for failed in result.failed}
    return tuple(
        Hold(
            key=planned.request.key,
            frozen=staying.get(planned.request.key),
            held_out=planned.object_id,
            reason="probe",
            evidence=evidence[planned.request.digest],
        )
        for planned in edit.edits
        if planned.request.digest in evidence
    )
