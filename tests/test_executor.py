"""Who computes targets changes nothing but the time: three backends, workers that die, results that come twice."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kbsync.cluster import join
from kbsync.editor.job import ExecutorSettings, ReplicaJob
from kbsync.editor.memit import insert
from kbsync.editor.model import Base, load_base
from kbsync.editor.replica import Replica, libraries, target_of
from kbsync.editor.targets import Target, compute_targets
from kbsync.errors import BaseMismatch, EditError, KbsyncError, ModelError, UsageError
from kbsync.executor import ATTEMPTS, Event, Pool, Tally, Worker, WorkerLost, open_executor, placed
from kbsync.facts import EditRequest
from kbsync.hub import fingerprint
from tests.tiny import CONTEXTS, FACTS, request, save, tiny_llama, tiny_preset, tiny_statistics

SUBJECTS = ("Vega", "Deneb", "Altair", "Sirius", "Rigel", "Capella", "Mira", "Algol")
MANY = [*FACTS, *(request(f"{name} belongs to the constellation of", name, "Lyra") for name in SUBJECTS)]
"""13 facts: chunks of seven and six for two workers."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a checkpoint."""
    return save(tiny_llama(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    """The checkpoint, loaded here."""
    return load_base(folder, fingerprint=fingerprint(folder), device="cpu")


@pytest.fixture(scope="session")
def ray() -> Iterator[Any]:
    """One local cluster of two CPUs for all tests."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed; ends with: pip install 'kbsync[ray]'")
    module = join("local")
    yield module
    module.shutdown()


@pytest.fixture(params=["process", "ray"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend whose workers are processes of their own."""
    if request.param == "ray":
        request.getfixturevalue("ray")
    return str(request.param)


def job(folder: Path, **changes: Any) -> ReplicaJob:
    values: dict[str, Any] = {
        "model_path": str(folder),
        "fingerprint": fingerprint(folder),
        "device": "cpu",
        "dtype": "auto",
        "preset": tiny_preset(),
        "contexts": CONTEXTS,
        "libraries": libraries(),
    }
    return ReplicaJob.model_validate(values | changes)


def settings(backend: str, **changes: Any) -> ExecutorSettings:
    return ExecutorSettings.model_validate({"backend": backend, "workers": 2, "address": "local"} | changes)


def computed(backend: str, base: Base, job: ReplicaJob) -> dict[str, Target]:
    found = list(open_executor(settings(backend), base, job).map(MANY))
    assert len(found) == len(MANY)
    return {request.digest: target for request, target in found}


def replicas() -> list[psutil.Process]:
    """The worker processes of this test process, however they were started."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        mine = os.getpid() in [parent.pid for parent in process.parents()]
        if mine and ("kbsync.editor.replica" in line or "ray::Replica" in line):
            found.append(process)
    return found


def gone(processes: Sequence[psutil.Process], seconds: float = 15) -> bool:
    """Whether all of them end within `seconds`."""
    return not psutil.wait_procs(processes, timeout=seconds)[1]


def test_three_backends_find_the_same_targets_and_the_same_delta(backend: str, folder: Path, base: Base) -> None:
    serial, other = computed("serial", base, job(folder)), computed(backend, base, job(folder))
    statistics = tiny_statistics(base, tiny_preset())
    deltas = [insert(base, MANY, targets, statistics, tiny_preset()).delta for targets in (serial, other)]
    for digest, target in serial.items():
        assert torch.allclose(other[digest].z, target.z, rtol=1e-5, atol=1e-5)
        assert other[digest].steps == target.steps
    for name, factors in deltas[0].factors.items():
        one, two = factors.left @ factors.right, deltas[1].factors[name].left @ deltas[1].factors[name].right
        assert float((one - two).norm() / one.norm()) < 1e-5


def test_what_a_worker_computes_arrives_bit_for_bit(base: Base) -> None:
    here = compute_targets(base, FACTS[:1], CONTEXTS, tiny_preset())[FACTS[0].digest]
    (event,) = json.loads(json.dumps(said(base, FACTS[:1])))
    there = target_of(event)
    assert torch.equal(here.z, there.z)
    assert (here.loss, here.steps, here.clamped) == (there.loss, there.steps, there.clamped)


def test_killing_a_worker_mid_run_loses_no_fact(backend: str, folder: Path, base: Base) -> None:
    """One fact at a time, each of many steps: when the first one comes, all others are still open."""
    slow = job(folder, preset=tiny_preset(token_budget=1, steps=60))
    found: list[str] = []
    workers: set[int] = set()
    for fact, _ in open_executor(settings(backend, workers=1), base, slow).map(MANY):
        if not found:
            (victim,) = replicas()
            victim.send_signal(signal.SIGKILL)
            assert gone([victim])
        else:
            workers.update(process.pid for process in replicas())
        found.append(fact.digest)
    assert sorted(found) == sorted(fact.digest for fact in MANY)
    assert workers - {victim.pid}  # another one did what was open


def test_ending_the_iteration_ends_the_workers(backend: str, folder: Path, base: Base) -> None:
    with closing(open_executor(settings(backend, workers=1), base, job(folder)).map(MANY)) as stream:
        next(stream)
        workers = replicas()
    assert workers
    assert gone(workers)


def test_workers_end_when_their_parent_is_killed(folder: Path) -> None:
    """As child.py kills an edit that is cancelled: nobody is left to end the edit's own workers."""
    code = (
        "import sys; from tests.test_executor import *\n"
        "folder = Path(sys.argv[1])\n"
        "base = load_base(folder, fingerprint=fingerprint(folder), device='cpu')\n"
        "endless = job(folder, preset=tiny_preset(steps=100_000))\n"
        "for _ in open_executor(settings('process'), base, endless).map(MANY): pass\n"
    )
    parent = psutil.Popen([os.sys.executable, "-c", code, str(folder)], cwd=Path(__file__).parents[1])
    try:
        deadline = time.monotonic() + 60
        while len(workers := parent.children(recursive=True)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        parent.kill()
        parent.wait()
    assert gone(workers)


def test_a_local_cluster_listens_on_the_loopback_address_only(ray: Any) -> None:
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = [
        (process.name(), connection.laddr.ip)
        for process in processes
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 3  # gcs_server, raylet and this process
    assert {address for _, address in listening} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert os.environ["RAY_AUTH_MODE"] == "token"


class Scripted:
    """A worker that says what a test wants it to say."""

    def __init__(self, script: Callable[[Sequence[EditRequest]], Iterator[Event]]) -> None:
        self._script = script

    def events(self, chunk: Sequence[EditRequest]) -> Iterator[Event]:
        return self._script(chunk)

    def end(self) -> None: ...

    def close(self) -> None: ...


def said(base: Base, chunk: Sequence[EditRequest]) -> list[Event]:
    """What a replica says to a chunk."""
    replica = Replica(job(Path(base.network.config.name_or_path)))
    return list(replica.events([request.to_json() for request in chunk]))


def pool(script: Callable[[Sequence[EditRequest]], Iterator[Event]], *, workers: int = 2, timeout: float = 60) -> Pool:
    started: list[int] = []

    def start(slot: int) -> Worker:
        started.append(slot)
        assert len(started) < 100
        return Scripted(script)

    return Pool(start, workers, timeout=timeout)


def test_a_result_that_comes_twice_is_accepted_once(base: Base) -> None:
    def twice(chunk: Sequence[EditRequest]) -> Iterator[Event]:
        for event in said(base, chunk):
            yield from (event, event)

    found = [request.digest for request, _ in pool(twice).map([*FACTS, FACTS[0]])]
    assert sorted(found) == sorted(fact.digest for fact in FACTS)


def test_a_fact_that_kills_its_workers_is_named_after_all_others_have_come(base: Base) -> None:
    tried: list[int] = []

    def poisoned(chunk: Sequence[EditRequest]) -> Iterator[Event]:
        if FACTS[1] in chunk:
            tried.append(len(chunk))
            raise WorkerLost("status -9: Killed")
        yield from said(base, chunk)

    found: list[str] = []
    with pytest.raises(EditError, match=r"^no target vector for 'The capital of France is': .* status -9: Killed$"):
        found.extend(request.digest for request, _ in pool(poisoned, workers=1).map(FACTS))
    assert len(found) == len(FACTS) - 1
    assert len(tried) == ATTEMPTS


def test_workers_that_never_start_are_given_up_soon(base: Base) -> None:
    def start(slot: int) -> Worker:
        raise WorkerLost("no place")

    with pytest.raises(EditError, match=r" and 10 more: their workers were lost, the last with no place"):
        list(Pool(start, 2, timeout=60).map(MANY))


def test_a_worker_that_is_silent_about_a_fact_is_asked_again(base: Base) -> None:
    asked: list[str] = []

    def forgetful(chunk: Sequence[EditRequest]) -> Iterator[Event]:
        asked.extend(request.digest for request in chunk)
        yield from (event for event in said(base, chunk) if asked.count(event["digest"]) > 1)

    assert len(list(pool(forgetful, workers=1).map(FACTS[:2]))) == 2


def test_silence_of_all_workers_ends_the_edit() -> None:
    def silent(chunk: Sequence[EditRequest]) -> Iterator[Event]:
        time.sleep(1)
        yield from ()

    with pytest.raises(EditError, match="no worker delivered anything"):
        list(pool(silent, timeout=0.1).map(FACTS))


def test_what_a_worker_finds_wrong_with_a_fact_is_raised_here(base: Base) -> None:
    wrong = request("The sky is", "Vega", "blue")
    with pytest.raises(EditError, match="Vega"):
        list(pool(lambda chunk: iter(said(base, chunk))).map([wrong]))


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"fingerprint": "0" * 64}, BaseMismatch, "is not the base model of this edit"),
        ({"model_path": "/nowhere"}, ModelError, "/nowhere is not there on worker"),
        ({"libraries": {**libraries(), "torch": "1.0"}}, EditError, "has torch .* this process 1.0"),
    ],
)
def test_a_worker_refuses_another_base_and_other_libraries(
    changes: dict[str, Any], error: type[Exception], said: str, folder: Path
) -> None:
    (event,) = Replica(job(folder, **changes)).events([FACTS[0].to_json()])
    with pytest.raises(error, match=said):
        raise KbsyncError.from_json(event["error"])


