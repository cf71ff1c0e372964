"""Deltas that retention has removed, and so the versions that are not restorable any more.

    db.restorable(model)                # {0, 4, 5}
    db.require_restorable(model, 3)     # raises UsageError: version 3 is not restorable

The same edit made again gives the same file. So a delta that a version names which was published after it was dropped
is there again, for all versions that need it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime

from sqlalchemy import func, select

from kbsync.errors import UsageError
from kbsync.ledger import schema
from kbsync.ledger.audit import Auditor
from kbsync.ledger.database import batches, bulk_insert
from kbsync.ledger.read_versions import VersionReader
from kbsync.versions.store import named

__all__ = ["RETENTION", "DroppedReader", "DroppedWriter"]

RETENTION = "retention"
"""The entry of the audit log by which deltas were dropped."""


class DroppedReader(VersionReader):
    """Questions about dropped deltas. `model` is always the model's id."""

    def dropped(self, model: str) -> dict[str, datetime]:
        """The deltas and corrections that are gone -> since when."""
        table = schema.dropped_delta
        query = select(table.c.delta, func.max(table.c.at)).where(table.c.model == model).group_by(table.c.delta)
        gone: dict[str, datetime] = {row[0]: row[1] for row in self._connection.execute(query)}
        published = self._published(model) if gone else {}
        return {delta: at for delta, at in gone.items() if delta not in published or at > published[delta][1]}

    def files(self, model: str) -> dict[int, set[str]]:
        """Version -> the sha256 of every delta and corrections file that its weights are rebuilt from."""
        table = schema.version_delta
        found: dict[int, set[str]] = {number: set() for number in self.made_at(model)}
        query = select(table.c.version, table.c.delta, table.c.corrections).where(table.c.model == model)
        for number, *names in self._connection.execute(query):
            found[number].update(name for name in names if name is not None)
        return found

    def restorable(self, model: str) -> set[int]:
        """The versions whose files have to be there: all but those that were given up, and HEAD in any case; none that
        needs a dropped delta."""
        given_up, head = self.retired().get(model, 0), self.head(model)
        lost = self._needing(model, self.dropped(model))
        kept = {number for number in self.made_at(model) if number > given_up or number in (0, head)}
        return kept - lost

    def kept_files(self, model: str) -> set[str]:
        """The sha256 of every delta and corrections file that a restorable version needs."""
        files = self.files(model)
        return {file for number in self.restorable(model) for file in files[number]}

    def require_restorable(self, model: str, number: int) -> None:
        """Raise UsageError where version `number` needs a delta that is gone."""
        gone = self.dropped(model)
        if since := [gone[delta] for delta in named(self.active(model, number)) if delta in gone]:
            raise UsageError(
                f"version {number} is not restorable: retention removed its deltas on {min(since):%Y-%m-%d}",
                hint="kbsync log shows which versions are; kbsync revert VERSION undoes any, by a rebase if need be",
            )

    def freed(self, since: datetime) -> int:
        """Bytes of the files that were older than `since` and were dropped after it."""
        table, published = schema.dropped_delta, {model.id: self._published(model.id) for model in self.models()}
        query = select(table.c.model, table.c.delta, table.c.size).where(table.c.at >= since)
        rows = self._connection.execute(query)
        return sum(row.size for row in rows if published[row.model].get(row.delta, (since,))[0] < since)

    def begun_at(self) -> datetime | None:
        """When the first entry of the audit log was written."""
        found: datetime | None = self._connection.scalar(select(func.min(schema.audit.c.at)))
        return found

    def share_since(self, since: datetime) -> float:
        """Which share of the audit log was written since then: about as much of the ledger."""
        entries = select(func.count()).select_from(schema.audit)
        total = self._connection.scalar(entries) or 0
        return (self._connection.scalar(entries.where(schema.audit.c.at >= since)) or 0) / total if total else 0.0

    def _needing(self, model: str, files: Collection[str]) -> set[int]:
        """The versions that need one of these files."""
        table = schema.version_delta.c
        query = select(table.version).where(table.model == model)
        found: set[int] = set()
        for page in batches(files):
            for name in (table.delta, table.corrections):
                found.update(self._connection.scalars(query.where(name.in_(page))))
        return found

    def _published(self, model: str) -> dict[str, tuple[datetime, datetime]]:
        """File -> when the first and the newest version was published that names it."""
        table, version = schema.version_delta, schema.version
        times = func.min(version.c.created_at), func.max(version.c.created_at)
        found: dict[str, tuple[datetime, datetime]] = {}
        for name in (table.c.delta, table.c.corrections):
            query = select(name, *times).where(table.c.model == model, name.is_not(None)).group_by(name)
            query = query.join(version, (version.c.model == table.c.model) & (version.c.number == table.c.version))
            for file, first, newest in self._connection.execute(query):
                other = found.get(file, (first, newest))
                found[file] = min(first, other[0]), max(newest, other[1])
        return found


class DroppedWriter(DroppedReader, Auditor):
    """What a Writer may write about dropped deltas."""

    def drop_deltas(self, model: str, sizes: Mapping[str, int], *, user: str, reason: str) -> None:
        """From now on these files (sha256 -> bytes) need not be there. Their removal comes after the transaction."""
        rows = ((model, delta, size, user, reason, self.now) for delta, size in sorted(sizes.items()))
        bulk_insert(self._connection, schema.dropped_delta, ("model", "delta", "size", "who", "reason", "at"), rows)
        detail = {"model": model, "deltas": len(sizes), "bytes": sum(sizes.values()), "reason": reason}
        self.audit(user, RETENTION, detail)
