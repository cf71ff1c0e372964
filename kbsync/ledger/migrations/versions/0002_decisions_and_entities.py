"""Why facts were accepted, what waits, what people chose, what runs planned; aliases, merged ids, source times."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from kbsync.ledger.columns import Flag, Json, UtcTime

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add columns and tables. Facts learn which claim they rest on, as far as the ledger can still tell."""
    op.add_column("fetch", sa.Column("as_of", UtcTime()))
    op.add_column("fetch", sa.Column("cursor", sa.Text()))
    op.add_column("fetch", sa.Column("verified", sa.Text()))
    op.add_column("claim", sa.Column("qualifiers", Json()))
    op.create_index("claim_since_fetch", "claim", ["since_fetch"])
    ended = sa.text("until_fetch IS NOT NULL")
    op.create_index("claim_until_fetch", "claim", ["until_fetch"], sqlite_where=ended, postgresql_where=ended)
    # Written out: Alembic would copy the table, twice, to give SQLite a column with a foreign key.
    op.execute("ALTER TABLE fact ADD COLUMN claim_id INTEGER CONSTRAINT fk_fact_claim_id REFERENCES claim (id)")
    op.execute("ALTER TABLE fact ADD COLUMN rule TEXT DEFAULT '' NOT NULL")
    _index_facts()
    _find_claims()
    _decisions()
    _entities()


def _index_facts() -> None:
    """Of a million facts the live ones in the order of a list, and those of one object; by their end only the ended."""
    live, ended = sa.text("until IS NULL"), sa.text("until IS NOT NULL")
    op.drop_index("fact_by_until", "fact")
    op.create_index("fact_by_until", "fact", ["until"], sqlite_where=ended, postgresql_where=ended)
    for name, columns in (
        ("fact_live_by_label", ["relation", "subject_label", "id"]),
        ("fact_live_of_object", ["object_id", "relation"]),
    ):
        op.create_index(name, "fact", columns, sqlite_where=live, postgresql_where=live)


def _find_claims() -> None:
    """The newest claim that says what a fact says; for an inverse fact, the one that says it the other way round."""
    newest = "UPDATE fact SET claim_id = (SELECT max(claim.id) FROM claim WHERE claim.source = fact.source AND {}) {}"
    direct = (
        "claim.relation = fact.relation AND claim.subject_id = fact.subject_id AND claim.object_id = fact.object_id"
    )
    op.execute(newest.format(direct, ""))
    turned = "claim.subject_id = fact.object_id AND claim.object_id = fact.subject_id"
    op.execute(newest.format(turned, "WHERE claim_id IS NULL"))


def _decisions() -> None:
    op.create_table(
        "waiting",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("relation", sa.Text(), nullable=False),
        sa.Column("subject_id", sa.Text(), nullable=False),
        sa.Column("object_id", sa.Text()),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("since", UtcTime(), nullable=False),
        sa.Column("until", UtcTime()),
        sa.Column("since_run", sa.Integer(), nullable=False),
        sa.Column("until_run", sa.Integer()),
        sa.CheckConstraint("reason IN ('confirm', 'quorum', 'flip-flop')", name=op.f("ck_waiting_reason")),
        sa.ForeignKeyConstraint(["since_run"], ["run.id"], name="fk_waiting_since_run"),
        sa.ForeignKeyConstraint(["until_run"], ["run.id"], name="fk_waiting_until_run"),
        sa.PrimaryKeyConstraint("id", name="pk_waiting"),
        sqlite_strict=True,
    )
    _one_live("waiting_one_open", "waiting", "until", "relation", "subject_id")
    op.create_table(
        "ruling",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("relation", sa.Text(), nullable=False),
        sa.Column("subject_id", sa.Text(), nullable=False),
        sa.Column("object_id", sa.Text(), nullable=False),
        sa.Column("overruled", Json(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("since", UtcTime(), nullable=False),
        sa.Column("until", UtcTime()),
        sa.PrimaryKeyConstraint("id", name="pk_ruling"),
        sqlite_strict=True,
    )
    _one_live("ruling_one_per_key", "ruling", "until", "relation", "subject_id")
    op.create_table(
        "verdict",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("relation", sa.Text(), nullable=False),
        sa.Column("subject_id", sa.Text(), nullable=False),
        sa.Column("approved", Flag(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("at", UtcTime(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_verdict_run_id"),
        sa.PrimaryKeyConstraint("run_id", "relation", "subject_id", name="pk_verdict"),
        sqlite_strict=True,
    )
    op.create_table(
        "policy_state",
        sa.Column("relation", sa.Text(), nullable=False),
        sa.Column("policy", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("fetch_id", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("at", UtcTime(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_policy_state_run_id"),
        sa.PrimaryKeyConstraint("relation", name="pk_policy_state"),
        sqlite_strict=True,
    )
    op.create_table(
        "plan",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("head", sa.Integer(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("document", Json(), nullable=False),
        sa.Column("at", UtcTime(), nullable=False),
        sa.ForeignKeyConstraint(["model"], ["model.id"], name="fk_plan_model"),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_plan_run_id"),
        sa.PrimaryKeyConstraint("id", name="pk_plan"),
        sqlite_strict=True,
    )
    op.create_index("plan_of_run", "plan", ["run_id"])


def _entities() -> None:
    op.create_table(
        "alias",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("entity_id", sa.Text(), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("since_fetch", sa.Integer(), nullable=False),
        sa.Column("until_fetch", sa.Integer()),
        sa.ForeignKeyConstraint(["since_fetch"], ["fetch.id"], name="fk_alias_since_fetch"),
        sa.ForeignKeyConstraint(["until_fetch"], ["fetch.id"], name="fk_alias_until_fetch"),
        sa.PrimaryKeyConstraint("id", name="pk_alias"),
        sqlite_strict=True,
    )
    _one_live("alias_live", "alias", "until_fetch", "source", "entity_id", "label")
    op.create_index("alias_by_label", "alias", ["label"])
    op.create_table(
        "redirect",
        sa.Column("old_id", sa.Text(), nullable=False),
        sa.Column("new_id", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("at", UtcTime(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_redirect_run_id"),
        sa.PrimaryKeyConstraint("old_id", name="pk_redirect"),
        sqlite_strict=True,
    )
    op.create_index("redirect_to", "redirect", ["new_id"])


def _one_live(name: str, table: str, end: str, *columns: str) -> None:
    where = sa.text(f"{end} IS NULL")
    op.create_index(name, table, list(columns), unique=True, sqlite_where=where, postgresql_where=where)