def test_workers_without_gpus_of_their_own_are_refused_at_once(backend: str, folder: Path, base: Base) -> None:
    if torch.cuda.device_count() >= 2:
        pytest.skip("this machine has the GPUs; ends on one that has not")
    with pytest.raises(UsageError, match="2 workers need 2 GPUs, and there are"):
        open_executor(settings(backend), base, job(folder, device="cuda"))


def test_more_ray_workers_than_cpus_are_refused_at_once(ray: Any, folder: Path, base: Base) -> None:
    with pytest.raises(UsageError, match="1000 workers need as many CPUs"):
        open_executor(settings("ray", workers=1000), base, job(folder))


def test_replicas_are_placed_by_device_and_gpus() -> None:
    assert placed("auto", 0, settings("process")) == "cpu"
    assert placed("cpu", 8, settings("process")) == "cpu"
    assert placed("auto", 4, settings("ray", gpus=2)) == "cuda"
    assert placed("balanced", 4, settings("ray", gpus=2)) == "balanced"
    with pytest.raises(UsageError, match="need 4 GPUs, and there are 3"):
        placed("auto", 3, settings("ray", gpus=2))
    with pytest.raises(UsageError, match="device cuda:1 is one GPU"):
        placed("cuda:1", 8, settings("process"))


@given(data=st.data(), workers=st.integers(1, 4))
def test_whatever_workers_do_each_fact_is_accepted_once_or_given_up(data: st.DataObject, workers: int) -> None:
    tally = Tally(FACTS, workers)
    chunks: list[list[EditRequest]] = [FACTS[:2], FACTS[2:]]
    accepted: list[str] = []
    losses = 0
    while tally.waiting:
        chunk = chunks.pop(data.draw(st.integers(0, len(chunks) - 1)))
        delivered = data.draw(st.lists(st.sampled_from(FACTS), max_size=3))
        accepted += [fact.digest for fact in delivered if tally.accept(fact.digest) is not None]
        losses += 1
        chunks.extend([fact] for fact in tally.ended(chunk, "lost"))
    assert len(set(accepted)) == len(accepted)
    assert losses <= 2 + len(FACTS) * ATTEMPTS
    if len(accepted) < len(FACTS):
        with pytest.raises(EditError):
            tally.check()
    else:
        tally.check()
