"""What inserting facts would cost, from what earlier versions measured: target vectors, seconds, capacity. Torch-free.

cost_of(line, plan)        # of a plan
measured(line), missing_targets(line, requests, manifests), seconds_of(manifests, facts, targets)
"""

from __future__ import annotations

from collections.abc import Sequence

from kbsync.editor.target_names import TargetNames
from kbsync.facts import EditRequest
from kbsync.line import Line
from kbsync.plan import Plan
from kbsync.plan_document import CapacityForecast, Cost, TargetCount
from kbsync.strategy import norm_with
from kbsync.versions.manifest import Manifest

__all__ = ["cost_of", "measured", "missing_targets", "seconds_of"]

MEASURED = 50
"""Versions whose times count: those of long ago were on other hardware, and there may be thousands."""


def cost_of(line: Line, plan: Plan) -> Cost:
    """What carrying the plan out on HEAD would cost; None for what no version has measured yet."""
    with line.ledger.read() as db:
        live = len(db.applied(line.model, plan.head))
    requests = {edit.request.digest: edit.request for edit in plan.edits}
    manifests = measured(line)
    missing = missing_targets(line, list(requests.values()), manifests)
    seconds = seconds_of(manifests, len(requests), missing) if requests else 0.0
    added = sum(1 for edit in plan.edits if edit.replaces is None)
    facts = live + added - len(plan.retractions)
    norm = norm_with(line.odometer().now, facts)
    return Cost(
        facts=len(requests),
        targets=TargetCount(compute=missing, cached=len(requests) - missing),
        seconds=None if seconds is None else round(seconds, 1),
        capacity=CapacityForecast(facts=facts, relative_norm=None if norm is None else round(norm, 6)),
    )


def measured(line: Line) -> list[Manifest]:
    """Manifests of the line's newest versions that inserted facts and took the time of it, newest first."""
    with line.ledger.read() as db:
        rows = [row for row in db.versions(line.model) if row.manifest_sha256 and row.facts]
    found = [line.store.manifest(row.number, row.manifest_sha256) for row in reversed(rows[-MEASURED:])]
    return [manifest for manifest in found if "seconds" in manifest.numerics]


def missing_targets(line: Line, requests: Sequence[EditRequest], manifests: Sequence[Manifest]) -> int:
    """How many target vectors are not stored, by the names that they would have with the contexts of the last edit."""
    if not manifests or "contexts" not in manifests[0].numerics:
        return len(requests)
    newest = manifests[0]
    names = TargetNames(line.fingerprint, f"torch.{newest.dtype}", line.preset, newest.numerics["contexts"])
    return sum(1 for request in requests if not (line.workspace.targets / names.of(request)).exists())


def seconds_of(manifests: Sequence[Manifest], facts: int, targets: int) -> float | None:
    """Each phase's time per fact, the longest of those versions for target vectors: a later one had them cached."""
    if not manifests:
        return None

    def per_fact(manifest: Manifest, phase: str) -> float:
        return float(manifest.numerics["seconds"].get(phase, 0.0)) / len(manifest.facts)

    newest = manifests[0]
    once = float(newest.numerics["seconds"].get("load", 0.0))
    each = per_fact(newest, "insert") + per_fact(newest, "probe")
    return once + facts * each + targets * max(per_fact(manifest, "targets") for manifest in manifests)
