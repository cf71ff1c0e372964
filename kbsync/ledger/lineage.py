"""Where a fact comes from and where it went: the whole chain behind `kbsync blame`.

source row ─ fetch ─ run ─ decision ─ plan ─ version, column of its delta ─ what was measured of it

chain = lineage(db, FactKey("governor", "wikidata:Q1397"), model="smollm2-135m-0123456789ab")
chain.gaps                    # link -> why there is none: {"column": "held: rolled back from 2 to 1"}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from kbsync.facts import Entity, FactKey
from kbsync.ledger.downstream import Weights, downstream, held_run
from kbsync.ledger.links import ClaimLink, ColumnLink, FetchLink, Measured, PlanLink
from kbsync.ledger.reader import Reader
from kbsync.ledger.records import FactRow, RunRow
from kbsync.ledger.upstream import decided_by, no_fact, open_questions

__all__ = ["Lineage", "lineage"]


@dataclass(frozen=True, slots=True)
class Lineage:
    """The chain of one key. A link that is None has its reason in `gaps`, under the link's name. `approval`: the run
    that waits for approval and would change what the weights hold."""

    key: FactKey
    subject: Entity
    model: str | None
    fact: FactRow | None = None
    claim: ClaimLink | None = None
    fetch: FetchLink | None = None
    run: RunRow | None = None
    rule: str | None = None
    weighed: tuple[ClaimLink, ...] = ()
    ruling: Mapping[str, Any] | None = None
    conflicts: tuple[str, ...] = ()
    waiting: str | None = None
    approval: int | None = None
    plan: PlanLink | None = None
    column: ColumnLink | None = None
    measured: Measured | None = None
    gaps: Mapping[str, str] = field(default_factory=dict)

    @property
    def current(self) -> bool:
        """Whether the weights of HEAD hold the object that the ledger wants."""
        wanted, held = self.fact, self.column
        return wanted is not None and held is not None and held.object_id == wanted.fact.object.id

    def to_json(self) -> dict[str, Any]:
        """The chain as a JSON value; times are ISO 8601."""
        value: dict[str, Any] = _plain(asdict(self))
        return value | {"current": self.current}


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


def lineage(
    db: Reader,
    key: FactKey,
    *,
    model: str | None,
    kept_out: str = "",
    unasked: Callable[[], str] = lambda: "",
) -> Lineage:
    """The chain of a key as the ledger has it now.

    `model`: whose weights; None: no model follows the ledger yet. `kept_out`: why the policy never edits this key, if
    so. `unasked`: why a plan made now would not ask the model for it, or nothing; called only where that may be the
    reason, since a plan reads all facts of a policy.
    """
    ids = db.merged(key.subject)
    row = db.fact_row(key.relation, ids)
    gaps: dict[str, str] = {}
    found: dict[str, Any] = open_questions(db, key.relation, ids)
    found["approval"] = approval = held_run(db, key, ids)
    if row is None:
        gaps["fact"] = no_fact(db, key, ids, found, kept_out)
    else:
        found |= decided_by(db, row, ids, gaps)
    found |= downstream(Weights(db, model, key, ids), row, approval, kept_out, unasked, gaps)
    return Lineage(key, Entity(key.subject, db.label(key.subject)), model, row, **found, gaps=gaps)
