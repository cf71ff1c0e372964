"""Fixtures of the fault suite: processes that suffer, and how often."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.faults.shim import Unavailable
from tests.faults.world import Nursery
from tests.standin import StandIn


@pytest.fixture(scope="session")
def _nursery() -> Iterator[Nursery | str]:
    with _open_folder() as folder:
        try:
            with Nursery.open(folder) as found:
                yield found
        except Unavailable as error:
            yield str(error)


@contextmanager
def _open_folder() -> Iterator[Path]:
    """pytest's own temporary folders can be entered by their owner alone."""
    with TemporaryDirectory(prefix="kbsync-faults-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter."""
    with _open_folder() as folder:
        yield folder


@pytest.fixture
def nursery(_nursery: Nursery | str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nursery]:
    """Where processes come from that suffer; this process edits with the editor that remembers, too."""
    if isinstance(_nursery, str):
        pytest.skip(_nursery)
    monkeypatch.setattr("kbsync.reconcile.run_edit", StandIn())
    yield _nursery
    _nursery.control.set(mode=0, hold=0, clock=0, statement=0)
    _nursery.clear()
