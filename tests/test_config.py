"""The workspace: its settings, its paths, and the one that `init` makes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbsync import config
from kbsync.config import EditWindow, Settings, Workspace
from kbsync.documents import read_document
from kbsync.errors import ConfigError, UsageError

CANARY = "canary-7f3a"


def workspace(root: Path, text: str) -> Workspace:
    (root / "kbsync.yaml").write_text(text, encoding="utf-8")
    return Workspace.load(root)


def test_only_the_model_must_be_said(tmp_path: Path) -> None:
    """Everything else has a default."""
    settings = workspace(tmp_path, "model: smollm2-135m\n").settings
    assert settings.model == "smollm2-135m"
    assert (settings.device, settings.dtype, settings.grace) == ("auto", "auto", 30.0)


def test_paths_lie_under_the_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absolute, wherever the command was started."""
    monkeypatch.chdir(tmp_path)
    found = workspace(Path(), "model: m\ndata: state\nallowed_dirs: [feeds, /srv/feeds]\n")
    state = tmp_path / "state"
    assert found.root == tmp_path
    assert found.deltas == state / "deltas" / "sha256"
    assert found.versions == state / "versions"
    assert found.targets == state / "targets"
    assert (found.lock, found.socket) == (state / "lock", state / "control.sock")
    assert found.ledger_url == f"sqlite:///{state}/ledger.db"
    assert found.allowed_dirs == (tmp_path, tmp_path / "feeds", Path("/srv/feeds"))
    assert (found.sources, found.policies) == (tmp_path / "sources", tmp_path / "policies")


def test_a_folder_without_kbsync_yaml_is_no_workspace(tmp_path: Path) -> None:
    """The hint is the command that makes one."""
    with pytest.raises(ConfigError, match="is no workspace") as caught:
        Workspace.load(tmp_path)
    assert caught.value.hint.startswith("kbsync init")


@pytest.mark.parametrize(
    ("text", "line", "key", "problem"),
    [
        ("device: cpu\n", 0, "model", "is missing"),
        ("model: ''\n", 1, "model", "at least 1 character"),
        ("model: m\ndevice: tpu\n", 2, "device", "must be auto, balanced, cpu, cuda or cuda:N"),
        ("model: m\ndevise: cpu\n", 2, "devise", "not a known key"),
        ("model: m\n_env_file: other\n", 2, "_env_file", "not a known key"),
        ("model: m\ndtype: int8\n", 2, "dtype", "'float32'"),
        ("model: m\ngrace: 0s\n", 2, "grace", "greater than 0"),
        ("model: m\ngrace: soon\n", 2, "grace", "(got 'soon')"),
        ("model: m\nmax_gpu_memory: lots\n", 2, "max_gpu_memory", "(got 'lots')"),
        ("model: m\nedit_window: night\n", 2, "edit_window", "must look like"),
        ("model: m\nedit_window: 22:00-06:00 Mars/Base\n", 2, "edit_window", "no time zone Mars/Base"),
        ("model: m\nedit_window: 22:00-22:00\n", 2, "edit_window", "same minute"),
        ("model: m\nedit_window: 22:00-26:00\n", 2, "edit_window", "hour"),
        ("model: m\nstatistics:\n  corpus: wiki\n", 3, "statistics.corpus", "must be self, file:PATH or hf:DATASET"),
        ("model: m\nstatistics: {tokens: 5}\n", 2, "statistics.tokens", "not a known key"),
    ],
)
def test_a_wrong_setting_is_named_with_its_line(tmp_path: Path, text: str, line: int, key: str, problem: str) -> None:
    """File, line, key, value."""
    with pytest.raises(ConfigError) as caught:
        workspace(tmp_path, text)
    assert (caught.value.line, caught.value.key) == (line, key)
    assert problem in caught.value.message


def test_sizes_and_windows_are_read(tmp_path: Path) -> None:
    """20GiB is 20 · 2**30 bytes; a window without a zone is in UTC."""
    found = workspace(tmp_path, "model: m\nmax_gpu_memory: 20GiB\nedit_window: 1:30-6:00\ngrace: 2m\n")
    assert found.settings.max_gpu_memory == 20 * 2**30
    assert found.settings.grace == 120
    assert found.edit_window == EditWindow.parse("01:30 - 06:00 UTC")


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KBSYNC_<KEY>; a list is parted as PATH is."""
    monkeypatch.setenv("KBSYNC_DEVICE", "cuda:1")
    monkeypatch.setenv("KBSYNC_ALLOWED_DIRS", "/a:/b")
    monkeypatch.setenv("KBSYNC_UNKNOWN", "ignored")
    settings = workspace(tmp_path, "model: m\ndevice: cpu\nallowed_dirs: [/c]\n").settings
    assert settings.device == "cuda:1"
    assert settings.allowed_dirs == (Path("/a"), Path("/b"))


def test_a_wrong_environment_variable_is_named_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is not to blame."""
    monkeypatch.setenv("KBSYNC_DEVICE", "tpu")
    with pytest.raises(ConfigError, match=r"^environment: KBSYNC_DEVICE: must be auto.* \(got 'tpu'\)$"):
        workspace(tmp_path, "model: m\ndevice: cpu\n")


