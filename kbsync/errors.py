"""The exception tree. Each error is one line that names the file, line, key or fact, and a hint: what to do next.

KbsyncError                     exit 1
├── UsageError                  exit 2   the command cannot be meant this way
│   ├── ConfigError             exit 2   kbsync.yaml, a source or a policy is wrong (file, line, key, value)
│   └── ModelError              exit 2   the model cannot be edited or is not there
├── SourceError                 a source could not be read; the ledger is as it was
│   ├── SourceUnavailable       may work later (timeout, 5xx, 429); retry_after in seconds
│   ├── SourceBlocked           the source refuses us (403); not asked again before a cooldown has passed
│   └── SourceInvalid           the answer is not what was declared (cut, wrong type, wrong header)
├── LedgerError                 the ledger cannot be opened or is damaged
├── StoreError                  a delta, manifest or HEAD is missing or damaged
│   └── BaseMismatch            the base model is not the one that the versions were made on
├── EditError                   the engine refuses: subject not found, solve not accurate, not finite
│   └── Inseparable             a fact cannot leave the weights alone, only by inserting all others anew
├── Busy                        another process holds the workspace
├── Cancelled                   stopped on request; put back for the next pass
├── Moved                       a reviewed plan is no longer what would be done
├── Held                        exit 3   waits for `kbsync approve` or `kbsync reject`
└── GateRejected                exit 4   edited, probed, and not good enough to publish
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from traceback import extract_tb

__all__ = [
    "BaseMismatch",
    "Busy",
    "Cancelled",
    "ConfigError",
    "EditError",
    "GateRejected",
    "Held",
    "Inseparable",
    "KbsyncError",
    "LedgerError",
    "ModelError",
    "Moved",
    "SourceBlocked",
    "SourceError",
    "SourceInvalid",
    "SourceUnavailable",
    "StoreError",
    "UsageError",
    "place_of",
]


def place_of(error: BaseException) -> str:
    """A foreign exception's type and place, `KeyError at feed.py:12`: its text may have a secret in it."""
    frames = extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"


class KbsyncError(Exception):
    """What a user is told in one line, with the next command as the hint."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def to_json(self) -> dict[str, object]:
        """What another process needs to raise the same error: `from_json` reads it back."""
        return {
            "type": type(self).__name__,
            "message": self.message,
            "hint": self.hint,
            "exit_code": self.exit_code,
        }

    @staticmethod
    def from_json(value: Mapping[str, object]) -> KbsyncError:
        """The error that another process described: its message, hint and exit code, and its class."""
        named = globals().get(str(value.get("type")))
        kind = named if isinstance(named, type) and issubclass(named, KbsyncError) else KbsyncError
        error: KbsyncError = Exception.__new__(kind)  # not kind(...): subclasses take their data, not a message
        KbsyncError.__init__(error, str(value.get("message", "failed")), hint=str(value.get("hint", "")))
        error.exit_code = int(str(value.get("exit_code", 1)))
        return error


class UsageError(KbsyncError):
    """The command cannot be meant this way."""

    exit_code = 2


class ConfigError(UsageError):
    """A file of the workspace is wrong. `line` counts from 1; 0 where the file has no such line."""

    def __init__(self, problem: str, *, file: Path | str, line: int = 0, key: str = "", hint: str = "") -> None:
        place = f"{file}:{line}" if line else str(file)
        message = f"{place}: {key}: {problem}" if key else f"{place}: {problem}"
        super().__init__(message, hint=hint or "correct it, then: kbsync check")
        self.file = Path(file)
        self.line = line
        self.key = key


class ModelError(UsageError):
    """The model is absent, of an unknown family, quantised, or has no preset."""


class SourceError(KbsyncError):
    """A source could not be read. The ledger is unchanged. `resting`: the host that wants to be left alone, where it
    said so; other sources of that host are not asked meanwhile either."""

    resting: str | None = None
    outcome: str = "failed"
    """What kind of answer it was, in a word: an HTTP status, or what came instead of one. Counted in the ledger."""

    def __init__(self, source: str, problem: str, *, hint: str = "") -> None:
        super().__init__(f"source {source}: {problem}", hint=hint)
        self.source = source


class SourceUnavailable(SourceError):
    """The source may answer later; `retry_after` is its own wish in seconds, or None. `exhausted`: it was asked often
    enough."""

    exhausted: bool = False
    outcome = "unavailable"

    def __init__(self, source: str, problem: str, *, retry_after: float | None = None, hint: str = "") -> None:
        super().__init__(source, problem, hint=hint)
        self.retry_after = retry_after


class SourceBlocked(SourceError):
    """The source refuses this client. Asking again at once would make it worse."""

    outcome = "blocked"


class SourceInvalid(SourceError):
    """The answer is not what the source file declares, or not whole."""

    outcome = "invalid"


class LedgerError(KbsyncError):
    """The ledger cannot be opened, is damaged, or is newer than this kbsync."""


class StoreError(KbsyncError):
    """A delta, a manifest or HEAD is missing, damaged or inconsistent."""


class BaseMismatch(StoreError):
    """The base model's fingerprint is not the one recorded with the versions."""


class EditError(KbsyncError):
    """The engine refuses an edit rather than damage the model."""


class Inseparable(EditError):
    """A fact's share cannot be told from that of the others: only inserting all others anew takes it out."""


class Busy(KbsyncError):
    """Another process holds the workspace's lock."""


class Cancelled(KbsyncError):
    """Stopped on request (a rollback, SIGTERM); the next pass plans the work again."""


class Moved(KbsyncError):
    """The world is not the one that a plan was reviewed in: nothing was done, and the plan is to be made anew."""


class Held(KbsyncError):
    """A guard stopped the run; a person decides."""

    exit_code = 3


class GateRejected(KbsyncError):
    """The edit was made and probed, and is not good enough to publish."""

    exit_code = 4
