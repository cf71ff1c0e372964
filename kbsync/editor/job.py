"""What the parent asks of the child process that edits, and what it answers: plain values, JSON over a pipe.

Torch-free, so that the daemon can speak it without loading a model.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kbsync.editor.preset import Preset
from kbsync.facts import EditRequest
from kbsync.policy import Seconds
from kbsync.versions.manifest import ActiveDelta, Manifest

__all__ = [
    "AskJob",
    "AskResult",
    "ControlFile",
    "EditJob",
    "EditResult",
    "ExecutorSettings",
    "FailedFact",
    "ModelJob",
    "ReplicaJob",
]


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class ControlFile(_Value):
    """A file of subjects of a relation that are never synced, and the relation's prompt template."""

    path: str
    prompt: str


class ExecutorSettings(_Value):
    """`executor:` of kbsync.yaml: who computes target vectors."""

    backend: Literal["serial", "process", "ray"] = "serial"
    """In the edit's own process, in processes of this machine, or on a Ray cluster."""
    workers: Annotated[int, Field(ge=1)] = 2
    """Replicas of the model at work at the same time (`serial` has one)."""
    gpus: Annotated[int, Field(ge=1)] = 1
    """GPUs of each worker, where the device is one."""
    address: Annotated[str, Field(min_length=1)] = "auto"
    """Of the Ray cluster: `HOST:PORT`, `auto` (the one of this machine), or `local`: start one for the edit."""
    timeout: Annotated[Seconds, Field(gt=0)] = 3600.0
    """Seconds without a result from any worker after which the edit fails."""


class ModelJob(_Value):
    """The base model of a job, where and how to load it, and the settings of the edit. The path is absolute."""

    model_path: str
    fingerprint: str
    device: str
    dtype: str
    max_gpu_memory: int | None = None
    preset: Preset


class ReplicaJob(ModelJob):
    """What a worker that computes target vectors has to know beside the requests.

    `libraries` are the versions that it must have; `threads` are torch's (None: as it finds them).
    """

    contexts: tuple[str, ...]
    libraries: dict[str, str]
    threads: int | None = None


class EditJob(ModelJob):
    """One edit: leave columns out of the deltas of a version, teach new requests, write and probe the outcome.

    Paths are absolute. `active` are the deltas of the version that the edit starts from, whose recorded hash is
    `weights_sha256` (None for a version whose hash is not known yet: the pristine base before its first edit).
    """

    executor: ExecutorSettings = ExecutorSettings()
    deltas: str
    targets: str
    active: tuple[ActiveDelta, ...]
    weights_sha256: str | None
    live: tuple[tuple[str, tuple[int, ...]], ...]
    """The columns to keep, delta by delta in the order in which they are added up; all others are left out."""
    same: tuple[ActiveDelta, ...] | None = None
    """Active deltas known to hold just the `live` columns: taken as they are. Of a rebase: none."""
    supersedes: dict[str, tuple[tuple[str, int], ...]] = {}
    """Digest of a request -> each live (delta, column) that it replaces: left out if, and only if, the request stays or
    the base answers it."""
    requests: tuple[dict[str, Any], ...]
    """Edit requests as JSON (`EditRequest.to_json`), one column each in this order."""
    skip_known: tuple[str, ...] = ()
    """Digests of requests that are left out where the base already answers them."""
    settled: tuple[str, ...] = ()
    """Digests of requests that the version left behind holds already: a rebase must not lose what it answers."""
    instead: dict[str, tuple[dict[str, Any], ...]] = {}
    """Digest of a request -> the requests that a rebase inserts in its place should it fail: what it was to replace."""
    retained: tuple[dict[str, Any], ...] = ()
    """Live facts of earlier versions to probe again."""
    watched: tuple[dict[str, Any], ...] = ()
    """Requests without an edit because the base answers them: does the outcome, too?"""
    controls: tuple[ControlFile, ...] = ()
    """Never-synced subjects to measure specificity on; none: the shipped common-knowledge prompts."""
    synced_subjects: tuple[str, ...] = ()

    def edit_requests(self) -> list[EditRequest]:
        """The requests as values."""
        return [EditRequest.from_json(value) for value in self.requests]

    def replaced_requests(self) -> dict[str, list[EditRequest]]:
        """`instead` as values."""
        return {digest: [EditRequest.from_json(value) for value in olds] for digest, olds in self.instead.items()}

    def retained_requests(self) -> list[EditRequest]:
        """The retained facts as values."""
        return [EditRequest.from_json(value) for value in self.retained]

    def watched_requests(self) -> list[EditRequest]:
        """The watched facts as values."""
        return [EditRequest.from_json(value) for value in self.watched]


class FailedFact(_Value):
    """A request that cannot be placed in its tokens, has no target vector or is not answered by the edited weights,
    with the evidence."""

    digest: str
    evidence: str


class EditResult(_Value):
    """What the child made. `columns` are the digests of the new delta's columns in order; without new columns `delta`
    is None. The files named are on disk and fsynced; nothing is published yet."""

    active: tuple[ActiveDelta, ...]
    modules: tuple[str, ...]
    dtype: str
    weights_sha256: str
    base_weights_sha256: str
    delta: str | None
    columns: tuple[str, ...]
    failed: tuple[FailedFact, ...]
    """Left out of the weights."""
    answered: int = 0
    """How many of the live facts that are to stay, or had to, the version left behind answers."""
    lost: tuple[FailedFact, ...] = ()
    """Those of them that the outcome does not answer."""
    known: dict[str, bool]
    remembered: tuple[str, ...] = ()
    """Digests of requests that the base answers without an edit, and the outcome does, too."""
    forgotten: tuple[str, ...] = ()
    """Those that the base answers, and the outcome does not."""
    probe: dict[str, Any]
    numerics: dict[str, Any]
    seconds: dict[str, float]
    computed: int = 0
    """Target vectors that were not in the cache: what `seconds["targets"]` was spent on."""
    libraries: dict[str, str]


class AskJob(ModelJob):
    """Does a version still answer these requests? `deltas` is the absolute path of the delta files."""

    deltas: str
    manifest: Manifest
    requests: tuple[dict[str, Any], ...]

    def ask_requests(self) -> list[EditRequest]:
        """The requests as values."""
        return [EditRequest.from_json(value) for value in self.requests]


class AskResult(_Value):
    """The digests of the requests that the version answers, and the others with what it answers instead."""

    answered: tuple[str, ...]
    failed: tuple[FailedFact, ...]
