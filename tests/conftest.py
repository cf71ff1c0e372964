"""Fixtures that every test may use: the device, optional real data, a clean environment."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import ledgers, postgres, reading

if TYPE_CHECKING:
    from kbsync.editor.model import Base

# A rich console that is made while COLUMNS is set keeps that width for ever. The one of `kbsync.cli` is made here,
# without it, so that a test's own COLUMNS counts, whatever the shell says and whichever test comes first.
for _name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
    os.environ.pop(_name, None)
importlib.import_module("kbsync.cli.common")
reading.enforce()

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def shared_data(name: str) -> Path:
    """A file or folder of the optional development data; skips the test where it is absent."""
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"development data {name} is not beside the checkout; ends when ../shared/data has it")
    return path


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the developer's own shell never reach a test."""
    for name in [name for name in os.environ if name.startswith("KBSYNC_") and name != "KBSYNC_CACHE"]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def _postgresql() -> Iterator[postgres.Server | str]:
    """One server for all tests of this process; why there is none, where there is none."""
    with ExitStack() as stack:
        try:
            found: postgres.Server | str = stack.enter_context(postgres.server())
        except postgres.Unavailable as error:
            found = str(error)
        yield found


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each database that a ledger may live in: `tests.ledgers` makes them there."""
    if request.param == "sqlite":
        yield "sqlite"
        return
    server = request.getfixturevalue("_postgresql")
    if isinstance(server, str):
        pytest.skip(server)
    with ledgers.served_by(server):
        yield "postgresql"


@pytest.fixture(scope="module")
def one_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The statistics of the tiny model are collected once for all tests of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KBSYNC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each device that the engine must run on; tiny models are made there."""
    import torch

    monkeypatch.setattr("tests.tiny.DEVICE", request.param)
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine; ends on a machine that has one")
    return str(request.param)


@pytest.fixture(scope="session")
def smollm2() -> Base:
    """The embedded model, loaded once per session; skips where it was not pulled (`make test` pulls it)."""
    from kbsync.editor.model import load_base
    from kbsync.errors import ModelError
    from kbsync.hub import fingerprint, resolve_model

    try:
        folder = resolve_model("smollm2-135m")
    except ModelError as error:
        pytest.skip(f"{error.message}; ends with: {error.hint}")
    return load_base(folder.path, fingerprint=fingerprint(folder.path))
