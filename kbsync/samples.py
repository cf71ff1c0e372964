"""What is measured now, sample by sample: from the ledger in short readings, from the files beside it, from the disk.

What is not known has no sample; there is no NaN. Numbers of rows are counted by the database: a million facts cost one
aggregate.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kbsync.catalog import Catalog
from kbsync.config import Workspace
from kbsync.errors import StoreError
from kbsync.freshness import freshness_rows
from kbsync.ledger import Ledger, ModelRow, Reader, VersionRow
from kbsync.lock import held_by
from kbsync.odometer import read_odometer
from kbsync.strategy import facts_left
from kbsync.versions.store import VersionStore

__all__ = ["Sample", "samples"]

Sample = tuple[str, tuple[str, ...], float | tuple[int, float]]
"""Name (without kbsync_), label values, value; of a summary the count and the sum."""

ANSWERED = ("200", "304")
"""Outcomes of a source that are an answer."""
UNFINISHED = ("running", "held")


def samples(workspace: Workspace, catalog: Catalog, ledger: Ledger, now: datetime) -> Iterator[Sample]:
    """Everything that `kbsync.metrics.DECLARED` has, as far as it is known. Raises LedgerError or Busy where the ledger
    cannot be read."""
    for reading in _readings(workspace, catalog, now):
        with ledger.read() as db:
            found = list(reading(db))
        yield from found
    with ledger.read() as db:
        model = db.model_named(workspace.settings.model)
        found = [*_model(db, model), *_gate(catalog, db, model)] if model else []
        head = db.version(model.id, model.head) if model else None
    yield from found
    if head is not None:  # files are read once the ledger is not
        yield from _some("edit_gpu_memory_peak_bytes", (head.model,), _numerics(workspace, head).get("gpu_peak_bytes"))
        yield from _capacity(workspace, ledger, head.model)
    yield from _disk(workspace.data)


def _readings(workspace: Workspace, catalog: Catalog, now: datetime) -> Iterator[Callable[[Reader], Iterable[Sample]]]:
    """Each with a transaction of its own: nobody can commit while SQLite's rollback journal is read, and to count a
    million facts takes it a second, here once and once for their policy. In between a writer comes to its turn."""
    yield lambda db: (*_daemon(workspace, db), *_runs(catalog, db), *_sources(catalog, db))
    yield _facts
    for name, policy in catalog.policies.items():
        yield partial(_freshness, replace(catalog, policies={name: policy}), now)


def _daemon(workspace: Workspace, db: Reader) -> Iterator[Sample]:
    yield "build_info", (version("kbsync"), platform.python_version()), 1
    yield "daemon_running", (), held_by(workspace.lock) is not None
    for part, beat in db.beats().items():
        yield "heartbeat_timestamp_seconds", (part,), beat.at.timestamp()
    yield "ledger_bytes", (), db.size()
    yield from _counted("notices_total", db.notice_counts())
    channels = [channel.name for channel in workspace.settings.notify.channels]
    waiting, given_up = db.undelivered(), db.given_up()
    for name in channels:
        yield "notices_undelivered", (name,), waiting.get(name, 0)
        yield "notices_given_up_total", (name,), given_up.get(name, 0)


def _runs(catalog: Catalog, db: Reader) -> Iterator[Sample]:
    """How a policy stands that is no longer declared is nothing that anybody could still mend."""
    for (policy, status), number in db.run_counts().items():
        if status == "running":
            yield "running_runs", (policy,), number
        elif status not in UNFINISHED:
            yield "runs_total", (policy, status), number
    for policy, (number, since) in db.held_runs().items():
        yield "held_runs", (policy,), number
        yield "held_runs_oldest_timestamp_seconds", (policy,), since.timestamp()
    for policy, number in db.failures_in_a_row().items():
        if policy in catalog.policies:
            yield "policy_failures", (policy,), number
    for state in db.schedule_states():
        if state.policy not in catalog.policies:
            continue
        yield from _moment("policy_last_start_timestamp_seconds", (state.policy,), state.last_started)
        yield from _moment("policy_last_success_timestamp_seconds", (state.policy,), state.last_ok)
        yield from _moment("policy_next_due_timestamp_seconds", (state.policy,), state.next_due)
    for (policy, phase), took in db.phase_totals().items():
        yield "run_phase_seconds", (policy, phase), (took.runs, took.seconds)
        if phase == "targets":
            yield "target_vector_seconds", (policy,), (took.amount, took.seconds)
    if last := db.last_targets():
        yield "last_target_vector_seconds", (), last.seconds / last.amount


def _sources(catalog: Catalog, db: Reader) -> Iterator[Sample]:
    answered: dict[str, datetime] = {}
    for (source, outcome), (number, last) in db.answers().items():
        yield "source_answers_total", (source, outcome), number
        if outcome in ANSWERED and source in catalog.sources:
            answered[source] = max(last, answered.get(source, last))
    for source, last in answered.items():
        yield "source_last_success_timestamp_seconds", (source,), last.timestamp()
    for state in db.source_states():
        if state.source not in catalog.sources:
            continue
        yield "source_failures", (state.source,), state.failures
        yield "source_blocked", (state.source,), state.blocked
        yield from _moment("source_retry_timestamp_seconds", (state.source,), state.retry_at)
    for (source,), number in db.quarantine_counts().items():
        if source in catalog.sources:
            yield "quarantined_rows", (source,), number


def _facts(db: Reader) -> Iterator[Sample]:
    yield from _counted("facts", db.fact_counts())
    yield from _counted("conflicts", db.conflict_counts())
    yield from _counted("waiting_keys", db.waiting_counts())


def _freshness(catalog: Catalog, now: datetime, db: Reader) -> Iterator[Sample]:
    for name, policy in catalog.policies.items():
        yield from _some("freshness_target_seconds", (name,), policy.freshness.target)
    for row in freshness_rows(db, catalog, now):
        labels = (row.policy, row.source, row.relation)
        yield from _some("freshness_seconds", (*labels, "50"), row.p50)
        yield from _some("freshness_seconds", (*labels, "95"), row.p95)
        yield "freshness_missed", labels, bool(row.missed(now))
        waiting: dict[str, int] = {}
        for part in row.backlog:
            waiting[part.why] = waiting.get(part.why, 0) + part.keys
        for why, keys in sorted(waiting.items()):
            yield "waiting_changes", (*labels, why), keys
        if row.oldest:
            yield "waiting_changes_oldest_timestamp_seconds", labels, row.oldest.since.timestamp()


def _model(db: Reader, model: ModelRow) -> Iterator[Sample]:
    of = (model.id,)
    yield "head_version", of, model.head
    yield "head_timestamp_seconds", of, db.head_moves(model.id, limit=1)[0].at.timestamp()
    for alias, number in db.aliases(model.id).items():
        yield "alias_version", (*of, alias), number
    yield from _counted("versions_total", db.version_counts(model.id), of)
    yield "versions_restorable", of, len(db.restorable(model.id))
    yield "facts_applied", of, len(db.applied(model.id, model.head))
    yield from _counted("held_facts", db.hold_counts(model.id), of)
    yield from _counted("facts_held_total", db.hold_counts(model.id, ever=True), of)
    for (answered,), number in db.check_counts(model.id).items():
        yield "fact_checks_total", (*of, "yes" if answered else "no"), number
    report = db.version(model.id, model.head).probe or {}
    for name in ("efficacy", "paraphrase", "specificity_drop"):
        yield from _some(f"probe_{name}_ratio", of, report.get(name))
    yield from _some("probe_drift_nats", of, report.get("drift"))


def _gate(catalog: Catalog, db: Reader, model: ModelRow) -> Iterator[Sample]:
    """With what has not happened yet as 0: Prometheus cannot see that a series increased which was not there before."""
    never = dict.fromkeys(((policy, result) for policy in catalog.policies for result in ("published", "rejected")), 0)
    yield from _counted("gate_results_total", never | db.gate_counts(model.id), (model.id,))


def _numerics(workspace: Workspace, row: VersionRow) -> Mapping[str, Any]:
    """What a version measured of itself; nothing where its manifest cannot be read (`verify` says so)."""
    if row.manifest_sha256 is None:
        return {}
    try:
        return VersionStore(workspace.data, row.model).manifest(row.number, row.manifest_sha256).numerics
    except StoreError:
        return {}


def _capacity(workspace: Workspace, ledger: Ledger, model: str) -> Iterator[Sample]:
    of, strategy = (model,), workspace.settings.strategy
    odometer = read_odometer(ledger, VersionStore(workspace.data, model), model)
    yield "capacity_norm_limit_ratio", of, strategy.max_relative_norm
    yield "capacity_retention_limit_ratio", of, strategy.min_retention
    yield "versions_since_rebase", of, odometer.since
    if odometer.now:
        yield "capacity_norm_ratio", of, odometer.now.norm
        yield from _some("capacity_retention_ratio", of, odometer.now.retention)
        yield from _some("capacity_facts_left", of, facts_left(strategy, odometer.now))


def _disk(data: Path) -> Iterator[Sample]:
    for part, size in sorted(_sizes(data).items()):
        yield "data_bytes", (part,), size
    usage = shutil.disk_usage(data if data.is_dir() else data.parent)
    yield "disk_free_bytes", (), usage.free
    yield "disk_size_bytes", (), usage.total


def _sizes(data: Path) -> dict[str, int]:
    """Bytes of the files below each folder of `data`; of those beside the folders as `.`."""
    found = {".": 0}
    for folder, _, names in os.walk(data):
        part = Path(folder).relative_to(data).parts[:1] or (".",)
        found[part[0]] = found.get(part[0], 0) + sum(_size(Path(folder, name)) for name in names)
    return found


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:  # gone meanwhile
        return 0


def _some(name: str, labels: tuple[str, ...], value: float | None) -> Iterator[Sample]:
    if value is not None:
        yield name, labels, value


def _moment(name: str, labels: tuple[str, ...], at: datetime | None) -> Iterator[Sample]:
    if at is not None:
        yield name, labels, at.timestamp()


def _counted(name: str, numbers: Mapping[Any, int], of: tuple[str, ...] = ()) -> Iterator[Sample]:
    for labels, number in numbers.items():
        yield name, (*of, *labels), number
