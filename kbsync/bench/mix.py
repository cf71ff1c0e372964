"""Do facts of different relations get in each other's way? Section 5.4 of the paper (arXiv 2210.07229).

For a pair of relations: n facts of one, n of the other, and n/2 of each together, each into the pristine base. The
facts of the mix are among those that were inserted without the other relation, so they are compared fact by fact.

    result = measure(lab, pairs(records, count=3, facts=20))
    result.pairs[0].difference.score            # mixed minus alone, on the facts of the mix
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kbsync.bench.lab import PRISTINE, Laboratory
from kbsync.editor.datasets import CounterFactRecord
from kbsync.editor.evaluate import CounterFactScores, RecordScores, paired_difference, summarise
from kbsync.errors import UsageError

__all__ = ["Mixed", "Mixes", "measure", "pairs"]

Pair = tuple[Sequence[CounterFactRecord], Sequence[CounterFactRecord]]


@dataclass(frozen=True, slots=True)
class Mixed:
    """Two relations: scores of each alone and of the mix, and how far the mix is from the same facts without the other
    relation (paired interval)."""

    relations: tuple[str, str]
    alone: tuple[CounterFactScores, CounterFactScores]
    mixed: CounterFactScores
    difference: CounterFactScores


@dataclass(frozen=True, slots=True)
class Mixes:
    """All pairs, and all their facts together: the difference over every pair."""

    pairs: Sequence[Mixed]
    difference: CounterFactScores

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return asdict(self)


def pairs(
    records: Sequence[CounterFactRecord], *, count: int, facts: int, named: Sequence[tuple[str, str]] = ()
) -> list[Pair]:
    """`facts` records of each relation of a pair: of those `named`, else of the `count` pairs of neighbors among the
    relations with the most records. Raises UsageError where there are not enough."""
    known: Mapping[str, list[CounterFactRecord]] = defaultdict(list)
    for record in records:
        known[record.request.key.relation].append(record)
    order = sorted(known, key=lambda relation: (-len(known[relation]), relation))
    wanted = list(named) or list(zip(order[0 : 2 * count : 2], order[1 : 2 * count : 2], strict=False))
    for relation in (relation for pair in wanted for relation in pair):
        if (found := len(known.get(relation, ()))) < facts:
            raise UsageError(
                f"relation {relation} has {found} records, {facts} were asked for",
                hint=f"relations with the most: {', '.join(f'{name} ({len(known[name])})' for name in order[:6])}",
            )
    if not wanted:
        raise UsageError("the data set has no two relations", hint="use CounterFact's published form")
    return [(known[one][:facts], known[other][:facts]) for one, other in wanted]


def measure(lab: Laboratory, wanted: Sequence[Pair]) -> Mixes:
    """Every pair. Raises EditError as the engine does."""
    found, before, after = [], [], []
    for one, other in wanted:
        half, rest = len(one) // 2, len(one) - len(one) // 2
        first, second = _scores(lab, one), _scores(lab, other)
        mixed = _scores(lab, [*one[:half], *other[:rest]])
        alone = [*first[:half], *second[:rest]]
        relations = (one[0].request.key.relation, other[0].request.key.relation)
        scores = summarise(first), summarise(second)
        found.append(Mixed(relations, scores, summarise(mixed), paired_difference(alone, mixed)))
        before += alone
        after += mixed
        lab.progress("pairs", len(found), len(wanted))
    return Mixes(found, paired_difference(before, after))


def _scores(lab: Laboratory, records: Sequence[CounterFactRecord]) -> list[RecordScores]:
    requests = [record.request for record in records]
    return lab.scores(lab.edit(PRISTINE, requests, lab.targets(requests)), records)
