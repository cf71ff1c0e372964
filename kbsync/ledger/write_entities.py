"""Writing which ids have been merged, and taking along what people have said of them: holds and rulings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

from sqlalchemy import delete, select

from kbsync.facts import FactKey, Hold, Ruling, Snapshot
from kbsync.ledger import schema
from kbsync.ledger.database import upsert
from kbsync.ledger.entities import EntityReader, collapsed, follow_applied, follow_key
from kbsync.ledger.write_decisions import DecisionWriter
from kbsync.ledger.write_versions import VersionWriter

__all__ = ["EntityWriter"]

_USER = "kbsync"


class EntityWriter(VersionWriter, DecisionWriter, EntityReader):
    """What a Writer may write about entities."""

    def merge_entities(self, run_id: int, snapshot: Snapshot) -> dict[str, str]:
        """Take note of the ids that a source has merged, and of those that it no longer has merged; the new redirects.

        Chains are followed to their end. A circle is refused and audited, and so is an id of a space in which the
        source has said nothing. Holds and rulings on an old id go on under the new one, where that has none of its own;
        where several that differ would, all of them end. To be called before the snapshot is recorded.
        """
        known = self.redirects()
        if parted := self._parted(snapshot):
            known = {old: new for old, new in known.items() if old not in parted}
            self._connection.execute(delete(schema.redirect).where(schema.redirect.c.old_id.in_(sorted(parted))))
            self.audit(_USER, "part", {"source": snapshot.source, "ids": parted}, run_id=run_id)
        own = self._own_spaces(snapshot) if snapshot.redirects else set()
        foreign = {old: new for old, new in snapshot.redirects.items() if not {_space(old), _space(new)} <= own}
        moved, refused = collapsed(known, {o: n for o, n in snapshot.redirects.items() if o not in foreign})
        refused |= foreign
        if refused:
            self.audit(_USER, "refuse merge", {"source": snapshot.source, "ids": refused}, run_id=run_id)
        new = {old: to for old, to in moved.items() if known.get(old) != to}
        if new:
            self._write(run_id, snapshot.source, new)
            self._take_holds_along(moved)
            self._take_rulings_along(moved)
            self.audit(_USER, "merge", {"source": snapshot.source, "ids": new}, run_id=run_id)
        return new

    def _own_spaces(self, snapshot: Snapshot) -> set[str]:
        """The id spaces that the source speaks about, now or before."""
        said = (id_ for entry in snapshot.content if isinstance(entry, tuple) for id_ in (entry[0], entry[2]))
        return {_space(id_) for id_ in chain(said, self.claimed_ids(snapshot.source))}

    def _parted(self, snapshot: Snapshot) -> dict[str, str]:
        """Ids that this source had merged, and of which it speaks by themselves again."""
        table = schema.redirect
        query = select(table.c.old_id, table.c.new_id).where(table.c.source == snapshot.source)
        merged = {row.old_id: row.new_id for row in self._connection.execute(query)}
        if not merged:
            return {}
        present = {entry[0] for entry in snapshot.content if isinstance(entry, tuple)}
        return {old: new for old, new in merged.items() if old in present and old not in snapshot.redirects}

    def _write(self, run_id: int, source: str, new: Mapping[str, str]) -> None:
        table = schema.redirect
        first = {
            row.old_id: row for row in self._connection.execute(select(table).where(table.c.old_id.in_(list(new))))
        }
        rows: list[dict[str, Any]] = []
        for old, to in sorted(new.items()):
            was = first.get(old)
            origin = (source, run_id, self.now) if was is None else (was.source, was.run_id, was.at)
            rows.append({"old_id": old, "new_id": to, **dict(zip(("source", "run_id", "at"), origin, strict=True))})
        upsert(self._connection, table, rows)

    def _take_holds_along(self, moved: Mapping[str, str]) -> None:
        for model in self.models():
            holds = self.holds(model.id)
            coming: dict[FactKey, list[Hold]] = {}
            for key, hold in holds.items():
                now = follow_key(key, moved)
                held_out = moved.get(hold.held_out or "", hold.held_out)
                frozen = hold.frozen and follow_applied(hold.frozen, moved)
                if (after := replace(hold, key=now, held_out=held_out, frozen=frozen)) != hold:
                    self.release(model.id, [key])
                    if now == key or now not in holds:
                        coming.setdefault(now, []).append(after)
            for key, several in coming.items():
                if len({(one.frozen and one.frozen.object_id, one.held_out) for one in several}) == 1:
                    self.hold(model.id, several[0])
                else:
                    self._end_merged("release", key, [one.evidence for one in several])

    def _take_rulings_along(self, moved: Mapping[str, str]) -> None:
        rulings = {row.key: row for row in self.rulings()}
        coming: dict[FactKey, list[tuple[Ruling, str]]] = {}
        for key, row in rulings.items():
            now, ruling = follow_key(key, moved), row.ruling
            overruled = frozenset(moved.get(id_, id_) for id_ in ruling.overruled)
            after = replace(ruling, object=moved.get(ruling.object, ruling.object), overruled=overruled)
            if (now, after) != (key, ruling):
                self.unrule(key, user=_USER, reason="merged at the source")
                if now == key or now not in rulings:
                    coming.setdefault(now, []).append((after, row.user))
        for key, several in coming.items():
            if len({ruling.object for ruling, _ in several}) == 1:
                ruling, user = several[0]
                overruled = frozenset[str]().union(*(one.overruled for one, _ in several))
                self.rule(key, replace(ruling, overruled=overruled), user=user)
            else:
                self._end_merged("unrule", key, [ruling.reason for ruling, _ in several])

    def _end_merged(self, action: str, key: FactKey, reasons: list[str]) -> None:
        """Of what people said of several ids that have become one and that differs, nothing goes on: nobody knows which
        of it is meant."""
        self.audit(_USER, action, {**key._asdict(), "reason": "merged ids that differ", "ended": reasons})


def _space(id_: str) -> str:
    return id_.partition(":")[0]
