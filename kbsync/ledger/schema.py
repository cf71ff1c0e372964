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

import re
from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import CheckConstraint, ForeignKeyConstraint, Index, MetaData, Table, Text, column
from sqlalchemy.orm import declared_attr
from sqlmodel import Field, SQLModel

from kbsync.ledger.columns import Flag, Json, UtcTime

NAMING = {
    "pk": "pk_%(table_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
}
"""Every constraint has a name, so that later migrations can alter it."""


class _Table(SQLModel):
    metadata = MetaData(naming_convention=NAMING)
    __table_args__: ClassVar[Any] = {"sqlite_strict": True}

    @declared_attr  # type: ignore[arg-type]  # SQLModel declares a method where SQLAlchemy means a class attribute
    def __tablename__(cls) -> str:  # noqa: N805  # a class attribute, see above
        """`StagedSnapshot` -> `staged_snapshot`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()


def _key() -> Any:
    return Field(default=None, primary_key=True)


def _text(**options: Any) -> Any:
    return Field(sa_type=Text, **options)


def _time() -> Any:
    return Field(sa_type=UtcTime)


def _json() -> Any:
    return Field(sa_type=Json)


def _flag() -> Any:
    return Field(sa_type=Flag)


def _refers(target: str) -> Any:
    return Field(foreign_key=f"{target}.id")


def _one_of(name: str, *values: str) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{name} IN ({listed})", name=name)


def _live(name: str, end: str, *columns: str, unique: bool = True) -> Index:
    """An index over the rows that have not ended; UNIQUE: at most one of them."""
    where = column(end).is_(None)
    return Index(name, *columns, unique=unique, sqlite_where=where, postgresql_where=where)


class Run(_Table, table=True):
    """One pass over a policy, or one command that changes the ledger."""

    __table_args__ = (
        _one_of("status", "running", "done", "failed", "held", "rejected", "superseded", "cancelled", "postponed"),
        Index("run_by_policy", "policy", "id"),
        _Table.__table_args__,
    )
    id: int | None = _key()
    policy: str | None = _text()
    model: str | None = _text()
    cause: str = _text()
    who: str = _text()
    status: str = _text()
    message: str = _text()
    counts: Any = _json()
    started_at: datetime = _time()
    finished_at: datetime | None = _time()


class Fetch(_Table, table=True):
    """One accepted answer of a source: what makes its claims' provenance."""

    __table_args__ = (Index("fetch_of_source", "source", "number", unique=True), _Table.__table_args__)
    id: int | None = _key()
    run_id: int = _refers("run")
    source: str = _text()
    relation: str = _text()
    number: int
    location: str = _text()
    fetched_at: datetime = _time()
    recorded_at: datetime = _time()
    status: int
    body_sha256: str = _text()
    etag: str | None = _text()
    last_modified: str | None = _text()
    declaration: str | None = _text()
    complete: bool = _flag()
    not_modified: bool = _flag()
    rows: int


class Claim(_Table, table=True):
    """What a source says. `origin` is the place in the newest fetch that said it, `first_origin` in `since_fetch`."""

    __table_args__ = (
        _one_of("rank", "preferred", "normal", "deprecated"),
        _live("claim_live", "until_fetch", "source", "subject_id", "object_id", unique=False),
        Index("claim_of_key", "relation", "subject_id"),
        _Table.__table_args__,
    )
    id: int | None = _key()
    source: str = _text()
    relation: str = _text()
    subject_id: str = _text()
    subject_label: str = _text()
    object_id: str = _text()
    object_label: str = _text()
    origin: str = _text()
    first_origin: str = _text()
    rank: str = _text()
    valid_from: str | None = _text()
    valid_to: str | None = _text()
    since_fetch: int = _refers("fetch")
    until_fetch: int | None = _refers("fetch")
    seen_from: int
    seen_to: int | None


class Quarantine(_Table, table=True):
    """A row of a source that cannot be used, and why."""

    __table_args__ = (
        _live("quarantine_live", "until_fetch", "source", "subject_id", unique=False),
        _Table.__table_args__,
    )
    id: int | None = _key()
    source: str = _text()
    origin: str = _text()
    reason: str = _text()
    raw: str = _text()
    subject_id: str | None = _text()
    since_fetch: int = _refers("fetch")
    until_fetch: int | None = _refers("fetch")


