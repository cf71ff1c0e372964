"""Secrets in the workspace's files: they stand there as `${NAME}` or `file:PATH` only, and are looked up when used."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

__all__ = [
    "FILE",
    "filled",
    "holds_password",
    "is_reference",
    "names_secret",
    "open_to_others",
    "redacted",
    "secrets_of",
]

FILE = "file:"
"""What begins a value whose text is in a file."""

_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_PASSWORD = re.compile(
    r"://[^/\s:@]*:(?!\$\{)[^@\s]+@"
    r"|://\S*[?&](?:[\w.-]*[-_.])?(?:(?:ssl)?password|passwd|pwd|token|secret|(?:api|access|auth)?key|sig|signature"
    r"|credential)=(?!\$\{)[^&#\s]",
    re.IGNORECASE,
)
_SECRET_NAME = re.compile(r"(?:.*[-_])?(?:authorization|cookie|token|secret|password|api[-_]?key)", re.IGNORECASE)


def filled(text: str) -> str:
    """`text` with each `${NAME}` taken from the environment. Raises ValueError where one is not set."""
    if missing := [name for name in _REFERENCE.findall(text) if name not in os.environ]:
        raise ValueError(f"environment variable {missing[0]} is not set")
    return _REFERENCE.sub(lambda match: os.environ[match[1]], text)


def holds_password(url: str) -> bool:
    """Whether a URL has a password, a token or a key written out, before its host or behind its question mark."""
    return _PASSWORD.search(url) is not None


def names_secret(key: str) -> bool:
    """Whether a setting or a header of this name has a secret as its value."""
    return _SECRET_NAME.fullmatch(key) is not None


def is_reference(text: str) -> bool:
    """Whether a text refers to a secret that stands elsewhere."""
    return text.startswith(FILE) or _REFERENCE.search(text) is not None


def secrets_of(text: str) -> set[str]:
    """What the `${NAME}` of a text stand for, as far as that is known."""
    return {value for name in _REFERENCE.findall(text) if (value := os.environ.get(name))}


def redacted(url: str) -> str:
    """A URL as it may be shown and kept: without its query string, which often has a key in it."""
    return re.sub(r"(://[^?#]*)\?[^#]+", r"\1?…", url)


def open_to_others(path: Path, declared: object) -> str | None:
    """What is unwise about a file that declares a secret written out, where other users of the machine can read it."""
    if not _holds_any(declared) or not path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        return None
    return "holds a secret, and others can read the file: chmod 600, or write ${NAME} or file:PATH instead"


def _holds_any(declared: object) -> bool:
    if isinstance(declared, Mapping):
        named = (value for key, value in declared.items() if names_secret(str(key)) and isinstance(value, str))
        return not all(map(is_reference, named)) or any(map(_holds_any, declared.values()))
    if isinstance(declared, list):
        return any(map(_holds_any, declared))
    return isinstance(declared, str) and holds_password(declared)
