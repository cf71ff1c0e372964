"""The tables, declared with SQLModel and used through SQLAlchemy Core (`schema.fact.c.since`). docs/ledger.md explains
them; the migrations create them, and a test holds that both agree.

Rows are validated before they get here (the frozen values of `kbsync.facts`); NOT NULL, CHECK, foreign keys, UNIQUE
indexes and STRICT are the second net. Two ideas hold the schema together:

- Nothing is overwritten. Claims, facts, conflicts, quarantined rows and holds have a beginning and an end; HEAD and
  the audit log only grow.
- A claim that is said again costs no write. `fetch.number` counts a source's accepted fetches; a claim was said by
  all of them from `seen_from` to `seen_to`, or up to the newest one while `seen_to` is NULL.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKeyConstraint, Index, Table
from sqlmodel import Field

import kbsync.ledger.operations  # noqa: F401  # declares the tables of running it
from kbsync.ledger.columns import (
    LedgerTable,
    ended_index,
    flag,
    json_value,
    key,
    live_index,
    one_of,
    refers,
    text,
    time,
)


class Run(LedgerTable, table=True):
    """One pass over a policy, or one command that changes the ledger."""

    __table_args__ = (
        one_of("status", "running", "done", "failed", "held", "rejected", "superseded", "cancelled", "postponed"),
        Index("run_by_policy", "policy", "id"),
        LedgerTable.__table_args__,
    )
    id: int | None = key()
    policy: str | None = text()
    model: str | None = text()
    cause: str = text()
    who: str = text()
    status: str = text()
    message: str = text()
    counts: Any = json_value()
    started_at: datetime = time()
    finished_at: datetime | None = time()


class Fetch(LedgerTable, table=True):
    """One accepted answer of a source: what makes its claims' provenance."""

    __table_args__ = (
        Index("fetch_of_source", "source", "number", unique=True),
        Index("fetch_by_time", "source", "recorded_at"),
        LedgerTable.__table_args__,
    )
    id: int | None = key()
    run_id: int = refers("run")
    source: str = text()
    relation: str = text()
    number: int
    location: str = text()
    fetched_at: datetime = time()
    recorded_at: datetime = time()
    status: int
    body_sha256: str = text()
    etag: str | None = text()
    last_modified: str | None = text()
    declaration: str | None = text()
    complete: bool = flag()
    not_modified: bool = flag()
    rows: int
    as_of: datetime | None = time()
    cursor: str | None = text()
    verified: str | None = text()


class Claim(LedgerTable, table=True):
    """What a source says. `origin` is the place in the newest fetch that said it, `first_origin` in `since_fetch`."""

    __table_args__ = (
        one_of("rank", "preferred", "normal", "deprecated"),
        live_index("claim_live", "until_fetch", "source", "subject_id", "object_id", unique=False),
        Index("claim_of_key", "relation", "subject_id"),
        Index("claim_since_fetch", "since_fetch"),
        ended_index("claim_until_fetch", "until_fetch"),
        LedgerTable.__table_args__,
    )
    id: int | None = key()
    source: str = text()
    relation: str = text()
    subject_id: str = text()
    subject_label: str = text()
    object_id: str = text()
    object_label: str = text()
    origin: str = text()
    first_origin: str = text()
    rank: str = text()
    valid_from: str | None = text()
    valid_to: str | None = text()
    since_fetch: int = refers("fetch")
    until_fetch: int | None = refers("fetch")
    seen_from: int
    seen_to: int | None
    qualifiers: Any | None = json_value()


class Quarantine(LedgerTable, table=True):
    """A row of a source that cannot be used, and why."""

    __table_args__ = (
        live_index("quarantine_live", "until_fetch", "source", "subject_id", unique=False),
        LedgerTable.__table_args__,
    )
    id: int | None = key()
    source: str = text()
    origin: str = text()
    reason: str = text()
    raw: str = text()
    subject_id: str | None = text()
    since_fetch: int = refers("fetch")
    until_fetch: int | None = refers("fetch")


