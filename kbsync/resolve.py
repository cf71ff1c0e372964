"""Claims -> facts (pure): what the policy accepts for each (relation, subject), and what it must leave to a person.

MEMIT's no-conflict constraint (Meng et al. 2022, arXiv 2210.07229, Eqn 5) holds in what comes out: at most one object
per key and, because a model sees only text, at most one object per rendered prompt. What would break it is a
`Conflict`, which blocks only its own key: the key keeps its last accepted fact.

    resolution = resolve(claims, accepted, policy)
    changes = diff(accepted, resolution.facts)
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import groupby, takewhile

from kbsync.facts import Change, ChangeKind, Claim, Conflict, ConflictKind, EditRequest, Fact, FactKey
from kbsync.policy import Inverse, Policy, Relation, render

__all__ = ["ONLY_CLAIM", "Context", "Resolution", "diff", "keep_apart", "resolve"]

_Wording = Mapping[str, Relation | Inverse]

ONLY_CLAIM = "the only claim"
"""The rule of a fact that nothing else was weighed against."""

_SHOWN = 10
"""Claims that one conflict lists; its reason gives their number. The inverse of a constellation has every star."""

_DATE = re.compile(r"([+-]?\d{4,9})(?:-(\d\d)(?:-(\d\d)([T ].*)?)?)?")
"""ISO 8601 as Wikidata writes it: years before 1 and after 9999, and months and days of 00 where unknown."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a resolution depends on beside claims, previous facts and policy.

    `now` is the time of the transaction. `rulings`: the object id that a person chose for a key. `recent`: the object
    ids that a key had before its present one, as far back as the policy looks for flip-flops.
    """

    now: datetime | None = None
    rulings: Mapping[FactKey, str] = field(default_factory=dict)
    recent: Mapping[FactKey, frozenset[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Resolution:
    """What the policy accepts: every fact of its relations (with the withdrawn ones that it keeps), the conflicts (at
    most one per key), and the keys that wait for a source to repeat itself or for a quorum; both sorted by key."""

    facts: dict[FactKey, Fact]
    conflicts: tuple[Conflict, ...]
    pending: tuple[FactKey, ...]


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What the claims of one key come to: a claim, a conflict, or nothing. `waiting`: not to be acted on yet."""

    claim: Claim | None = None
    conflict: Conflict | None = None
    waiting: bool = False

    @property
    def outcome(self) -> tuple[str, str]:
        """Equal for two verdicts that would have the same consequence."""
        if self.conflict is not None:
            return "conflict", ""
        return ("object", self.claim.object.id) if self.claim else ("nothing", "")


_SILENCE = _Verdict()


def resolve(
    claims: Iterable[Claim],
    previous: Mapping[FactKey, Fact],
    policy: Policy,
    context: Context = Context(),  # noqa: ARG001
) -> Resolution:
    """The facts of the policy's relations, from the live claims and the facts accepted before.

    - A claim counts once its source has said it `confirm.fetches` times in a row. While claims that do not count yet
      would change the outcome, the key is pending and stays at its previous fact, or without one.
    - Within a source: deprecated claims are dropped, the best rank is taken, of these the ones without an end, of these
      the latest start (https://www.wikidata.org/wiki/Help:Ranking). Different objects that are left are a conflict.
    - Across sources: `order`, `newest` (by the claims' own start) or `quorum(n)`.
    - A key that nobody claims any more is withdrawn (`retract: keep`) or leaves (`retract: revert`).
    - Inverse relations are derived from the live facts and resolved by themselves; they never block a direct fact.
    - Of two keys with one rendered prompt and different objects each keeps its previous fact. A withdrawn fact, which
      no source stands for, gives way to a live one.

    The order of `claims` does not matter, and resolving again with the facts that came out gives the same facts.
    Claims of other relations and of sources that the policy does not name are ignored, and a relation with
    `cardinality: many` has no facts.
    """
    wording = policy.wording()
    functional = {name: relation for name, relation in policy.relations.items() if relation.cardinality == "one"}
    said = _by_key((claim for claim in claims if claim.relation in functional), policy.sources)
    verdicts = {key: _decide(key, told, policy) for key, told in said.items()}
    first = _settle(verdicts, _of(previous, functional), wording, {})

    inverse = {relation.inverse.relation for relation in functional.values() if relation.inverse}
    turned = _by_key(_turned(first.facts.values(), functional), policy.sources)
    verdicts = {key: _agree(key, told, kind="inverse") for key, told in turned.items()}
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