class Fact(_Table, table=True):
    """What the policy accepted. At most one live object per (relation, subject): MEMIT's Eqn 5, as an index."""

    __table_args__ = (
        _one_of("status", "live", "withdrawn"),
        CheckConstraint("until IS NULL OR until > since", name="until"),
        _live("fact_one_live_object", "until", "relation", "subject_id"),
        Index("fact_of_subject", "subject_id", "relation", "since"),
        Index("fact_by_label", "subject_label"),
        Index("fact_by_since", "since"),
        Index("fact_by_until", "until"),
        _Table.__table_args__,
    )
    id: int | None = _key()
    relation: str = _text()
    subject_id: str = _text()
    subject_label: str = _text()
    object_id: str = _text()
    object_label: str = _text()
    source: str = _text()
    origin: str = _text()
    status: str = _text()
    since: datetime = _time()
    until: datetime | None = _time()
    since_run: int = _refers("run")
    until_run: int | None = _refers("run")


class Conflict(_Table, table=True):
    """Claims that cannot all be true; the key keeps its last accepted fact while this is open."""

    __table_args__ = (
        _one_of("kind", "rows", "sources", "ambiguous", "prompt", "inverse"),
        _live("conflict_one_open", "closed_at", "relation", "subject_id", "kind"),
        _Table.__table_args__,
    )
    id: int | None = _key()
    relation: str = _text()
    subject_id: str = _text()
    kind: str = _text()
    reason: str = _text()
    claims: Any = _json()
    opened_run: int = _refers("run")
    opened_at: datetime = _time()
    closed_run: int | None = _refers("run")
    closed_at: datetime | None = _time()


class Staged(_Table, table=True):
    """A held run: the plan that approving it would carry out."""

    run_id: int = Field(primary_key=True, foreign_key="run.id")
    plan: Any = _json()
    plan_digest: str = _text()
    reasons: Any = _json()
    staged_at: datetime = _time()


class StagedSnapshot(_Table, table=True):
    """What a source said in a held run; no claim until the run is approved."""

    __table_args__ = (
        ForeignKeyConstraint(["run_id"], ["staged.run_id"], ondelete="CASCADE"),
        _Table.__table_args__,
    )
    run_id: int = Field(primary_key=True)
    position: int = Field(primary_key=True)
    source: str = _text()
    snapshot: str = _text()


class Model(_Table, table=True):
    """A model that follows the ledger."""

    id: str = _text(primary_key=True)
    name: str = _text()
    fingerprint: str = _text()
    path: str = _text()
    registered_at: datetime = _time()


class Version(_Table, table=True):
    """A published state of a model's weights; 0 is the pristine base."""

    __table_args__ = (
        ForeignKeyConstraint(["model"], ["model.id"]),
        ForeignKeyConstraint(["model", "parent"], ["version.model", "version.number"]),
        _one_of("kind", "base", "edit", "revert", "rebase"),
        CheckConstraint("(number = 0) = (kind = 'base')", name="base"),
        _Table.__table_args__,
    )
    model: str = _text(primary_key=True)
    number: int = Field(primary_key=True)
    parent: int | None
    kind: str = _text()
    manifest_sha256: str | None = _text()
    weights_sha256: str | None = _text()
    facts: int
    run_id: int | None = _refers("run")
    who: str = _text()
    reason: str = _text()
    created_at: datetime = _time()


class VersionDelta(_Table, table=True):
    """The deltas that a version's weights are rebuilt from, in order."""

    __table_args__ = (
        ForeignKeyConstraint(["model", "version"], ["version.model", "version.number"]),
        _Table.__table_args__,
    )
    model: str = _text(primary_key=True)
    version: int = Field(primary_key=True)
    position: int = Field(primary_key=True)
    delta: str = _text()
    excluded: Any = _json()
    corrections: str | None = _text()


