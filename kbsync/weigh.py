"""Which claim counts (pure): the claims of one key -> one verdict, with the rule that decided in words.

    verdict = decide(key, claims, policy, before, context)

In this order: a person's ruling; the sources that the relation prefers; else the policy's precedence; within a source
rank, end and start. What is not confirmed yet, and what goes back to an object that the key had before, waits.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import groupby, takewhile

from kbsync.facts import Claim, Conflict, ConflictKind, Fact, FactKey, Ruling, Waiting
from kbsync.policy import Confirm, Policy

__all__ = ["ONLY_CLAIM", "Context", "Verdict", "by_key", "date_parts", "decide", "turn"]

ONLY_CLAIM = "the only claim"
"""The rule of a fact that nothing else was weighed against."""

_SHOWN = 10
"""Claims that one conflict lists; its reason gives their number. The inverse of a constellation has every star."""

_DATE = re.compile(r"([+-]?\d{4,9})(?:-(\d\d)(?:-(\d\d)([T ].*)?)?)?")
"""ISO 8601 as Wikidata writes it: years before 1 and after 9999, and months and days of 00 where unknown."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a resolution depends on beside claims, previous facts and policy.

    `now` is the time of the transaction. `rulings`: what people chose for a key. `recent`: the object ids that a key
    had before its present one, as far back as the policy looks for flip-flops.
    """

    now: datetime | None = None
    rulings: Mapping[FactKey, Ruling] = field(default_factory=dict)
    recent: Mapping[FactKey, frozenset[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the claims of one key come to: a claim and the rule that chose it, a conflict, or nothing. `waiting`: not
    to be acted on yet; `stays`: nothing but what the key has already, though not confirmed anew."""

    claim: Claim | None = None
    rule: str = ONLY_CLAIM
    conflict: Conflict | None = None
    waiting: Waiting | None = None
    stays: bool = False

    @property
    def keeps(self) -> bool:
        """Whether the key keeps its previous fact, or goes on without one."""
        return self.stays or self.conflict is not None or self.waiting is not None

    @property
    def outcome(self) -> tuple[str, str]:
        """Equal for two verdicts that would have the same consequence."""
        if self.conflict is not None:
            return "conflict", ""
        return ("object", self.claim.object.id) if self.claim else ("nothing", "")


@dataclass(frozen=True, slots=True)
class _Answer:
    """The claims of one source that hold now, and by which rules they were chosen among its claims."""

    source: str
    claims: Sequence[Claim]
    rules: tuple[str, ...] = ()


def by_key(claims: Iterable[Claim], sources: Sequence[str]) -> dict[FactKey, list[Claim]]:
    """The claims of these sources by key, in the order of the sources and then of their rows."""
    rank = {source: place for place, source in enumerate(sources)}
    found: defaultdict[FactKey, list[Claim]] = defaultdict(list)
    for claim in claims:
        if claim.source in rank:
            found[claim.key].append(claim)
    for said in found.values():
        # By length first: `line 9` comes before `line 10`.
        said.sort(key=lambda claim: (rank[claim.source], len(claim.origin), claim.origin, claim.object))
    return dict(found)


def decide(
    key: FactKey, said: Sequence[Claim], policy: Policy, before: Fact | None = None, context: Context = Context()
) -> Verdict:
    """The verdict of the confirmed claims of a key (as `by_key` orders them), given its previous fact.

    It waits where claims that are not confirmed yet would change it, where too few sources for a quorum have spoken,
    and where it would go back to a recent object. A ruling needs no confirmation and ends the wait of a flip-flop.
    """
    ruling = context.rulings.get(key)
    confirmed = [
        claim
        for claim in said
        if _confirmed(claim, policy.confirm, context.now) or (ruling and claim.object.id == ruling.object)
    ]
    now = _weigh(key, confirmed, policy, ruling)
    if len(confirmed) < len(said):
        everything = _weigh(key, said, policy, ruling)
        if before and before.status == "live" and everything.outcome == ("object", before.object.id) != now.outcome:
            return replace(everything, stays=True)
        # Where nothing is confirmed the key waits even if the rest comes to nothing (deprecated): what was said just
        # once takes no fact away either.
        if not confirmed or everything.outcome != now.outcome:
            return replace(now, waiting=_unconfirmed(key, everything, policy.confirm))
    if now.claim and not ruling and _goes_back(now.claim, before, context):
        return replace(now, waiting=_flip_flop(key, now.claim, before, policy.confirm))
    return now


