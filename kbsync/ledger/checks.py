"""Old facts that were asked again: what a version still answers, what is due, what has faded."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Select, and_, case, func, select

from kbsync.facts import Applied, FactKey
from kbsync.ledger import schema
from kbsync.ledger.audit import Auditor
from kbsync.ledger.columns import Days
from kbsync.ledger.database import bulk_insert
from kbsync.ledger.read_versions import VersionReader
from kbsync.recheck import AGES, FactCheck, Share, Standing, misses

__all__ = ["CheckReader", "CheckWriter"]

_check = schema.fact_check


class CheckReader(VersionReader):
    """Questions about checks of facts."""

    def standings(self, model: str, head: int) -> list[Standing]:
        """What version `head` holds, by key, with the newest check of each fact. It counts where it was of the same
        column, in `head` or a version that it was made on: what a rollback has taken out says nothing.

        Reads the newest check of each fact, and all checks of those facts alone whose newest found them not answered.
        """
        applied, line = self.applied(model, head), self._line(model, head)
        served = self._served(model, applied)
        newest = {check.key: check for check in self._checks(_newest(model))}
        missed: dict[FactKey, list[FactCheck]] = {}
        for check in self._checks(_of_missed(model)):
            missed.setdefault(check.key, []).append(check)
        found = []
        for key, fact in sorted(applied.items()):
            since, last = served[fact.delta], newest.get(key)
            if last and not _counts(last, fact.request.digest, since, line):
                last = None
            found.append(Standing(fact, since, last, misses(missed.get(key, ()), fact.request.digest)))
        return found

    def decay(self, model: str) -> list[Share]:
        """How many facts of a model were still answered, by relation and by age since they were published, over all
        checks that were made."""
        days = Days(_check.c.served_at, _check.c.at)
        until = case(*((days < age, age) for age in AGES)).label("until")
        answered = func.sum(case((_check.c.answered, 1), else_=0))
        query = select(_check.c.relation, until, func.count(), answered).where(_check.c.model == model)
        rows = self._connection.execute(query.group_by(_check.c.relation, until))
        return sorted((Share(*row) for row in rows), key=lambda share: (share.relation, share.until or math.inf))

    def faded(self, model: str, head: int, applied: Mapping[FactKey, Applied] | None = None) -> set[str]:
        """Digests of the requests that version `head` holds and did not answer when it was last asked; `applied`: of
        what a version made on it holds."""
        missed = self._checks(_newest(model, answered=False))
        if not missed:
            return set()
        applied, line = self.applied(model, head) if applied is None else applied, self._line(model, head)
        served = self._served(model, applied)
        return {
            check.request
            for check in missed
            if (fact := applied.get(check.key)) and _counts(check, fact.request.digest, served[fact.delta], line)
        }

    def _served(self, model: str, applied: Mapping[FactKey, Applied]) -> dict[str, datetime]:
        """Delta -> when it was first published, of those that the facts are in."""
        part, version = schema.version_delta, schema.version
        query = (
            select(part.c.delta, func.min(version.c.created_at))
            .join(version, and_(version.c.model == part.c.model, version.c.number == part.c.version))
            .where(part.c.model == model, part.c.delta.in_({fact.delta for fact in applied.values()}))
            .group_by(part.c.delta)
        )
        return {row[0]: row[1] for row in self._connection.execute(query)}

    def _line(self, model: str, head: int) -> set[int]:
        """Version `head` and those that it was made on."""
        parents = self.parents(model)
        line = {head}
        while (head := parents.get(head, -1)) >= 0:
            line.add(head)
        return line

    def _checks(self, query: Any) -> list[FactCheck]:
        return [
            FactCheck(
                key=FactKey(row.relation, row.subject_id),
                request=row.request,
                version=row.version,
                stage=row.stage,
                answered=row.answered,
                served=row.served_at,
                due_at=row.due_at,
                at=row.at,
            )
            for row in self._connection.execute(query)
        ]


def _newest(model: str, *, answered: bool | None = None) -> Select[Any]:
    """The newest check of each fact; `answered`: of those alone where it found this."""
    newest = select(func.max(_check.c.id)).where(_check.c.model == model)
    query = select(_check).where(_check.c.id.in_(newest.group_by(_check.c.relation, _check.c.subject_id)))
    return query if answered is None else query.where(_check.c.answered.in_([answered]))


def _of_missed(model: str) -> Select[Any]:
    """All checks of the facts that their newest one found not to be answered, newest first."""
    missed = _newest(model, answered=False).subquery()
    same = and_(_check.c.relation == missed.c.relation, _check.c.subject_id == missed.c.subject_id)
    return select(_check).join(missed, same).where(_check.c.model == model).order_by(_check.c.id.desc())


def _counts(check: FactCheck, request: str, served: datetime, line: Collection[int]) -> bool:
    return (check.request, check.served) == (request, served) and check.version in line


class CheckWriter(CheckReader, Auditor):
    """What a Writer may write about checks of facts."""

    def note_checks(self, model: str, checks: Iterable[FactCheck]) -> None:
        """Facts were asked again."""
        names = ("version", "relation", "subject_id", "request", "stage", "answered", "served_at", "due_at", "at")
        rows = (
            (model, one.version, *one.key, one.request, one.stage, one.answered, one.served, one.due_at, one.at)
            for one in checks
        )
        bulk_insert(self._connection, _check, ("model", *names), rows)