# Which claim counts ------------------------------------------------------------------------------------------------


def _by_key(claims: Iterable[Claim], sources: Sequence[str]) -> dict[FactKey, list[Claim]]:
    """The claims of these sources by key, in the order of the sources and then of their rows."""
    rank = {source: place for place, source in enumerate(sources)}
    found: defaultdict[FactKey, list[Claim]] = defaultdict(list)
    for claim in claims:
        if claim.source in rank:
            found[claim.key].append(claim)
    for said in found.values():
        # By length first: `line 9` comes before `line 10`.
        said.sort(key=lambda claim: (rank[claim.source], len(claim.origin), claim.origin, claim.object))
    return found


def _decide(key: FactKey, said: list[Claim], policy: Policy) -> _Verdict:
    """The verdict of the confirmed claims; waiting where those that are not confirmed yet would change it."""
    confirmed = [claim for claim in said if claim.seen >= policy.confirm.fetches]
    now = _weigh(key, confirmed, policy)
    if len(confirmed) == len(said):
        return now
    # Where nothing is confirmed the key waits even if the rest comes to nothing (deprecated): what was said just once
    # takes no fact away either.
    if confirmed and _weigh(key, said, policy).outcome == now.outcome:
        return now
    return replace(now, waiting=True)


def _weigh(key: FactKey, said: Sequence[Claim], policy: Policy) -> _Verdict:
    """One verdict of several sources, by the policy's precedence."""
    by_source = (list(claims) for _, claims in groupby(said, key=lambda claim: claim.source))
    answers = [current for claims in by_source if (current := _current(claims))]
    if not answers:
        return _SILENCE
    if policy.quorum is not None:
        return _vote(key, answers, policy.quorum)
    if policy.precedence == "newest":
        return _agree(key, _latest([claim for claims in answers for claim in claims]))
    return _agree(key, answers[0])


def _vote(key: FactKey, answers: Sequence[Sequence[Claim]], needed: int) -> _Verdict:
    """The object that enough sources name. A source that contradicts itself has no vote."""
    votes: defaultdict[str, list[Claim]] = defaultdict(list)
    for claims in answers:
        if len({claim.object.id for claim in claims}) == 1:
            votes[claims[0].object.id].append(claims[0])
    winners = [claims[0] for claims in votes.values() if len(claims) >= needed]
    if len(winners) == 1:
        return _Verdict(claim=winners[0])
    verdict = _agree(key, [claim for claims in answers for claim in claims])
    # Without a conflict nobody disagrees, but too few have spoken.
    return verdict if verdict.conflict else _Verdict(waiting=True)


def _current(claims: Sequence[Claim]) -> list[Claim]:
    """The claims of one source that hold now, by rank, end and start (R1.6)."""
    usable = [claim for claim in claims if claim.rank != "deprecated"]
    best = [claim for claim in usable if claim.rank == "preferred"] or usable
    return _latest([claim for claim in best if not claim.end] or best)


def _latest(claims: Sequence[Claim]) -> list[Claim]:
    """Those that no other is certainly later than: dates are compared as far as both are known, so that 2011 is neither
    before nor after March 2011. Claims without a start count as earlier than any start."""
    starts = [_moment(claim.start) for claim in claims]
    latest = max(starts, default=())
    # What is earlier than any other start is also earlier than the greatest one, so that one comparison is enough.
    level = [start == latest[: len(start)] and bool(start) == bool(latest) for start in starts]
    return [claim for claim, kept in zip(claims, level, strict=True) if kept]