def turn(key: FactKey, said: Sequence[Claim], ruling: Ruling | None = None) -> Verdict:
    """The verdict of what facts say in the opposite direction."""
    if ruling and (ruled := _ruled(key, said, ruling, "inverse")):
        return ruled
    verdict = _agree(key, said, kind="inverse")
    return replace(verdict, rule=f"the only subject of {said[0].subject.label}") if verdict.claim else verdict


# When a claim counts -----------------------------------------------------------------------------------------------


def _confirmed(claim: Claim, confirm: Confirm, now: datetime | None) -> bool:
    if claim.seen < confirm.fetches:
        return False
    if not confirm.hours:
        return True
    return bool(now and claim.since and now - claim.since >= timedelta(hours=confirm.hours))


def _unconfirmed(key: FactKey, verdict: Verdict, confirm: Confirm) -> Waiting:
    what = verdict.claim.object.label if verdict.claim else "what its sources say now"
    needs = [f"{confirm.fetches} fetches in a row"] if confirm.fetches > 1 else []
    needs += [f"{confirm.hours:g} hours"] if confirm.hours else []
    object_id = verdict.claim.object.id if verdict.claim else None
    return Waiting(key, "confirm", object_id, f"{what} counts after {' and '.join(needs)}")


def _goes_back(claim: Claim, before: Fact | None, context: Context) -> bool:
    same = before is not None and before.object.id == claim.object.id
    return not same and claim.object.id in context.recent.get(claim.key, ())


def _flip_flop(key: FactKey, claim: Claim, before: Fact | None, confirm: Confirm) -> Waiting:
    now = f"it is {before.object.label} now" if before else "it has none now"
    days = confirm.flip_flop / 86400
    detail = f"{claim.object.label} was its object within the last {days:g} days, {now}: a change back waits as long"
    return Waiting(key, "flip-flop", claim.object.id, detail)


# Across sources ----------------------------------------------------------------------------------------------------


def _weigh(key: FactKey, said: Sequence[Claim], policy: Policy, ruling: Ruling | None) -> Verdict:
    """One verdict of several sources: by a ruling, else by preference, else by the policy's precedence."""
    by_source = (list(claims) for _, claims in groupby(said, key=lambda claim: claim.source))
    answers = [answer for claims in by_source if (answer := _current(claims)).claims]
    if not answers:
        return Verdict()
    current = [claim for answer in answers for claim in answer.claims]
    if ruling and (ruled := _ruled(key, current, ruling)):
        return ruled
    preferred = policy.relations[key.relation].prefer
    for source in preferred:
        for answer in answers:
            if answer.source == source:
                return _first(key, answer, f"preferred source {source}" if len(answers) > 1 else "")
    if policy.quorum is not None:
        return _vote(key, answers, policy.quorum)
    if policy.precedence == "newest":
        return _newest(key, answers, current)
    return _first(key, answers[0], f"first of {_sources(answers)}" if len(answers) > 1 else "")


def _ruled(key: FactKey, current: Sequence[Claim], ruling: Ruling, kind: ConflictKind | None = None) -> Verdict | None:
    """What a ruling comes to: its object, while a claim names it; a conflict again, where a claim names an object that
    the ruling knew nothing of; None where no claim names its object any more."""
    chosen = [claim for claim in current if claim.object.id == ruling.object]
    if not chosen:
        return None
    if {claim.object.id for claim in current} - {ruling.object} - ruling.overruled:
        return _agree(key, current, kind)
    return Verdict(claim=chosen[0], rule=f"ruling: {ruling.reason}" if ruling.reason else "ruling")


def _first(key: FactKey, answer: _Answer, why: str) -> Verdict:
    """The verdict of one source, chosen among others because of `why`."""
    rule = ", ".join(filter(None, (why, *answer.rules))) or ONLY_CLAIM
    return replace(_agree(key, answer.claims), rule=rule)


