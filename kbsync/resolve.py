"""Claims -> facts (pure): what the policy accepts for each (relation, subject), and what it must leave to a person.

MEMIT's no-conflict constraint (Meng et al. 2022, arXiv 2210.07229, Eqn 5) holds in what comes out: at most one object
per key and, because a model sees only text, at most one object per rendered prompt. What would break it is a
`Conflict`, which blocks only its own key: the key keeps its last accepted fact.

    resolution = resolve(claims, accepted, policy)
    changes = diff(accepted, resolution.facts)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from operator import itemgetter

from kbsync.facts import Change, ChangeKind, Claim, Conflict, EditRequest, Entity, Fact, FactKey, Waiting
from kbsync.policy import Inverse, Policy, Relation, render
from kbsync.weigh import ONLY_CLAIM, Context, Verdict, by_key, decide, turn

__all__ = ["ONLY_CLAIM", "Context", "Resolution", "diff", "keep_apart", "resolve"]

_Wording = Mapping[str, Relation | Inverse]


@dataclass(frozen=True, slots=True)
class Resolution:
    """What the policy accepts: every fact of its relations (with the withdrawn ones that it keeps), the conflicts (at
    most one per key), and the keys that wait (for a source to repeat itself, for a quorum, for a flip-flop to settle);
    both sorted by key."""

    facts: dict[FactKey, Fact]
    conflicts: tuple[Conflict, ...]
    pending: tuple[Waiting, ...]


def resolve(
    claims: Iterable[Claim],
    previous: Mapping[FactKey, Fact],
    policy: Policy,
    context: Context = Context(),
) -> Resolution:
    """The facts of the policy's relations, from the live claims and the facts accepted before.

    - A claim counts once its source has said it `confirm.fetches` times in a row and for `confirm.hours`. While claims
      that do not count yet would change the outcome, the key is pending and stays at its previous fact, or without one.
    - Within a source: deprecated claims are dropped, the best rank is taken, of these the ones without an end, of these
      the latest start (https://www.wikidata.org/wiki/Help:Ranking). Different objects that are left are a conflict.
    - Across sources: those that the relation prefers alone; else `order`, `newest` (by the claims' own start) or
      `quorum(n)`. A person's ruling goes before all that.
    - A change back to an object that the key had within `confirm.flip_flop` is pending, too.
    - A key that nobody claims any more is withdrawn (`retract: keep`) or leaves (`retract: revert`).
    - Inverse relations are derived from the live facts and resolved by themselves; they never block a direct fact.
    - Of two keys with one rendered prompt and different objects each keeps its previous fact. A withdrawn fact, which
      no source stands for, gives way to a live one. The relation's `subject` template may tell them apart.

    The order of `claims` does not matter, and resolving again with the facts that came out gives the same facts.
    Claims of other relations and of sources that the policy does not name are ignored, and a relation with
    `cardinality: many` has no facts.
    """
    wording = policy.wording()
    functional = {name: relation for name, relation in policy.relations.items() if relation.cardinality == "one"}
    said = by_key((claim for claim in claims if claim.relation in functional), policy.sources)
    verdicts = {key: decide(key, told, policy, previous.get(key), context) for key, told in said.items()}
    first = _settle(verdicts, _of(previous, functional), wording, {})

    inverse = {relation.inverse.relation for relation in functional.values() if relation.inverse}
    turned = by_key(_turned(first.facts.values(), functional), policy.sources)
    verdicts = {key: turn(key, told, context.rulings.get(key)) for key, told in turned.items()}
    second = _settle(verdicts, _of(previous, inverse), wording, first.facts)
    return Resolution(
        facts=first.facts | second.facts,
        conflicts=tuple(sorted(first.conflicts + second.conflicts, key=lambda conflict: conflict.key)),
        pending=first.pending,
    )


def diff(before: Mapping[FactKey, Fact], after: Mapping[FactKey, Fact]) -> list[Change]:
    """What differs between two states of the ledger, sorted by key. Another origin or source alone is no change."""
    found: list[Change] = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if kind := _change(old, new):
            found.append(Change(key, kind, old, new))
    return found


def keep_apart(
    wanted: Mapping[FactKey, EditRequest],
    fallback: Mapping[FactKey, EditRequest],
    fixed: Iterable[EditRequest] = (),
) -> tuple[dict[FactKey, EditRequest], dict[FactKey, EditRequest]]:
    """Requests of which no two have one prompt and different targets (Eqn 5 for text), the `fixed` ones included.

    Who contradicts a fixed request goes back to its fallback; then all keys that want one prompt with different targets
    do, and so does whoever wants what a fallback has taken. A fallback that contradicts another one or a fixed one is
    none: its key goes.

    Returns (what each key gets, for each key that had to go back the request it collided with). The result does not
    depend on the order of the keys, and taken as the fallback it gives itself.
    """
    fixed = list(fixed)
    safe = _peaceful(fallback, fixed)
    taken: defaultdict[str, dict[str, EditRequest]] = defaultdict(dict)
    for request in fixed:
        taken[request.prompt].setdefault(request.target, request)
    chosen, blocked = dict(wanted), {}
    asking: defaultdict[str, list[FactKey]] = defaultdict(list)

    def go_back(key: FactKey, rivals: Mapping[str, EditRequest]) -> None:
        blocked[key] = next(rival for target, rival in rivals.items() if target != wanted[key].target)
        del chosen[key]
        if back := safe.get(key):
            chosen[key] = back
            taken[back.prompt].setdefault(back.target, back)

    fixed_targets = {prompt: dict(targets) for prompt, targets in taken.items()}
    for key in sorted(wanted):
        if fixed_targets.get(wanted[key].prompt, {}).keys() - {wanted[key].target}:
            go_back(key, fixed_targets[wanted[key].prompt])
        else:
            asking[wanted[key].prompt].append(key)
    queue = list(asking)
    while queue:
        prompt = queue.pop()
        rivals = dict(taken[prompt])
        for key in asking[prompt]:
            rivals.setdefault(wanted[key].target, wanted[key])
        if len(rivals) < 2:
            continue
        for key in asking.pop(prompt, ()):
            go_back(key, rivals)
            if key in chosen:
                queue.append(chosen[key].prompt)
    return chosen, blocked


def _peaceful(requests: Mapping[FactKey, EditRequest], fixed: Iterable[EditRequest]) -> dict[FactKey, EditRequest]:
    """Those that contradict none of the others and none of the fixed ones."""
    targets: defaultdict[str, set[str]] = defaultdict(set)
    for request in [*fixed, *requests.values()]:
        targets[request.prompt].add(request.target)
    return {key: request for key, request in requests.items() if len(targets[request.prompt]) == 1}


# From verdicts to facts --------------------------------------------------------------------------------------------


def _turned(facts: Iterable[Fact], relations: Mapping[str, Relation]) -> Iterable[Claim]:
    """What the live facts say in the opposite direction."""
    for fact in facts:
        inverse = relations[fact.relation].inverse
        if inverse is not None and fact.status == "live":
            yield Claim(fact.source, inverse.relation, fact.object, fact.subject, fact.origin, id=fact.claim)


def _of(facts: Mapping[FactKey, Fact], relations: Collection[str]) -> dict[FactKey, Fact]:
    return {key: fact for key, fact in facts.items() if key.relation in relations}


def _settle(
    verdicts: Mapping[FactKey, Verdict],
    previous: Mapping[FactKey, Fact],
    wording: _Wording,
    fixed: Mapping[FactKey, Fact],
) -> Resolution:
    """The facts that verdicts make of the previous ones, with one object per prompt, `fixed` facts included.

    A previous fact that contradicts another one (two relations that got one template) is nothing to stay at.
    """
    live = {key: fact for key, fact in previous.items() if fact.status == "live"}
    safe = _peaceful(_requests(live, wording), ())
    standing = {key: fact for key, fact in previous.items() if key in safe or key not in live}
    facts: dict[FactKey, Fact] = {}
    for key in sorted(verdicts.keys() | previous.keys()):
        verdict = verdicts.get(key, Verdict())
        fact = standing.get(key) if verdict.keeps else _next(verdict, previous.get(key), wording[key.relation])
        if fact is not None:
            facts[key] = fact
    facts, collisions = _one_object_per_prompt(facts, standing, wording, fixed)
    conflicts = {key: verdict.conflict for key, verdict in verdicts.items() if verdict.conflict}
    return Resolution(
        facts=facts,
        conflicts=tuple((collisions | conflicts).values()),
        pending=tuple(verdict.waiting for _, verdict in sorted(verdicts.items(), key=itemgetter(0)) if verdict.waiting),
    )


def _next(verdict: Verdict, before: Fact | None, wording: Relation | Inverse) -> Fact | None:
    """The fact of a key that is decided, given the one before."""
    if (claim := verdict.claim) is not None:
        subject = _written(claim, wording)
        fact = Fact(
            claim.relation, subject, claim.object, claim.source, claim.origin, claim=claim.id, rule=verdict.rule
        )
        # A row that only moved within its source is the fact as accepted, with the origin of that day.
        return before if before is not None and replace(before, origin=fact.origin) == fact else fact
    if before is None or wording.retract == "revert":
        return None
    return replace(before, status="withdrawn")


def _written(claim: Claim, wording: Relation | Inverse) -> Entity:
    """The subject as the relation's template writes it; plainly where the claim lacks a qualifier."""
    if not isinstance(wording, Relation):
        return claim.subject
    return replace(claim.subject, label=wording.subject_label(claim.subject.label, dict(claim.qualifiers)))


def _one_object_per_prompt(
    facts: Mapping[FactKey, Fact],
    previous: Mapping[FactKey, Fact],
    wording: _Wording,
    fixed: Mapping[FactKey, Fact],
) -> tuple[dict[FactKey, Fact], dict[FactKey, Conflict]]:
    """The facts that may stand together, and the conflicts of the keys that had to go back to their previous fact."""
    live = {key: fact for key, fact in facts.items() if fact.status == "live"}
    before = {key: previous[key] for key in live if key in previous}
    fallback = {key: fact for key, fact in before.items() if fact.status == "live"}
    pinned = _requests(fixed, wording)
    chosen, blocked = keep_apart(_requests(live, wording), _requests(fallback, wording), pinned.values())
    kept = {key: fallback[key] if key in blocked else live[key] for key in chosen}

    faded = {key: fact for key, fact in facts.items() if fact.status == "withdrawn"}
    faded |= {key: before[key] for key in blocked if key in before and before[key].status == "withdrawn"}
    kept |= {key: faded[key] for key in _peaceful(_requests(faded, wording), [*pinned.values(), *chosen.values()])}
    if not blocked:
        return kept, {}
    asking = {
        render(fact, wording[key.relation]): fact for group in (fixed, fallback, live) for key, fact in group.items()
    }
    return kept, {key: _collision(live[key], asking[rival], rival.prompt) for key, rival in blocked.items()}


def _requests(facts: Mapping[FactKey, Fact], wording: _Wording) -> dict[FactKey, EditRequest]:
    return {key: render(fact, wording[key.relation]) for key, fact in facts.items()}


def _collision(fact: Fact, rival: Fact, prompt: str) -> Conflict:
    sides = tuple(
        Claim(side.source, side.relation, side.subject, side.object, side.origin, id=side.claim)
        for side in (fact, rival)
    )
    named = " and ".join(f"{side.object.label} ({side.subject.id}, {side.source} {side.origin})" for side in sides)
    return Conflict(fact.key, "prompt", sides, f"{prompt!r} would go on with {named}")


def _change(old: Fact | None, new: Fact | None) -> ChangeKind | None:
    if old is None or new is None:
        return "added" if new else "removed" if old else None
    if old.object.id != new.object.id:
        return "changed"
    if old.status != new.status:
        return "withdrawn" if new.status == "withdrawn" else "restored"
    return "relabelled" if (old.subject, old.object) != (new.subject, new.object) else None
