"""Backup and restore: drilled with a running daemon, and with backups that are damaged, cut or hostile."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kbsync.aliases import demote, promote
from kbsync.backup import Index, check_backup, make_backup
from kbsync.commands import execute, perform
from kbsync.config import Workspace
from kbsync.errors import KbsyncError, StoreError, UsageError
from kbsync.ledger import Ledger
from kbsync.reconcile import open_workspace
from kbsync.restore import restore
from kbsync.serving import Versions, verify_workspace
from tests.ledgers import on_postgresql
from tests.workspaces import TestWorkspace, run_here, workspace

STARS = {"Vega": "Orion", "Deneb": "Paris"}
pytestmark = pytest.mark.usefixtures("one_cache")


def make(folder: Path) -> TestWorkspace:
    """A workspace below `folder` with three versions, the last one a rebase; the base model lies outside of it."""
    (folder / "w").mkdir()
    made = workspace(folder / "w", STARS)
    (folder / "w" / "model").rename(folder / "model")
    config = made.root / "kbsync.yaml"
    config.write_text(config.read_text().replace("model: model", f"model: {folder / 'model'}"))
    with made.open() as reconciler:
        reconciler.sync()
        made.feed({"Vega": "Rome", "Deneb": "Paris"})
        reconciler.sync()
        execute(reconciler, "rebase", {})
    return made


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, one_cache: None) -> Path:
    """A folder with such a workspace, and a backup of it."""
    folder = tmp_path_factory.mktemp("template")
    take(make(folder), folder / "backup")
    return folder


@pytest.fixture
def made(template: Path, tmp_path: Path) -> TestWorkspace:
    """The workspace, to be changed."""
    shutil.copytree(template / "w", tmp_path / "w")
    return TestWorkspace(tmp_path / "w")


@pytest.fixture
def backup(template: Path, tmp_path: Path) -> Path:
    """The backup, to be changed."""
    shutil.copytree(template / "backup", tmp_path / "backup")
    return tmp_path / "backup"


def take(made: TestWorkspace, target: Path, **options: bool) -> dict[str, Any]:
    """Back the workspace up."""
    with made.open() as reconciler:
        return make_backup(reconciler.workspace, reconciler.ledger, target, **options)


def live(root: Path) -> tuple[int, str | None]:
    """The live version of a workspace and its recorded hash, after everything there was verified."""
    opened = Workspace.load(root)
    with Ledger.open(opened.ledger_url) as ledger:
        assert list(verify_workspace(opened, ledger)) == []
        row = Versions.open(opened, ledger).row("live")
    assert row is not None
    return row.number, row.weights_sha256


def test_a_workspace_is_backed_up_while_the_daemon_runs_lost_and_restored_elsewhere(
    made: TestWorkspace, tmp_path: Path
) -> None:
    """Everything verifies, the live weights have the recorded hash, and the next pass has nothing to do."""
    before, target = live(made.root), tmp_path / "backup"
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-m", "kbsync", "daemon", "--workspace", str(made.root)]
        daemon = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        while not (made.root / "data" / "control.sock").exists():
            assert daemon.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        done = perform(made.root, "backup", {"target": str(target)}, user="test")
        assert daemon.poll() is None
    finally:
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()
    shutil.rmtree(made.root)
    found = restore(target, tmp_path / "elsewhere", user="test")
    assert live(tmp_path / "elsewhere") == before
    assert found["weights_sha256"] == before[1]
    assert list(found["not_restorable"].values()) == [[1, 2]]
    with open_workspace(tmp_path / "elsewhere", user="test") as reconciler:
        reconciler.run_edit = run_here
        [report] = reconciler.sync()
        assert (report.status, report.counts["edits"], report.versions) == ("done", 0, [])
        with pytest.raises(UsageError, match="version 1 is not restorable"):
            execute(reconciler, "rollback", {"to": 1})
    assert done["files"] == len(check_backup(target).files)


@pytest.mark.usefixtures("database")
def test_a_ledger_on_any_database_is_restored_into_a_file(tmp_path: Path) -> None:
    made = make(tmp_path)
    before = live(made.root)
    take(made, tmp_path / "backup")
    found = restore(tmp_path / "backup", tmp_path / "new", user="test")
    assert found["changed"] == (["ledger"] if on_postgresql() else [])
    assert live(tmp_path / "new") == before
    assert (tmp_path / "new" / "data" / "ledger.db").exists()


def test_versions_with_an_alias_or_all_of_them_can_be_taken_along(made: TestWorkspace, tmp_path: Path) -> None:
    """Of the others the manifests are there, and what the ledger knows."""
    with made.open() as reconciler, reconciler.ledger.write() as db:
        model = db.models()[0].id
        db.note_promotion(model, "canary", "promote", 1, user="test", reason="")
    assert take(made, tmp_path / "some")["versions"] == {model: [0, 1, 3]}
    assert take(made, tmp_path / "all", everything=True)["versions"] == {model: [0, 1, 2, 3]}
    assert restore(tmp_path / "some", tmp_path / "one", user="test")["not_restorable"] == {model: [2]}
    assert restore(tmp_path / "all", tmp_path / "other", user="test")["not_restorable"] == {}
    for root in (tmp_path / "one", tmp_path / "other"):
        assert live(root)[0] == 3
        assert len(list((root / "data" / "versions" / model).glob("*.json"))) == 3


def test_what_a_demotion_brings_back_comes_along(made: TestWorkspace, tmp_path: Path) -> None:
    with made.open() as reconciler:
        promote(reconciler.line(), 1)
        promote(reconciler.line(), 2)
    take(made, tmp_path / "backup")
    restore(tmp_path / "backup", tmp_path / "there", user="test")
    with open_workspace(tmp_path / "there", user="test") as reconciler:
        assert demote(reconciler.line(), "live")["version"] == 1


def test_no_secret_is_in_a_backup_and_only_its_owner_can_read_it(made: TestWorkspace, tmp_path: Path) -> None:
    """A file that a `file:` reference names is left out, and said to be."""
    (made.root / "sources" / "token").write_text("canary-secret")
    (made.root / "sources" / ".hidden").write_text("canary-secret")
    declared = made.root / "sources" / "stars.yaml"
    declared.write_text(declared.read_text() + 'headers: {Authorization: "file:token", X-Key: "file:my token.txt"}\n')
    (made.root / "sources" / "my token.txt").write_text("canary-secret")
    (made.root / "sources" / "old.txt").write_text("canary-secret")
    (made.root / "sources" / "drafts").mkdir()
    (made.root / "sources" / "drafts" / "half-written.yml").write_text("headers: {Cookie: file:../old.txt")
    secrets = dict.fromkeys(("sources/my token.txt", "sources/old.txt", "sources/token"), "holds a secret")
    assert take(made, tmp_path / "backup")["left_out"] == secrets
    files = [path for path in (tmp_path / "backup").rglob("*") if path.is_file()]
    assert {"kbsync.yaml", "index.json", "stars.csv", "controls.txt", "preset.yaml"} <= {path.name for path in files}
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert b"canary-secret" not in path.read_bytes()


def test_files_that_are_named_below_the_workspace_come_along_and_others_are_said_to_be_missing(
    made: TestWorkspace, tmp_path: Path
) -> None:
    root = made.root
    for folder, file, source in (
        ("lists", "c.txt", "policies/controls.txt"),
        ("feeds", "stars.csv", "sources/stars.csv"),
    ):
        (root / folder).mkdir()
        (root / source).rename(root / folder / file)
    put(root / "policies" / "sky.yaml", "controls.txt", "../lists/c.txt")
    put(root / "sources" / "stars.yaml", "location: stars.csv", "location: ../feeds/stars.csv")
    (root / "lists" / "corpus.txt").write_text("A corpus.")
    put(root / "preset.yaml", "corpus: self", "corpus: file:lists/corpus.txt")
    assert take(made, tmp_path / "whole")["left_out"] == {}
    found = restore(tmp_path / "whole", tmp_path / "new", user="test")
    assert (found["left_out"], found["problems"]) == ({}, [])
    with open_workspace(tmp_path / "new", user="test") as reconciler:
        reconciler.run_edit = run_here
        assert reconciler.sync()[0].status == "done"
    (root / "lists" / "c.txt").rename(tmp_path / "c.txt")
    put(root / "policies" / "sky.yaml", "../lists/c.txt", str(tmp_path / "c.txt"))
    put(root / "kbsync.yaml", "model:", f"allowed_dirs: [{tmp_path}]\nmodel:")
    outside = {str(tmp_path / "c.txt"): "lies outside the workspace"}
    assert take(made, tmp_path / "part")["left_out"] == outside
    (tmp_path / "c.txt").unlink()
    found = restore(tmp_path / "part", tmp_path / "other", user="test")
    assert found["left_out"] == outside
    [problem] = found["problems"]
    assert problem.startswith(str(tmp_path / "other" / "policies" / "sky.yaml"))
    assert problem.endswith(f"no file {tmp_path / 'c.txt'}")


def put(path: Path, old: str, new: str) -> None:
    """Another text in a file."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_damaged_manifest_of_an_old_version_stops_no_backup_but_one_that_is_saved_does(
    made: TestWorkspace, tmp_path: Path
) -> None:
    model = next((made.root / "data" / "versions").iterdir()).name
    first, last = ((made.root / "data" / "versions" / model / f"00000{number}.json") for number in (1, 3))
    first.chmod(0o600)
    flip(first)
    left_out = {f"data/versions/{model}/000001.json": "damaged"}
    done = take(made, tmp_path / "backup")
    assert (done["left_out"], done["versions"]) == (left_out, {model: [0, 3]})
    assert dict(check_backup(tmp_path / "backup").left_out) == left_out
    assert restore(tmp_path / "backup", tmp_path / "new", user="test")["left_out"] == left_out
    with pytest.raises(StoreError, match=r"000001\.json: damaged"):
        take(made, tmp_path / "all", everything=True)
    last.unlink()
    with pytest.raises(StoreError, match=r"000003\.json: No such file") as caught:
        take(made, tmp_path / "none")
    assert "older backup" in caught.value.hint


