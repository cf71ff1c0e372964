"""What may be done to a text of a feed: small steps that the source file declares, never code.

    {match: "^([A-Z]{2})-(\\d+)$", take: "{1} {2}"}   {lookup: constellations.csv}   {date: "%d/%m/%Y"}
    {replace: {"Sen.": Senator}}                      strip, title, upper, lower

Each takes time linear in the text: patterns are RE2's (https://github.com/google/re2/wiki/Syntax), which has no
backtracking. A time limit instead would make it depend on the machine which rows are good.
"""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

import re2
from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from kbsync.connectors import Options, Place
from kbsync.connectors.text import printable

__all__ = ["WORDS", "Step", "Then"]

PATTERN_MEMORY = 1 << 20
"""Bytes that a compiled pattern may take; RE2 refuses `(((a{1000}){1000}){1000})` by it."""
COMPARISONS = 100_000
"""So many known values may be compared with unknown ones to find the nearest, all in all some seconds."""

_ENDING = re.compile(r"(?<=\w)['’](?:S|T|Re|Ll|Ve|D|M)\b")
_GROUP = re.compile(r"\{(\d+)\}")
_DIRECTIVE = re.compile(r"%(.?)")
_DAY, _MONTH, _YEAR = set("dj"), set("mbB"), set("Yy")
WORDS: Mapping[str, Callable[[str], str]] = {
    "strip": str.strip,
    "title": lambda text: _ENDING.sub(lambda found: found[0].lower(), text.title()),
    "upper": str.upper,
    "lower": str.lower,
}
"""Steps that need no more than a word."""


