"""Which version broke an answer: binary search over a line of versions, told only which answer right. Pure.

    search = Search(last=len(path) - 1)                 # or good=3
    while search.candidate is not None:
        search.told(answers_right(path[search.candidate]))     # None: it cannot be loaded
    search.outcome, search.good, search.bad, search.skipped

As `git bisect` it finds one boundary: a version that answers right and a later one that does not, with none between
that could be asked. Where answers went back and forth there are others.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Literal

from kbsync.errors import UsageError

__all__ = ["ARROW", "Probe", "Search", "looking_back"]

ARROW = "=>"
Outcome = Literal["found", "still right", "never right", "cannot be asked"]
_Questions = Generator[int, bool | None, Outcome]


@dataclass(frozen=True, slots=True)
class Probe:
    """What a version has to answer: after `prompt` comes `expected`."""

    prompt: str
    expected: str

    @classmethod
    def parse(cls, text: str) -> Probe:
        """`PROMPT => EXPECTED`. Raises UsageError."""
        prompt, arrow, expected = (part.strip() for part in text.rpartition(ARROW))
        if not (arrow and prompt and expected):
            raise UsageError(f"{text!r} is no probe", hint='--probe "The capital of France is => Paris"')
        return cls(prompt, expected)


class Search:
    """The search over positions 0 to `last`, which is said to answer wrong; `good` is said to answer right (default:
    one is looked for). Where the outcome is `found`, `good` answers right, `bad` answers wrong, and those `skipped`
    between them cannot be asked: the first that answers wrong is `bad` or one of these."""

    def __init__(self, last: int, good: int | None = None) -> None:
        self.answers: dict[int, bool | None] = {}
        self.outcome: Outcome | None = None
        self.good = self.bad = last
        self._questions = self._ask(last, good)
        self.candidate: int | None = next(self._questions)

    @property
    def skipped(self) -> list[int]:
        """Positions between `good` and `bad`."""
        return list(range(self.good + 1, self.bad))

    def told(self, right: bool | None) -> None:
        """Whether `candidate` answers right (None: it cannot be asked); sets the next one, None at the end."""
        if self.candidate is None:
            raise ValueError("the search is over")
        self.answers[self.candidate] = right
        try:
            self.candidate = self._questions.send(right)
        except StopIteration as end:
            self.candidate, self.outcome = None, end.value

    def _ask(self, last: int, good: int | None) -> _Questions:
        right = yield last
        if right is not False:
            return "still right" if right else "cannot be asked"
        for index in looking_back(last) if good is None else [good]:
            if (yield index):
                self.good = index
                break
        else:
            return "never right"
        self.bad = min(index for index, right in self.answers.items() if right is False and index > self.good)
        while (middle := self._middle()) is not None:
            right = yield middle
            if right is not None:
                self.good, self.bad = (middle, self.bad) if right else (self.good, middle)
        return "found"

    def _middle(self) -> int | None:
        """The position not asked yet that is nearest to the middle between the boundaries."""
        unasked = [index for index in self.skipped if index not in self.answers]
        return min(unasked, key=lambda index: abs(2 * index - self.good - self.bad), default=None)


def looking_back(last: int) -> Iterator[int]:
    """All positions before `last`: first the one 1, 2, 4, 8, … before it and the first of all, then the others, newest
    first."""
    doubled = [last - 2**power for power in range(last.bit_length()) if 2**power < last]
    steps = [*doubled, 0] if last else []
    yield from steps
    yield from (index for index in reversed(range(last)) if index not in steps)
