"""Names for versions, and the log of what each named when.

HEAD is the tip that edits build on. `live` is what is served: HEAD, until somebody promotes a version to it. All other
names are free.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, insert, select

from kbsync.errors import UsageError
from kbsync.ledger import schema
from kbsync.ledger.audit import Auditor
from kbsync.ledger.read_versions import VersionReader
from kbsync.ledger.records import PromotionKind, PromotionRow

__all__ = ["HEAD", "LIVE", "PromotionReader", "PromotionWriter", "standing"]

LIVE = "live"
"""The alias of what is served. Where nothing is promoted to it, it follows HEAD."""
HEAD = "HEAD"
"""What edits build on; no alias."""


def standing(log: Sequence[PromotionRow]) -> list[PromotionRow]:
    """The promotions of one alias that hold, oldest first: a demotion took the last one back, an end all of them. The
    last one is what the alias names; where there is none it names nothing, `live` what HEAD does."""
    found: list[PromotionRow] = []
    for row in log:
        if row.kind == "promote":
            found.append(row)
        elif row.kind == "demote":
            found.pop()
        else:
            found.clear()
    return found


class PromotionReader(VersionReader):
    """Questions about aliases. `model` is always the model's id."""

    def promotions(self, model: str, alias: str | None = None) -> list[PromotionRow]:
        """Every promotion and demotion, oldest first; `alias`: of this one alone."""
        table = schema.promotion.c
        query = select(table.model, table.alias, table.kind, table.version, table.who, table.reason, table.at)
        query = query.where(table.model == model).order_by(table.id)
        if alias is not None:
            query = query.where(table.alias == alias)
        return [PromotionRow(*row) for row in self._connection.execute(query)]

    def pinned(self, model: str) -> dict[str, int]:
        """Alias -> the version that somebody promoted to it; `live` only where it does not follow HEAD."""
        table = schema.promotion.c
        newest = select(func.max(table.id)).where(table.model == model).group_by(table.alias)
        query = select(table.alias, table.version).where(table.id.in_(newest), table.version.is_not(None))
        return {row.alias: row.version for row in self._connection.execute(query.order_by(table.alias))}

    def aliases(self, model: str) -> dict[str, int]:
        """Alias -> the version that it names; `live` is always among them. Raises UsageError for an unknown model."""
        return {LIVE: self.head(model), **self.pinned(model)}

    def behind(self, model: str) -> dict[str, int]:
        """Alias -> the version that it names again once its last promotion is taken back; none that names what HEAD is
        then, or nothing."""
        logs: dict[str, list[PromotionRow]] = {}
        for row in self.promotions(model):
            logs.setdefault(row.alias, []).append(row)
        holding = {alias: standing(log)[:-1] for alias, log in logs.items()}
        return {alias: rows[-1].version for alias, rows in holding.items() if rows and rows[-1].version is not None}

    def number_of(self, model: str, version: int | str) -> int:
        """The number of a version that is named by its number, by an alias or as HEAD.

        Raises UsageError where there is no such version or alias.
        """
        if isinstance(version, int) or version.isdecimal():
            return self.version(model, int(version)).number
        if version == HEAD:
            return self.head(model)
        aliases = self.aliases(model)
        if version not in aliases:
            hint = f"a number from `kbsync log`, HEAD, or one of the aliases {', '.join(sorted(aliases))}"
            raise UsageError(f"{version!r} is no version", hint=hint)
        return aliases[version]


class PromotionWriter(PromotionReader, Auditor):
    """What a Writer may write about aliases."""

    def note_promotion(
        self, model: str, alias: str, kind: PromotionKind, version: int | None, *, user: str, reason: str
    ) -> None:
        """Let an alias name a version from now on; None: none (`live`: HEAD)."""
        values = {"model": model, "alias": alias, "kind": kind, "version": version, "who": user, "reason": reason}
        self._connection.execute(insert(schema.promotion).values(**values, at=self.now))
        self.audit(user, kind, {"model": model, "alias": alias, "version": version, "reason": reason})
