"""Running it for years: notices and their delivery, aliases, dropped deltas, checks of facts, freshness, measures."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from kbsync.ledger import database
from kbsync.ledger.columns import Flag, Json, UtcTime

revision = "0003"
down_revision = "0002"

REASONS = "reason IN ('rollback', 'revert', 'probe', 'gate', 'manual')"
KINDS = "kind IN ('held', 'rejected', 'conflict', 'failed', 'stale', 'faded', 'recovered')"


def upgrade() -> None:
    """Add the tables, and a reason to hold a fact: the gate."""
    _allow_gate()
    _notices()
    _versions()
    _measures()
    for table in ("promotion", "dropped_delta", "arrival"):
        database.append_only(op.get_bind(), table)


def _allow_gate() -> None:
    if op.get_bind().dialect.name != "sqlite":
        op.drop_constraint(op.f("ck_hold_reason"), "hold", type_="check")
        op.create_check_constraint(op.f("ck_hold_reason"), "hold", REASONS)
        return
    # SQLite cannot alter a CHECK: a new table takes the rows. Nothing refers to this one.
    op.drop_index("hold_one_per_key", "hold")
    op.rename_table("hold", "hold_before")
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
        sa.CheckConstraint(REASONS, name=op.f("ck_hold_reason")),
        sa.ForeignKeyConstraint(["model"], ["model.id"], name="fk_hold_model"),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_hold_run_id"),
        sa.PrimaryKeyConstraint("id", name="pk_hold"),
        sqlite_strict=True,
    )
    columns = "id, model, relation, subject_id, frozen, held_out, reason, evidence, run_id, version, since, until"
    op.execute(f"INSERT INTO hold ({columns}) SELECT {columns} FROM hold_before")  # noqa: S608  # no value in it
    op.drop_table("hold_before")
    live = sa.text("until IS NULL")
    op.create_index("hold_one_per_key", "hold", ["model", "relation", "subject_id"], unique=True, sqlite_where=live)


def _notices() -> None:
    op.create_table(
        "notice",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("thread", sa.Text(), nullable=False),
        sa.Column("policy", sa.Text()),
        sa.Column("run_id", sa.Integer()),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("detail", Json(), nullable=False),
        sa.Column("at", UtcTime(), nullable=False),
        sa.CheckConstraint(KINDS, name=op.f("ck_notice_kind")),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_notice_run_id"),
        sa.PrimaryKeyConstraint("id", name="pk_notice"),
        sqlite_strict=True,
    )
    op.create_index("notice_of_thread", "notice", ["thread", "id"])
    op.create_table(
        "delivery",
        sa.Column("notice_id", sa.Integer(), nullable=False),
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_at", UtcTime()),
        sa.Column("delivered_at", UtcTime()),
        sa.Column("error", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["notice_id"], ["notice.id"], name="fk_delivery_notice_id"),
        sa.PrimaryKeyConstraint("notice_id", "channel", name="pk_delivery"),
        sqlite_strict=True,
    )
    op.create_index("delivery_due", "delivery", ["delivered_at", "next_at"])
    op.create_table(
        "channel",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("seen", sa.Integer(), nullable=False),
        sa.Column("stopped", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_channel"),
        sqlite_strict=True,
    )


def _versions() -> None:
    op.create_table(
        "promotion",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("alias", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer()),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("at", UtcTime(), nullable=False),
        sa.CheckConstraint("kind IN ('promote', 'demote', 'end')", name=op.f("ck_promotion_kind")),
        _of_version("promotion"),
        sa.PrimaryKeyConstraint("id", name="pk_promotion"),
        sqlite_strict=True,
    )
    op.create_index("promotion_of_alias", "promotion", ["model", "alias", "id"])
    op.create_table(
        "dropped_delta",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("delta", sa.Text(), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("at", UtcTime(), nullable=False),
        sa.ForeignKeyConstraint(["model"], ["model.id"], name="fk_dropped_delta_model"),
        sa.PrimaryKeyConstraint("id", name="pk_dropped_delta"),
        sqlite_strict=True,
    )
    op.create_index("dropped_delta_of_model", "dropped_delta", ["model", "delta"])
    op.create_table(
        "fact_check",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("relation", sa.Text(), nullable=False),
        sa.Column("subject_id", sa.Text(), nullable=False),
        sa.Column("request", sa.Text(), nullable=False),
        sa.Column("stage", sa.Integer(), nullable=False),
        sa.Column("answered", Flag(), nullable=False),
        sa.Column("served_at", UtcTime(), nullable=False),
        sa.Column("due_at", UtcTime(), nullable=False),
        sa.Column("at", UtcTime(), nullable=False),
        _of_version("fact_check"),
        sa.PrimaryKeyConstraint("id", name="pk_fact_check"),
        sqlite_strict=True,
    )
    op.create_index("fact_check_of_key", "fact_check", ["model", "relation", "subject_id", "id"])
    op.create_table(
        "arrival",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("relation", sa.Text(), nullable=False),
        sa.Column("subject_id", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("changed_at", UtcTime(), nullable=False),
        sa.Column("fetched_at", UtcTime(), nullable=False),
        sa.Column("served_at", UtcTime(), nullable=False),
        _of_version("arrival"),
        sa.PrimaryKeyConstraint("id", name="pk_arrival"),
        sqlite_strict=True,
    )
    op.create_index("arrival_by_time", "arrival", ["served_at"])


def _measures() -> None:
    op.create_table(
        "phase",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("phase", sa.Text(), nullable=False),
        sa.Column("milliseconds", sa.Integer(), nullable=False),
        sa.Column("amount", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_phase_run_id"),
        sa.PrimaryKeyConstraint("run_id", "phase", name="pk_phase"),
        sqlite_strict=True,
    )
    op.create_table(
        "source_answer",
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("last_at", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("source", "outcome", name="pk_source_answer"),
        sqlite_strict=True,
    )
    op.create_table(
        "heartbeat",
        sa.Column("part", sa.Text(), nullable=False),
        sa.Column("process", sa.Integer(), nullable=False),
        sa.Column("detail", Json(), nullable=False),
        sa.Column("at", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("part", name="pk_heartbeat"),
        sqlite_strict=True,
    )


def _of_version(table: str) -> sa.ForeignKeyConstraint:
    columns = ["version.model", "version.number"]
    return sa.ForeignKeyConstraint(["model", "version"], columns, name=f"fk_{table}_model_version")
