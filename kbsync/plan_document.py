"""A plan as a document: what a person or a CI job reviews, what `sync --plan` applies, what the ledger keeps. Pure.

document = document_of(plan, policy="astronomy", guard=reasons, …)
document.model_dump(mode="json")        # the same plan gives the same JSON; docs/plan.schema.json describes it
moved(document, now)                    # how the world differs from what was reviewed, in words; [] where it does not
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kbsync.errors import UsageError
from kbsync.facts import Change, Conflict, FactKey, Snapshot, Waiting, digest_of
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


class ChangeRow(KeyRow):
    """A change of the ledger's facts. `object_id`: of the fact as it would be; of one that is to go, as it is."""

    kind: str
    subject: str
    before: str | None
    after: str | None
    object_id: str


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

    `policy` is null where a rebase or an undo made the plan. `digest` covers what would happen to the weights, to the
    holds and in the ledger; `facts` counts what changes in the ledger, `ledger` lists it (of a first load not all);
    `guard` says why the run would be held, `rebase` why the version would be made anew from the base.
    """

    document: Literal["kbsync plan"] = "kbsync plan"
    version: Literal[1] = 1
    policy: str | None
    model: str
    head: int
    digest: str
    sources: list[SourceRow] = Field(default_factory=list)
    facts: dict[str, int] = Field(default_factory=dict)
    ledger: list[ChangeRow] = Field(default_factory=list)
    adds: list[PlannedRow] = Field(default_factory=list)
    changes: list[PlannedRow] = Field(default_factory=list)
    re_rendered: list[PlannedRow] = Field(default_factory=list)
    faded: list[PlannedRow] = Field(default_factory=list)
    """What the weights hold and no longer answer: inserted once more."""
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
        return [*self.adds, *self.changes, *self.re_rendered, *self.faded, *self.kept]

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
    kinds: Mapping[str, int] | None = None,
    conflicts: Sequence[Conflict] = (),
    waiting: Sequence[Waiting] = (),
    guard: Sequence[str] = (),
    rebase: str | None = None,
    cost: Cost | None = None,
) -> PlanDocument:
    """The plan with all that it depends on, in a stable order. `kinds` counts the changes of the ledger, of which
    `changes` may be the first only."""
    kinds = dict(sorted((kinds or {}).items()))
    ledger = [_changed(change) for change in changes]
    return PlanDocument(
        policy=policy,
        model=plan.model,
        head=plan.head,
        digest=_digest(plan, ledger, kinds, snapshots),
        sources=[_source(snapshot) for snapshot in sorted(snapshots, key=lambda snapshot: snapshot.source)],
        facts=kinds,
        ledger=ledger,
        adds=_planned(plan, "added"),
        changes=_planned(plan, "changed"),
        re_rendered=_planned(plan, "re-rendered"),
        faded=_planned(plan, "faded"),
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


def _digest(plan: Plan, ledger: Sequence[ChangeRow], kinds: Mapping[str, int], snapshots: Sequence[Snapshot]) -> str:
    """The plan's own digest where it changes nothing in the ledger. Changes that are not listed are told by the bodies
    that they come from."""
    if not kinds:
        return plan.digest
    told = [[row.kind, *row.key, row.object_id] for row in ledger]
    whole = len(ledger) == sum(kinds.values())
    bodies = [] if whole else sorted(snapshot.provenance.body_sha256 for snapshot in snapshots)
    return digest_of([plan.digest, told, dict(kinds), bodies])


def read_plans(value: object) -> list[PlanDocument]:
    """The documents of a plan file, as `plan --json` printed it. Raises UsageError where it is none."""
    try:
        return PlanFile.model_validate(value).plans
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(f"no plan of this kbsync: {place}: {first['msg']}", hint="kbsync plan --out FILE") from None


_TOLD_APART: dict[str, Any] = {
    **dict.fromkeys(("guard", "rebase", "cost"), True),
    "sources": {"__all__": {"not_modified", "body_sha256"}},
}
"""What may be otherwise without another plan: a guard with another reason holds the run by itself, and a source may
have another body as long as everything that follows from it is the same."""


def moved(reviewed: PlanDocument, now: PlanDocument) -> list[str]:
    """How the plan of now differs from the one that was reviewed; [] where carrying it out would do just that."""
    if reviewed.model_dump(exclude=_TOLD_APART) == now.model_dump(exclude=_TOLD_APART):
        return []
    if reviewed.model != now.model:
        return [f"the model was {reviewed.model} and is {now.model} now"]
    found = [f"HEAD has moved from version {reviewed.head} to {now.head}"] if reviewed.head != now.head else []
    found += _moved_rows(reviewed, now)
    for part in ("ledger", "known", "held", "ended_holds", "conflicts", "waiting", "blocked"):
        found += _moved_part(part, getattr(reviewed, part), getattr(now, part))
    then, today = ({row.source for row in document.sources} for document in (reviewed, now))
    found += [f"the source {name} was {'not read' if name in today else 'read'}" for name in sorted(then ^ today)]
    return found or ["it is not as kbsync wrote it, or of a first load that has changed"]


def _moved_rows(reviewed: PlanDocument, now: PlanDocument) -> Iterator[str]:
    then, today = _content(reviewed), _content(now)
    for key in sorted(then.keys() | today.keys()):
        if then.get(key) == today.get(key):
            continue
        was, is_ = reviewed.rows.get(key, "not in the plan"), now.rows.get(key, "not in the plan")
        said = f"was {was}, is {is_} now" if was != is_ else f"{was}, but the row is another one"
        yield f"{key.relation} of {key.subject}: {said}"


def _moved_part(part: str, reviewed: Sequence[KeyRow], now: Sequence[KeyRow]) -> Iterator[str]:
    then, today = ({(row.key, row.model_dump_json()) for row in rows} for rows in (reviewed, now))
    for key in sorted({key for key, _ in then ^ today}):
        yield f"{key.relation} of {key.subject}: its entry in `{part}` is another one"


def _content(document: PlanDocument) -> Mapping[FactKey, KeyRow]:
    rows: list[PlannedRow | RetractedRow] = [*document.edits, *document.retractions]
    return {row.key: row for row in rows}


def _changed(change: Change) -> ChangeRow:
    fact, before, after = change.after or change.before, change.before, change.after
    if fact is None:
        raise ValueError("a change without a fact")
    return ChangeRow(
        **_key(change.key).model_dump(),
        kind=change.kind,
        subject=fact.subject.label,
        before=before.object.label if before else None,
        after=after.object.label if after else None,
        object_id=fact.object.id,
    )


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
