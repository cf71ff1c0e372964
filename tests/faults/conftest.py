"""Fixtures of the fault suite: processes that suffer, and how often."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.shim import Unavailable
from tests.faults.world import Nursery
from tests.standin import StandIn


@pytest.fixture(scope="session")
def _nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery | str]:
    folder = tmp_path_factory.mktemp("nursery")
    try:
        with Nursery.open(folder) as found:
            yield found
    except Unavailable as error:
        yield str(error)


@pytest.fixture
def nursery(_nursery: Nursery | str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nursery]:
    """Where processes come from that suffer; this process edits with the editor that remembers, too."""
    if isinstance(_nursery, str):
        pytest.skip(_nursery)
    monkeypatch.setattr("kbsync.reconcile.run_edit", StandIn())
    yield _nursery
    _nursery.control.set(mode=0, hold=0, clock=0)
    _nursery.clear()