def test_a_backup_that_says_it_lacks_the_live_manifest_is_refused(backup: Path, tmp_path: Path) -> None:
    index = json.loads((backup / "index.json").read_text())
    [gone] = [entry for entry in index["files"] if entry["path"].endswith("000003.json")]
    index["files"].remove(gone)
    index["left_out"] = {gone["path"]: "damaged"}
    (backup / "index.json").write_text(json.dumps(index))
    with pytest.raises(StoreError, match="not whole"):
        restore(backup, tmp_path / "new", user="test")


def test_what_a_killed_backup_left_behind_goes_with_the_next_one_unless_it_is_at_work(
    made: TestWorkspace, tmp_path: Path
) -> None:
    code = "import sys, os; from pathlib import Path; from kbsync.backup import made_whole\n"
    code += "with made_whole(Path(sys.argv[1])) as made: (made / 'big').touch(); os.kill(os.getpid(), 9)"
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=False)
    stale, busy = sorted(tmp_path.glob(".tmp-*"))
    (tmp_path / ".tmp-others").mkdir()
    for path in (stale / "big", stale, busy, tmp_path / ".tmp-others"):
        os.utime(path, (0, 0))
    take(made, tmp_path / "backup")
    assert {path.name for path in tmp_path.iterdir()} == {"w", "backup", ".tmp-others", busy.name}