class Fact(LedgerTable, table=True):
    """What the policy accepted. At most one live object per (relation, subject): MEMIT's Eqn 5, as an index."""

    __table_args__ = (
        one_of("status", "live", "withdrawn"),
        CheckConstraint("until IS NULL OR until > since", name="until"),
        live_index("fact_one_live_object", "until", "relation", "subject_id"),
        Index("fact_of_subject", "subject_id", "relation", "since"),
        Index("fact_by_label", "subject_label"),
        Index("fact_by_since", "since"),
        ended_index("fact_by_until", "until"),
        live_index("fact_live_by_label", "until", "relation", "subject_label", "id", unique=False),
        live_index("fact_live_of_object", "until", "object_id", "relation", unique=False),
        LedgerTable.__table_args__,
    )
    id: int | None = key()
    relation: str = text()
    subject_id: str = text()
    subject_label: str = text()
    object_id: str = text()
    object_label: str = text()
    source: str = text()
    origin: str = text()
    status: str = text()
    since: datetime = time()
    until: datetime | None = time()
    since_run: int = refers("run")
    until_run: int | None = refers("run")
    claim_id: int | None = refers("claim")
    rule: str = text(sa_column_kwargs={"server_default": ""})


class Waiting(LedgerTable, table=True):
    """A key whose claims do not count yet, and why: it keeps its last accepted fact while this is open."""

    __table_args__ = (
        one_of("reason", "confirm", "quorum", "flip-flop"),
        live_index("waiting_one_open", "until", "relation", "subject_id"),
        LedgerTable.__table_args__,
    )
    id: int | None = key()
    relation: str = text()
    subject_id: str = text()
    object_id: str | None = text()
    reason: str = text()
    detail: str = text()
    since: datetime = time()
    until: datetime | None = time()
    since_run: int = refers("run")
    until_run: int | None = refers("run")


class Ruling(LedgerTable, table=True):
    """A person's choice of an object over those `overruled`; it decides while a claim names it and none a third one."""

    __table_args__ = (live_index("ruling_one_per_key", "until", "relation", "subject_id"), LedgerTable.__table_args__)
    id: int | None = key()
    relation: str = text()
    subject_id: str = text()
    object_id: str = text()
    overruled: Any = json_value()
    who: str = text()
    reason: str = text()
    since: datetime = time()
    until: datetime | None = time()


class Alias(LedgerTable, table=True):
    """Another way to write an entity, as a source gives it."""

    __table_args__ = (
        live_index("alias_live", "until_fetch", "source", "entity_id", "label"),
        Index("alias_by_label", "label"),
        LedgerTable.__table_args__,
    )
    id: int | None = key()
    source: str = text()
    entity_id: str = text()
    label: str = text()
    since_fetch: int = refers("fetch")
    until_fetch: int | None = refers("fetch")


class Redirect(LedgerTable, table=True):
    """An id that a source has merged into another one: its history is the other's, too. `new_id` is never old."""

    __table_args__ = (Index("redirect_to", "new_id"), LedgerTable.__table_args__)
    old_id: str = text(primary_key=True)
    new_id: str = text()
    source: str = text()
    run_id: int = refers("run")
    at: datetime = time()


class Conflict(LedgerTable, table=True):
    """Claims that cannot all be true; the key keeps its last accepted fact while this is open."""

    __table_args__ = (
        one_of("kind", "rows", "sources", "ambiguous", "prompt", "inverse"),
        live_index("conflict_one_open", "closed_at", "relation", "subject_id", "kind"),
        LedgerTable.__table_args__,
    )
    id: int | None = key()
    relation: str = text()
    subject_id: str = text()
    kind: str = text()
    reason: str = text()
    claims: Any = json_value()
    opened_run: int = refers("run")
    opened_at: datetime = time()
    closed_run: int | None = refers("run")
    closed_at: datetime | None = time()


class Staged(LedgerTable, table=True):
    """A held run: the plan that approving it would carry out."""

    run_id: int = Field(primary_key=True, foreign_key="run.id")
    plan: Any = json_value()
    plan_digest: str = text()
    reasons: Any = json_value()
    staged_at: datetime = time()