def _moment(text: str | None) -> tuple[int, ...]:
    """Year, month, day, hour, minute, second in UTC, as far as given; () where there is none or it is not ISO 8601."""
    match = _DATE.fullmatch(text.strip()) if text else None
    if match is None:
        return ()
    if match[4]:
        try:
            instant = datetime.fromisoformat(match[0])
            instant = instant.astimezone(UTC) if instant.tzinfo else instant
            return tuple(instant.timetuple()[:6])
        except (ValueError, OverflowError):
            pass  # a year or a day that the calendar of datetime lacks: its date is compared
    return tuple(takewhile(bool, (int(part or 0) for part in match.groups()[:3])))


def _agree(key: FactKey, said: Sequence[Claim], kind: ConflictKind | None = None) -> _Verdict:
    """The one object that all claims name, or a conflict."""
    objects: dict[str, Claim] = {}
    for claim in said:
        objects.setdefault(claim.object.id, claim)
    claims = tuple(objects.values())
    if len(claims) == 1:
        return _Verdict(claim=claims[0])
    named = ", ".join(f"{claim.object.label} ({claim.source} {claim.origin})" for claim in claims[:_SHOWN])
    more = f" and {len(claims) - _SHOWN} more" if len(claims) > _SHOWN else ""
    reason = f"{claims[0].subject.label} has {len(claims)} objects: {named}{more}"
    return _Verdict(conflict=Conflict(key, kind or _kind(said), claims[:_SHOWN], reason))


def _kind(claims: Sequence[Claim]) -> ConflictKind:
    if len({claim.source for claim in claims}) > 1:
        return "sources"
    plain = all(claim.rank == "normal" and not claim.start and not claim.end for claim in claims)
    return "rows" if plain else "ambiguous"


def _turned(facts: Iterable[Fact], relations: Mapping[str, Relation]) -> Iterable[Claim]:
    """What the live facts say in the opposite direction."""
    for fact in facts:
        inverse = relations[fact.relation].inverse
        if inverse is not None and fact.status == "live":
            yield Claim(fact.source, inverse.relation, fact.object, fact.subject, fact.origin, id=fact.claim)


# From verdicts to facts --------------------------------------------------------------------------------------------


def _of(facts: Mapping[FactKey, Fact], relations: Collection[str]) -> dict[FactKey, Fact]:
    return {key: fact for key, fact in facts.items() if key.relation in relations}


def _settle(
    verdicts: Mapping[FactKey, _Verdict],
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
        verdict = verdicts.get(key, _SILENCE)
        if verdict.conflict or verdict.waiting:
            fact = standing.get(key)
        else:
            fact = _next(verdict.claim, previous.get(key), wording[key.relation])
        if fact is not None:
            facts[key] = fact
    facts, collisions = _one_object_per_prompt(facts, standing, wording, fixed)
    conflicts = {key: verdict.conflict for key, verdict in verdicts.items() if verdict.conflict}
    return Resolution(
        facts=facts,
        conflicts=tuple((collisions | conflicts).values()),
        pending=tuple(sorted(key for key, verdict in verdicts.items() if verdict.waiting)),
    )


def _next(claim: Claim | None, before: Fact | None, wording: Relation | Inverse) -> Fact | None:
    """The fact of a key that is decided, given the one before."""
    if claim is not None:
        fact = Fact(
            claim.relation, claim.subject, claim.object, claim.source, claim.origin, claim=claim.id, rule=ONLY_CLAIM
        )
        # A row that only moved within its source is the fact as accepted, with the origin of that day.
        return before if before is not None and replace(before, origin=fact.origin) == fact else fact
    if before is None or wording.retract == "revert":
        return None
    return replace(before, status="withdrawn")


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
    sides = tuple(Claim(side.source, side.relation, side.subject, side.object, side.origin) for side in (fact, rival))
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
