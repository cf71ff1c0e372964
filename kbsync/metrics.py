"""Metrics for Prometheus: read from the ledger when they are asked for, so that counters outlive every restart.

print(Exposition(workspace, ledger)().decode())

Names and units follow https://prometheus.io/docs/practices/naming/; docs/metrics.md explains each. Points in time are
exported as such (`_timestamp_seconds`), not as ages: `time() - x` in a rule goes on counting while nobody scrapes.
"""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kbsync.config import Workspace
from kbsync.ledger import Ledger, Reader

__all__ = ["DECLARED", "Declared", "Exposition"]

FRESH = 5.0
"""Seconds for which an exposition is good: many scrapers cost the ledger no more than one."""


@dataclass(frozen=True, slots=True)
class Declared:
    """What a metric is. A summary has no quantiles: a count and a sum."""

    name: str
    kind: Literal["gauge", "counter", "summary"]
    text: str
    labels: tuple[str, ...] = ()


def _declared(kind: Literal["gauge", "counter", "summary"], name: str, text: str, *labels: str) -> Declared:
    return Declared(f"kbsync_{name}", kind, text, labels)


DECLARED: Sequence[Declared] = (
    _declared("gauge", "build_info", "1; what is running is in the labels.", "version", "python"),
    _declared("gauge", "heartbeat_timestamp_seconds", "Last sign of life of a part of the daemon.", "part"),
    _declared("counter", "runs_total", "Runs that are over, by how they ended.", "policy", "status"),
    _declared("gauge", "runs", "Runs that are not over.", "policy", "status"),
    _declared("gauge", "policy_failures", "Passes of a policy that failed in a row.", "policy"),
    _declared("gauge", "facts", "Facts that the ledger holds true.", "relation", "status"),
    _declared("gauge", "head_version", "The live version.", "model"),
)
"""Every metric, in the order of the exposition."""

Sample = tuple[str, tuple[str, ...], float]
"""Name (without kbsync_), label values, value."""


class Exposition:
    """The text of /metrics, made anew when the last one is older than `fresh` seconds. Thread-safe."""

    def __init__(self, workspace: Workspace, ledger: Ledger, *, fresh: float = FRESH) -> None:
        self._workspace, self._ledger, self._fresh = workspace, ledger, fresh
        self._lock = threading.Lock()
        self._made = -fresh
        self._text = b""

    def __call__(self) -> bytes:
        """The text, in UTF-8. Raises LedgerError or Busy where the ledger cannot be read."""
        with self._lock:
            if time.monotonic() - self._made > self._fresh:
                with self._ledger.read() as db:
                    samples = list(_samples(self._workspace, db))
                self._text = generate_latest(_Families(samples))
                self._made = time.monotonic()
            return self._text


class _Families:
    """Samples as prometheus-client wants them."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._samples: dict[str, list[tuple[tuple[str, ...], float]]] = {}
        for name, labels, value in samples:
            self._samples.setdefault(f"kbsync_{name}", []).append((labels, value))

    def collect(self) -> Iterator[Metric]:
        """A family per declared metric that has a value."""
        for declared in DECLARED:
            if declared.name in self._samples:
                yield _family(declared, self._samples[declared.name])


def _family(declared: Declared, samples: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    make = CounterMetricFamily if declared.kind == "counter" else GaugeMetricFamily
    family = make(declared.name, declared.text, labels=declared.labels)
    for labels, value in samples:
        family.add_metric(labels, value)
    return family


def _samples(workspace: Workspace, db: Reader) -> Iterator[Sample]:
    del workspace
    yield "build_info", (version("kbsync"), platform.python_version()), 1
    for part, beat in db.beats().items():
        yield "heartbeat_timestamp_seconds", (part,), beat.at.timestamp()
    for (policy, status), number in db.run_counts().items():
        yield "runs" if status in ("running", "held") else "runs_total", (policy, status), number
    for policy, number in db.failures_in_a_row().items():
        yield "policy_failures", (policy,), number
    for (relation, status), number in db.fact_counts().items():
        yield "facts", (relation, status), number
    for model in db.models():
        yield "head_version", (model.id,), model.head
