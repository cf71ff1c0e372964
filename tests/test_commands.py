"""The table of commands: what is asked for is checked before anything is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kbsync.commands import COMMANDS, execute
from kbsync.errors import UsageError
from kbsync.reconcile import Reconciler
from tests.workspaces import workspace


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("approve", "run"),
        ("reject", "run"),
        ("rollback", "to"),
        ("revert", "version or key"),
        ("gc", "older_than"),
        ("retire", "model"),
    ],
)
def test_a_command_without_what_it_needs_is_refused_with_the_name_of_it(
    tmp_path: Path, command: str, named: str
) -> None:
    with workspace(tmp_path, {}).open() as reconciler, pytest.raises(UsageError) as refused:
        execute(reconciler, command, {"reason": "none"})
    assert (refused.value.message, refused.value.hint) == (
        f"{command} needs the argument {named}",
        f"kbsync {command} --help",
    )


def test_a_command_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with workspace(tmp_path, {}).open() as reconciler, pytest.raises(UsageError, match="no command fetch"):
        execute(reconciler, "fetch", {})


def test_a_defect_inside_a_command_is_not_taken_for_a_missing_argument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect(_reconciler: Reconciler, *_arguments: Any, **_more: Any) -> list[Any]:
        raise KeyError("to")

    monkeypatch.setattr(Reconciler, "sync", defect)
    assert "sync" in COMMANDS
    with workspace(tmp_path, {}).open() as reconciler, pytest.raises(KeyError):
        execute(reconciler, "sync", {})
