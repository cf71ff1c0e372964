"""What the ledger answers: one frozen value per row of interest, plain data without a database behind it.

Times are timezone-aware UTC. `since`/`until` say when kbsync knew something (half open: since <= t < until; `until`
None: still), `Claim.start`/`Claim.end` what the source says about the world.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from kbsync.facts import Applied, Conflict, Difference, Fact, FactKey, Hold, Provenance, QuarantinedRow, Ruling, Waiting
from kbsync.versions.manifest import ActiveDelta, VersionKind

__all__ = [
    "AuditRow",
    "ConflictRow",
    "FactRow",
    "HeadMove",
    "HoldRow",
    "ModelRow",
    "Orphan",
    "Placement",
    "PlanRow",
    "ProbeRow",
    "PromotionKind",
    "PromotionRow",
    "PublishedVersion",
    "QuarantineRow",
    "RecordCounts",
    "RulingRow",
    "RunRow",
    "RunStatus",
    "ScheduleState",
    "SourceState",
    "StagedPlan",
    "VerdictRow",
    "VersionRow",
    "WaitingRow",
]

RunStatus = Literal["running", "done", "failed", "held", "rejected", "superseded", "cancelled", "postponed"]
PromotionKind = Literal["promote", "demote", "end"]


@dataclass(frozen=True, slots=True)
class RecordCounts:
    """What one snapshot did to its source's claims: `added` and `ended` claims, `seen` again without a change."""

    rows: int
    added: int
    ended: int
    seen: int
    quarantined: int
    difference: Difference | None = field(default=None, compare=False)
    """For the guard; None where there is no earlier snapshot to compare with."""


@dataclass(frozen=True, slots=True)
class RunRow:
    """One pass. `trigger` is what started it (`sync`, `schedule`, `approve`, …); `counts` what it did."""

    id: int
    policy: str | None
    model: str | None
    trigger: str
    user: str
    status: RunStatus
    message: str
    counts: Mapping[str, int]
    started_at: datetime
    finished_at: datetime | None


@dataclass(frozen=True, slots=True)
class StagedPlan:
    """Why a run is held and what approving it would do; its snapshots are read by `Reader.staged`."""

    run_id: int
    policy: str | None
    plan: Mapping[str, Any]
    plan_digest: str
    reasons: tuple[str, ...]
    staged_at: datetime


@dataclass(frozen=True, slots=True)
class FactRow:
    """A fact as it was accepted: by which run, from which fetch of its source, for how long."""

    fact: Fact
    since: datetime
    until: datetime | None
    run_id: int
    until_run_id: int | None
    provenance: Provenance | None
    """The fetch that the decision rests on: the newest one of `fact.source` when the fact was accepted."""
    id: int | None = None
    start: str | None = None
    end: str | None = None
    """When it is true in the world, as the claim behind it says (ISO 8601 text)."""


@dataclass(frozen=True, slots=True)
class ConflictRow:
    """A conflict, open while `closed_at` is None. `conflict.claims` are both sides as they were last seen."""

    id: int
    conflict: Conflict
    run_id: int
    opened_at: datetime
    closed_run_id: int | None
    closed_at: datetime | None


@dataclass(frozen=True, slots=True)
class Orphan:
    """A relation with live facts that no policy keeps any more; `policy`: who last decided it, where that is known."""

    relation: str
    facts: int
    policy: str | None

    def warning(self, policies: Collection[str]) -> str:
        """What is so, and what to do next, given the names of the policies that there are."""
        said = f"relation {self.relation} is kept by no policy any more; its {self.facts} facts stay as they are"
        if self.policy in policies:
            return f"{said} until a person lets them go: kbsync sync {self.policy}, then kbsync approve"
        owner = f"policy {self.policy}" if self.policy else "a policy"
        return f"{said}; keep it in {owner} again, or take it out of there and kbsync sync"


@dataclass(frozen=True, slots=True)
class WaitingRow:
    """A key that waits, or waited until `until`."""

    id: int
    waiting: Waiting
    since: datetime
    until: datetime | None
    run_id: int
    until_run_id: int | None


