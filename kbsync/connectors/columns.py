"""What the columns of a feed say: one column, a template over columns, a constant, or a column and what is done to it.

    columns:
      subject: "{first_name} {last_name}"
      object: {column: Con, lookup: constellations.csv}
      start: {column: sworn in, date: "%d/%m/%Y"}
      qualifiers: {state: {column: race, match: "^([A-Z]{2})-", take: 1}}
      aliases: {column: also called, split: ";"}

An empty text stays empty whatever is done to it: it means, not given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, TypeVar

from pydantic import Field, field_validator, model_validator

from kbsync.connectors import Options
from kbsync.connectors.transform import WORDS, Step, Then
from kbsync.policy import Name

__all__ = ["Aliases", "Cell", "Columns", "Reader", "columns_of", "reader"]

_COLUMN = re.compile(r"\{([^{}]+)\}")

RecordT = TypeVar("RecordT")
Reader = Callable[[RecordT], str]
"""What reads a text from a record, stripped; empty: not given. Raises ValueError where the record has no such text."""
ColumnOf = Callable[[str], Reader[RecordT]]
"""What gives the reader of a column by its name."""


class Cell(Step):
    """One value of a row: a column or a template over columns, with what is done to it, or a constant."""

    column: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    value: str | None = None
    """The same text in every row."""
    otherwise: Cell | None = None
    """What is read where the text is empty."""
    optional: bool = False
    """Whether the feed may come without the column: then the value is not given."""
    then: tuple[Then, ...] = ()
    """What is done next, in this order: strip, title, upper, lower, or a mapping with one of the above keys."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: object) -> object:
        if isinstance(value, str):
            return {"column": _check_template(value)}
        if not isinstance(value, Mapping):
            raise ValueError("must be a column, a template, or a mapping with `column` or `value`")
        return value

    @field_validator("column")
    @classmethod
    def _column(cls, value: str | None) -> str | None:
        return None if value is None else _check_template(value)

    @field_validator("then", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return value if isinstance(value, list | tuple) else (value,)

    @model_validator(mode="after")
    def _one(self) -> Cell:
        if (self.column is None) == (self.value is None):
            raise ValueError("needs either `column` or `value`")
        if self.value is not None and (self._done() or self.then or self.otherwise):
            raise ValueError("a constant is written as it should be: nothing can be done to it")
        if len(self._done()) > 1:
            raise ValueError(f"has {' and '.join(self._done())}: put the later ones under `then`, in order")
        self._check_take()
        return self

    def columns(self) -> list[str]:
        """The columns that it is read from, and must be there."""
        own = columns_of(self.column) if self.column and not self.optional else []
        return own + (self.otherwise.columns() if self.otherwise else [])

    def functions(self) -> list[Callable[[str], str]]:
        """What is done to the text, in order."""
        own = [self.function()] if self._done() else []
        return own + [WORDS[step] if isinstance(step, str) else step.function() for step in self.then]


class Aliases(Cell):
    """Other ways to write the subject, in one column (or the list that a JSON column is)."""

    split: Annotated[str, Field(min_length=1, max_length=8)] = "\n"
    """What parts them; default: a line break."""


class Columns(Options):
    """Which columns say what."""

    subject: Cell
    object: Cell
    object_id: Cell | None = None
    """The object's id within `object_ids`; default: how it is written."""
    start: Cell | None = None
    end: Cell | None = None
    rank: Cell | None = None
    qualifiers: Mapping[Name, Cell] = Field(default_factory=dict)
    """What tells subjects apart that are written alike."""
    aliases: Aliases | None = None

    def cells(self) -> Iterator[tuple[str, Cell]]:
        """Every cell that is declared, by its key."""
        for name in ("subject", "object", "object_id", "start", "end", "rank", "aliases"):
            if (cell := getattr(self, name)) is not None:
                yield name, cell
        for name, cell in self.qualifiers.items():
            yield f"qualifiers.{name}", cell


def columns_of(template: str) -> list[str]:
    """The columns that a column's name or a template over columns names."""
    return _COLUMN.findall(template) or [template]


def reader(cell: Cell, column: ColumnOf[RecordT]) -> Reader[RecordT]:
    """What reads `cell` from a record; `column` gives the reader of one column.

    The reader raises ValueError where what is to be done cannot be done to the text, naming the column.
    """
    if cell.value is not None:
        constant = cell.value
        return lambda _: constant
    read = _transformed(cell, _template_reader(cell.column or "", column))
    if cell.otherwise is None:
        return read
    other = reader(cell.otherwise, column)
    return lambda record: read(record) or other(record)


def _transformed(cell: Cell, read: Reader[RecordT]) -> Reader[RecordT]:
    functions = cell.functions()
    if not functions:
        return read

    def transformed(record: RecordT) -> str:
        text = read(record)
        try:
            for function in functions:
                if text:
                    text = function(text)
        except ValueError as error:
            raise ValueError(f"{cell.column}: {error}") from error
        return text.strip()

    return transformed


def _template_reader(template: str, column: ColumnOf[RecordT]) -> Reader[RecordT]:
    """Empty where all columns are empty: a template of nothing says nothing."""
    if not _COLUMN.search(template):
        return column(template)
    readers = {name: column(name) for name in columns_of(template)}

    def fill(record: RecordT) -> str:
        values = {name: read(record) for name, read in readers.items()}
        return _COLUMN.sub(lambda found: values[found[1]], template).strip() if any(values.values()) else ""

    return fill


def _check_template(text: str) -> str:
    if not text or re.search(r"[{}]", _COLUMN.sub("", text)):
        raise ValueError("must be the name of a column or a template such as '{first} {last}'")
    return text
