"""Desired facts against those that a version holds -> Plan (pure), and the guards that stop a suspicious run.

    plan = make_plan(desired, applied, holds, policy.wording(), model=model, head=7)
    reasons = check_guard(difference, policy.guard) + check_edits(plan, policy.guard)

Planning again after a plan has been carried out gives an empty plan, and what the weights hold then has at most one
target per prompt (MEMIT's Eqn 5 for text), holds and relations of other policies included.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from kbsync.facts import Applied, Difference, EditRequest, Fact, FactKey, Hold, digest_of
from kbsync.policy import Guard, Inverse, Relation, render
from kbsync.resolve import keep_apart

__all__ = [
    "Blocked",
    "EditKind",
    "HeldChange",
    "Plan",
    "PlannedEdit",
    "Retraction",
    "carried",
    "check_edits",
    "check_guard",
    "make_plan",
]

EditKind = Literal["added", "changed", "re-rendered", "faded", "kept"]

GUARDED_ROWS = 10
"""Rows of the last accepted snapshot from which on percentages count: of three rows one is 33 %, and no alarm."""


@dataclass(frozen=True, slots=True)
class PlannedEdit:
    """One request to insert, and what it replaces in the weights, if anything. `re-rendered`: the object is the same,
    its wording or a label is not; `faded`: the weights hold just this and no longer answer it; `kept`: a live fact that
    a rebase inserts once more. `source` and `origin` are the
    fact's, empty where a hold's frozen state is restored.
    """

    request: EditRequest
    kind: EditKind
    replaces: Applied | None
    object_id: str
    source: str
    origin: str

    @property
    def before(self) -> str | None:
        """The target text that the weights hold for the key now."""
        return self.replaces.request.target if self.replaces else None


@dataclass(frozen=True, slots=True)
class Retraction:
    """A key whose column is to be taken out of the weights, with nothing in its place."""

    key: FactKey
    applied: Applied


@dataclass(frozen=True, slots=True)
class HeldChange:
    """What a hold keeps out of the weights: `wanted` is the object id that the ledger has, None for a retraction."""

    key: FactKey
    hold: Hold
    wanted: str | None


@dataclass(frozen=True, slots=True)
class Blocked:
    """A request that cannot be made, and why; the weights keep what they hold for the key."""

    key: FactKey
    target: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What brings the version `head` of `model` in line with the ledger. All tuples are sorted by key.

    `known`: keys that the base model answers by itself and that need no edit; `held`: changes that holds keep out;
    `ended_holds`: holds that a third object or other settings have ended, released once the plan is carried out;
    `unchanged`: keys that the weights hold as wanted.
    """

    model: str
    head: int
    edits: tuple[PlannedEdit, ...] = ()
    retractions: tuple[Retraction, ...] = ()
    known: tuple[FactKey, ...] = ()
    held: tuple[HeldChange, ...] = ()
    ended_holds: tuple[FactKey, ...] = ()
    blocked: tuple[Blocked, ...] = ()
    unchanged: int = 0

    @property
    def empty(self) -> bool:
        """Whether the weights are to stay as they are."""
        return not self.edits and not self.retractions

    @property
    def idle_holds(self) -> list[FactKey]:
        """The ended holds of keys of which the weights keep what they have: nothing is to come of their end. The others
        end with the version that comes of it, or stand where it is rejected."""
        busy = self.leaving
        return [key for key in self.ended_holds if key not in busy]

    def without(self, holds: Collection[FactKey]) -> Plan:
        """The plan once these ended holds are released."""
        return replace(self, ended_holds=tuple(key for key in self.ended_holds if key not in holds))

    @property
    def leaving(self) -> set[FactKey]:
        """The keys whose columns are to leave the weights, or would be replaced were they there."""
        return {edit.request.key for edit in self.edits} | {gone.key for gone in self.retractions}

    @property
    def digest(self) -> str:
        """sha256 of what the plan would do to the weights and the holds, and to which version: what is approved."""
        return digest_of(
            [
                self.model,
                self.head,
                [[*edit.request.key, edit.request.digest, edit.object_id] for edit in self.edits],
                [[*gone.key, gone.applied.delta, gone.applied.column] for gone in self.retractions],
                [list(key) for key in self.ended_holds],
            ]
        )

    def take(self, facts: int) -> Plan:
        """The part that one version takes: every retraction and the first `facts` edits; the rest is planned again."""
        return self.only({edit.request.key for edit in self.edits[:facts]})

    def only(self, keys: Collection[FactKey]) -> Plan:
        """The part with every retraction and the edits of `keys`.

        What another edit is to replace is retracted at once where it would contradict one of these edits, so that each
        version on the way, too, has one target per prompt.
        """
        taken = tuple(edit for edit in self.edits if edit.request.key in keys)
        later = [edit for edit in self.edits if edit.request.key not in keys]
        targets = {edit.request.prompt: edit.request.target for edit in taken}
        in_the_way = [
            Retraction(edit.request.key, old)
            for edit in later
            if (old := edit.replaces) and targets.get(old.request.prompt, old.request.target) != old.request.target
        ]
        retractions = sorted([*self.retractions, *in_the_way], key=lambda gone: gone.key)
        waiting = {edit.request.key for edit in later}
        ended = tuple(key for key in self.ended_holds if key not in waiting)
        return replace(self, edits=taken, retractions=tuple(retractions), ended_holds=ended)

    def to_json(self) -> dict[str, object]:
        """The plan as a JSON value, for people, `--json` and staging; its digest included."""
        return {
            "model": self.model,
            "head": self.head,
            "digest": self.digest,
            "edits": [_edit_json(edit) for edit in self.edits],
            "retractions": [_key_json(gone.key) | {"target": gone.applied.request.target} for gone in self.retractions],
            "known": [_key_json(key) for key in self.known],
            "held": [_held_json(held) for held in self.held],
            "ended_holds": [_key_json(key) for key in self.ended_holds],
            "blocked": [_key_json(no.key) | {"target": no.target, "reason": no.reason} for no in self.blocked],
            "unchanged": self.unchanged,
        }


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What the weights should hold for a key, and which fact says so."""

    request: EditRequest
    object_id: str
    source: str
    origin: str


@dataclass(slots=True)
class _Draft:
    """A plan in the making: `goal` may give way to other requests, `pinned` stands."""

    goal: dict[FactKey, _Wanted] = field(default_factory=dict)
    pinned: dict[FactKey, _Wanted] = field(default_factory=dict)
    known: list[FactKey] = field(default_factory=list)
    held: list[HeldChange] = field(default_factory=list)
    ended: list[FactKey] = field(default_factory=list)
    blocked: list[Blocked] = field(default_factory=list)


def make_plan(
    desired: Mapping[FactKey, Fact],
    applied: Mapping[FactKey, Applied],
    holds: Mapping[FactKey, Hold],
    wording: Mapping[str, Relation | Inverse],
    *,
    known: Collection[str] = (),
    moved: Mapping[str, str] | None = None,
    faded: Collection[str] = (),
    outdated: Collection[FactKey] = (),
    model: str,
    head: int,
) -> Plan:
    """What has to be edited into and taken out of version `head` so that it holds the desired facts.

    Only relations in `wording` are touched. Withdrawn facts that the ledger keeps are desired. A held key stays at what
    its hold froze until a third object ends the hold, or it is `outdated`; a protected subject stays as it is, under
    every id that it has had (`moved`: ids that were merged -> the id of now). `known` are the digests of
    requests that the base model answers by itself: relations with `skip_known` take no edit for them. A request that
    would contradict another one with the same prompt, or that does not name its subject exactly once, is blocked. What
    is to go and shares its column with a fact that stays (two subjects written alike) goes when that one does.
    `faded` are the digests of requests that version `head` holds and does not answer any more: they are inserted once
    more, unless their key is held or protected.
    """
    ours = {key: now for key, now in applied.items() if key.relation in wording}
    wants = {key: _want(fact, wording) for key, fact in desired.items() if key.relation in wording}
    holds = {key: hold for key, hold in holds.items() if key.relation in wording}
    protected = _protected(wording, moved or {})
    draft = _Draft()
    for key in sorted(wants.keys() | ours.keys() | holds.keys()):
        want, now, hold = wants.get(key), ours.get(key), holds.get(key)
        if key in protected:
            _pin(draft, key, now)
        elif hold is not None and key not in outdated and not _ended_by(hold, want):
            _freeze(draft, hold, want)
        else:
            if hold is not None:
                draft.ended.append(key)
            _aim(draft, key, want, now, known if _skips_known(key, wording) else ())
    others = [now.request for key, now in applied.items() if key not in ours]
    final = _reconciled(draft, ours, others)
    again = {key for key, now in ours.items() if key in draft.goal and now.request.digest in faded}
    kept = {
        key
        for key, now in applied.items()
        if key not in ours or (key not in again and key in final and final[key].request == now.request)
    }
    shared = {(applied[key].delta, applied[key].column) for key in kept}
    gone = [key for key in sorted(ours.keys() - final.keys()) if (ours[key].delta, ours[key].column) not in shared]
    return Plan(
        model=model,
        head=head,
        edits=tuple(_edits(final, ours, again)),
        retractions=tuple(Retraction(key, ours[key]) for key in gone),
        known=tuple(draft.known),
        held=tuple(draft.held),
        ended_holds=tuple(draft.ended),
        blocked=tuple(sorted(draft.blocked, key=lambda blocked: blocked.key)),
        unchanged=len(kept & ours.keys()),
    )


def carried(keep: Mapping[FactKey, Applied], desired: Mapping[FactKey, Fact]) -> list[PlannedEdit]:
    """Live facts as a rebase inserts them once more, by key: just what the weights hold, frozen or not."""
    found = []
    for key, applied in sorted(keep.items()):
        fact = desired.get(key)
        said = (fact.source, fact.origin) if fact and fact.object.id == applied.object_id else ("", "")
        found.append(PlannedEdit(applied.request, "kept", applied, applied.object_id, *said))
    return found


def check_guard(found: Difference, guard: Guard) -> list[str]:
    """Why a snapshot looks suspicious beside its source's last accepted one; [] where it does not.

    Shares are of the subjects claimed before, and count from 10 rows on. `min_rows` compares good rows with good rows.
    A partial snapshot says nothing by what it lacks, an increment nothing by what it does not cover.
    """
    if found.complete and not found.rows and found.claims_before:
        return [f"{found.source}: no rows, {found.claims_before} before: a source does not become empty"]
    if found.claims_before < GUARDED_ROWS:
        return []
    counts = (
        ("changed", found.changed, guard.max_changed),
        ("added", found.added, guard.max_added),
        ("removed", found.removed, guard.max_removed),
    )
    reasons = [
        f"{found.source}: {count} of {found.subjects} subjects {what} ({count / found.subjects:.1%}), "
        f"max_{what} is {limit:.1%}"
        for what, count, limit in counts
        if _more(count, limit * found.subjects)
    ]
    if found.complete and _more(guard.min_rows * found.claims_before, found.claims):
        share = f"{found.claims / found.claims_before:.1%}"
        rows = f"{found.claims} of {found.claims_before} good rows ({share})"
        reasons.append(f"{found.source}: {rows}, min_rows is {guard.min_rows:.1%}")
    return reasons


def check_edits(plan: Plan, guard: Guard) -> list[str]:
    """Why a plan is too large to be carried out unseen; [] where it is not. Retractions count like edits."""
    edits = len(plan.edits) + len(plan.retractions)
    return [f"{edits} edits and retractions, max_edits is {guard.max_edits}"] if edits > guard.max_edits else []


# Where each key goes -----------------------------------------------------------------------------------------------


def _want(fact: Fact, wording: Mapping[str, Relation | Inverse]) -> _Wanted:
    return _Wanted(render(fact, wording[fact.relation]), fact.object.id, fact.source, fact.origin)


def _protected(wording: Mapping[str, Relation | Inverse], moved: Mapping[str, str]) -> set[FactKey]:
    relations = {name: words.protected for name, words in wording.items() if isinstance(words, Relation)}
    return {FactKey(name, id_) for name, ids in relations.items() for old in ids for id_ in (old, moved.get(old, old))}


def _skips_known(key: FactKey, wording: Mapping[str, Relation | Inverse]) -> bool:
    relation = wording[key.relation]
    return isinstance(relation, Relation) and relation.skip_known


def _ended_by(hold: Hold, want: _Wanted | None) -> bool:
    """Whether the source gives a third object, neither the frozen nor the held-out one."""
    frozen = hold.frozen.object_id if hold.frozen else None
    return want is not None and want.object_id not in (frozen, hold.held_out)


def _pin(draft: _Draft, key: FactKey, now: Applied | None) -> None:
    if now is not None:
        draft.pinned[key] = _Wanted(now.request, now.object_id, "", "")


def _freeze(draft: _Draft, hold: Hold, want: _Wanted | None) -> None:
    """The state that the hold froze, with the fact's own origin where it is the fact's object."""
    frozen = hold.frozen
    _pin(draft, hold.key, frozen)
    if frozen and want and want.object_id == frozen.object_id:
        draft.pinned[hold.key] = replace(want, request=frozen.request)
    if (want and want.request) != (frozen and frozen.request):
        draft.held.append(HeldChange(hold.key, hold, want.object_id if want else None))


def _aim(draft: _Draft, key: FactKey, want: _Wanted | None, now: Applied | None, known: Collection[str]) -> None:
    """A key that nothing freezes: to its fact, unless the base knows it already or no prompt can teach it."""
    if want is None:
        return
    current = now is not None and now.request == want.request
    if not current and known and want.request.digest in known:
        draft.known.append(key)
    elif (times := want.request.prompt.count(want.request.subject)) != 1:
        reason = f"the prompt {want.request.prompt!r} has the subject {want.request.subject!r} {times} times"
        draft.blocked.append(Blocked(key, want.request.target, reason))
        _pin(draft, key, now)
    else:
        draft.goal[key] = want


def _reconciled(
    draft: _Draft, ours: Mapping[FactKey, Applied], others: Iterable[EditRequest]
) -> dict[FactKey, _Wanted]:
    """What every key is to hold, with one target per prompt; what had to give way is noted as blocked."""
    fixed = [*others, *(want.request for want in draft.pinned.values())]
    wanted = {key: want.request for key, want in draft.goal.items()}
    fallback = {key: ours[key].request for key in wanted if key in ours}
    chosen, collided = keep_apart(wanted, fallback, fixed)
    final = draft.pinned | {key: draft.goal[key] for key in chosen}
    for key, rival in collided.items():
        if key in chosen:
            final[key] = replace(draft.goal[key], request=chosen[key], object_id=ours[key].object_id)
        if chosen.get(key) != wanted[key]:
            reason = f"{rival.prompt!r} goes on with {rival.target!r} for {rival.key.relation} {rival.key.subject}"
            draft.blocked.append(Blocked(key, wanted[key].target, reason))
    return final


def _edits(
    final: Mapping[FactKey, _Wanted], ours: Mapping[FactKey, Applied], again: Collection[FactKey]
) -> Iterator[PlannedEdit]:
    for key in sorted(final):
        want, now = final[key], ours.get(key)
        same = now is not None and now.request == want.request
        if same and key not in again:
            continue
        changed: EditKind = "re-rendered" if now is not None and now.object_id == want.object_id else "changed"
        kind: EditKind = "added" if now is None else "faded" if same else changed
        yield PlannedEdit(want.request, kind, now, want.object_id, want.source, want.origin)


# Guard arithmetic --------------------------------------------------------------------------------------------------


def _more(count: float, limit: float) -> bool:
    """count > limit, where one of them is a product: 29 % of 100 is 28.999999999999996 in floating point."""
    return count - limit > 1e-6


# JSON --------------------------------------------------------------------------------------------------------------


def _key_json(key: FactKey) -> dict[str, object]:
    return {"relation": key.relation, "subject_id": key.subject}


def _edit_json(edit: PlannedEdit) -> dict[str, object]:
    return {
        "kind": edit.kind,
        "request": edit.request.to_json(),
        "before": edit.before,
        "object_id": edit.object_id,
        "source": edit.source,
        "origin": edit.origin,
    }


def _held_json(held: HeldChange) -> dict[str, object]:
    frozen = held.hold.frozen.object_id if held.hold.frozen else None
    return _key_json(held.key) | {"frozen": frozen, "wanted": held.wanted, "reason": held.hold.reason}
