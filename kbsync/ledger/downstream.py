"""Where a fact went: the plan that asked for it, the column of the weights that holds it, what was measured of it; and
why the weights do not hold it, where they do not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from sqlalchemy import Text, select, type_coerce

from kbsync.facts import Applied, FactKey
from kbsync.ledger import schema
from kbsync.ledger.aliases import LIVE
from kbsync.ledger.columns import canonical
from kbsync.ledger.links import EARLIER, ColumnLink, Measured, PlanLink, minute
from kbsync.ledger.reader import Reader
from kbsync.ledger.records import FactRow, HoldRow, Placement

__all__ = ["Weights", "downstream", "held_run"]

_KINDS = {
    "adds": "added",
    "changes": "changed",
    "re_rendered": "re-rendered",
    "faded": "faded",
    "kept": "kept",
}
"""The lists of a plan document that ask for something, and what each of their rows is called."""


class Weights:
    """What one model's versions hold for a key."""

    def __init__(self, db: Reader, model: str | None, key: FactKey, ids: Collection[str]) -> None:
        self.db, self.model, self.key, self.ids = db, model, key, ids
        self.head = db.head(model) if model else 0
        self.live = db.aliases(model)[LIVE] if model else 0
        places = db.placements(ids, model) if model else []
        self.places = [place for place in places if place.applied.request.key.relation == key.relation]

    def held(self) -> Placement | None:
        """The column in HEAD."""
        return next((place for place in self.places if self.head in place.versions), None)

    def hold(self) -> HoldRow | None:
        """The hold in force of the key."""
        rows = self.db.hold_rows(self.model) if self.model else []
        ours = (row for row in rows if row.hold.key.relation == self.key.relation and row.hold.key.subject in self.ids)
        return next(ours, None)

    def column(self, place: Placement) -> ColumnLink:
        """A column of HEAD with the version that made it."""
        applied, version = place.applied, min(place.versions)
        made = self.db.version(place.model, version)
        return ColumnLink(
            applied.delta,
            applied.column,
            applied.request,
            applied.object_id,
            version,
            made.kind,
            made.created_at,
            made.user,
            made.run_id,
            self._first(applied),
            self.head,
            self.live,
            tuple(self._sharing(place)),
        )

    def _first(self, applied: Applied) -> int:
        """From HEAD back, parent by parent, as long as the request is held."""
        holding = {number for place in self.places if _same(place.applied, applied) for number in place.versions}
        parents, number = self.db.parents(self.model or ""), self.head
        while (parent := parents.get(number)) is not None and parent in holding:
            number = parent
        return number

    def _sharing(self, place: Placement) -> Iterator[FactKey]:
        table = schema.delta_fact
        query = select(table.c.relation, table.c.subject_id).where(
            table.c.model == place.model,
            table.c.delta == place.applied.delta,
            table.c.delta_column == place.applied.column,
        )
        for row in self.db.execute(query):
            if (key := FactKey(row.relation, row.subject_id)) != place.applied.request.key:
                yield key

    def plan(self, column: ColumnLink) -> PlanLink | None:
        """The plan of the run that made the column; where a rebase did, that of the version it was first put in by."""
        for number in dict.fromkeys((column.version, column.first)):
            version = self.db.version(self.model or "", number)
            if (plan := self._planned(version.run_id, version.parent)) is not None:
                return plan
        return None

    def _planned(self, run_id: int | None, head: int | None) -> PlanLink | None:
        table = schema.plan
        query = select(table).where(table.c.run_id == run_id, table.c.model == self.model, table.c.head == head)
        for row in self.db.execute(query.order_by(table.c.id.desc())):
            for kind, asked in _edits_of(row.document):
                if _about(asked, self.key, self.ids):
                    return PlanLink(row.id, row.run_id, row.digest, row.head, row.at, kind)
        return None

    def measured(self, digest: str, since: int) -> Measured | None:
        """The newest probe of a request in versions from `since` on. The database looks for it in the canonical text of
        the reports, newest first, and hands over one."""
        table = schema.probe_result
        query = (
            select(table.c.version, table.c.measured_at, table.c.report)
            .where(table.c.model == self.model, table.c.version >= since)
            .where(type_coerce(table.c.report, Text).contains(canonical({"digest": digest})[1:-1]))
            .order_by(table.c.version.desc(), table.c.id.desc())
            .limit(1)
        )
        row: Any = self.db.execute(query).one_or_none()
        facts = row.report.get("facts", ()) if row is not None else ()
        for fact in facts:
            if fact["digest"] == digest:
                return Measured(row.version, row.measured_at, fact["probability"], fact["efficacy"], fact["answer"])
        return None


