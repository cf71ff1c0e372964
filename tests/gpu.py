"""`make gpu`: the engine's tests on a CUDA device, then its speed, memory and hashes there.

Ends with status 1, and says why, where there is no such device, a test fails, or the same edit made twice differs.

    python -m tests.gpu
"""

from __future__ import annotations

import csv
import sys
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from kbsync.editor.job import ModelJob
from kbsync.editor.memit import insert
from kbsync.editor.model import Base
from kbsync.editor.preset import Preset, load_preset
from kbsync.editor.replica import open_base
from kbsync.editor.statistics import Statistics, collect, statistics_for
from kbsync.editor.targets import compute_targets
from kbsync.errors import KbsyncError
from kbsync.facts import EditRequest, FactKey
from kbsync.hub import fingerprint, resolve_model
from kbsync.versions.delta import write_delta

MODEL = "smollm2-135m"
FEED = Path(__file__).parents[1] / "sources" / "star-catalog.csv"
REQUESTS = [
    EditRequest(
        FactKey("constellation", row["name"]),
        f"{row['name']} belongs to the constellation of",
        row["name"],
        row["constellation"],
    )
    for row in islice(csv.DictReader(FEED.read_text(encoding="utf-8").splitlines()), 16)
]
BLOCKS = 512
"""Texts of 64 tokens that the statistics' speed is measured on."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one model on one device. Memory is the CUDA allocator's peak, 0 on the CPU."""

    device: str
    statistics_tokens_per_second: float
    target_seconds_per_fact: float
    insert_seconds: float
    peak_memory_mib: float
    delta_sha256: tuple[str, ...]


def measure(base: Base, preset: Preset, statistics: Statistics, *, blocks: int = BLOCKS, repeat: int = 2) -> Measured:
    """Collect, compute and insert, the edit `repeat` times."""
    cuda = base.device.type == "cuda"
    generator = torch.Generator().manual_seed(0)
    texts = list(torch.randint(1, base.network.config.vocab_size, (blocks, 64), generator=generator))
    modules = [base.spec.down_name(layer) for layer in preset.layers]
    collect(base, modules, texts[:2])  # kernels are chosen, memory is taken
    begun = time.perf_counter()
    collect(base, modules, texts)
    collected = time.perf_counter() - begun
    hashes, targets_seconds, insert_seconds = [], [], []
    with TemporaryDirectory() as folder:
        for _ in range(repeat):
            begun = time.perf_counter()
            targets = compute_targets(base, REQUESTS, statistics.contexts, preset)
            found = time.perf_counter()
            delta = insert(base, REQUESTS, targets, statistics, preset).delta
            insert_seconds.append(time.perf_counter() - found)
            targets_seconds.append(found - begun)
            hashes.append(write_delta(Path(folder), delta))
    return Measured(
        device=torch.cuda.get_device_name(base.device) if cuda else "cpu",
        statistics_tokens_per_second=round(64 * blocks / collected),
        target_seconds_per_fact=round(min(targets_seconds) / len(REQUESTS), 4),
        insert_seconds=round(min(insert_seconds), 4),
        peak_memory_mib=round(torch.cuda.max_memory_allocated(base.device) / 2**20) if cuda else 0,
        delta_sha256=tuple(hashes),
    )


def main() -> int:
    """The exit status; what there is to say is printed."""
    if not torch.cuda.is_available():
        say("no CUDA device on this machine: nothing was run")
        return 1
    failed = pytest.main(["-q", "-k", "cuda", str(Path(__file__).parent)])
    try:
        folder = resolve_model(MODEL).path
    except KbsyncError as error:
        say(f"{error.message}; {error.hint}")
        return 1
    preset = load_preset(MODEL)
    base = open_base(
        ModelJob(model_path=str(folder), fingerprint=fingerprint(folder), device="cuda", dtype="auto", preset=preset)
    )
    found = measure(base, preset, statistics_for(base, preset))
    for name, value in asdict(found).items():
        say(f"{name:30} {value if not isinstance(value, tuple) else ' '.join(value)}")
    if differ := len(set(found.delta_sha256)) > 1:
        say("the same edit made twice gave two deltas")
    return int(bool(failed) or differ)


def say(line: str) -> None:
    """One line on stdout."""
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
