"""The edit's child process: its end, however it comes, ends the run and not the daemon."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from kbsync.child import end, run_edit, start
from kbsync.editor.job import EditJob
from kbsync.editor.preset import load_preset
from kbsync.errors import Cancelled, EditError

FAKE = "fakeworker"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EditJob:
    """A job that no fake worker looks into."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return EditJob(
        model_path=str(tmp_path),
        fingerprint="0" * 64,
        device="cpu",
        dtype="auto",
        preset=load_preset("smollm2-135m"),
        deltas=str(tmp_path),
        targets=str(tmp_path),
        active=(),
        weights_sha256=None,
        live=(),
        requests=(),
    )


def test_a_child_that_dies_is_an_error_with_its_last_words(job: EditJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBSYNC_FAKE", "die")
    seen: list[str] = []
    with pytest.raises(EditError, match=r"status 134: CUDA error: an illegal memory access"):
        run_edit(job, worker=FAKE, progress=lambda phase, done, total: seen.append(f"{phase} {done}/{total}"))
    assert seen == ["targets 1/2"]


def test_the_childs_own_error_is_raised_whatever_else_stands_on_its_stdout(
    job: EditJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KBSYNC_FAKE", "chatter")
    with pytest.raises(EditError, match=r"^no$") as caught:
        run_edit(job, worker=FAKE)
    assert caught.value.hint == "try"


def test_cancelling_ends_the_child_at_once(job: EditJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBSYNC_FAKE", "sleep")
    stop = threading.Event()
    begun = time.monotonic()
    with pytest.raises(Cancelled):
        run_edit(job, worker=FAKE, cancelled=stop, progress=lambda *_: stop.set())
    assert time.monotonic() - begun < 30  # the child would have slept for ten minutes


def test_a_child_has_no_secret_in_its_environment_but_those_that_an_edit_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    for name in ("PGPASSWORD", "KBSYNC_WEBHOOK_SECRET", "HF_TOKEN"):
        monkeypatch.setenv(name, f"canary-{name}")
    with (tmp_path / "stderr").open("wb") as stderr:
        process = start(FAKE, stderr, {"KBSYNC_FAKE": "wait"})
        given = Path(f"/proc/{process.pid}/environ").read_bytes()
        end(process)
        if process.stdout is not None:
            process.stdout.close()
    assert b"canary-HF_TOKEN" in given
    assert b"KBSYNC_FAKE=wait" in given
    assert b"canary-PGPASSWORD" not in given
    assert b"canary-KBSYNC" not in given