def _same(one: Applied, other: Applied) -> bool:
    return (one.request.digest, one.object_id) == (other.request.digest, other.object_id)


def downstream(
    weights: Weights,
    row: FactRow | None,
    approval: int | None,
    kept_out: str,
    unasked: Callable[[], str],
    gaps: dict[str, str],
) -> dict[str, Any]:
    """Plan, column and measurement as fields of a Lineage; what is missing has its reason put into `gaps`, and so has,
    under `column`, that the weights do not hold what the ledger wants."""
    place = weights.held()
    if place is None or row is None or place.applied.object_id != row.fact.object.id:
        gaps["column"] = _not_in_weights(weights, row, approval, kept_out, unasked)
    if place is None:
        gaps |= dict.fromkeys(("plan", "measured"), "the weights hold no column for it")
        return {}
    column = weights.column(place)
    plan, measured = weights.plan(column), weights.measured(place.applied.request.digest, column.version)
    if plan is None:
        gaps["plan"] = EARLIER if column.kind == "edit" else f"version {column.version} is a {column.kind}"
    if measured is None:
        gaps["measured"] = f"no probe since version {column.version} asked for it"
    return {"plan": plan, "column": column, "measured": measured}


def _not_in_weights(
    weights: Weights, row: FactRow | None, approval: int | None, kept_out: str, unasked: Callable[[], str]
) -> str:
    """Why the weights of HEAD do not hold the ledger's fact: the first reason that applies."""
    if row is None and approval is None and weights.held() is None:
        return "the ledger holds no such fact"
    if weights.model is None:
        return "no model follows the ledger yet: kbsync sync"
    if kept_out:
        return kept_out
    if held := weights.hold():
        return f"held since {minute(held.since)} ({held.hold.reason}): {held.hold.evidence}"
    if approval is not None:
        return f"run {approval} waits for approval: kbsync approve {approval}"
    if row is None:
        return "the ledger holds no such fact, and the next sync takes it out"
    if reason := unasked():
        return reason
    past = [place for place in weights.places if place.applied.object_id == row.fact.object.id and place.versions]
    if past:
        return f"version {max(past[-1].versions)} holds it, but HEAD is version {weights.head}"
    return "not edited yet: kbsync sync"


def held_run(db: Reader, key: FactKey, ids: Collection[str]) -> int | None:
    """A run that waits for approval and would edit the key, or take it out."""
    for staged in db.staged_plans():
        retracted = staged.plan.get("retractions", ())
        if any(_about(row, key, ids) for row in (*(asked for _, asked in _edits_of(staged.plan)), *retracted)):
            return staged.run_id
    return None


def _edits_of(document: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What a plan asks for: (kind, row). Plans that an earlier kbsync staged have `edits`."""
    for name, kind in _KINDS.items():
        yield from ((kind, row) for row in document.get(name, ()))
    yield from ((edit["kind"], edit["request"]) for edit in document.get("edits", ()))


def _about(entry: Mapping[str, Any], key: FactKey, ids: Collection[str]) -> bool:
    return entry.get("relation") == key.relation and entry.get("subject_id") in ids
