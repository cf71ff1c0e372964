"""The ledger's schema through time: Alembic revisions in `versions`, applied when a ledger is opened."""