class DeltaFact(_Table, table=True):
    """Which request each column of a delta put into the weights."""

    __table_args__ = (
        ForeignKeyConstraint(["model"], ["model.id"]),
        Index("delta_fact_of_subject", "subject_id", "relation"),
        _Table.__table_args__,
    )
    model: str = _text(primary_key=True)
    delta: str = _text(primary_key=True)
    delta_column: int = Field(primary_key=True)
    relation: str = _text()
    subject_id: str = _text()
    object_id: str = _text()
    prompt: str = _text()
    subject: str = _text()
    target: str = _text()
    paraphrases: Any = _json()


class Head(_Table, table=True):
    """Every move of HEAD; the newest row of a model is its live version. Append-only."""

    __table_args__ = (
        ForeignKeyConstraint(["model", "version"], ["version.model", "version.number"]),
        Index("head_of_model", "model", "id"),
        _Table.__table_args__,
    )
    id: int | None = _key()
    model: str = _text()
    version: int
    at: datetime = _time()
    who: str = _text()
    reason: str = _text()


class Hold(_Table, table=True):
    """A key frozen for one model until released."""

    __table_args__ = (
        ForeignKeyConstraint(["model"], ["model.id"]),
        _one_of("reason", "rollback", "revert", "probe", "manual"),
        _live("hold_one_per_key", "until", "model", "relation", "subject_id"),
        _Table.__table_args__,
    )
    id: int | None = _key()
    model: str = _text()
    relation: str = _text()
    subject_id: str = _text()
    frozen: Any | None = _json()
    held_out: str | None = _text()
    reason: str = _text()
    evidence: str = _text()
    run_id: int | None = _refers("run")
    version: int | None
    since: datetime = _time()
    until: datetime | None = _time()


class Known(_Table, table=True):
    """Whether a base model answers a request without any edit."""

    fingerprint: str = _text(primary_key=True)
    request: str = _text(primary_key=True)
    known: bool = _flag()
    measured_at: datetime = _time()


class RejectedPlan(_Table, table=True):
    """A plan that the gate refused; not tried again until plan, settings or HEAD change."""

    __table_args__ = (ForeignKeyConstraint(["model"], ["model.id"]), _Table.__table_args__)
    model: str = _text(primary_key=True)
    plan_digest: str = _text(primary_key=True)
    settings_digest: str = _text(primary_key=True)
    head: int = Field(primary_key=True)
    run_id: int | None = _refers("run")
    reason: str = _text()
    rejected_at: datetime = _time()


class ProbeResult(_Table, table=True):
    """A probe report. `version` is NULL where the edit was rejected and so became no version."""

    __table_args__ = (
        ForeignKeyConstraint(["model", "version"], ["version.model", "version.number"]),
        Index("probe_result_of_version", "model", "version", "id"),
        _Table.__table_args__,
    )
    id: int | None = _key()
    model: str = _text()
    version: int | None
    run_id: int | None = _refers("run")
    report: Any = _json()
    measured_at: datetime = _time()


class SourceState(_Table, table=True):
    """How a source has behaved; keeps a cooldown over restarts."""

    source: str = _text(primary_key=True)
    failures: int
    blocked: bool = _flag()
    retry_at: datetime | None = _time()
    last_error: str = _text()


class ScheduleState(_Table, table=True):
    """The truth about a policy's schedule; the scheduler itself keeps nothing."""

    policy: str = _text(primary_key=True)
    last_started: datetime | None = _time()
    last_ok: datetime | None = _time()
    next_due: datetime | None = _time()


class Audit(_Table, table=True):
    """Who did what when. Triggers refuse UPDATE and DELETE."""

    id: int | None = _key()
    at: datetime = _time()
    who: str = _text()
    action: str = _text()
    run_id: int | None = _refers("run")
    detail: Any = _json()


def _core(name: str) -> Table:
    return metadata.tables[name]


metadata = _Table.metadata
run, fetch, claim, quarantine = _core("run"), _core("fetch"), _core("claim"), _core("quarantine")
fact, conflict = _core("fact"), _core("conflict")
staged, staged_snapshot = _core("staged"), _core("staged_snapshot")
model, version, version_delta = _core("model"), _core("version"), _core("version_delta")
delta_fact, head, hold = _core("delta_fact"), _core("head"), _core("hold")
known, rejected_plan, probe_result = _core("known"), _core("rejected_plan"), _core("probe_result")
source_state, schedule_state, audit = _core("source_state"), _core("schedule_state"), _core("audit")
