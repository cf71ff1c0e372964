"""Who computes target vectors: this process, several processes of this machine, or a Ray cluster.

Each z_i is found on the pristine base alone, so facts are independent and the work is dealt out in chunks. A worker
holds one replica of the base (`kbsync.editor.replica`), is pure and may die: results are keyed by request and accepted
once, and what a lost worker had not delivered is given to another, fact by fact, a bounded number of times. Only the
caller stores anything; the insertion is its own.

    executor = open_executor(settings, base, job)
    for request, target in executor.map(requests): store.put(request, target)
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from kbsync import child
from kbsync.editor.job import ExecutorSettings, ReplicaJob
from kbsync.errors import EditError, KbsyncError, UsageError
from kbsync.facts import EditRequest

if TYPE_CHECKING:
    from kbsync.editor.model import Base
    from kbsync.editor.targets import Target

__all__ = ["Executor", "Pool", "Tally", "Worker", "WorkerLost", "open_executor", "placed"]

ATTEMPTS = 3
"""Workers that one fact may cost before it is given up."""
ROUNDS = 4
"""Most chunks per worker, unless they would be too large: enough that none waits long for the last one."""
PACKED = 8
"""Facts that are worth being computed together: fewer chunks where they would be smaller."""
CHUNK = 256
"""Most facts in a chunk: what a lost worker can have in hand."""

Event = dict[str, Any]
Results: TypeAlias = "Generator[tuple[EditRequest, Target], None, None]"


class Executor(Protocol):
    """Computes target vectors on the pristine base."""

    def map(self, requests: Sequence[EditRequest]) -> Results:
        """Each distinct request with its target once, in the order in which they are finished.

        Raises EditError and ModelError as `compute_targets` does; EditError, after all others have come, for facts
        whose workers were lost again and again. Ending the iteration ends the workers.
        """


class Worker(Protocol):
    """One replica, however it is reached. `events` is called for one chunk at a time."""

    def events(self, chunk: Sequence[EditRequest]) -> Iterator[Event]:
        """What `Replica.events` says to the chunk. Raises WorkerLost where the replica is gone."""

    def end(self) -> None:
        """End the replica; from any thread, more than once. A chunk in work then raises WorkerLost."""

    def close(self) -> None:
        """Release what it held here; only when no chunk is in work."""


class WorkerLost(Exception):
    """A worker is gone; its message says how."""


def open_executor(settings: ExecutorSettings, base: Base, job: ReplicaJob) -> Executor:
    """The executor that kbsync.yaml asks for. `base` serves where there are no other workers.

    Raises UsageError at once where the backend is not installed or reached, or has not the GPUs that `device` asks for.
    """
    if settings.backend == "serial":
        return _Serial(base, job)
    if settings.backend == "process":
        return Pool(_processes(settings, job), settings.workers, timeout=settings.timeout)
    from kbsync.cluster import actors

    return Pool(actors(settings, job), settings.workers, timeout=settings.timeout)


def placed(device: str, there: int, settings: ExecutorSettings) -> str:
    """`cpu`, `cuda` or `balanced`: where the replicas of a job for `device` run, with `there` GPUs for all of them.

    Raises UsageError where `device` asks for more: better at once than a worker that waits for ever.
    """
    if device == "cpu" or (device in ("auto", "balanced") and not there):
        return "cpu"
    if ":" in device:
        raise UsageError(f"device {device} is one GPU, and each worker needs its own", hint="set `device: cuda`")
    if there < (wanted := settings.workers * settings.gpus):
        raise UsageError(
            f"device {device}: {settings.workers} workers need {wanted} GPUs, and there are {there}",
            hint="lower executor.workers, or set `device: cpu`",
        )
    return device if device == "balanced" else "cuda"


@dataclass(frozen=True, slots=True)
class _Serial:
    base: Base
    job: ReplicaJob

    def map(self, requests: Sequence[EditRequest]) -> Results:
        from kbsync.editor.targets import stream_targets

        distinct = list({request.digest: request for request in requests}.values())
        return stream_targets(self.base, distinct, self.job.contexts, self.job.preset)


class Tally:
    """Which facts are still to do. Every result is accepted once; a fact that costs too many workers is given up."""

    def __init__(self, requests: Sequence[EditRequest], workers: int = 1) -> None:
        self.waiting = {request.digest: request for request in requests}
        self._lost: Counter[str] = Counter()
        self._given_up: dict[str, tuple[EditRequest, str]] = {}
        self._fruitless, self._patience = 0, ATTEMPTS * workers

    def accept(self, digest: str) -> EditRequest | None:
        """The request of a result, or None where it was answered or given up before."""
        self._fruitless = 0
        return self.waiting.pop(digest, None)

    def ended(self, chunk: Sequence[EditRequest], reason: str) -> list[EditRequest]:
        """A chunk's worker has ended: the requests to try again, one by one, so that one cannot spoil the others."""
        left = [request for request in chunk if request.digest in self.waiting]
        if left:
            self._fruitless += 1
            self._lost.update(request.digest for request in left)
        hopeless = list(self.waiting.values()) if self._fruitless >= self._patience else left
        for request in hopeless:
            if self._fruitless >= self._patience or self._lost[request.digest] >= ATTEMPTS:
                self._given_up[request.digest] = (self.waiting.pop(request.digest), reason)
        return [request for request in left if request.digest in self.waiting]

    def check(self) -> None:
        """Raise EditError, naming them, where facts were given up."""
        if not self._given_up:
            return
        prompts = [repr(request.prompt) for request, _ in self._given_up.values()]
        more = f" and {len(prompts) - 3} more" if len(prompts) > 3 else ""
        reason = next(reason for _, reason in self._given_up.values())
        raise EditError(
            f"no target vector for {', '.join(prompts[:3])}{more}: their workers were lost, the last with {reason}",
            hint="finished facts are kept; fewer `executor.workers` need less memory; kbsync doctor",
        )


