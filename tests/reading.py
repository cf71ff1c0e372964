"""A rule for all tests: while the ledger is being read or written, this thread opens no file of the version store.

A reader keeps writers from committing, and these files may be gigabytes that are read and hashed: what a block needs of
the ledger comes first, then the files.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from kbsync.ledger import Ledger

__all__ = ["FileInBlock", "enforce"]

_FILES = re.compile(r"\.safetensors$|/versions/[^/]+/\d{6,}\.json$")


class FileInBlock(BaseException):
    """A file of the version store was opened inside a block of `Ledger.read` or `Ledger.write`. No Exception: code that
    makes the best of a file that it cannot read must not make the best of this."""


class _Blocks(threading.local):
    open = 0


_blocks = _Blocks()


def enforce() -> None:
    """From now on, for good. An audit hook sees every file that Python opens (docs.python.org, "Audit events")."""
    for name in ("read", "write"):
        setattr(Ledger, name, _counted(getattr(Ledger, name)))
    sys.addaudithook(_refuse)


def _counted(block: Callable[..., AbstractContextManager[Any]]) -> Callable[..., AbstractContextManager[Any]]:
    @contextmanager
    def counted(ledger: Ledger) -> Iterator[Any]:
        with block(ledger) as db:
            _blocks.open += 1
            try:
                yield db
            finally:
                _blocks.open -= 1

    return counted


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _blocks.open and isinstance(arguments[0], (str, os.PathLike)):
        path = os.fspath(arguments[0])
        if _FILES.search(path):
            raise FileInBlock(f"{path} was opened while the ledger was being read or written")
