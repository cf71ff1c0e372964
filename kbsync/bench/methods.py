"""Ways to edit by name: MEMIT and the baselines. Each gives the weights with the first n of some facts, for each n.

MEMIT and FT-W take the first n facts at once; ROME one after the other, so its path to the largest number passes the
others.

    for weights in METHODS["rome"](lab, requests, [1, 10, 100]): ...       # weights.masters: float64 [d, f] by module
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from kbsync.bench.lab import PRISTINE, Laboratory, Weights
from kbsync.editor.baselines import FineTuning, finetune, rome, rome_settings
from kbsync.errors import UsageError
from kbsync.facts import EditRequest

__all__ = ["METHODS", "Method", "fine_tuning"]

Method = Callable[[Laboratory, Sequence[EditRequest], Sequence[int]], Iterator[Weights]]
"""The weights with the first n of the facts, for each n, ascending."""


def _memit(lab: Laboratory, requests: Sequence[EditRequest], counts: Sequence[int]) -> Iterator[Weights]:
    targets = lab.targets(requests)
    for count in counts:
        yield lab.edit(PRISTINE, requests[:count], targets)


def _rome(lab: Laboratory, requests: Sequence[EditRequest], counts: Sequence[int]) -> Iterator[Weights]:
    settings, weights = rome_settings(lab.preset), PRISTINE
    for count in counts:
        with lab.timed("rome"), lab.holding(weights) as base:
            fresh = requests[weights.facts : count]
            deltas = rome(base, fresh, lab.statistics, settings, progress=lab.progress)
        weights = lab.plus(weights, deltas, facts=len(fresh))
        yield weights


def fine_tuning(changes: Mapping[str, Any]) -> Method:
    """FT-W with other values for some of its settings. Raises UsageError for a setting that it does not have."""
    known = [field.name for field in fields(FineTuning)]
    for name in changes:
        if name not in known:
            raise UsageError(f"ft-w has no setting {name!r}", hint=f"one of: {', '.join(known)}")

    def method(lab: Laboratory, requests: Sequence[EditRequest], counts: Sequence[int]) -> Iterator[Weights]:
        settings = replace(FineTuning.of(lab.base), **changes)
        for count in counts:
            with lab.timed("ft-w"):
                deltas = finetune(lab.base, requests[:count], settings, progress=lab.progress)
            yield lab.plus(PRISTINE, deltas, facts=count)

    return method


METHODS: dict[str, Method] = {"memit": _memit, "rome": _rome, "ft-w": fine_tuning({})}
"""By name as typed. ROME's and FT-W's settings are their authors'; see kbsync.editor.baselines."""
