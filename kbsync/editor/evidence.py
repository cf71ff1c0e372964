"""Why a fact is not in the weights, in words that a hold keeps and a person reads. Pure.

FailedFact(digest=request.digest, evidence=unanswered(probe))
no_way_back(old, target, kept, answered=True)         # None: it can go back in
"""

from __future__ import annotations

from collections.abc import Iterable

from kbsync.editor.probe import FactProbe
from kbsync.editor.targets import Target
from kbsync.facts import EditRequest

__all__ = ["no_target", "no_way_back", "unanswered"]


def unanswered(fact: FactProbe) -> str:
    """A fact that the edited weights do not answer."""
    return f"the edited model answers {fact.answer!r} (probability of the object {fact.probability:.2g})"


def no_target(request: EditRequest, target: Target) -> str:
    """A fact whose search for a target vector led nowhere."""
    where = ", at the clamp" if target.clamped else ""
    return f"no target vector for {request.target!r}: a loss of {target.loss:.3g} after {target.steps} steps{where}"


def no_way_back(old: EditRequest, target: Target, kept: Iterable[EditRequest], *, answered: bool) -> str | None:
    """Why a live fact whose replacement failed cannot go back in beside the requests `kept`; None: it can. `answered`:
    whether the version left behind answers it."""
    if not answered:
        return f"the live version does not answer {old.target!r} either"
    if target.diverged:
        return no_target(old, target)
    rivals = (other for other in kept if other.prompt == old.prompt and other.target != old.target)
    if (rival := next(rivals, None)) is not None:
        return f"{old.prompt!r} goes on with {rival.target!r} for {rival.key.relation} {rival.key.subject}"
    return None
