"""Secrets stand in files as references; what they stand for is hidden, and kept from other programs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kbsync.references import LARGEST_SECRET, environment, hidden, noted, read_secret


def test_a_secret_file_is_read_without_the_blanks_around(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("  canary-55aa\n")
    assert read_secret(tmp_path / "token") == "canary-55aa"


def test_what_is_no_secret_file_is_refused(tmp_path: Path) -> None:
    """A pipe is not waited for, and a device is not read for ever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"x" * (LARGEST_SECRET + 1))
    (tmp_path / "latin").write_bytes(b"\xe9")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path / "large", tmp_path / "latin"):
        with pytest.raises(ValueError, match=r"regular|larger|utf-8"):
            read_secret(path)


def test_what_references_stand_for_is_hidden_in_any_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEED_ACCESS", "canary-91")
    (tmp_path / "token").write_text("canary-91-longer")
    noted("location: https://example.org/${FEED_ACCESS}")
    read_secret(tmp_path / "token")
    assert hidden("canary-91-longer, canary-91 and canary") == "***, *** and canary"


@pytest.mark.parametrize(("name", "value"), [("REGION", "eu"), ("HOME", "/home/ada/long"), ("UNSET_HERE", None)])
def test_short_values_and_ordinary_variables_stay(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str | None
) -> None:
    if value is not None:
        monkeypatch.setenv(name, value)
    noted(f"location: ${{{name}}}/feed.csv")
    assert hidden("eu at /home/ada/long") == "eu at /home/ada/long"


@pytest.mark.parametrize(
    "name",
    ["PGPASSWORD", "GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "SMTP_PASS", "MYSQL_PWD", "API_KEY", "smtp_password"],
)
def test_what_is_called_a_secret_is_kept_from_other_programs(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "x")
    assert name not in environment()
    assert environment([name])[name] == "x"


@pytest.mark.parametrize(
    "name", ["PATH", "HOME", "PWD", "TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES", "KBSYNC_CACHE", "SSH_AUTH_SOCK"]
)
def test_other_variables_are_passed_on(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "/x")
    assert environment()[name] == "/x"
