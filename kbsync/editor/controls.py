"""Control prompts: what an edit must leave alone. Either subjects of the same relation that are never synced (the
strict test), or the shipped 100 prompts of common knowledge. Torch-free.

    shipped_controls(synced=["France"])                                   # without the prompts about France
    subject_controls(Path("never-synced.txt"), "{subject} belongs to the constellation of")
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from kbsync.errors import ConfigError

__all__ = ["NO_CONTROLS", "Controls", "shipped_controls", "subject_controls"]

SUBJECT = "{subject}"
_SHIPPED = "controls.txt"


@dataclass(frozen=True, slots=True)
class Controls:
    """Prompts whose greedy answers are compared with the base model's, and where they come from."""

    prompts: tuple[str, ...]
    description: str

    def __add__(self, other: Controls) -> Controls:
        """Both sets, each prompt once."""
        if not other.prompts or not self.prompts:
            return self if self.prompts else other
        prompts = dict.fromkeys(self.prompts + other.prompts)
        return Controls(tuple(prompts), f"{self.description} + {other.description}")


NO_CONTROLS = Controls((), "none")


def shipped_controls(synced: Collection[str] = ()) -> Controls:
    """The shipped common-knowledge prompts, without those whose subject has the label of a synced one in it."""
    labels = {_normal(label) for label in synced}
    text = (resources.files("kbsync.editor") / _SHIPPED).read_text(encoding="utf-8")
    shipped = [line.split(" | ", 1) for line in _lines(text)]
    kept = tuple(prompt for subject, prompt in shipped if labels.isdisjoint(_phrases(subject)))
    return Controls(kept, f"{len(kept)} of {len(shipped)} shipped common-knowledge prompts")


def subject_controls(path: Path, prompt: str, synced: Collection[str] = ()) -> Controls:
    """The relation's `prompt` template for each subject in a UTF-8 file (one label per line, `#` starts a comment),
    without the synced ones. Raises ConfigError for a file that cannot be read or holds no such subject."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"no list of control subjects: {error}", file=path, key="controls") from error
    labels = {_normal(label) for label in synced}
    subjects = dict.fromkeys(line for line in _lines(text) if _normal(line) not in labels)
    if not subjects:
        raise ConfigError("no subject that is never synced", file=path, key="controls", hint="write one label per line")
    prompts = tuple(prompt.replace(SUBJECT, subject) for subject in subjects)
    return Controls(prompts, f"{len(prompts)} never-synced subjects of {path.name}")


def _lines(text: str) -> Iterator[str]:
    """Lines that say something."""
    for line in text.splitlines():
        if (stripped := line.strip()) and not stripped.startswith("#"):
            yield stripped


def _normal(label: str) -> str:
    """How labels are compared: NFC, case folded, words apart by one space."""
    return " ".join(re.findall(r"[\w'-]+", unicodedata.normalize("NFC", label).casefold()))


def _phrases(text: str) -> set[str]:
    """All runs of words in a text, normalised."""
    words = _normal(text).split()
    return {" ".join(words[a:b]) for a in range(len(words)) for b in range(a + 1, len(words) + 1)}
