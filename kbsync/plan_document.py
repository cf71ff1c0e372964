"""A plan as a document: what a person or a CI job reviews, what `sync --plan` applies, what the ledger keeps. Pure.

document = document_of(plan, policy="astronomy", guard=reasons, …)
document.model_dump(mode="json")        # the same plan gives the same JSON; docs/plan.schema.json describes it
moved(document, plan)                   # how the world differs from what was reviewed, in words; [] where it does not
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kbsync.errors import UsageError
from kbsync.facts import Change, Conflict, FactKey, Snapshot, Waiting
from kbsync.plan import Blocked, HeldChange, Plan, PlannedEdit, Retraction

__all__ = ["CapacityForecast", "Cost", "PlanDocument", "PlanFile", "TargetCount", "document_of", "moved", "read_plans"]


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KeyRow(_Value):
    """A relation of a subject."""

    relation: str
    subject_id: str

    @property
    def key(self) -> FactKey:
        """As the plan has it."""
        return FactKey(self.relation, self.subject_id)


class PlannedRow(KeyRow):
    """A request to insert. `before`: what the weights answer for the key now."""

    subject: str
    prompt: str
    before: str | None
    target: str
    object_id: str
    source: str
    origin: str
    request: str
    """Digest of the request: prompt, subject and target."""


class RetractedRow(KeyRow):
    """A fact to take out of the weights."""

    subject: str
    target: str


class HeldRow(KeyRow):
    """A change that a hold keeps out: the object ids that the weights keep and that the ledger wants (null: none)."""

    frozen: str | None
    wanted: str | None
    reason: str


class BlockedRow(KeyRow):
    """A request that cannot be made."""

    target: str
    reason: str


class WaitingRow(KeyRow):
    """A key whose claims do not count yet."""

    object_id: str | None
    reason: str
    detail: str


class ClaimRow(_Value):
    """One side of a conflict."""

    object: str
    object_id: str
    source: str
    origin: str


class ConflictRow(KeyRow):
    """A key whose claims cannot all be true."""

    kind: str
    reason: str
    claims: list[ClaimRow]


class SourceRow(_Value):
    """What the plan rests on: a source, and the sha256 of its body; `not_modified`: it vouched that nothing changed."""

    source: str
    not_modified: bool
    body_sha256: str


class TargetCount(_Value):
    """Target vectors that are to be computed, and that are stored from earlier."""

    compute: int
    cached: int


class CapacityForecast(_Value):
    """Facts that the weights hold afterwards, and the largest ‖ΔW‖/‖W‖ to expect; null where nothing was measured."""

    facts: int
    relative_norm: float | None


class Cost(_Value):
    """What carrying the plan out costs: facts to insert, target vectors, seconds (null where nothing was measured)."""

    facts: int
    targets: TargetCount
    seconds: float | None
    capacity: CapacityForecast


class PlanDocument(_Value):
    """What one policy's pass would do to the version `head` of `model`, all lists sorted by key.

    `policy` is null where a rebase or an undo made the plan. `digest` covers what would happen to the weights and the
    holds; `facts` counts what would change in the ledger; `guard` says why the run would be held, `rebase` why the
    version would be made anew from the base.
    """

    document: Literal["kbsync plan"] = "kbsync plan"
    version: Literal[1] = 1
    policy: str | None
    model: str
    head: int
    digest: str
    sources: list[SourceRow] = Field(default_factory=list)
    facts: dict[str, int] = Field(default_factory=dict)
    adds: list[PlannedRow] = Field(default_factory=list)
    changes: list[PlannedRow] = Field(default_factory=list)
    re_rendered: list[PlannedRow] = Field(default_factory=list)
    kept: list[PlannedRow] = Field(default_factory=list)
    """Live facts that a rebase inserts once more."""
    retractions: list[RetractedRow] = Field(default_factory=list)
    known: list[KeyRow] = Field(default_factory=list)
    held: list[HeldRow] = Field(default_factory=list)
    ended_holds: list[KeyRow] = Field(default_factory=list)
    conflicts: list[ConflictRow] = Field(default_factory=list)
    waiting: list[WaitingRow] = Field(default_factory=list)
    blocked: list[BlockedRow] = Field(default_factory=list)
    unchanged: int = 0
    guard: list[str] = Field(default_factory=list)
    rebase: str | None = None
    cost: Cost | None = None

    @property
    def edits(self) -> list[PlannedRow]:
        """Everything to be inserted."""
        return [*self.adds, *self.changes, *self.re_rendered, *self.kept]

    @property
    def rows(self) -> dict[FactKey, str]:
        """What would happen to each key, in words."""
        rows = {row.key: f"to become {row.target}" for row in self.edits}
        return rows | {row.key: f"{row.target} to be taken out" for row in self.retractions}

    def find(self, subject: str, relation: str) -> FactKey:
        """The row of a subject, given by id or as it is written. Raises UsageError where it is not just one."""
        written = {row.key: row.subject for row in self.edits} | {row.key: row.subject for row in self.retractions}
        found = [key for key, label in written.items() if key.relation == relation and subject in (key.subject, label)]
        if len(found) == 1:
            return found[0]
        ids = ", ".join(key.subject for key in found)
        raise UsageError(
            f"the plan has {'several rows' if found else 'no row'} for {relation} of {subject!r}"
            + (ids and f": {ids}"),
            hint="kbsync holds --json shows the rows of held plans",
        )

    @classmethod
    def read(cls, value: object) -> PlanDocument | None:
        """A document that the ledger kept; None where it is of an older form."""
        try:
            return cls.model_validate(value)
        except ValidationError:
            return None


class PlanFile(_Value):
    """What `plan --json` prints: a document for each policy that could be planned, and what kept others from it."""

    document: Literal["kbsync plans"] = "kbsync plans"
    version: Literal[1] = 1
    plans: list[PlanDocument]
    problems: list[dict[str, Any]] = Field(default_factory=list)


def document_of(
    plan: Plan,
    policy: str | None,
    *,
    snapshots: Sequence[Snapshot] = (),
    changes: Sequence[Change] = (),
    conflicts: Sequence[Conflict] = (),
    waiting: Sequence[Waiting] = (),
    guard: Sequence[str] = (),
    rebase: str | None = None,
    cost: Cost | None = None,
) -> PlanDocument:
    """The plan with all that it depends on, in a stable order."""
    return PlanDocument(
        policy=policy,
        model=plan.model,
        head=plan.head,
        digest=plan.digest,
        sources=[_source(snapshot) for snapshot in sorted(snapshots, key=lambda snapshot: snapshot.source)],
        facts=dict(sorted(Counter(str(change.kind) for change in changes).items())),
        adds=_planned(plan, "added"),
        changes=_planned(plan, "changed"),
        re_rendered=_planned(plan, "re-rendered"),
        kept=_planned(plan, "kept"),
        retractions=[_retracted(gone) for gone in plan.retractions],
        known=[_key(key) for key in plan.known],
        held=[_held(held) for held in plan.held],
        ended_holds=[_key(key) for key in plan.ended_holds],
        conflicts=[_conflict(conflict) for conflict in sorted(conflicts, key=lambda one: (one.key, one.kind))],
        waiting=[_waiting(one) for one in sorted(waiting, key=lambda one: one.key)],
        blocked=[_blocked(no) for no in plan.blocked],
        unchanged=plan.unchanged,
        guard=list(guard),
        rebase=rebase,
        cost=cost,
    )


def read_plans(value: object) -> list[PlanDocument]:
    """The documents of a plan file, as `plan --json` printed it. Raises UsageError where it is none."""
    try:
        return PlanFile.model_validate(value).plans
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(f"no plan of this kbsync: {place}: {first['msg']}", hint="kbsync plan --out FILE") from None


def moved(reviewed: PlanDocument, now: PlanDocument) -> list[str]:
    """How the plan of now differs from the one that was reviewed; [] where carrying it out would do just that."""
    if reviewed.digest == now.digest:
        return []
    if reviewed.model != now.model:
        return [f"the model was {reviewed.model} and is {now.model} now"]
    found = [f"HEAD has moved from version {reviewed.head} to {now.head}"] if reviewed.head != now.head else []
    then, today = _content(reviewed), _content(now)
    for key in sorted(then.keys() | today.keys()):
        if then.get(key) != today.get(key):
            was, is_ = reviewed.rows.get(key, "not in the plan"), now.rows.get(key, "not in the plan")
            found.append(f"{key.relation} of {key.subject}: was {was}, is {is_} now")
    return found or ["the holds that it ends are others"]


def _content(document: PlanDocument) -> Mapping[FactKey, tuple[str, str]]:
    edits = {row.key: (row.request, row.object_id) for row in document.edits}
    return edits | {row.key: ("", row.target) for row in document.retractions}


def _key(key: FactKey) -> KeyRow:
    return KeyRow(relation=key.relation, subject_id=key.subject)


def _planned(plan: Plan, kind: str) -> list[PlannedRow]:
    return [_row(edit) for edit in plan.edits if edit.kind == kind]


def _row(edit: PlannedEdit) -> PlannedRow:
    request = edit.request
    return PlannedRow(
        relation=request.key.relation,
        subject_id=request.key.subject,
        subject=request.subject,
        prompt=request.prompt,
        before=edit.before,
        target=request.target,
        object_id=edit.object_id,
        source=edit.source,
        origin=edit.origin,
        request=request.digest,
    )


def _retracted(gone: Retraction) -> RetractedRow:
    request = gone.applied.request
    return RetractedRow(**_key(gone.key).model_dump(), subject=request.subject, target=request.target)


def _held(held: HeldChange) -> HeldRow:
    frozen = held.hold.frozen.object_id if held.hold.frozen else None
    return HeldRow(**_key(held.key).model_dump(), frozen=frozen, wanted=held.wanted, reason=held.hold.reason)


def _blocked(no: Blocked) -> BlockedRow:
    return BlockedRow(**_key(no.key).model_dump(), target=no.target, reason=no.reason)


def _waiting(one: Waiting) -> WaitingRow:
    return WaitingRow(**_key(one.key).model_dump(), object_id=one.object, reason=one.reason, detail=one.detail)


def _conflict(conflict: Conflict) -> ConflictRow:
    claims = [
        ClaimRow(object=claim.object.label, object_id=claim.object.id, source=claim.source, origin=claim.origin)
        for claim in conflict.claims
    ]
    return ConflictRow(**_key(conflict.key).model_dump(), kind=conflict.kind, reason=conflict.reason, claims=claims)


def _source(snapshot: Snapshot) -> SourceRow:
    return SourceRow(
        source=snapshot.source,
        not_modified=snapshot.not_modified,
        body_sha256=snapshot.provenance.body_sha256,
    )
