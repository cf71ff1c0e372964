"""Freshness: how long a change takes from its source to the model that answers it, per policy, source and relation.

    rows = freshness_rows(db, catalog, now)
    [row.missed(now) for row in rows]        # why a target is missed, in words; [] where none is

What arrived is measured (ledger/arrivals.py: an upper bound). What has not arrived yet is counted by comparing numbers:
live facts by the pass that accepted them, less those that the weights hold. So a million facts are one aggregate, and
only as many rows are read as the weights hold facts; of a relation with `skip_known`, all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from kbsync.catalog import Catalog
from kbsync.facts import FactKey
from kbsync.ledger.arrivals import ArrivalRow, Backlog, FactPlace
from kbsync.ledger.reader import Reader
from kbsync.policy import Inverse, Policy, Relation, render

__all__ = ["FreshnessRow", "duration", "freshness_rows", "histogram", "quantile"]

PENDING = "pending"
"""Why a fact is not in the weights where nothing else is known: the next pass edits it."""
_AFTER = {
    "postponed": "outside the edit window",
    "rejected": "rejected by the gate",
    "failed": "the last pass failed",
    "cancelled": "the last pass was cancelled",
    "running": "a pass is running",
}
"""How the policy's last pass ended -> why its facts are not in the weights."""


@dataclass(frozen=True, slots=True)
class FreshnessRow:
    """How fresh a relation of a source is. `seconds`: of each change that arrived within `over`, ascending; `backlog`:
    what has not arrived, oldest first; `shown`: up to when the source's last accepted answer shows its changes."""

    policy: str
    source: str
    relation: str
    target: float | None
    over: float
    seconds: tuple[float, ...]
    backlog: tuple[Backlog, ...]
    shown: datetime | None

    @property
    def p50(self) -> float | None:
        """Median, in seconds; None where nothing arrived."""
        return quantile(self.seconds, 0.5)

    @property
    def p95(self) -> float | None:
        """95th percentile, in seconds; None where nothing arrived."""
        return quantile(self.seconds, 0.95)

    @property
    def waiting(self) -> int:
        """Changes that have not arrived. A key that waits for two reasons counts twice."""
        return sum(part.keys for part in self.backlog)

    @property
    def oldest(self) -> Backlog | None:
        """What has waited longest."""
        return self.backlog[0] if self.backlog else None

    def missed(self, now: datetime) -> list[str]:
        """Why the target is missed, in words; [] where it is not, or where there is none."""
        if self.target is None:
            return []
        found, target = [], duration(self.target)
        if self.oldest and (age := (now - self.oldest.since).total_seconds()) > self.target:
            found.append(f"{self.waiting} changes wait, the oldest for {duration(age)} ({self.oldest.why})")
        if self.p95 is not None and self.p95 > self.target:
            found.append(f"p95 of the last {duration(self.over)} is {duration(self.p95)}")
        if self.shown and (lag := (now - self.shown).total_seconds()) > self.target:
            found.append(f"the source was last seen as it was {duration(lag)} ago")
        return [f"{reason}, the target is {target}" for reason in found]

    def to_json(self, now: datetime) -> dict[str, Any]:
        """The row as a JSON value; times in seconds."""
        oldest = self.oldest
        return {
            "policy": self.policy,
            "source": self.source,
            "relation": self.relation,
            "target": self.target,
            "over": self.over,
            "count": len(self.seconds),
            "p50": self.p50,
            "p95": self.p95,
            "waiting": self.waiting,
            "oldest": (now - oldest.since).total_seconds() if oldest else None,
            "oldest_why": oldest.why if oldest else None,
            "backlog": [asdict(part) for part in self.backlog],
            "lag": (now - self.shown).total_seconds() if self.shown else None,
            "missed": self.missed(now),
        }


def quantile(ascending: Sequence[float], share: float) -> float | None:
    """The nearest-rank quantile of sorted numbers: one of them, never less than `share` of them; None of none."""
    return ascending[max(math.ceil(share * len(ascending)) - 1, 0)] if ascending else None


def histogram(seconds: Sequence[float]) -> list[tuple[float, int]]:
    """(upper limit in seconds, how many are up to it and above the one before), from the shortest to the longest; each
    limit is twice the one before, and one of them is a minute."""
    steps = Counter(math.ceil(math.log2(max(one, 1.0) / 60)) for one in seconds)
    return [(60.0 * 2**step, steps[step]) for step in range(min(steps), max(steps) + 1)] if steps else []


def duration(seconds: float) -> str:
    """Seconds as a person writes them, to two units: 42s, 6h 5m, 3d 2h."""
    left, said = max(round(seconds), 0), list[str]()
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if said or count:
            said.append(f"{count}{unit}" if count else "")
    return " ".join(filter(None, said[:2])) or "0s"


def freshness_rows(db: Reader, catalog: Catalog, now: datetime, over: float | None = None) -> list[FreshnessRow]:
    """Every relation of every policy by source. `over`: the window in seconds; default: each policy's own."""
    found = db.model_named(catalog.workspace.settings.model)
    model = found.id if found else None
    return [row for policy in catalog.policies.values() for row in _rows(db, catalog, policy, model, now, over)]


