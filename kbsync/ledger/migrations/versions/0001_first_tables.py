"""The first tables.

Frozen: a later change of the schema is a later revision.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from kbsync.ledger import database
from kbsync.ledger.columns import Flag, Json, UtcTime

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the tables, then make what must only grow append-only."""
    _sources()
    _facts()
    _versions()
    _judgements()
    for table in ("head", "audit"):
        database.append_only(op.get_bind(), table)
    database.mark_as_ledger(op.get_bind())


def _sources() -> None:
    """What sources said."""
    op.create_table(
        "run",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("policy", sa.Text()),
        sa.Column("model", sa.Text()),
        sa.Column("cause", sa.Text(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("counts", Json(), nullable=False),
        sa.Column("started_at", UtcTime(), nullable=False),
        sa.Column("finished_at", UtcTime()),
        sa.CheckConstraint(
            "status IN ('running', 'done', 'failed', 'held', 'rejected', 'superseded', 'cancelled', 'postponed')",
            name=op.f("ck_run_status"),
        ),
        sa.PrimaryKeyConstraint("id", name="pk_run"),
        sqlite_strict=True,
    )
    op.create_index("run_by_policy", "run", ["policy", "id"])
    op.create_table(
        "fetch",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("relation", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("location", sa.Text(), nullable=False),
        sa.Column("fetched_at", UtcTime(), nullable=False),
        sa.Column("recorded_at", UtcTime(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("body_sha256", sa.Text(), nullable=False),
        sa.Column("etag", sa.Text()),
        sa.Column("last_modified", sa.Text()),
        sa.Column("declaration", sa.Text()),
        sa.Column("complete", Flag(), nullable=False),
        sa.Column("not_modified", Flag(), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_fetch_run_id"),
        sa.PrimaryKeyConstraint("id", name="pk_fetch"),
        sqlite_strict=True,
    )
    op.create_index("fetch_by_time", "fetch", ["source", "recorded_at"])
    op.create_index("fetch_of_source", "fetch", ["source", "number"], unique=True)
    op.create_table(
        "claim",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("relation", sa.Text(), nullable=False),
        sa.Column("subject_id", sa.Text(), nullable=False),
        sa.Column("subject_label", sa.Text(), nullable=False),
        sa.Column("object_id", sa.Text(), nullable=False),
        sa.Column("object_label", sa.Text(), nullable=False),
        sa.Column("origin", sa.Text(), nullable=False),
        sa.Column("first_origin", sa.Text(), nullable=False),
        sa.Column("rank", sa.Text(), nullable=False),
        sa.Column("valid_from", sa.Text()),
        sa.Column("valid_to", sa.Text()),
        sa.Column("since_fetch", sa.Integer(), nullable=False),
        sa.Column("until_fetch", sa.Integer()),
        sa.Column("seen_from", sa.Integer(), nullable=False),
        sa.Column("seen_to", sa.Integer()),
        sa.CheckConstraint("rank IN ('preferred', 'normal', 'deprecated')", name=op.f("ck_claim_rank")),
        sa.ForeignKeyConstraint(["since_fetch"], ["fetch.id"], name="fk_claim_since_fetch"),
        sa.ForeignKeyConstraint(["until_fetch"], ["fetch.id"], name="fk_claim_until_fetch"),
        sa.PrimaryKeyConstraint("id", name="pk_claim"),
        sqlite_strict=True,
    )
    op.create_index(
        "claim_live",
        "claim",
        ["source", "subject_id", "object_id"],
        sqlite_where=sa.text("until_fetch IS NULL"),
        postgresql_where=sa.text("until_fetch IS NULL"),
    )
    op.create_index("claim_of_key", "claim", ["relation", "subject_id"])
    op.create_table(
        "quarantine",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("origin", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("raw", sa.Text(), nullable=False),
        sa.Column("subject_id", sa.Text()),
        sa.Column("since_fetch", sa.Integer(), nullable=False),
        sa.Column("until_fetch", sa.Integer()),
        sa.ForeignKeyConstraint(["since_fetch"], ["fetch.id"], name="fk_quarantine_since_fetch"),
        sa.ForeignKeyConstraint(["until_fetch"], ["fetch.id"], name="fk_quarantine_until_fetch"),
        sa.PrimaryKeyConstraint("id", name="pk_quarantine"),
        sqlite_strict=True,
    )
    op.create_index(
        "quarantine_live",
        "quarantine",
        ["source", "subject_id"],
        sqlite_where=sa.text("until_fetch IS NULL"),
        postgresql_where=sa.text("until_fetch IS NULL"),
    )
    op.create_table(
        "source_state",
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("blocked", Flag(), nullable=False),
        sa.Column("retry_at", UtcTime()),
        sa.Column("last_error", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("source", name="pk_source_state"),
        sqlite_strict=True,
    )
    op.create_table(
        "schedule_state",
        sa.Column("policy", sa.Text(), nullable=False),
        sa.Column("last_started", UtcTime()),
        sa.Column("last_ok", UtcTime()),
        sa.Column("next_due", UtcTime()),
        sa.PrimaryKeyConstraint("policy", name="pk_schedule_state"),
        sqlite_strict=True,
    )


def _facts() -> None:
    """What was accepted, what waits."""
    op.create_table(
        "fact",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("relation", sa.Text(), nullable=False),
        sa.Column("subject_id", sa.Text(), nullable=False),
        sa.Column("subject_label", sa.Text(), nullable=False),
        sa.Column("object_id", sa.Text(), nullable=False),
        sa.Column("object_label", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("origin", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("since", UtcTime(), nullable=False),
        sa.Column("until", UtcTime()),
        sa.Column("since_run", sa.Integer(), nullable=False),
        sa.Column("until_run", sa.Integer()),
        sa.CheckConstraint("status IN ('live', 'withdrawn')", name=op.f("ck_fact_status")),
        sa.CheckConstraint("until IS NULL OR until > since", name=op.f("ck_fact_until")),
        sa.ForeignKeyConstraint(["since_run"], ["run.id"], name="fk_fact_since_run"),
        sa.ForeignKeyConstraint(["until_run"], ["run.id"], name="fk_fact_until_run"),
        sa.PrimaryKeyConstraint("id", name="pk_fact"),
        sqlite_strict=True,
    )
    op.create_index("fact_by_label", "fact", ["subject_label"])
    op.create_index("fact_by_since", "fact", ["since"])
    op.create_index("fact_by_until", "fact", ["until"])
    op.create_index("fact_of_subject", "fact", ["subject_id", "relation", "since"])
    op.create_index(
        "fact_one_live_object",
        "fact",
        ["relation", "subject_id"],
        unique=True,
        sqlite_where=sa.text("until IS NULL"),
        postgresql_where=sa.text("until IS NULL"),
    )
    op.create_table(
        "conflict",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("relation", sa.Text(), nullable=False),
        sa.Column("subject_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("claims", Json(), nullable=False),
        sa.Column("opened_run", sa.Integer(), nullable=False),
        sa.Column("opened_at", UtcTime(), nullable=False),
        sa.Column("closed_run", sa.Integer()),
        sa.Column("closed_at", UtcTime()),
        sa.CheckConstraint(
            "kind IN ('rows', 'sources', 'ambiguous', 'prompt', 'inverse')", name=op.f("ck_conflict_kind")
        ),
        sa.ForeignKeyConstraint(["closed_run"], ["run.id"], name="fk_conflict_closed_run"),
        sa.ForeignKeyConstraint(["opened_run"], ["run.id"], name="fk_conflict_opened_run"),
        sa.PrimaryKeyConstraint("id", name="pk_conflict"),
        sqlite_strict=True,
    )
    op.create_index(
        "conflict_one_open",
        "conflict",
        ["relation", "subject_id", "kind"],
        unique=True,
        sqlite_where=sa.text("closed_at IS NULL"),
        postgresql_where=sa.text("closed_at IS NULL"),
    )
    op.create_table(
        "staged",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("plan", Json(), nullable=False),
        sa.Column("plan_digest", sa.Text(), nullable=False),
        sa.Column("reasons", Json(), nullable=False),
        sa.Column("staged_at", UtcTime(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_staged_run_id"),
        sa.PrimaryKeyConstraint("run_id", name="pk_staged"),
        sqlite_strict=True,
    )
    op.create_table(
        "staged_snapshot",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("snapshot", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["staged.run_id"], name="fk_staged_snapshot_run_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", "position", name="pk_staged_snapshot"),
        sqlite_strict=True,
    )


def _versions() -> None:
    """What each model holds."""
    op.create_table(
        "model",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("registered_at", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_model"),
        sqlite_strict=True,
    )
    op.create_table(
        "version",
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("parent", sa.Integer()),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("manifest_sha256", sa.Text()),
        sa.Column("weights_sha256", sa.Text()),
        sa.Column("facts", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Integer()),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", UtcTime(), nullable=False),
        sa.CheckConstraint("(number = 0) = (kind = 'base')", name=op.f("ck_version_base")),
        sa.CheckConstraint("kind IN ('base', 'edit', 'revert', 'rebase')", name=op.f("ck_version_kind")),
        sa.ForeignKeyConstraint(
            ["model", "parent"], ["version.model", "version.number"], name="fk_version_model_parent"
        ),
        sa.ForeignKeyConstraint(["model"], ["model.id"], name="fk_version_model"),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_version_run_id"),
        sa.PrimaryKeyConstraint("model", "number", name="pk_version"),
        sqlite_strict=True,
    )
    op.create_table(
        "version_delta",
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("delta", sa.Text(), nullable=False),
        sa.Column("excluded", Json(), nullable=False),
        sa.Column("corrections", sa.Text()),
        sa.ForeignKeyConstraint(
            ["model", "version"], ["version.model", "version.number"], name="fk_version_delta_model_version"
        ),
        sa.PrimaryKeyConstraint("model", "version", "position", name="pk_version_delta"),
        sqlite_strict=True,
    )
    op.create_table(
        "delta_fact",
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("delta", sa.Text(), nullable=False),
        sa.Column("delta_column", sa.Integer(), nullable=False),
        sa.Column("relation", sa.Text(), nullable=False),
        sa.Column("subject_id", sa.Text(), nullable=False),
        sa.Column("object_id", sa.Text(), nullable=False),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("paraphrases", Json(), nullable=False),
        sa.ForeignKeyConstraint(["model"], ["model.id"], name="fk_delta_fact_model"),
        sa.PrimaryKeyConstraint("model", "delta", "relation", "subject_id", name="pk_delta_fact"),
        sqlite_strict=True,
    )
    op.create_index("delta_fact_of_subject", "delta_fact", ["subject_id", "relation"])
    op.create_table(
        "head",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("at", UtcTime(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["model", "version"], ["version.model", "version.number"], name="fk_head_model_version"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_head"),
        sqlite_strict=True,
    )
    op.create_index("head_of_model", "head", ["model", "id"])


def _judgements() -> None:
    """What is kept out of a model, and why."""
    op.create_table(
        "hold",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("relation", sa.Text(), nullable=False),
        sa.Column("subject_id", sa.Text(), nullable=False),
        sa.Column("frozen", Json()),
        sa.Column("held_out", sa.Text()),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("evidence", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Integer()),
        sa.Column("version", sa.Integer()),
        sa.Column("since", UtcTime(), nullable=False),
        sa.Column("until", UtcTime()),
        sa.CheckConstraint("reason IN ('rollback', 'revert', 'probe', 'manual')", name=op.f("ck_hold_reason")),
        sa.ForeignKeyConstraint(["model"], ["model.id"], name="fk_hold_model"),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_hold_run_id"),
        sa.PrimaryKeyConstraint("id", name="pk_hold"),
        sqlite_strict=True,
    )
    op.create_index(
        "hold_one_per_key",
        "hold",
        ["model", "relation", "subject_id"],
        unique=True,
        sqlite_where=sa.text("until IS NULL"),
        postgresql_where=sa.text("until IS NULL"),
    )
    op.create_table(
        "known",
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("request", sa.Text(), nullable=False),
        sa.Column("known", Flag(), nullable=False),
        sa.Column("measured_at", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("fingerprint", "request", name="pk_known"),
        sqlite_strict=True,
    )
    op.create_table(
        "rejected_plan",
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("plan_digest", sa.Text(), nullable=False),
        sa.Column("settings_digest", sa.Text(), nullable=False),
        sa.Column("head", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Integer()),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("rejected_at", UtcTime(), nullable=False),
        sa.ForeignKeyConstraint(["model"], ["model.id"], name="fk_rejected_plan_model"),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_rejected_plan_run_id"),
        sa.PrimaryKeyConstraint("model", "plan_digest", "settings_digest", "head", name="pk_rejected_plan"),
        sqlite_strict=True,
    )
    op.create_table(
        "probe_result",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer()),
        sa.Column("run_id", sa.Integer()),
        sa.Column("report", Json(), nullable=False),
        sa.Column("measured_at", UtcTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["model", "version"], ["version.model", "version.number"], name="fk_probe_result_model_version"
        ),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_probe_result_run_id"),
        sa.PrimaryKeyConstraint("id", name="pk_probe_result"),
        sqlite_strict=True,
    )
    op.create_index("probe_result_of_version", "probe_result", ["model", "version", "id"])
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at", UtcTime(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Integer()),
        sa.Column("detail", Json(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_audit_run_id"),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
        sqlite_strict=True,
    )
