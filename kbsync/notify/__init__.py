"""Notices to people: by webhook, command or e-mail, from an outbox in the ledger, so that none is lost."""
