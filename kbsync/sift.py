"""A batch that the gate rejected, part by part: the facts to blame are held with the evidence, the rest is published.

    found = sift(line, batch, first, judge=…, edit_of=…, trials=20)
    found.publish()                  # one version with what passes together; the holds are placed with it

Each part is tried as the version would be made: inserted into the live one in a child process and probed. Target
vectors are stored from the first attempt, so that a trial costs an insertion and a probe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kbsync.culprits import Search, worst_first
from kbsync.edit import Edit, Outcome, Tried, hold_out
from kbsync.editor.job import EditResult
from kbsync.errors import Inseparable
from kbsync.facts import Hold
from kbsync.line import Line
from kbsync.plan import Plan, PlannedEdit

__all__ = ["Sifted", "sift"]

WHOLE_VERSION = ("specificity_drop", "drift")
"""Numbers of a probe report that add up over all facts of a version."""
ROOM = "a rebase, another strategy or another gate makes room"


@dataclass(frozen=True, slots=True)
class _Trial:
    """What came of one part: the edit that would publish it (None: it cannot be made), and why it falls short."""

    tried: Tried | None
    reasons: Sequence[str]

    @property
    def probe(self) -> Mapping[str, Any]:
        return self.tried.result.probe if self.tried else {}


@dataclass(slots=True)
class Sifted:
    """What the search found in a batch that was rejected for `reasons`. `rest`: the part that passes, as a plan."""

    line: Line
    batch: Plan
    first: Tried
    search: Search
    trials: dict[frozenset[str], _Trial] = field(default_factory=dict)

    @property
    def rest(self) -> Plan:
        """What is accepted, as a plan."""
        return self._part(self.search.accepted)

    @property
    def version(self) -> Tried | None:
        """The edit that holds just what is accepted; None where not even the live version passes."""
        found = self.trials.get(frozenset(self.search.accepted))
        return None if found is None or found.reasons else found.tried

    @property
    def held(self) -> tuple[Hold, ...]:
        """A hold on each fact to blame, on those for which there is no room, and on those that failed by themselves."""
        if (version := self.version) is None:
            return ()
        with self.line.ledger.read() as db:
            standing = db.holds(self.line.model)
        said = {digest: self._evidence(digest) for digest in (*self.search.guilty, *self.search.crowded)}
        if self.search.full:
            said |= dict.fromkeys(self.search.undecided, self._no_room())
        edits = {planned.request.key: planned for planned in self.batch.edits}
        failed = [replace(hold, frozen=version.staying.get(hold.key)) for hold in self.first.held if hold.key in edits]
        guilty = [
            hold_out(planned, "gate", said[digest], version.staying, standing)
            for planned in self.batch.edits
            if (digest := planned.request.digest) in said
        ]
        return (*failed, *guilty)

    @property
    def undecided(self) -> list[PlannedEdit]:
        """What the next pass tries again: the budget ended before it was decided."""
        names = set() if self.search.full else set(self.search.undecided)
        return [planned for planned in self.batch.edits if planned.request.digest in names]

    @property
    def nothing(self) -> str:
        """Why the search leaves all as it was, in words."""
        if self.search.short:
            reasons = "; ".join(self._trial().reasons)
            return f"the live version falls short without any of these facts, so none is to blame: {reasons}: {ROOM}"
        tried = f"{self.search.trials} of its parts were tried (gate.trials)"
        return f"which facts are to blame was not found: {tried}"

    def publish(self) -> Outcome:
        """Publish what is accepted and place the holds, in one transaction. Raises what `Line.settle` raises."""
        if (version := self.version) is None:
            return Outcome(self.first.result, None, (), self.first.rejected)
        held = self.held
        outcome = self.line.settle(replace(version, edit=replace(version.edit, holds=held)))
        return replace(outcome, held=(*held, *outcome.held))

    def unpublished(self, outcome: Outcome) -> list[EditResult]:
        """What the other attempts made, the rejected one among them."""
        tried = [trial.tried.result for trial in self.trials.values() if trial.tried]
        return [result for result in (self.first.result, *tried) if result is not outcome.result]

    def reports(self) -> list[dict[str, Any]]:
        """The probe report of the trial of each fact to blame, with the fact and how many were beside it."""
        found = []
        for digest, beside in {**self.search.guilty, **self.search.crowded}.items():
            if probe := self._trial(*beside, digest).probe:
                found.append({**probe, "trial": {"fact": digest, "beside": len(beside)}})
        return found

    def to_json(self, outcome: Outcome) -> dict[str, Any]:
        """What a report says of the search."""
        held = {hold.key: hold for hold in outcome.held}
        return {
            "rejected": list(self.first.rejected),
            "trials": self.search.trials,
            "accepted": len(self.search.accepted),
            "undecided": len(self.undecided),
            "version": outcome.version,
            "held": [
                {
                    "relation": key.relation,
                    "subject_id": key.subject,
                    "prompt": planned.request.prompt,
                    "target": planned.request.target,
                    "reason": held[key].reason,
                    "evidence": held[key].evidence,
                }
                for planned in self.batch.edits
                if (key := planned.request.key) in held
            ],
        }

    def _part(self, digests: Sequence[str]) -> Plan:
        """The batch with these of its suspects; what got no column is in no one's way and stays in."""
        out = {fact.digest for fact in self.first.result.failed} | set(self.first.result.columns) - set(digests)
        return self.batch.only({edit.request.key for edit in self.batch.edits if edit.request.digest not in out})

    def _trial(self, *digests: str) -> _Trial:
        """What is known of a set: all suspects together are the batch as it was rejected."""
        whole = _Trial(self.first, self.first.rejected)
        return self.trials.get(frozenset(digests), whole)

    def _evidence(self, digest: str) -> str:
        """What the gate measured with the fact and without it."""
        beside = self.search.guilty.get(digest, self.search.crowded.get(digest, ()))
        bad, good = self._trial(*beside, digest), self._trial(*beside)
        names = [reason.partition(" ")[0] for reason in bad.reasons]
        without = [f"{name} {value:.3f}" for name in names if (value := good.probe.get(name)) is not None]
        others = f"beside {len(beside)} others of its batch" if beside else "alone"
        said = f"{'; '.join(bad.reasons)} with it, {others}" + (f"; {', '.join(without)} without it" if without else "")
        return f"{said}; alone it passes: {ROOM}" if digest in self.search.crowded else said

    def _no_room(self) -> str:
        """Of facts that were not tried, because others like them found no room."""
        probe = self._trial(*self.search.accepted).probe
        numbers = ", ".join(f"{name} {probe[name]:.3f}" for name in WHOLE_VERSION if probe.get(name) is not None)
        return f"no room beside {len(self.search.accepted)} others of its batch ({numbers}): {ROOM}"


def sift(
    line: Line,
    batch: Plan,
    first: Tried,
    *,
    judge: Callable[[Mapping[str, Any]], Sequence[str]],
    edit_of: Callable[[Plan], Edit],
    trials: int,
) -> Sifted:
    """Search the batch, which the gate rejected as `first`, for the facts to blame, with at most so many trials.

    Nothing is published. Raises what `Line.try_out` raises, but Inseparable: a part that cannot be made fails.
    """
    columns = set(first.result.columns)
    suspects = [digest for digest in worst_first(first.result.probe) if digest in columns]
    found = Sifted(line, batch, first, Search(suspects, trials))
    while (candidate := found.search.candidate) is not None:
        try:
            tried = line.try_out(edit_of(found._part(candidate)), None)
            trial = _Trial(tried, judge(tried.result.probe))
        except Inseparable as error:
            trial = _Trial(None, [error.message])
        found.trials[frozenset(candidate)] = trial
        line.progress("trials", found.search.trials + 1, trials)
        found.search.told(not trial.reasons)
    return found
