"""What a pass says of itself: to a person, as JSON, to the daemon's caller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kbsync.errors import KbsyncError
from kbsync.facts import Change
from kbsync.plan import Plan
from kbsync.plan_document import PlanDocument

__all__ = ["Report"]


@dataclass(slots=True)
class Report:
    """What one pass of one policy did, or would do."""

    policy: str
    status: str = "running"
    run_id: int | None = None
    changes: Sequence[Change] = ()
    plan: Plan | None = None
    document: PlanDocument | None = None
    """The plan for review, where the pass was not to carry it out at once."""
    rebase: str | None = None
    """Why the version that the plan asks for is, or was to be, a rebase."""
    counts: dict[str, int] = field(default_factory=dict)
    reasons: Sequence[str] = ()
    versions: list[int] = field(default_factory=list)
    searches: list[dict[str, Any]] = field(default_factory=list)
    """Of each batch that the gate rejected at first: why, how many of its parts were tried, which facts are held."""
    probe: Mapping[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """By phase of the pass; the phases of its edits added up."""
    computed: int = 0
    """Target vectors that were computed in `seconds["targets"]`."""
    notes: list[str] = field(default_factory=list)
    problems: list[KbsyncError] = field(default_factory=list)

    def took(self, seconds: Mapping[str, float], computed: int) -> None:
        """Add what one edit took."""
        for phase, value in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value
        self.computed += computed

    @property
    def exit_code(self) -> int:
        """0 done, 1 failed, 2 usage, 3 held, 4 rejected."""
        return max((problem.exit_code for problem in self.problems), default=0)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON value."""
        return {
            "policy": self.policy,
            "status": self.status,
            "run": self.run_id,
            "changes": [change.to_json() for change in self.changes],
            "plan": self.plan.to_json() if self.plan else None,
            "document": self.document.model_dump(mode="json") if self.document else None,
            "rebase": self.rebase,
            "notes": self.notes,
            "counts": self.counts,
            "reasons": list(self.reasons),
            "versions": self.versions,
            "searches": self.searches,
            "probe": self.probe,
            "seconds": self.seconds,
            "computed": self.computed,
            "problems": [problem.to_json() for problem in self.problems],
            "exit_code": self.exit_code,
        }