def _read_table(value: object, info: ValidationInfo) -> object:
    """The table that a lookup's file holds: two columns below a header."""
    if not isinstance(value, str):
        return value
    reader = csv.reader(io.StringIO(Place.of(info).text(value), newline=""), strict=True)
    table: dict[str, str] = {}
    try:
        rows = [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
    except csv.Error as error:
        raise ValueError(f"{value}: line {reader.line_num}: {error}") from error
    for line, row in rows:
        if len(row) != 2:
            raise ValueError(f"{value}: line {line} has {len(row)} columns, not 2")
    for line, (known, meaning) in rows[1:]:
        if table.setdefault(known.strip(), meaning.strip()) != meaning.strip():
            raise ValueError(f"{value}: line {line} says something else of {known} than a line before")
    return table


class Step(Options):
    """One thing that is done to a text: exactly one of `match`, `lookup`, `replace`, `date`."""

    match: Annotated[str, Field(min_length=1, max_length=1000)] | None = None
    """An RE2 pattern that is searched for; what does not match sends the row to quarantine."""
    take: int | str | None = None
    """What a match comes to: a group's number, or a template over them, "{1}-{2}"; default: the first group."""
    lookup: Annotated[Mapping[str, str], BeforeValidator(_read_table), Field(min_length=1)] | None = None
    """What a text means: a mapping, or a CSV file beside the source of two columns below a header."""
    replace: Mapping[Annotated[str, Field(min_length=1)], str] | None = None
    """Texts that become others, in this order."""
    date: str | None = None
    """How the source writes a date (`%d/%m/%Y`); it becomes ISO 8601, to the day, the month or the year."""

    @field_validator("match")
    @classmethod
    def _match(cls, value: str | None) -> str | None:
        if value is not None:
            _compiled(value)
        return value

    @field_validator("date")
    @classmethod
    def _date(cls, value: str | None) -> str | None:
        if value is not None:
            _precision(value)
        return value

    @model_validator(mode="after")
    def _one(self) -> Step:
        if len(self._done()) != 1:
            raise ValueError("needs exactly one of match, lookup, replace, date")
        self._check_take()
        return self

    def _done(self) -> list[str]:
        return [name for name in ("match", "lookup", "replace", "date") if getattr(self, name) is not None]

    def _check_take(self) -> None:
        if self.take is None:
            return
        if self.match is None:
            raise ValueError("`take` says what of a `match` is taken, and there is none")
        groups = _compiled(self.match).groups
        named = [self.take] if isinstance(self.take, int) else [int(one) for one in _GROUP.findall(self.take)]
        if isinstance(self.take, str) and re.search(r"[{}]", _GROUP.sub("", self.take)):
            raise ValueError("`take` must be a group's number or a template such as '{1}-{2}'")
        if wrong := [one for one in named if not 0 <= one <= groups]:
            raise ValueError(f"`take` names group {wrong[0]}; the pattern has {groups}")

    def function(self) -> Callable[[str], str]:
        """What does it; raises ValueError for a text that it cannot be done to."""
        if self.match is not None:
            return _matcher(self.match, self.take)
        if self.lookup is not None:
            return _Lookup(self.lookup)
        if self.date is not None:
            return _dater(self.date)
        replacements = dict(self.replace or {})

        def replaced(text: str) -> str:
            for old, new in replacements.items():
                text = text.replace(old, new)
            return text

        return replaced


Then = Annotated[
    Annotated[Literal["strip", "title", "upper", "lower"], Tag("word")] | Annotated[Step, Tag("step")],
    Discriminator(lambda value: "word" if isinstance(value, str) else "step"),
]
"""A step as a list of them has it."""


def _compiled(pattern: str) -> Any:
    options = re2.Options()
    options.log_errors = False
    options.max_mem = PATTERN_MEMORY
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        detail = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
        raise ValueError(f"is no pattern of RE2: {detail}") from error


def _matcher(pattern: str, take: int | str | None) -> Callable[[str], str]:
    compiled = _compiled(pattern)
    group = take if isinstance(take, int) else min(1, compiled.groups)

    def matched(text: str) -> str:
        found = compiled.search(text)
        if found is None:
            raise ValueError(f"{printable(text, 60)!r} does not match {pattern}")
        if isinstance(take, str):
            return _GROUP.sub(lambda place: found.group(int(place[1])) or "", take)
        return str(found.group(group) or "")

    return matched


class _Lookup:
    """A table, and for what is not in it the nearest that is, in whatever case."""

    def __init__(self, table: Mapping[str, str]) -> None:
        self._table = table
        self._known = {name.casefold(): name for name in table}
        self._nearest: dict[str, str] = {}
        self._left = COMPARISONS

    def __call__(self, text: str) -> str:
        meaning = self._table.get(text)
        if meaning is None:
            near = self._near(text)
            raise ValueError(f"{printable(text, 60)!r} is not in its lookup table{near and f'; near: {near}'}")
        return meaning

    def _near(self, text: str) -> str:
        if text not in self._nearest and self._left >= len(self._known):
            self._left -= len(self._known)
            close = difflib.get_close_matches(text[:100].casefold(), self._known, n=1, cutoff=0.5)
            self._nearest[text] = printable(self._known[close[0]], 60) if close else ""
        return self._nearest.get(text, "")


def _precision(form: str) -> str:
    """How ISO 8601 writes what a date format gives. Raises ValueError where it gives no date."""
    found = _DIRECTIVE.findall(form)
    if wrong := [f"%{one}" for one in found if one not in _DAY | _MONTH | _YEAR | {"%"}]:
        raise ValueError(f"has {wrong[0]}; a date is made of %d %m %Y, %y, %b, %B or %j")
    given = set(found)
    if not given & _YEAR or (given & {"d"} and not given & _MONTH):
        raise ValueError("gives no date: write for instance %d/%m/%Y")
    return "%Y-%m-%d" if given & _DAY else "%Y-%m" if given & _MONTH else "%Y"


def _dater(form: str) -> Callable[[str], str]:
    precision = _precision(form)
    length = {"%Y-%m-%d": 10, "%Y-%m": 7, "%Y": 4}[precision]

    def dated(text: str) -> str:
        try:
            return datetime.strptime(text, form).date().isoformat()[:length]  # noqa: DTZ007 (a date has no zone)
        except ValueError as error:
            raise ValueError(f"{printable(text, 60)!r} is no date as {form} writes it") from error

    return dated
