"""The conditions of a measurement, written down with every result: model, settings, data, machine, date, time, memory.

document("sequential", lab, dataset, facts=200) | {"strategies": ...}
"""

from __future__ import annotations

import os
import platform
import resource
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kbsync.bench.lab import Laboratory
from kbsync.editor.datasets import dataset_of
from kbsync.versions.files import sha256_of

__all__ = ["document", "machine"]

LIBRARIES = ("kbsync", "torch", "transformers", "numpy")
_KIB = 1024


def document(benchmark: str, lab: Laboratory, dataset: str, **more: Any) -> dict[str, Any]:
    """What was measured, how and where, as a JSON value; `more` are the benchmark's own numbers (facts, batch, seed).

    To be made at the end: seconds by phase and peak memory are those of the process so far.
    """
    kind, path = dataset_of(dataset)
    return {
        "benchmark": benchmark,
        "model": lab.name,
        "fingerprint": lab.base.fingerprint,
        "dtype": str(lab.base.dtype).removeprefix("torch."),
        "device": str(lab.base.device),
        "preset": {
            "digest": lab.preset.digest,
            "settings": lab.preset.model_dump(mode="json", exclude={"scores", "note"}),
            "changes": dict(lab.changes),
        },
        "statistics_tokens": lab.statistics.tokens,
        "diverged_targets": len(lab.diverged),
        "left_out": len(lab.left_out),
        "contexts": len(lab.statistics.contexts),
        "dataset": f"{kind}:{path.name}",
        "dataset_sha256": sha256_of(path),
        "seconds": {phase: round(value, 2) for phase, value in lab.seconds.items()},
        **more,
        **machine(),
    }


def machine() -> dict[str, Any]:
    """Where and with what a measurement was made, and the most memory that this process had so far."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB / 1e9, 2),
        "peak_gpu_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
