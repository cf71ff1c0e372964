"""Metrics for Prometheus: read from the ledger when they are asked for, so that counters outlive every restart.

print(Exposition(ledger, lambda: catalog)().decode())

Names and units follow https://prometheus.io/docs/practices/naming/; docs/metrics.md explains each. Points in time are
exported as such (`_timestamp_seconds`), not as ages: `time() - x` in a rule goes on counting while nobody scrapes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily

from kbsync.catalog import Catalog
from kbsync.config import Workspace
from kbsync.ledger import Ledger
from kbsync.samples import Sample, samples

__all__ = ["DECLARED", "Declared", "Exposition", "measure", "to_json"]

FRESH = 5.0
"""Seconds for which an exposition is good: many scrapers cost the ledger no more than one."""
SHARE = 20
"""It is good for so many times as long as it took, too: metrics take no more than 5 % of the time, however large the
ledger has become."""

Checks = Callable[[], Mapping[str, bool]]
Kind = Literal["gauge", "counter", "summary"]


@dataclass(frozen=True, slots=True)
class Declared:
    """What a metric is. A summary has no quantiles: a count and a sum."""

    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()


def _declared(kind: Kind, name: str, text: str, *labels: str) -> Declared:
    return Declared(f"kbsync_{name}", kind, text, labels)


_PLACE = ("policy", "source", "relation")

DECLARED: Sequence[Declared] = (
    _declared("gauge", "build_info", "1; what is running is in the labels.", "version", "python"),
    _declared("gauge", "daemon_running", "1 while a process holds the workspace's lock, else 0."),
    _declared("gauge", "check_ok", "1 while a check of /readyz is well, else 0; from the server alone.", "check"),
    _declared("gauge", "heartbeat_timestamp_seconds", "Last sign of life of a part of the daemon.", "part"),
    _declared("gauge", "exposition_seconds", "How long these metrics took to read."),
    _declared("counter", "notices_total", "Notices to people.", "kind"),
    _declared("gauge", "notices_undelivered", "Notices that are still to come through.", "channel"),
    _declared("counter", "notices_given_up_total", "Notices that never came through.", "channel"),
    _declared("counter", "runs_total", "Runs that are over, by how they ended.", "policy", "status"),
    _declared("gauge", "running_runs", "Runs that are going on.", "policy"),
    _declared("summary", "run_phase_seconds", "What the phases of runs took.", "policy", "phase"),
    _declared("gauge", "policy_failures", "Passes that failed in a row up to now.", "policy"),
    _declared("gauge", "policy_last_start_timestamp_seconds", "When the last pass began.", "policy"),
    _declared("gauge", "policy_last_success_timestamp_seconds", "When a pass last ended well.", "policy"),
    _declared("gauge", "policy_next_due_timestamp_seconds", "When the next pass is due.", "policy"),
    _declared("gauge", "held_runs", "Runs that wait for approval.", "policy"),
    _declared("gauge", "held_runs_oldest_timestamp_seconds", "Since when the oldest of them waits.", "policy"),
    _declared("counter", "source_answers_total", "Answers, by HTTP status or what came instead.", "source", "outcome"),
    _declared("gauge", "source_last_success_timestamp_seconds", "When the source last answered.", "source"),
    _declared("gauge", "source_failures", "Times that the source failed in a row up to now.", "source"),
    _declared("gauge", "source_blocked", "1 while the source refuses us, else 0.", "source"),
    _declared("gauge", "source_retry_timestamp_seconds", "Until when the source is left alone.", "source"),
    _declared("gauge", "quarantined_rows", "Rows that cannot be used.", "source"),
    _declared("gauge", "facts", "Facts that the ledger holds true.", "relation", "status"),
    _declared("gauge", "conflicts", "Open conflicts.", "relation", "kind"),
    _declared("gauge", "waiting_keys", "Keys whose claims do not count yet.", "relation", "reason"),
    _declared("gauge", "freshness_seconds", "From a change to the model that answers it.", *_PLACE, "percentile"),
    _declared("gauge", "freshness_target_seconds", "What the policy wants of it.", "policy"),
    _declared("gauge", "freshness_missed", "1 while the target is missed, else 0.", *_PLACE),
    _declared("gauge", "waiting_changes", "Changes that the model does not answer yet.", *_PLACE, "reason"),
    _declared("gauge", "waiting_changes_oldest_timestamp_seconds", "When the oldest of them began.", *_PLACE),
    _declared("gauge", "head_version", "The newest state: what the next edit builds on.", "model"),
    _declared("gauge", "head_timestamp_seconds", "When HEAD last moved.", "model"),
    _declared("gauge", "alias_version", "The version that an alias names.", "model", "alias"),
    _declared("counter", "versions_total", "Versions that were published.", "model", "kind"),
    _declared("gauge", "versions_restorable", "Versions whose weights can be rebuilt.", "model"),
    _declared("gauge", "versions_since_rebase", "Versions on top of the last rebase.", "model"),
    _declared("gauge", "facts_applied", "Facts in the weights of HEAD.", "model"),
    _declared("gauge", "held_facts", "Facts that are frozen in the weights.", "model", "reason"),
    _declared("counter", "facts_held_total", "Facts that were ever held.", "model", "reason"),
    _declared("counter", "gate_results_total", "Edits that the gate let pass, or not.", "model", "policy", "result"),
    _declared("counter", "fact_checks_total", "Old facts that were asked again.", "model", "answered"),
    _declared("gauge", "probe_efficacy_ratio", "Share of its facts that HEAD answers.", "model"),
    _declared("gauge", "probe_paraphrase_ratio", "Share that it answers in other words, too.", "model"),
    _declared("gauge", "probe_specificity_drop_ratio", "Share of control answers that changed.", "model"),
    _declared("gauge", "probe_drift_nats", "KL divergence from the base, per token.", "model"),
    _declared("gauge", "capacity_norm_ratio", "Largest change of a matrix, as a share of it.", "model"),
    _declared("gauge", "capacity_norm_limit_ratio", "strategy.max_relative_norm.", "model"),
    _declared("gauge", "capacity_facts_left", "About how many more facts fit below the limit.", "model"),
    _declared("gauge", "capacity_retention_ratio", "Share of earlier facts that is still answered.", "model"),
    _declared("gauge", "capacity_retention_limit_ratio", "strategy.min_retention.", "model"),
    _declared("summary", "target_vector_seconds", "What computing target vectors took, one per fact.", "policy"),
    _declared("gauge", "last_target_vector_seconds", "Of the newest edit, per fact."),
    _declared("gauge", "edit_gpu_memory_peak_bytes", "Peak on one GPU of the edit behind HEAD.", "model"),
    _declared("gauge", "ledger_bytes", "Size of the database."),
    _declared("gauge", "data_bytes", "Files in the data folder.", "part"),
    _declared("gauge", "disk_free_bytes", "Free on the disk of the data folder."),
    _declared("gauge", "disk_size_bytes", "Size of that disk."),
)
"""Every metric, in the order of the exposition."""


def measure(workspace: Workspace, catalog: Catalog, ledger: Ledger) -> list[Sample]:
    """Everything that is known now. Raises LedgerError or Busy where the ledger cannot be read."""
    start = time.perf_counter()
    found = list(samples(workspace, catalog, ledger, datetime.now(UTC)))
    return [*found, ("exposition_seconds", (), time.perf_counter() - start)]


def to_json(found: Iterable[Sample]) -> list[dict[str, Any]]:
    """Samples as a JSON value: name, labels, and the value, or the count and sum of a summary."""
    names = {declared.name: declared.labels for declared in DECLARED}
    shown = []
    for name, labels, value in found:
        row: dict[str, Any] = {"name": f"kbsync_{name}"}
        row["labels"] = dict(zip(names[row["name"]], labels, strict=True))
        row |= {"count": value[0], "sum": value[1]} if isinstance(value, tuple) else {"value": value}
        shown.append(row)
    return shown


class Exposition:
    """The text of /metrics, made anew when the last one is no longer good. Thread-safe.

    `catalog`: gives the settings, sources and policies that are in force. `checks`: those of the daemon that this is;
    with it come memory, processor time and open files of this process, as `process_*`.
    """

    def __init__(
        self,
        ledger: Ledger,
        catalog: Callable[[], Catalog],
        *,
        fresh: float = FRESH,
        checks: Checks | None = None,
    ) -> None:
        self._ledger, self._catalog, self._fresh = ledger, catalog, fresh
        self._checks = checks
        self._process = ProcessCollector(registry=None) if checks else None
        self._lock = threading.Lock()
        self._good_until = 0.0
        self._text = b""

    def __call__(self) -> bytes:
        """The text, in UTF-8. Raises LedgerError or Busy where the ledger cannot be read."""
        with self._lock:
            if (start := time.monotonic()) >= self._good_until:
                catalog = self._catalog()
                found = measure(catalog.workspace, catalog, self._ledger)
                found += [("check_ok", (name,), ok) for name, ok in (self._checks() if self._checks else {}).items()]
                self._text = generate_latest(_Families(found, self._process))
                now = time.monotonic()
                self._good_until = now + max(self._fresh, SHARE * (now - start) if self._fresh else 0.0)
            return self._text


class _Families:
    """Samples as prometheus-client wants them."""

    def __init__(self, found: Iterable[Sample], process: ProcessCollector | None) -> None:
        self._process = process
        self._samples: dict[str, list[Sample]] = {}
        for sample in found:
            self._samples.setdefault(f"kbsync_{sample[0]}", []).append(sample)

    def collect(self) -> Iterator[Metric]:
        """A family per declared metric that has a value, then those of the process."""
        for declared in DECLARED:
            if declared.name in self._samples:
                yield _family(declared, self._samples[declared.name])
        if self._process:
            yield from self._process.collect()


def _family(declared: Declared, found: Collection[Sample]) -> Metric:
    values = [(labels, value if isinstance(value, tuple) else (1, value)) for _, labels, value in found]
    if declared.kind == "summary":
        summary = SummaryMetricFamily(declared.name, declared.text, labels=declared.labels)
        for labels, (count, total) in values:
            summary.add_metric(labels, count, total)
        return summary
    make = CounterMetricFamily if declared.kind == "counter" else GaugeMetricFamily
    family = make(declared.name, declared.text, labels=declared.labels)
    for labels, (_, value) in values:
        family.add_metric(labels, value)
    return family
