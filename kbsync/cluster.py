"""Workers on a Ray cluster: actors with one replica each, on a cluster that is reached with a token.

Whoever reaches a Ray port runs code, so kbsync joins a cluster that its operator protects, or, with `address: local`,
starts one that listens on the loopback address only, with a token that is made for it and kept in no file. Ray is
imported here, when it is asked for. https://docs.ray.io/en/latest/ray-security/token-auth.html

    start = actors(settings, job)            # joins the cluster, or raises UsageError at once
    start(0).events(requests)
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

from kbsync.editor.job import ExecutorSettings, ReplicaJob
from kbsync.errors import UsageError
from kbsync.executor import Event, Worker, WorkerLost, placed
from kbsync.facts import EditRequest

__all__ = ["actors", "join"]

PLACE_SECONDS = 120.0
"""What Ray may take to place a worker and start its process."""
LOOPBACK = "127.0.0.1"
ALWAYS = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # an actor without GPUs sees what its node sees: its `device` decides
}
LOCAL = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Makes Ray take the loopback address as the node's, whatever the system; every port then listens there only."""


def actors(settings: ExecutorSettings, job: ReplicaJob) -> Callable[[int], Worker]:
    """Starts actors that share the cluster's CPUs, or have GPUs of their own.

    Raises UsageError where Ray is not installed, the cluster cannot be joined, or lacks what the workers need.
    """
    ray = join(settings.address)
    there = ray.cluster_resources()
    device = placed(job.device, int(there.get("GPU", 0)), settings)
    cpus = int(there.get("CPU", 0)) // settings.workers
    if not cpus:
        raise UsageError(
            f"{settings.workers} workers need as many CPUs, and the Ray cluster has {int(there.get('CPU', 0))}",
            hint="lower executor.workers",
        )
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": 0, "max_restarts": 0, "max_task_retries": 0}
    if device != "cpu":
        options |= {"num_cpus": 1, "num_gpus": settings.gpus}
    job = job.model_copy(update={"device": device, "threads": cpus if device == "cpu" else None})
    return lambda _slot: _Actor(ray, options, job)


def join(address: str) -> Any:
    """The module `ray`, joined to the cluster at `address` (`auto`, `local`, `HOST:PORT`) unless it is joined already.

    Sets the variables that Ray reads, when it is imported, in this process's environment. Raises UsageError.
    """
    os.environ.update(ALWAYS)
    if address == "local":
        os.environ.update(LOCAL)
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        ray: Any = import_module("ray")
    except ImportError as error:
        raise UsageError("executor.backend ray needs Ray", hint="pip install 'kbsync[ray]'") from error
    if not ray.is_initialized():
        quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        try:
            ray.init(address=address, **quiet, **({"include_dashboard": False} if address == "local" else {}))
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise UsageError(
                f"cannot join the Ray cluster at {address}: {said[0]}",
                hint="start one (ray start --head), or set executor.address; docs/scale-out.md",
            ) from error
    if address == "local" and any(node["NodeManagerAddress"] != LOOPBACK for node in ray.nodes()):
        ray.shutdown()
        raise UsageError(
            f"Ray {ray.__version__} listens on other addresses than {LOOPBACK}", hint="use `backend: process`"
        )
    return ray


class _Actor:
    """A replica in a Ray actor."""

    def __init__(self, ray: Any, options: dict[str, Any], job: ReplicaJob) -> None:
        from kbsync.editor.replica import Replica

        self._ray = ray
        self._actor = ray.remote(**options)(Replica).remote(job)
        ready, _ = ray.wait([self._actor.__ray_ready__.remote()], timeout=PLACE_SECONDS)
        if not ready:
            self.end()
            raise WorkerLost(f"no place on the Ray cluster for {PLACE_SECONDS:.0f} s")

    def events(self, chunk: Sequence[EditRequest]) -> Iterator[Event]:
        try:
            for answer in self._actor.events.remote([request.to_json() for request in chunk]):
                yield self._ray.get(answer)
        except self._ray.exceptions.RayError as error:
            raise WorkerLost(" ".join(str(error).split())[:200]) from error

    def end(self) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._actor)

    def close(self) -> None:
        """Ray holds nothing of it here."""
