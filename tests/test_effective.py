"""`kbsync config`: which settings are in force, where from, and no secret among them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kbsync.cli import app
from kbsync.config import Settings
from kbsync.effective import Setting, effective

CANARY = "canary-c0nf"


def shown(root: Path, key: str) -> Setting:
    return next(one for one in effective(root) if one.key == key)


def test_each_value_says_where_it_is_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Part of a section may be from the file, part from the environment, the rest from nowhere."""
    (tmp_path / "kbsync.yaml").write_text("model: here\ngrace: 5s\nretention:\n  days: 7\n")
    monkeypatch.setenv("KBSYNC_GRACE", "9s")
    monkeypatch.setenv("KBSYNC_RETENTION", json.dumps({"versions": 3}))
    monkeypatch.setenv("KBSYNC_ALLOWED_DIRS", "/srv/a:/srv/b")
    assert shown(tmp_path, "model") == Setting("model", "here", "kbsync.yaml:1")
    assert shown(tmp_path, "grace") == Setting("grace", 9.0, "KBSYNC_GRACE")
    assert shown(tmp_path, "retention.versions") == Setting("retention.versions", 3, "KBSYNC_RETENTION")
    assert shown(tmp_path, "retention.days") == Setting("retention.days", 7, "kbsync.yaml:4")
    assert shown(tmp_path, "allowed_dirs") == Setting("allowed_dirs", ["/srv/a", "/srv/b"], "KBSYNC_ALLOWED_DIRS")
    assert shown(tmp_path, "device") == Setting("device", "auto", "default")


def test_every_key_of_the_settings_is_shown(tmp_path: Path) -> None:
    (tmp_path / "kbsync.yaml").write_text("model: here\n")
    assert {one.key.partition(".")[0] for one in effective(tmp_path)} == set(Settings.model_fields)


@pytest.mark.parametrize(
    ("ledger", "said"),
    [
        ("file:/run/secrets/ledger", "file:/run/secrets/ledger"),
        ("${LEDGER}", "${LEDGER}"),
        ("postgresql://ada:${PW}@db/facts", "postgresql://ada:${PW}@db/facts"),
        (f"postgresql://ada:{CANARY}@db/facts", "***"),
        (f"postgresql://ada:{CANARY}${{PW}}@db/facts", "***"),
        (f"postgresql://ada:${{PW}}@db/facts?sslpassword={CANARY}", "***"),
        (f"{CANARY}${{PW}}", "***"),
    ],
)
def test_a_secret_is_shown_only_as_the_reference_that_it_is(tmp_path: Path, ledger: str, said: str) -> None:
    (tmp_path / "kbsync.yaml").write_text(f'model: here\nledger: "{ledger}"\n')
    assert shown(tmp_path, "ledger").value == said


def test_no_form_of_the_command_shows_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one in a command line that is no secret as a whole."""
    monkeypatch.setenv("KBSYNC_LEDGER", f"postgresql://ada:{CANARY}@db/facts")
    monkeypatch.setenv("KBSYNC_ON_PUBLISH", f"curl -H 'Authorization: Bearer {CANARY}' http://u:{CANARY}@localhost/")
    (tmp_path / "kbsync.yaml").write_text("model: here\n")
    for arguments in (["config"], ["config", "--json"]):
        done = CliRunner().invoke(app, [*arguments, "--workspace", str(tmp_path)])
        assert done.exit_code == 0
        assert "KBSYNC_ON_PUBLISH" in done.output
        assert CANARY not in done.output
