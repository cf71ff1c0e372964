"""Which facts of a rejected batch are to blame: binary splitting, told only which sets the gate lets through. Pure.

    search = Search(worst_first(probe), trials=20)
    while search.candidate is not None:
        search.told(passes(search.candidate))
    search.accepted, search.guilty, search.crowded, search.undecided

The first candidate is the empty one: where the version falls short without any of the facts, none is to blame; a single
fact is, where it does not. A set that fails is halved: the better half is tried beside what is accepted so far; where
it passes, the worse half is known to fail beside it, untried. So g guilty facts among n cost O(g log n) trials
(adaptive group testing: Hwang 1972; of changes to a program: Zeller and Hildebrandt 2002).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

__all__ = ["FULL", "Search", "worst_first"]

FULL = 2
"""As many facts in a row that pass alone and not beside the accepted ones: then no other is tried beside them."""

_Trials = Generator[tuple[str, ...], bool, None]


class Search:
    """The search among `suspects` (those that look worst first), which fail together; at most `trials` candidates.

    `accepted`: pass together. `guilty`: fact -> the accepted facts beside which it fails; without it they pass.
    `crowded`: the same of facts that pass alone. `full`: the search ended because of those. `short`: it ended at once,
    the empty candidate fails. Every fact of `guilty` and `crowded` was tried just so, whatever the gate is like.
    """

    def __init__(self, suspects: Sequence[str], trials: int) -> None:
        self._suspects = tuple(suspects)
        self._limit = trials
        self.accepted: tuple[str, ...] = ()
        self.guilty: dict[str, tuple[str, ...]] = {}
        self.crowded: dict[str, tuple[str, ...]] = {}
        self.short = False
        self.trials = 0
        self._room = FULL
        self._steps = self._search()
        self.candidate: tuple[str, ...] | None = next(self._steps) if trials and suspects else None

    @property
    def full(self) -> bool:
        """Whether there is no room beside the accepted facts."""
        return not self._room

    @property
    def undecided(self) -> list[str]:
        """Suspects of which nothing is known yet, in order."""
        known = {*self.accepted, *self.guilty, *self.crowded}
        return [suspect for suspect in self._suspects if suspect not in known]

    def told(self, passes: bool) -> None:
        """Whether `candidate` passes; sets the next one, None where the search is over."""
        self.trials += 1
        try:
            following = self._steps.send(passes)
        except StopIteration:
            self.candidate = None
        else:
            self.candidate = following if self.trials < self._limit else None

    def _search(self) -> _Trials:
        if not (yield ()):
            self.short = True
        else:
            yield from self._split(self._suspects)

    def _split(self, group: tuple[str, ...]) -> _Trials:
        """Decide a group that fails beside the accepted facts."""
        if len(group) == 1:
            yield from self._convict(group[0])
            return
        worse, better = group[: len(group) // 2], group[len(group) // 2 :]
        if (yield (*self.accepted, *better)):
            self._accept(better)
            yield from self._split(worse)
        else:
            yield from self._split(better)
            yield from self._try(worse)

    def _try(self, group: tuple[str, ...]) -> _Trials:
        """Decide a group of which nothing is known beside the accepted facts."""
        if self.full:
            return
        if (yield (*self.accepted, *group)):
            self._accept(group)
        else:
            yield from self._split(group)

    def _accept(self, group: tuple[str, ...]) -> None:
        self.accepted += group
        self._room = FULL

    def _convict(self, fact: str) -> _Trials:
        """A fact with which the accepted ones fail. It is crowded out, not guilty, where it passes alone."""
        self.guilty[fact] = self.accepted
        if self.accepted and (yield (fact,)):
            self.crowded[fact] = self.guilty.pop(fact)
            self._room -= 1


def worst_first(probe: Mapping[str, Any]) -> list[str]:
    """The digests of a probe report's facts, those first that are answered worst: the prompt not answered, few
    paraphrases answered, an improbable object."""

    def badness(fact: Mapping[str, Any]) -> tuple[float, float, float]:
        hits = fact["hits"] / fact["paraphrases"] if fact["paraphrases"] else 1.0
        return float(fact["efficacy"]), hits, fact["probability"]

    return [fact["digest"] for fact in sorted(probe["facts"], key=badness)]
