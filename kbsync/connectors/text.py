"""What a label, an id or a date of a source may look like, before any of it can reach a prompt.

Values are data: they stay strings (`NO` is "NO"), are brought to one spelling (Unicode NFC, single spaces, no
characters that nobody sees: https://unicode.org/reports/tr36/), and are refused where they could not be what was meant.
"""

from __future__ import annotations

import re
import unicodedata

__all__ = ["MAX_LENGTH", "clean", "clean_date", "clean_label", "composed", "label_key", "printable", "same_label"]

MAX_LENGTH = 512
"""Characters of the longest value. A label is a name; anything longer is a broken row, or text meant for the model."""

# What most values are, and which needs nothing done: words of printable ASCII without braces.
_PLAIN = re.compile(r"[!-z|~]+(?: [!-z|~]+)*")
# What nobody sees: format characters (category Cf), fillers, selectors of variants, tags. They would make two equal
# names differ, and can carry a text of their own to the model. Not the signs of Cf that enclose a number.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff"
    "\uffa0\ufff0-\ufffb\U00013430-\U00013438\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# The joiners of Arabic, Indic and other scripts change how a letter looks; without one before them they do nothing.
_LOOSE_JOINER = re.compile("(?<![^\u0000-\u007f\u200c\u200d])[\u200c\u200d]+")
# C0 and C1 controls, and halves of surrogate pairs, which are no text at all (JSON can carry them).
_CONTROL = re.compile("[\u0000-\u001f\u007f-\u009f\ud800-\udfff]")
# ISO 8601 to the precision that the source knows, as XML Schema writes it (years before 1 have a minus sign).
# Month and day may be 00: so Wikidata writes what is not known (https://www.mediawiki.org/wiki/Wikibase/DataModel).
_MONTH, _DAY = "(0[0-9]|1[0-2])", "([0-2][0-9]|3[01])"
_TIME = "([01][0-9]|2[0-4]):[0-5][0-9](:[0-5][0-9]([.][0-9]+)?)?(Z|[+-][0-2][0-9]:[0-5][0-9])?"
_DATE = re.compile(f"-?[0-9]{{4,}}(-{_MONTH}(-{_DAY}(T{_TIME})?)?)?")


def clean(value: str, what: str) -> str:
    """`value` in its one spelling. Raises ValueError, naming `what`, where it is empty, too long or no plain text."""
    if len(value) <= MAX_LENGTH and _PLAIN.fullmatch(value):
        return value
    text = _INVISIBLE.sub("", value).strip()
    if found := _CONTROL.search(text):
        raise ValueError(f"{what} has the control character U+{ord(found[0]):04X}")
    text = _LOOSE_JOINER.sub("", " ".join(composed(text).split()))
    text = composed(" ".join(text.split()))
    if not text:
        raise ValueError(f"{what} is empty")
    if len(text) > MAX_LENGTH:
        raise ValueError(f"{what} has {len(text)} characters; at most {MAX_LENGTH} are read")
    return text


def composed(text: str) -> str:
    """`text` in Unicode NFC; as it is where it is far too long for a value, for that could take time without bound."""
    return unicodedata.normalize("NFC", text) if len(text) <= 4 * MAX_LENGTH else text


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
    text = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", _INVISIBLE.sub("", text[: limit + 1]))
    return text if len(text) <= limit else text[: limit - 1] + "…"