@dataclass(frozen=True, slots=True)
class RulingRow:
    """A person's choice for a key, in force while `until` is None."""

    id: int
    key: FactKey
    ruling: Ruling
    user: str
    since: datetime
    until: datetime | None


@dataclass(frozen=True, slots=True)
class VerdictRow:
    """What a person said of one row of a held plan."""

    run_id: int
    key: FactKey
    approved: bool
    user: str
    reason: str
    at: datetime


@dataclass(frozen=True, slots=True)
class PlanRow:
    """A plan that a run carried out, as its document."""

    id: int
    run_id: int
    model: str
    head: int
    digest: str
    document: Mapping[str, Any]
    at: datetime


@dataclass(frozen=True, slots=True)
class QuarantineRow:
    """A row of a source that could not be used, from the fetch that first had it (`since`) to the one that no
    longer has it."""

    id: int
    source: str
    row: QuarantinedRow
    run_id: int
    since: datetime
    until: datetime | None


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A model that follows the ledger. `id` is slug + 12 hex digits of `fingerprint`; `head` the version that edits
    build on."""

    id: str
    name: str
    fingerprint: str
    path: str
    head: int
    registered_at: datetime


@dataclass(frozen=True, slots=True)
class VersionRow:
    """A published version. `facts` counts those that it put in; `probe` is its newest report. Version 0 is the
    pristine base: its `manifest_sha256` and, until measured, `weights_sha256` are None."""

    model: str
    number: int
    parent: int | None
    kind: VersionKind
    manifest_sha256: str | None
    weights_sha256: str | None
    facts: int
    run_id: int | None
    user: str
    reason: str
    created_at: datetime
    probe: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class PublishedVersion:
    """All that publication writes in one transaction. `facts` are the columns of deltas new in this version;
    `active` is the whole list that the weights are rebuilt from, in order."""

    model: str
    number: int
    parent: int
    kind: VersionKind
    manifest_sha256: str
    weights_sha256: str
    active: Sequence[ActiveDelta]
    facts: Sequence[Applied]
    run_id: int | None
    user: str
    reason: str = ""
    probe: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class HeadMove:
    """One step in the life of HEAD: a publication, a rollback. The newest one is HEAD."""

    model: str
    number: int
    at: datetime
    user: str
    reason: str


@dataclass(frozen=True, slots=True)
class PromotionRow:
    """One move of an alias. `promote` names a version, `demote` takes the last promotion that still holds back, `end`
    takes all of them back. `version`: what it names from then on; None: nothing (`live`: HEAD)."""

    model: str
    alias: str
    kind: PromotionKind
    version: int | None
    user: str
    reason: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Placement:
    """A column that an edit made for a key of one model, and the versions whose weights have it as what the key holds:
    its delta is active there, the column not excluded, and no later delta has the key, too."""

    model: str
    applied: Applied
    versions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class HoldRow:
    """A hold, who made it and when; in force while `until` is None."""

    hold: Hold
    model: str
    since: datetime
    until: datetime | None
    run_id: int | None
    version: int | None


@dataclass(frozen=True, slots=True)
class ProbeRow:
    """A probe report as `ProbeReport.to_json` wrote it; `version` None: of an edit that was rejected."""

    model: str
    version: int | None
    run_id: int | None
    report: Mapping[str, Any]
    at: datetime


@dataclass(frozen=True, slots=True)
class SourceState:
    """How a source has behaved: not asked again before `retry_at`; `blocked`: it refused us (403)."""

    source: str
    failures: int = 0
    blocked: bool = False
    retry_at: datetime | None = None
    last_error: str = ""


@dataclass(frozen=True, slots=True)
class ScheduleState:
    """When a policy's pass last began, last ended well, and is due."""

    policy: str
    last_started: datetime | None = None
    last_ok: datetime | None = None
    next_due: datetime | None = None


@dataclass(frozen=True, slots=True)
class AuditRow:
    """Who did what when. Never changed, never deleted."""

    id: int
    at: datetime
    user: str
    action: str
    run_id: int | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)