def test_a_workspace_with_its_files_elsewhere_is_restored_with_files_of_its_own(
    made: TestWorkspace, tmp_path: Path
) -> None:
    config = made.root / "kbsync.yaml"
    config.write_text(f"data: {tmp_path / 'far'}\n# a comment\n" + config.read_text())
    (made.root / "data").rename(tmp_path / "far")
    take(made, tmp_path / "backup")
    assert restore(tmp_path / "backup", tmp_path / "new", user="test")["changed"] == ["data"]
    assert "# a comment" in (tmp_path / "new" / "kbsync.yaml").read_text()
    shutil.rmtree(tmp_path / "far")
    assert live(tmp_path / "new")[0] == 3


def test_without_the_base_model_all_but_the_weights_is_verified(made: TestWorkspace, tmp_path: Path) -> None:
    config = made.root / "kbsync.yaml"
    config.write_text(config.read_text().replace("/model\n", "/nowhere\n"))
    take(made, tmp_path / "backup")
    assert restore(tmp_path / "backup", tmp_path / "new", user="test")["weights_sha256"] is None


def flip(path: Path) -> None:
    """Change one byte in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    """The second half of a file is lost."""
    os.truncate(path, path.stat().st_size // 2)


def lengthen(path: Path) -> None:
    """Something is behind a file's end."""
    path.write_bytes(path.read_bytes() + b"more")


def link(path: Path) -> None:
    """A link to the very same content stands in the place of a file."""
    path.symlink_to(path.rename(path.with_name(f"{path.name}.real")))


@pytest.mark.parametrize("act", [flip, cut, lengthen, link, Path.unlink], ids=lambda act: act.__name__)
@pytest.mark.parametrize("name", ["*.safetensors", "ledger.db", "000003.json", "kbsync.yaml", "stars.csv"])
def test_a_damaged_backup_is_refused_and_leaves_nothing(
    backup: Path, tmp_path: Path, act: Callable[[Path], object], name: str
) -> None:
    act(next(backup.rglob(name)))
    refused(backup, tmp_path)


def test_a_backup_without_a_whole_index_is_refused(backup: Path, tmp_path: Path) -> None:
    cut(backup / "index.json")
    refused(backup, tmp_path)
    (backup / "index.json").unlink()
    refused(backup, tmp_path)


