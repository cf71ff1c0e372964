"""A worker's copy of the pristine base: it computes target vectors for whoever asks, and writes nothing.

The same `Replica` stands in a child process (`python -m kbsync.editor.replica`: one job in on stdin, then chunks of
requests, events out) and in a Ray actor; `kbsync.executor` is the other end of both. Events are plain JSON: a target
as soon as it is finished, or the error that ends the work.

    for event in Replica(job).events([request.to_json()]): ...       # {"digest": ..., "z": ..., "loss": ...}
"""

from __future__ import annotations

import base64
import json
import os
import queue
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from kbsync.editor.job import ModelJob, ReplicaJob
from kbsync.editor.model import Base, load_base
from kbsync.editor.targets import Target, stream_targets
from kbsync.errors import BaseMismatch, EditError, KbsyncError, ModelError
from kbsync.facts import EditRequest
from kbsync.hub import fingerprint

__all__ = ["Replica", "libraries", "main", "open_base", "target_of"]


def open_base(job: ModelJob) -> Base:
    """The model of a job, loaded with the job's limit on GPU memory, on a GPU with kernels that repeat their results.

    Raises ModelError as `load_base` does.
    """
    base = load_base(Path(job.model_path), fingerprint=job.fingerprint, device=job.device, dtype=job.dtype)
    if base.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
        torch.use_deterministic_algorithms(True, warn_only=True)
    if job.max_gpu_memory is not None and base.device.type == "cuda":
        for gpu in {parameter.device for parameter in base.network.parameters()}:
            total = torch.cuda.get_device_properties(gpu).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, job.max_gpu_memory / total), gpu)
    return base


def libraries() -> dict[str, str]:
    """Versions that must be the same wherever parts of one edit are computed."""
    return {name: version(name) for name in ("kbsync", "torch", "transformers")}


def target_of(event: Mapping[str, Any]) -> Target:
    """The target of an event: z bit for bit, and what was measured of it."""
    values = {one.name: event[one.name] for one in fields(Target)}
    return Target(**values | {"z": load(base64.b64decode(event["z"]))["z"]})


class Replica:
    """One copy of a job's base, loaded and checked when it is first asked."""

    def __init__(self, job: ReplicaJob) -> None:
        self._job = job

    def events(self, requests: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """A chunk of requests (as JSON) worked off: an event per target, in the order in which they are finished.

        What is wrong with the model, the worker or a request comes as the last event, `{"error": ...}`.
        """
        try:
            wanted = [EditRequest.from_json(value) for value in requests]
            for request, target in stream_targets(self._base, wanted, self._job.contexts, self._job.preset):
                yield {"digest": request.digest, **_plain(target)}
        except KbsyncError as error:
            yield {"error": error.to_json()}

    @cached_property
    def _base(self) -> Base:
        """The pristine base, if it is the very one that the edit is made on and the libraries are the same."""
        folder = Path(self._job.model_path)
        if (own := libraries()) != self._job.libraries:
            name = next(name for name in own if own[name] != self._job.libraries.get(name))
            wanted = self._job.libraries.get(name)
            raise EditError(
                f"a worker on {os.uname().nodename} has {name} {own[name]}, this process {wanted}",
                hint=f"install {name}=={wanted} there",
            )
        if not folder.is_dir():
            raise ModelError(f"{folder} is not there on worker {os.uname().nodename}", hint="put the model there, too")
        if fingerprint(folder) != self._job.fingerprint:
            raise BaseMismatch(
                f"{folder} on worker {os.uname().nodename} is not the base model of this edit",
                hint="bring the same checkpoint to every worker",
            )
        if self._job.threads is not None:
            torch.set_num_threads(self._job.threads)
        return open_base(self._job)


def _plain(target: Target) -> dict[str, Any]:
    values = {one.name: getattr(target, one.name) for one in fields(Target)}
    return values | {"z": base64.b64encode(save({"z": target.z.contiguous()})).decode()}


def main() -> None:
    """Read the job, then chunks of requests, one JSON line each; ends at once when the parent's end of stdin closes."""
    replica = Replica(ReplicaJob.model_validate_json(sys.stdin.readline()))
    chunks: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(chunks,), daemon=True).start()
    while True:
        for event in replica.events(json.loads(chunks.get())):
            _say(event)
        _say({"done": True})


def _listen(chunks: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        chunks.put(line)
    os._exit(0)


def _say(event: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
