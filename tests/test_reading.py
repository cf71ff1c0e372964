"""The rule of `tests.reading`, which every test is under."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from kbsync.ledger import Ledger
from tests.reading import FileInBlock


@pytest.mark.parametrize("block", ["read", "write"])
@pytest.mark.parametrize("name", ["deltas/sha256/00.safetensors", "versions/tiny-0/000007.json"])
def test_a_file_of_the_store_that_is_opened_while_the_ledger_is_in_use_fails_the_test(
    tmp_path: Path, block: str, name: str
) -> None:
    file = tmp_path / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    with Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}") as ledger:
        with pytest.raises(FileInBlock), getattr(ledger, block)(), suppress(Exception):
            file.read_bytes()
        assert file.read_bytes() == b""