def refused(backup: Path, folder: Path) -> None:
    """Restoring is refused in one line with a hint, and leaves nothing in `folder`."""
    before = {path.name for path in folder.iterdir()}
    with pytest.raises(KbsyncError) as error:
        restore(backup, folder / "new", user="test")
    assert error.value.hint
    assert {path.name for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "path",
    [
        "../escaped.yaml",
        "/tmp/escaped.yaml",
        "sources/../../escaped",
        "data/lock",
        "data/deltas/sha256/x",
        "a//b.yaml",
        "index.json",
        ".git/hooks/post-checkout",
        "lists/.hidden",
    ],
)
def test_a_backup_that_would_write_outside_its_places_is_refused(backup: Path, tmp_path: Path, path: str) -> None:
    index = json.loads((backup / "index.json").read_text())
    index["files"][0]["path"] = path
    (backup / "index.json").write_text(json.dumps(index))
    with pytest.raises(StoreError, match="is no place in a workspace"):
        restore(backup, tmp_path / "new", user="test")
    assert not (tmp_path / "new").exists()


def test_a_backup_that_lacks_the_live_version_is_refused(backup: Path, tmp_path: Path) -> None:
    """Its index, too, may be the work of somebody else."""
    index = json.loads((backup / "index.json").read_text())
    index["files"] = [entry for entry in index["files"] if not entry["path"].startswith("data/deltas")]
    (backup / "index.json").write_text(json.dumps(index))
    with pytest.raises(StoreError, match="lacks deltas of the live version"):
        restore(backup, tmp_path / "new", user="test")
    assert not (tmp_path / "new").exists()


def test_a_backup_is_never_made_over_another_one_nor_of_a_damaged_store(made: TestWorkspace, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="is there already"):
        take(made, tmp_path / "there")
    for delta in (made.root / "data" / "deltas" / "sha256").iterdir():
        delta.chmod(0o600)
        flip(delta)
    with pytest.raises(StoreError, match="damaged"):
        take(made, tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"w", "there"}


def test_a_restore_touches_no_folder_that_has_something_in_it_and_no_other_workspace(
    backup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UsageError, match="is not empty"):
        restore(backup, tmp_path / "full", user="test")
    monkeypatch.setenv("KBSYNC_LEDGER", "sqlite:////elsewhere.db")
    with pytest.raises(UsageError, match="KBSYNC_LEDGER is set"):
        restore(backup, tmp_path / "new", user="test")
    monkeypatch.delenv("KBSYNC_LEDGER")
    (tmp_path / "empty").mkdir()
    restore(backup, tmp_path / "empty", user="test")
    assert live(tmp_path / "empty")[0] == 3


def test_the_commands_say_what_they_did(
    made: TestWorkspace, backup: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from kbsync.cli import main

    def run(*arguments: str) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["kbsync", *arguments])
            with pytest.raises(SystemExit) as caught:
                main()
        assert not caught.value.code
        return capsys.readouterr().out

    capsys.readouterr()
    root = made.root
    done = json.loads(run("backup", str(tmp_path / "second"), "--workspace", str(root), "--json"))
    assert done["files"] == len(Index.read(tmp_path / "second").files)
    assert "as the index says" in run("backup", str(backup), "--verify")
    said = run("restore", str(backup), "--workspace", str(tmp_path / "new"))
    assert "2 versions of model" in said
    assert "as recorded" in said
    token = root / "sources" / "token"
    token.write_text("secret")
    put(root / "sources" / "stars.yaml", "type: csv", "type: csv\nheaders: {Authorization: 'file:token'}")
    said = "not in it: sources/token: holds a secret"
    assert said in run("backup", str(tmp_path / "third"), "--workspace", str(root))
    assert said in run("backup", str(tmp_path / "third"), "--verify")
    put(tmp_path / "third" / "policies" / "sky.yaml", "controls: controls.txt", "controls: nowhere.txt")
    retouch(tmp_path / "third", "policies/sky.yaml")
    found = run("restore", str(tmp_path / "third"), "--workspace", str(tmp_path / "fourth"))
    assert said in found
    assert f"kbsync check: {tmp_path / 'fourth' / 'policies' / 'sky.yaml'}:" in found


def retouch(backup: Path, name: str) -> None:
    """Let the index name a file as it is now."""
    index, data = json.loads((backup / "index.json").read_text()), (backup / name).read_bytes()
    [entry] = [entry for entry in index["files"] if entry["path"] == name]
    entry |= {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (backup / "index.json").write_text(json.dumps(index))
