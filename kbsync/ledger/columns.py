"""Column types that mean the same in SQLite and PostgreSQL: UTC times, JSON values, flags."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Boolean, DateTime, Dialect, Integer, Text
from sqlalchemy.types import TypeDecorator, TypeEngine

__all__ = ["Flag", "Json", "UtcTime"]

_ISO = "%Y-%m-%dT%H:%M:%S.%fZ"


class UtcTime(TypeDecorator[datetime]):
    """A point in time. SQLite keeps it as text of fixed width (`2026-07-01T12:00:00.000000Z`), which sorts and compares
    as the times do; PostgreSQL as `timestamptz`. Raises ValueError for a datetime without a timezone, which SQLite
    would silently take for UTC."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Text in SQLite, a real timestamp elsewhere."""
        return dialect.type_descriptor(Text() if dialect.name == "sqlite" else DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        """To UTC."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value.isoformat()} has no timezone")
        utc = value.astimezone(UTC)
        return utc.strftime(_ISO) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: Any, _dialect: Dialect) -> datetime | None:
        """A timezone-aware UTC datetime."""
        if value is None:
            return None
        if isinstance(value, str):
            return datetime.fromisoformat(value)
        moment: datetime = value
        return moment.astimezone(UTC)


class Json(TypeDecorator[Any]):
    """A JSON value as canonical text: sorted keys, no spaces. Raises ValueError for NaN and infinities, which are no
    JSON."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, _dialect: Dialect) -> str | None:
        """The canonical text."""
        if value is None:
            return None
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    def process_result_value(self, value: str | None, _dialect: Dialect) -> Any:
        """The value."""
        return None if value is None else json.loads(value)


class Flag(TypeDecorator[bool]):
    """Yes or no: 0 or 1 in SQLite, whose STRICT tables know no BOOLEAN."""

    impl = Boolean
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """INTEGER in SQLite, BOOLEAN elsewhere."""
        return dialect.type_descriptor(Integer() if dialect.name == "sqlite" else Boolean())

    def process_bind_param(self, value: bool | None, _dialect: Dialect) -> bool | None:
        """Nothing but a truth value."""
        return None if value is None else bool(value)

    def process_result_value(self, value: Any, _dialect: Dialect) -> bool | None:
        """True or False."""
        return None if value is None else bool(value)
