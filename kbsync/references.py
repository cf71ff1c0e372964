"""Secrets in the workspace's files: they stand there as `${NAME}` or `file:PATH` only, and are looked up when used.

What they stand for, and what is secret in the environment beside it, is this process's alone: `hidden` takes it out of
any text, as the log and the errors of the command line do last of all; `environment` leaves it out of what other
programs get.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import IO

__all__ = [
    "FILE",
    "environment",
    "filled",
    "hidden",
    "holds_password",
    "is_reference",
    "last_words",
    "names_secret",
    "noted",
    "open_to_others",
    "read_secret",
    "redacted",
    "secrets_of",
]

FILE = "file:"
"""What begins a value whose text is in a file."""

LARGEST_SECRET = 65_536
"""Bytes of a file that holds one."""
LONGEST_TAIL = 100_000
"""Bytes of a program's words that are searched for secrets before they are cut: half a secret would not be found."""
SHORTEST_HIDDEN = 8
"""Characters of a secret that is looked for in texts: a shorter one would be found in other words, too."""

_ORDINARY = frozenset({"HOME", "PATH", "PWD", "OLDPWD", "USER", "LOGNAME", "HOSTNAME", "SHELL", "TMPDIR", "LANG", "TZ"})
"""Variables that hold no secret, though a file of the workspace may refer to them."""
_declared: set[str] = set()
"""Variables that the files of the workspace refer to."""
_read: set[str] = set()
"""What was read from files that hold a secret."""
_SECRET_VARIABLE = re.compile(
    r"(?:.*_)?(?:\w*PASS|\w*PASSWD|\w*PASSWORD|PASSPHRASE|PWD|SECRETS?|TOKENS?|CREDENTIALS?|\w*KEY)(?:_.*)?",
    re.IGNORECASE,
)
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


def noted(text: str) -> None:
    """Remember which variables a file of the workspace refers to: what they hold is a secret from now on."""
    _declared.update(name for name in _REFERENCE.findall(text) if name not in _ORDINARY)


def read_secret(path: Path) -> str:
    """The text of a file that holds a secret, without the blanks around it.

    Raises ValueError where it is no regular file (a pipe would be waited for), too large or no UTF-8, OSError where it
    cannot be read.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("is no regular file")
        body = file.read(LARGEST_SECRET + 1)
    if len(body) > LARGEST_SECRET:
        raise ValueError(f"is larger than {LARGEST_SECRET:,} bytes")
    text = body.decode().strip()
    _read.add(text)
    return text


def hidden(text: str) -> str:
    """`text` without any secret that this process knows, of the workspace or of its environment: `***` in its place."""
    values = _read.union(value for name, value in os.environ.items() if _is_secret(name, value))
    for value in sorted((value for value in values if len(value) >= SHORTEST_HIDDEN), key=len, reverse=True):
        text = text.replace(value, "***")
    return text


def last_words(said: IO[bytes], length: int) -> str:
    """The last characters of what another program wrote to a file, without secrets."""
    size = said.seek(0, os.SEEK_END)
    said.seek(max(0, size - LONGEST_TAIL))
    return hidden(said.read().decode(errors="replace").strip())[-length:]


def environment(keep: Collection[str] = ()) -> dict[str, str]:
    """What another program gets of this process's environment: all but secrets, unless `keep` names them.

    A variable is one where a file of the workspace refers to it, where its name says so (PGPASSWORD, GITHUB_TOKEN,
    AWS_SECRET_ACCESS_KEY), and where its value is a URL with a password.
    """
    return {name: value for name, value in os.environ.items() if name in keep or not _is_secret(name, value)}


def _is_secret(name: str, value: str) -> bool:
    return name in _declared or (name not in _ORDINARY and _looks_secret(name, value))


@cache
def _looks_secret(name: str, value: str) -> bool:
    return _SECRET_VARIABLE.fullmatch(name) is not None or holds_password(value)


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