def test_secrets_are_filled_in_only_where_the_ledger_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the settings, their text or an error."""
    monkeypatch.setenv("LEDGER_PASSWORD", CANARY)
    found = workspace(tmp_path, "model: m\nledger: postgresql://me:${LEDGER_PASSWORD}@host/db\n")
    assert CANARY not in repr(found) + str(found.settings.model_dump())
    assert found.ledger_url == f"postgresql://me:{CANARY}@host/db"
    assert found.warnings() == []


def test_a_secret_may_stand_in_a_file(tmp_path: Path) -> None:
    """As container secrets do."""
    (tmp_path / "secret").write_text(f"postgresql://me:{CANARY}@host/db\n", encoding="utf-8")
    assert workspace(tmp_path, "model: m\nledger: file:secret\n").ledger_url == f"postgresql://me:{CANARY}@host/db"


@pytest.mark.parametrize(("value", "problem"), [("${ABSENT}", "ABSENT is not set"), ("file:absent", "file:absent")])
def test_a_secret_that_is_not_there_is_named(tmp_path: Path, value: str, problem: str) -> None:
    """By its reference, when it is needed."""
    found = workspace(tmp_path, f"model: m\nledger: {value}\n")
    with pytest.raises(ConfigError, match=problem):
        _ = found.ledger_url


def test_a_literal_password_is_warned_of_and_never_repeated(tmp_path: Path) -> None:
    """It works, but does not belong there."""
    found = workspace(tmp_path, f"model: m\nledger: postgresql://me:{CANARY}@host/db\n")
    (tmp_path / "kbsync.yaml").chmod(0o600)
    (warning,) = found.warnings()
    assert "holds a password" in warning
    assert CANARY not in warning + repr(found)


def test_a_literal_password_in_a_file_of_all_is_warned_of(tmp_path: Path) -> None:
    """Other users of the machine can read it."""
    found = workspace(tmp_path, f"model: m\nledger: postgresql://host/db?user=me&password={CANARY}\n")
    (tmp_path / "kbsync.yaml").chmod(0o640)
    first, second = found.warnings()
    assert "holds a password" in first
    assert "others can read the file: chmod 600" in second
    assert CANARY not in first + second


@given(st.integers(0, 1439), st.integers(0, 1439), st.datetimes(timezones=st.just(UTC)))
def test_a_window_and_its_complement_part_the_day(start: int, end: int, moment: datetime) -> None:
    """Every moment is in exactly one of 22:00-06:00 and 06:00-22:00."""
    if start == end:
        return
    one, other = (f"{minute // 60:02}:{minute % 60:02}" for minute in (start, end))
    inside = EditWindow.parse(f"{one}-{other}").contains(moment)
    assert inside != EditWindow.parse(f"{other}-{one}").contains(moment)


def test_a_window_is_in_its_own_time_zone() -> None:
    """22:00 in Berlin is 20:00 UTC in summer; the end is outside."""
    window = EditWindow.parse("22:00-06:00 Europe/Berlin")
    begin = datetime(2026, 7, 1, 20, 0, tzinfo=UTC)
    assert window.contains(begin)
    assert not window.contains(begin - timedelta(seconds=1))
    assert not window.contains(datetime(2026, 7, 2, 6, 0, tzinfo=ZoneInfo("Europe/Berlin")))


@pytest.mark.parametrize("there", [True, False])
def test_init_makes_a_workspace_that_loads(tmp_path: Path, there: bool) -> None:
    """In an empty folder or a new one; it asks nothing and names the files."""
    root = tmp_path / "new" / "workspace"
    if there:
        root.mkdir(parents=True)
        (root / ".git").mkdir()
    written = Workspace.init(root)
    assert sorted(written) == sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
    assert Workspace.load(root).settings.model == "smollm2-135m"


def test_init_refuses_a_folder_with_anything_in_it(tmp_path: Path) -> None:
    """And leaves it as it is."""
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match=r"not empty: it has notes\.txt"):
        Workspace.init(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_init_refuses_a_file(tmp_path: Path) -> None:
    """A workspace is a folder."""
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is not a folder"):
        Workspace.init(tmp_path / "file")


@pytest.mark.parametrize("there", [True, False])
def test_an_init_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    """A full disk in the middle: the folder is as it was before."""
    root = tmp_path / "workspace"
    if there:
        root.mkdir()
        (root / ".git").mkdir()
    monkeypatch.setattr(config, "OFFLINE_EXAMPLES", (*config.OFFLINE_EXAMPLES, "sources/absent.csv"))
    with pytest.raises(UsageError, match="No such file"):
        Workspace.init(root)
    assert root.exists() == there
    if there:
        assert [p.name for p in root.iterdir()] == [".git"]


def test_the_sample_for_servers_has_every_key_at_its_default() -> None:
    """deploy/kbsync.yaml is where an operator looks keys up."""
    document = read_document(Path(__file__).parents[1] / "deploy" / "kbsync.yaml")
    assert set(document.value) == set(Settings.model_fields)
    assert Settings(**document.value) == Settings(model="smollm2-135m")
