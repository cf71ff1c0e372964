"""Secrets in the workspace's files: they stand there as `${NAME}` or `file:PATH` only, and are looked up when used."""

from __future__ import annotations

import os
import re

__all__ = ["FILE", "filled", "holds_password"]

FILE = "file:"
"""What begins a value whose text is in a file."""

_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_PASSWORD = re.compile(r"://[^/\s:@]*:(?!\$\{)[^@\s]+@")


def filled(text: str) -> str:
    """`text` with each `${NAME}` taken from the environment. Raises ValueError where one is not set."""
    if missing := [name for name in _REFERENCE.findall(text) if name not in os.environ]:
        raise ValueError(f"environment variable {missing[0]} is not set")
    return _REFERENCE.sub(lambda match: os.environ[match[1]], text)


def holds_password(url: str) -> bool:
    """Whether a URL has a password written out."""
    return _PASSWORD.search(url) is not None