def _newest(key: FactKey, answers: Sequence[_Answer], current: Sequence[Claim]) -> Verdict:
    latest = _latest(current)
    if len(answers) == 1:
        return _first(key, answers[0], "")
    verdict = _agree(key, latest)
    if verdict.claim is None:
        return verdict
    dropped = len(latest) < len(current)
    why = f"newest: {verdict.claim.start} ({verdict.claim.source})" if dropped else f"agreed by {_sources(answers)}"
    return replace(verdict, rule=why)


def _vote(key: FactKey, answers: Sequence[_Answer], needed: int) -> Verdict:
    """The object that enough sources name. A source that contradicts itself has no vote."""
    votes: defaultdict[str, list[Claim]] = defaultdict(list)
    for answer in answers:
        if len({claim.object.id for claim in answer.claims}) == 1:
            votes[answer.claims[0].object.id].append(answer.claims[0])
    winners = [claims for claims in votes.values() if len(claims) >= needed]
    if len(winners) == 1:
        [winner] = winners
        if len(answers) == 1:
            return _first(key, answers[0], "")
        return Verdict(claim=winner[0], rule=f"quorum {len(winner)} of {len(answers)}")
    verdict = _agree(key, [claim for answer in answers for claim in answer.claims])
    if verdict.claim is None:
        return verdict
    # Without a conflict nobody disagrees, but too few have spoken.
    told = f"{verdict.claim.object.label} is said by {len(answers)} of the {needed} sources that the quorum needs"
    return Verdict(waiting=Waiting(key, "quorum", verdict.claim.object.id, told))


def _sources(answers: Sequence[_Answer]) -> str:
    return ", ".join(answer.source for answer in answers)


# Within a source ---------------------------------------------------------------------------------------------------


def _current(claims: Sequence[Claim]) -> _Answer:
    """The claims of one source that hold now, by rank, end and start (R1.6)."""
    usable = [claim for claim in claims if claim.rank != "deprecated"]
    best = [claim for claim in usable if claim.rank == "preferred"] or usable
    open_ = [claim for claim in best if not claim.end] or best
    latest = _latest(open_)
    steps = (claims, usable, best, open_, latest)
    names = ("not deprecated", "preferred rank", "no end", "latest start")
    narrowed = zip(names, steps, steps[1:], strict=False)
    rules = tuple(name for name, before, after in narrowed if len(after) < len(before))
    return _Answer(claims[0].source, latest, rules)


def _latest(claims: Sequence[Claim]) -> list[Claim]:
    """Those that no other is certainly later than: dates are compared as far as both are known, so that 2011 is neither
    before nor after March 2011. Claims without a start count as earlier than any start."""
    starts = [date_parts(claim.start) for claim in claims]
    latest = max(starts, default=())
    # What is earlier than any other start is also earlier than the greatest one, so that one comparison is enough.
    level = [start == latest[: len(start)] and bool(start) == bool(latest) for start in starts]
    return [claim for claim, kept in zip(claims, level, strict=True) if kept]


def date_parts(text: str | None) -> tuple[int, ...]:
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


def _agree(key: FactKey, said: Sequence[Claim], kind: ConflictKind | None = None) -> Verdict:
    """The one object that all claims name, or a conflict."""
    objects: dict[str, Claim] = {}
    for claim in said:
        objects.setdefault(claim.object.id, claim)
    claims = tuple(objects.values())
    if len(claims) == 1:
        return Verdict(claim=claims[0])
    named = ", ".join(f"{claim.object.label} ({claim.source} {claim.origin})" for claim in claims[:_SHOWN])
    more = f" and {len(claims) - _SHOWN} more" if len(claims) > _SHOWN else ""
    reason = f"{claims[0].subject.label} has {len(claims)} objects: {named}{more}"
    return Verdict(conflict=Conflict(key, kind or _kind(said), claims[:_SHOWN], reason))


def _kind(claims: Sequence[Claim]) -> ConflictKind:
    if len({claim.source for claim in claims}) > 1:
        return "sources"
    plain = all(claim.rank == "normal" and not claim.start and not claim.end for claim in claims)
    return "rows" if plain else "ambiguous"