@dataclass(frozen=True, slots=True)
class _Ended:
    """A chunk that no worker has in hand any more."""

    chunk: Sequence[EditRequest]
    reason: str


class Pool:
    """An executor over workers that `start(slot)` makes, slots counted from 0; lost ones are replaced."""

    def __init__(self, start: Callable[[int], Worker], workers: int, *, timeout: float) -> None:
        self._start, self._count, self._timeout = start, workers, timeout

    def map(self, requests: Sequence[EditRequest]) -> Results:
        """As `Executor.map`. Raises EditError too where no worker delivers anything for `timeout` seconds."""
        from kbsync.editor.replica import target_of

        tally = Tally(requests, self._count)
        crew = _Crew(self._start, self._count)
        try:
            for chunk in _chunks(list(tally.waiting.values()), self._count):
                crew.submit(chunk)
            while tally.waiting:
                said = self._next(crew)
                if isinstance(said, _Ended):
                    for request in tally.ended(said.chunk, said.reason):
                        crew.submit([request])
                elif (accepted := tally.accept(said["digest"])) is not None:
                    yield accepted, target_of(said)
            tally.check()
        finally:
            crew.close()

    def _next(self, crew: _Crew) -> Event | _Ended:
        try:
            said = crew.said.get(timeout=self._timeout)
        except queue.Empty:
            raise EditError(
                f"no worker delivered anything for {self._timeout:.0f} s", hint="executor.timeout in kbsync.yaml"
            ) from None
        if isinstance(said, BaseException):
            raise said
        if isinstance(said, dict) and "error" in said:
            raise KbsyncError.from_json(said["error"])
        return said


class _Crew:
    """Threads that each talk with one worker, and pass on what it says."""

    def __init__(self, start: Callable[[int], Worker], count: int) -> None:
        self.said: queue.SimpleQueue[Event | _Ended | BaseException] = queue.SimpleQueue()
        self._start, self._workers, self._closed = start, dict[int, Worker](), False
        self._threads = ThreadPoolExecutor(count)
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(count):
            self._slots.put(slot)

    def submit(self, chunk: Sequence[EditRequest]) -> None:
        """Let the next free worker do it; what it says, and then that it has ended, comes in `said`."""
        self._threads.submit(self._work, chunk)

    def close(self) -> None:
        """End all workers and threads."""
        self._closed = True
        for worker in list(self._workers.values()):
            worker.end()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers.values():
            worker.end()
            worker.close()

    def _work(self, chunk: Sequence[EditRequest]) -> None:
        slot = self._slots.get()
        try:
            self.said.put(_Ended(chunk, self._converse(slot, chunk)))
        except Exception as error:  # whatever it is, the caller raises it
            self.said.put(error)
        finally:
            self._slots.put(slot)

    def _converse(self, slot: int, chunk: Sequence[EditRequest]) -> str:
        """Pass on all that the slot's worker says to the chunk. The answer: how the worker ended."""
        try:
            if slot not in self._workers:
                self._workers[slot] = self._start(slot)
            if self._closed:  # it may have been started after `close` had ended the others
                self._workers[slot].end()
            for event in self._workers[slot].events(chunk):
                self.said.put(event)
        except WorkerLost as lost:
            if slot in self._workers:
                worker = self._workers.pop(slot)
                worker.end()
                worker.close()
            return str(lost)
        return "nothing said of them"


def _chunks(requests: Sequence[EditRequest], workers: int) -> list[Sequence[EditRequest]]:
    """The requests in their order, in equal chunks: what is computed together never depends on who is faster."""
    rounds = min(max(1, len(requests) // (workers * PACKED)), ROUNDS)
    size = min(CHUNK, -(-len(requests) // (workers * rounds)))
    return [requests[start : start + size] for start in range(0, len(requests), size)]


class _Process:
    """A replica in a child process."""

    def __init__(self, job: ReplicaJob, environment: Mapping[str, str]) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = child.start("kbsync.editor.replica", self._stderr, environment)
        self._send(job.model_dump_json())

    def events(self, chunk: Sequence[EditRequest]) -> Iterator[Event]:
        self._send(json.dumps([request.to_json() for request in chunk]))
        for line in self._process.stdout or ():
            try:
                event = json.loads(line)
            except ValueError:
                continue  # a library wrote to stdout
            if "done" in event:
                return
            yield event
        raise WorkerLost(child.last_words(self._process, self._stderr))

    def end(self) -> None:
        child.end(self._process)

    def close(self) -> None:
        self._stderr.close()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _send(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError, ValueError):  # then there is nothing to read, which says so
            if self._process.stdin is not None:
                self._process.stdin.write(line.encode() + b"\n")
                self._process.stdin.flush()


def _processes(settings: ExecutorSettings, job: ReplicaJob) -> Callable[[int], Worker]:
    """Starts processes that share this machine's threads, each with GPUs of its own."""
    import torch

    count = torch.cuda.device_count()
    gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")[:count]
    device = placed(job.device, count, settings)
    threads = max(1, torch.get_num_threads() // settings.workers)
    job = job.model_copy(update={"device": device, "threads": threads})

    def start(slot: int) -> Worker:
        own = gpus[slot * settings.gpus : (slot + 1) * settings.gpus] if device != "cpu" else []
        return _Process(job, {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ",".join(own)})

    return start