def _rows(
    db: Reader, catalog: Catalog, policy: Policy, model: str | None, now: datetime, over: float | None
) -> Iterator[FreshnessRow]:
    over = policy.freshness.over if over is None else over
    since = now - timedelta(seconds=over)
    arrived = _by_place(db.arrivals(model, since, tuple(policy.wording())) if model else [])
    waiting = _by_place(_backlog(db, policy, model))
    places = {(source.source, source.relation) for source in catalog.sources_of(policy)}
    for source, relation in sorted(places | arrived.keys() | waiting.keys()):
        last = db.last_accepted(source)
        yield FreshnessRow(
            policy=policy.policy,
            source=source,
            relation=relation,
            target=policy.freshness.target,
            over=over,
            seconds=tuple(sorted(row.seconds for row in arrived.get((source, relation), ()))),
            backlog=tuple(sorted(waiting.get((source, relation), ()), key=lambda part: part.since)),
            shown=(last.as_of or last.fetched_at) if last else None,
        )


def _by_place(rows: Iterable[Any]) -> dict[tuple[str, str], list[Any]]:
    """Rows by source and relation."""
    found: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        relation = row.key.relation if isinstance(row, ArrivalRow) else row.relation
        found.setdefault((row.source, relation), []).append(row)
    return found


# What has not arrived ----------------------------------------------------------------------------------------------


def _backlog(db: Reader, policy: Policy, model: str | None) -> list[Backlog]:
    relations = tuple(policy.wording())
    undecided = [
        part if part.source else Backlog(policy.sources[0], part.relation, part.why, part.keys, part.since)
        for part in db.undecided(relations)
    ]
    return [*undecided, *_unserved(db, policy, model), *_unapproved(db, policy)]


def _unapproved(db: Reader, policy: Policy) -> Iterator[Backlog]:
    """The rows of a run that is held, since the first of those that it superseded."""
    since = db.held_since(policy.policy)
    plans = [plan.plan for plan in db.staged_plans() if plan.policy == policy.policy]
    if since is None or not plans:
        return
    rows = [row for kind in ("adds", "changes") for row in plans[-1].get(kind, ())]
    for (source, relation), keys in Counter((row["source"], row["relation"]) for row in rows).items():
        yield Backlog(source, relation, "held for approval", keys, since)


def _unserved(db: Reader, policy: Policy, model: str | None) -> Iterator[Backlog]:
    """Facts that the weights do not hold: those that a hold keeps out, and those that the next pass edits."""
    wording = policy.wording()
    held = {key for key in db.holds(model) if key.relation in wording} if model else set()
    served = _served(db, wording, model)
    settled = {place.key: place for place in db.fact_places(served.keys()) if _holds(served, place)}
    kept_out = [place for place in db.fact_places(held) if place.key not in settled]
    counts = Counter(db.accepted(tuple(wording)))
    for place in (*settled.values(), *kept_out):
        counts[place.source, place.key.relation, place.since] -= 1
    yield from _groups(db, "on hold", kept_out)
    runs = db.runs(1, policy=policy.policy)
    why = _AFTER.get(runs[0].status, PENDING) if runs else PENDING
    for (source, relation), passes in _positive(counts).items():
        apart = settled.keys() | held
        places = db.facts_since(source, relation, min(passes))
        oldest = next(place for place in places if place.key not in apart)
        yield Backlog(source, relation, why, sum(passes.values()), _began(db, [oldest]))


def _served(db: Reader, wording: Mapping[str, Relation | Inverse], model: str | None) -> dict[FactKey, str | None]:
    """Key -> the object that the model answers by its weights; None: whatever it is, it stays so (protected)."""
    served: dict[FactKey, str | None] = {}
    if model is not None:
        head = db.head(model)
        applied = db.applied(model, head)
        served |= {key: fact.object_id for key, fact in applied.items() if key.relation in wording}
        served |= _known(db, wording, db.known_to(model, head))
    for name, words in wording.items():
        served |= dict.fromkeys((FactKey(name, id_) for id_ in getattr(words, "protected", ())), None)
    return served


def _known(db: Reader, wording: Mapping[str, Relation | Inverse], known: Collection[str]) -> dict[FactKey, str | None]:
    """The facts that need no edit, as the base answers them by itself."""
    skipping = [name for name, words in wording.items() if isinstance(words, Relation) and words.skip_known]
    facts = db.facts(skipping) if skipping and known else {}
    return {key: fact.object.id for key, fact in facts.items() if render(fact, wording[key.relation]).digest in known}


def _holds(served: Mapping[FactKey, str | None], place: FactPlace) -> bool:
    return served[place.key] in (None, place.object_id)


def _groups(db: Reader, why: str, places: Collection[FactPlace]) -> Iterator[Backlog]:
    """Facts that are listed one by one, by source and relation."""
    found: dict[tuple[str, str], list[FactPlace]] = {}
    for place in places:
        found.setdefault((place.source, place.key.relation), []).append(place)
    for (source, relation), group in found.items():
        yield Backlog(source, relation, why, len(group), _began(db, group))


def _began(db: Reader, places: Collection[FactPlace]) -> datetime:
    """When the first of the changes behind these facts began."""
    changes = db.source_changes([place.key for place in places])
    return min(changes[place.key].changed_at if place.key in changes else place.since for place in places)


def _positive(counts: Mapping[tuple[str, str, datetime], int]) -> dict[tuple[str, str], dict[datetime, int]]:
    """The passes of which facts are left, by source and relation."""
    found: dict[tuple[str, str], dict[datetime, int]] = {}
    for (source, relation, since), count in counts.items():
        if count > 0:
            found.setdefault((source, relation), {})[since] = count
    return found
