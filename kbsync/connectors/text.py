"""What a label, an id or a date of a source may look like, before any of it can reach a prompt.

Values are data: they stay strings (`NO` is "NO"), are brought to one spelling (Unicode NFC, single spaces, no
invisible direction marks: https://unicode.org/reports/tr9/), and are refused where they could not be what was meant.
"""

from __future__ import annotations

import re
import unicodedata

__all__ = ["MAX_LENGTH", "clean", "clean_date", "clean_label", "label_key", "printable", "same_label"]

MAX_LENGTH = 512
"""Characters of the longest value. A label is a name; anything longer is a broken row, or text meant for the model."""

# What most values are, and which needs nothing done: words of printable ASCII without braces.
_PLAIN = re.compile(r"[!-z|~]+(?: [!-z|~]+)*")
# Marks that change the order of display only: they would make two equal names differ.
_DIRECTION = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# C0 and C1 controls, and halves of surrogate pairs, which are no text at all (JSON can carry them).
_CONTROL = re.compile("[\u0000-\u001f\u007f-\u009f\ud800-\udfff]")
# ISO 8601 to the precision that the source knows, as XML Schema writes it (years before 1 have a minus sign).
_DATE = re.compile(r"-?\d{4,}(-\d\d(-\d\d(T\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:\d\d)?)?)?)?")


def clean(value: str, what: str) -> str:
    """`value` in its one spelling. Raises ValueError, naming `what`, where it is empty, too long or no plain text."""
    if len(value) <= MAX_LENGTH and _PLAIN.fullmatch(value):
        return value
    text = _DIRECTION.sub("", value).strip()
    if found := _CONTROL.search(text):
        raise ValueError(f"{what} has the control character U+{ord(found[0]):04X}")
    text = " ".join(unicodedata.normalize("NFC", text).split())
    if not text:
        raise ValueError(f"{what} is empty")
    if len(text) > MAX_LENGTH:
        raise ValueError(f"{what} has {len(text)} characters; at most {MAX_LENGTH} are read")
    return text


def clean_label(value: str, what: str) -> str:
    """A label as `clean` gives it. Raises ValueError also for braces: in a feed they are templates left unfilled."""
    if len(value) <= MAX_LENGTH and _PLAIN.fullmatch(value):
        return value
    text = clean(value, what)
    if "{" in text or "}" in text:
        raise ValueError(f"{what} has braces, like a template that was never filled: {printable(text, 60)}")
    return text


def clean_date(value: str, what: str) -> str:
    """An ISO 8601 date or time as the source wrote it. Raises ValueError where it is none."""
    text = clean(value, what)
    if not _DATE.fullmatch(text):
        raise ValueError(f"{what} is no ISO 8601 date: {printable(text, 60)}")
    return text


def label_key(label: str) -> str:
    """How a label is compared where labels are the identity (`match: label`): NFC, without case."""
    return unicodedata.normalize("NFC", label.casefold())


def same_label(one: str, other: str) -> bool:
    """Whether two labels have one `label_key`."""
    if len(one) != len(other) and one.isascii() and other.isascii():
        return False
    return label_key(one) == label_key(other)


def printable(value: object, limit: int = MAX_LENGTH) -> str:
    """`value` on one line that is safe on a terminal and in a log: controls escaped, cut at `limit` characters."""
    text = str(value)
    text = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", _DIRECTION.sub("", text[: limit + 1]))
    return text if len(text) <= limit else text[: limit - 1] + "…"