class StagedSnapshot(LedgerTable, table=True):
    """What a source said in a held run; no claim until the run is approved."""

    __table_args__ = (
        ForeignKeyConstraint(["run_id"], ["staged.run_id"], ondelete="CASCADE"),
        LedgerTable.__table_args__,
    )
    run_id: int = Field(primary_key=True)
    position: int = Field(primary_key=True)
    source: str = text()
    snapshot: str = text()


class Verdict(LedgerTable, table=True):
    """What a person said of one row of a held plan: rows that are refused are held when the run is approved."""

    run_id: int = Field(primary_key=True, foreign_key="run.id")
    relation: str = text(primary_key=True)
    subject_id: str = text(primary_key=True)
    approved: bool = flag()
    who: str = text()
    reason: str = text()
    at: datetime = time()


class PolicyState(LedgerTable, table=True):
    """Who last decided a relation, with what, after which fetch: another policy or digest decides every key again."""

    relation: str = text(primary_key=True)
    policy: str = text()
    digest: str = text()
    fetch_id: int
    run_id: int = refers("run")
    at: datetime = time()


class Model(LedgerTable, table=True):
    """A model that follows the ledger."""

    id: str = text(primary_key=True)
    name: str = text()
    fingerprint: str = text()
    path: str = text()
    registered_at: datetime = time()


class Version(LedgerTable, table=True):
    """A published state of a model's weights; 0 is the pristine base."""

    __table_args__ = (
        ForeignKeyConstraint(["model"], ["model.id"]),
        ForeignKeyConstraint(["model", "parent"], ["version.model", "version.number"]),
        one_of("kind", "base", "edit", "revert", "rebase"),
        CheckConstraint("(number = 0) = (kind = 'base')", name="base"),
        LedgerTable.__table_args__,
    )
    model: str = text(primary_key=True)
    number: int = Field(primary_key=True)
    parent: int | None
    kind: str = text()
    manifest_sha256: str | None = text()
    weights_sha256: str | None = text()
    facts: int
    run_id: int | None = refers("run")
    who: str = text()
    reason: str = text()
    created_at: datetime = time()


class Plan(LedgerTable, table=True):
    """What a run decided to do to a model's weights, whole: the link between a decision and a version."""

    __table_args__ = (
        ForeignKeyConstraint(["model"], ["model.id"]),
        Index("plan_of_run", "run_id"),
        LedgerTable.__table_args__,
    )
    id: int | None = key()
    run_id: int = refers("run")
    model: str = text()
    head: int
    digest: str = text()
    document: Any = json_value()
    at: datetime = time()


class VersionDelta(LedgerTable, table=True):
    """The deltas that a version's weights are rebuilt from, in order."""

    __table_args__ = (
        ForeignKeyConstraint(["model", "version"], ["version.model", "version.number"]),
        LedgerTable.__table_args__,
    )
    model: str = text(primary_key=True)
    version: int = Field(primary_key=True)
    position: int = Field(primary_key=True)
    delta: str = text()
    excluded: Any = json_value()
    corrections: str | None = text()


class DeltaFact(LedgerTable, table=True):
    """Which request each column of a delta put into the weights. Keys with one and the same request share theirs."""

    __table_args__ = (
        ForeignKeyConstraint(["model"], ["model.id"]),
        Index("delta_fact_of_subject", "subject_id", "relation"),
        LedgerTable.__table_args__,
    )
    model: str = text(primary_key=True)
    delta: str = text(primary_key=True)
    delta_column: int
    relation: str = text(primary_key=True)
    subject_id: str = text(primary_key=True)
    object_id: str = text()
    prompt: str = text()
    subject: str = text()
    target: str = text()
    paraphrases: Any = json_value()


class Head(LedgerTable, table=True):
    """Every move of HEAD, the version that edits build on; the newest row is where it is. Append-only."""

    __table_args__ = (
        ForeignKeyConstraint(["model", "version"], ["version.model", "version.number"]),
        Index("head_of_model", "model", "id"),
        LedgerTable.__table_args__,
    )
    id: int | None = key()
    model: str = text()
    version: int
    at: datetime = time()
    who: str = text()
    reason: str = text()


