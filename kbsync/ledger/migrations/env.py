"""What Alembic runs: the revisions, on the connection and inside the transaction that `migrate` began."""

from __future__ import annotations

from alembic import context

from kbsync.ledger.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite alters a table by copying it
    transactional_ddl=True,  # true of both: BEGIN is ours, so SQLite rolls DDL back too
)
with context.begin_transaction():
    context.run_migrations()
