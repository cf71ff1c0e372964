"""What the tables are made of: column types that mean the same in SQLite and PostgreSQL, and short words for SQLModel's
declarations."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import Boolean, CheckConstraint, DateTime, Dialect, Float, Index, Integer, MetaData, Text, column
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import declared_attr
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator, TypeEngine
from sqlmodel import Field, SQLModel

__all__ = [
    "Days",
    "Flag",
    "Json",
    "LedgerTable",
    "UtcTime",
    "canonical",
    "ended_index",
    "flag",
    "json_value",
    "key",
    "live_index",
    "one_of",
    "refers",
    "text",
    "time",
]

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


class Days(FunctionElement[float]):
    """Days from one point in time to a later one, to the millisecond."""

    type = Float()
    inherit_cache = True


@compiles(Days, "sqlite")
def _days_in_sqlite(element: Days, compiler: Any, **kwargs: Any) -> str:
    earlier, later = (compiler.process(clause, **kwargs) for clause in element.clauses)
    return f"round(julianday({later}) - julianday({earlier}), 8)"


@compiles(Days, "postgresql")
def _days_in_postgresql(element: Days, compiler: Any, **kwargs: Any) -> str:
    earlier, later = (compiler.process(clause, **kwargs) for clause in element.clauses)
    return f"(extract(epoch FROM {later} - {earlier}) / 86400)"


def canonical(value: object) -> str:
    """The one text of a JSON value: sorted keys, no spaces. Raises ValueError for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


class Json(TypeDecorator[Any]):
    """A JSON value as canonical text: sorted keys, no spaces. Raises ValueError for NaN and infinities, which are no
    JSON."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, _dialect: Dialect) -> str | None:
        """The canonical text."""
        return None if value is None else canonical(value)

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


NAMING = {
    "pk": "pk_%(table_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
}
"""Every constraint has a name, so that later migrations can alter it."""


class LedgerTable(SQLModel):
    """A table named as its class is (`StagedSnapshot`: `staged_snapshot`), STRICT in SQLite."""

    metadata = MetaData(naming_convention=NAMING)
    __table_args__: ClassVar[Any] = {"sqlite_strict": True}

    @declared_attr  # type: ignore[arg-type]  # SQLModel declares a method where SQLAlchemy means a class attribute
    def __tablename__(cls) -> str:  # noqa: N805  # a class attribute, see above
        """The class's name in snake case."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()


def key() -> Any:
    """An id that the database counts up."""
    return Field(default=None, primary_key=True)


def text(**options: Any) -> Any:
    """Text."""
    return Field(sa_type=Text, **options)


def time() -> Any:
    """A UTC time."""
    return Field(sa_type=UtcTime)


def json_value() -> Any:
    """A JSON value."""
    return Field(sa_type=Json)


def flag() -> Any:
    """Yes or no."""
    return Field(sa_type=Flag)


def refers(target: str) -> Any:
    """The id of a row of another table."""
    return Field(foreign_key=f"{target}.id")


def one_of(name: str, *values: str) -> CheckConstraint:
    """CHECK: nothing but these values."""
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{name} IN ({listed})", name=name)


def live_index(name: str, end: str, *columns: str, unique: bool = True) -> Index:
    """An index over the rows that have not ended; UNIQUE: at most one of them."""
    where = column(end).is_(None)
    return Index(name, *columns, unique=unique, sqlite_where=where, postgresql_where=where)


def ended_index(name: str, end: str) -> Index:
    """An index over the rows that have ended, by when."""
    where = column(end).is_not(None)
    return Index(name, end, sqlite_where=where, postgresql_where=where)
