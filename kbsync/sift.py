"""A batch that the gate rejected, part by part: the facts to blame are held with the evidence, the rest is published.

    found = sift(line, batch, first, judge=…, edit_of=…, trials=20)
    found.publish()                  # one version with what passes together; the holds are placed with it

Each part is tried as the version would be made: inserted into the live one, or a rebase with it, in a child process and
probed. Target vectors are stored from the first attempt, so that a trial costs an insertion and a probe. Suspects are
the batch's own edits, not what the live version holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kbsync.culprits import Search, worst_first
from kbsync.edit import Edit, Outcome, Tried, held_facts, hold_out
from kbsync.editor.job import EditResult
from kbsync.errors import Inseparable
from kbsync.facts import Applied, FactKey, Hold
from kbsync.line import Judge, Line
from kbsync.plan import Plan, PlannedEdit

__all__ = ["Sifted", "sift", "suspects"]

WHOLE_VERSION = ("specificity_drop", "drift")
"""Numbers of a probe report that add up over all facts of a version."""
ROOM = "another gate or strategy makes room, or kbsync rebase and then kbsync release"


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
    def idle(self) -> bool:
        """Whether none of the suspects is accepted, though without them the version would pass, and nothing leaves."""
        return self.version is not None and not self.search.accepted and not self.batch.retractions

    @property
    def undecided(self) -> list[PlannedEdit]:
        """What the next pass tries again: the budget ended before it was decided."""
        names = set() if self.search.full else set(self.search.undecided)
        return [planned for planned in self.batch.edits if planned.request.digest in names]

    @property
    def nothing(self) -> str:
        """Why the search leaves all as it was, in words."""
        if self.search.short:
            what, room = self._without
            reasons = "; ".join(self._trial().reasons)
            return f"{what} falls short without any of these facts, so none is to blame: {reasons}: {room} makes room"
        tried = f"{self.search.trials} of its parts were tried (gate.trials)"
        return f"which facts are to blame was not found: {tried}"

    def publish(self) -> Outcome:
        """Publish what is accepted and place the holds, in one transaction: on the facts to blame, on those for which
        there is no room, and on those that failed by themselves. Where none is accepted and nothing is to leave the
        weights, they stay as they are: a rebase only for its own sake is not published.

        Raises what `Line.settle` raises.
        """
        if (version := self.version) is None:
            return Outcome(self.first.result, None, (), self.first.rejected)
        with self.line.ledger.read() as db:
            applied, holds = db.applied(self.line.model, version.head), db.holds(self.line.model)
        standing = {key: hold for key, hold in holds.items() if key not in self.batch.ended_holds}
        if self.rest.empty:
            held = self._held(applied, standing)
            with self.line.ledger.write() as db:
                for hold in held:
                    db.hold(self.line.model, hold, run_id=version.edit.run_id)
            return Outcome(version.result, None, held)
        held = self._held(version.staying, standing)
        edit = replace(version.edit, holds=held)
        failed = held_facts(edit, version.result, version.staying, standing)
        outcome = self.line.settle(replace(version, edit=edit, held=failed))
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
        out = {fact.digest for fact in self.first.result.failed} | set(suspects(self.batch, self.first)) - set(digests)
        return self.batch.only({edit.request.key for edit in self.batch.edits if edit.request.digest not in out})

    @property
    def _without(self) -> tuple[str, str]:
        """What the empty candidate is, and what makes room where that falls short."""
        if self.first.edit.kind == "rebase":
            return "a rebase of what HEAD holds", "another strategy or another gate"
        return "the live version", "a rebase, another strategy or another gate"

    def _held(self, staying: Mapping[FactKey, Applied], standing: Mapping[FactKey, Hold]) -> tuple[Hold, ...]:
        """The holds to place, where the weights hold `staying` afterwards."""
        said = {digest: self._evidence(digest) for digest in (*self.search.guilty, *self.search.crowded)}
        if self.search.full:
            said |= dict.fromkeys(self.search.undecided, self._no_room())
        tried = replace(self.first.edit, edits=self.batch.edits)
        guilty = [
            hold_out(planned, "gate", said[digest], staying, standing)
            for planned in self.batch.edits
            if (digest := planned.request.digest) in said
        ]
        return (*held_facts(tried, self.first.result, staying, standing), *guilty)

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
        said = f"{'; '.join(bad.reasons)} with it, {others}; {', '.join(without) or 'passes'} without it"
        return f"{said}; alone it passes: {ROOM}" if digest in self.search.crowded else said

    def _no_room(self) -> str:
        """Of facts that were not tried, because others like them found no room."""
        probe = self._trial(*self.search.accepted).probe
        numbers = ", ".join(f"{name} {probe[name]:.3f}" for name in WHOLE_VERSION if probe.get(name) is not None)
        return f"no room beside {len(self.search.accepted)} others of its batch ({numbers}): {ROOM}"


def suspects(batch: Plan, first: Tried) -> list[str]:
    """The digests of the batch's own edits that are in the version that was tried, those first that look worst."""
    there = {planned.request.digest for planned in batch.edits} & set(first.result.columns)
    return [digest for digest in worst_first(first.result.probe) if digest in there]


def sift(
    line: Line,
    batch: Plan,
    first: Tried,
    *,
    judge: Judge,
    edit_of: Callable[[Plan], Edit],
    trials: int,
) -> Sifted:
    """Search the batch, which the gate rejected as `first`, for the facts to blame, with at most so many trials.

    Nothing is published. Raises what `Line.try_out` raises, but Inseparable: a part that cannot be made fails.
    """
    found = Sifted(line, batch, first, Search(suspects(batch, first), trials))
    while (candidate := found.search.candidate) is not None:
        try:
            tried = line.try_out(edit_of(found._part(candidate)), None)
            requests = [planned.request for planned, _ in tried.facts]
            trial = _Trial(tried, [*tried.rejected, *judge(tried.result.probe, requests)])
        except Inseparable as error:
            trial = _Trial(None, [error.message])
        found.trials[frozenset(candidate)] = trial
        line.progress("trials", found.search.trials + 1, trials)
        found.search.told(not trial.reasons)
    return found