class Hold(LedgerTable, table=True):
    """A key frozen for one model until released."""

    __table_args__ = (
        ForeignKeyConstraint(["model"], ["model.id"]),
        one_of("reason", "rollback", "revert", "probe", "gate", "manual"),
        live_index("hold_one_per_key", "until", "model", "relation", "subject_id"),
        LedgerTable.__table_args__,
    )
    id: int | None = key()
    model: str = text()
    relation: str = text()
    subject_id: str = text()
    frozen: Any | None = json_value()
    held_out: str | None = text()
    reason: str = text()
    evidence: str = text()
    run_id: int | None = refers("run")
    version: int | None
    since: datetime = time()
    until: datetime | None = time()


class Known(LedgerTable, table=True):
    """Whether a base model answers a request without any edit."""

    fingerprint: str = text(primary_key=True)
    request: str = text(primary_key=True)
    known: bool = flag()
    measured_at: datetime = time()


class RejectedPlan(LedgerTable, table=True):
    """A plan that the gate refused; not tried again until plan, settings or HEAD change."""

    __table_args__ = (ForeignKeyConstraint(["model"], ["model.id"]), LedgerTable.__table_args__)
    model: str = text(primary_key=True)
    plan_digest: str = text(primary_key=True)
    settings_digest: str = text(primary_key=True)
    head: int = Field(primary_key=True)
    run_id: int | None = refers("run")
    reason: str = text()
    rejected_at: datetime = time()


class ProbeResult(LedgerTable, table=True):
    """A probe report. `version` is NULL where the edit was rejected and so became no version."""

    __table_args__ = (
        ForeignKeyConstraint(["model", "version"], ["version.model", "version.number"]),
        Index("probe_result_of_version", "model", "version", "id"),
        LedgerTable.__table_args__,
    )
    id: int | None = key()
    model: str = text()
    version: int | None
    run_id: int | None = refers("run")
    report: Any = json_value()
    measured_at: datetime = time()


class SourceState(LedgerTable, table=True):
    """How a source has behaved; keeps a cooldown over restarts."""

    source: str = text(primary_key=True)
    failures: int
    blocked: bool = flag()
    retry_at: datetime | None = time()
    last_error: str = text()


class ScheduleState(LedgerTable, table=True):
    """The truth about a policy's schedule; the scheduler itself keeps nothing."""

    policy: str = text(primary_key=True)
    last_started: datetime | None = time()
    last_ok: datetime | None = time()
    next_due: datetime | None = time()


class Audit(LedgerTable, table=True):
    """Who did what when. Triggers refuse UPDATE and DELETE."""

    id: int | None = key()
    at: datetime = time()
    who: str = text()
    action: str = text()
    run_id: int | None = refers("run")
    detail: Any = json_value()


def _core(name: str) -> Table:
    return metadata.tables[name]


metadata = LedgerTable.metadata
run, fetch, claim, quarantine = _core("run"), _core("fetch"), _core("claim"), _core("quarantine")
fact, conflict = _core("fact"), _core("conflict")
waiting, ruling, alias, redirect = _core("waiting"), _core("ruling"), _core("alias"), _core("redirect")
staged, staged_snapshot, verdict = _core("staged"), _core("staged_snapshot"), _core("verdict")
policy_state, plan = _core("policy_state"), _core("plan")
model, version, version_delta = _core("model"), _core("version"), _core("version_delta")
delta_fact, head, hold = _core("delta_fact"), _core("head"), _core("hold")
known, rejected_plan, probe_result = _core("known"), _core("rejected_plan"), _core("probe_result")
source_state, schedule_state, audit = _core("source_state"), _core("schedule_state"), _core("audit")
notice, delivery, channel, promotion = _core("notice"), _core("delivery"), _core("channel"), _core("promotion")
dropped_delta, fact_check, arrival = _core("dropped_delta"), _core("fact_check"), _core("arrival")
phase, source_answer, heartbeat = _core("phase"), _core("source_answer"), _core("heartbeat")
