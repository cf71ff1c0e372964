"""Ways to edit by name: MEMIT as one batch, and the baselines. Each gives the edited matrices, in memory.

masters = METHODS["rome"](base, preset, requests, statistics, progress)       # float64 [d, f] by module
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from kbsync.bench.lab import PRISTINE, TARGETS, Laboratory
from kbsync.editor.baselines import FineTuning, finetune, rome, rome_settings
from kbsync.editor.model import Base
from kbsync.editor.preset import Preset
from kbsync.editor.statistics import Statistics
from kbsync.errors import UsageError
from kbsync.facts import EditRequest
from kbsync.hub import cache_dir
from kbsync.progress import Progress

__all__ = ["METHODS", "fine_tuning"]

Masters = Mapping[str, Tensor]
Method = Callable[[Base, Preset, Sequence[EditRequest], Statistics, Progress], Masters]


def _memit(
    base: Base, preset: Preset, requests: Sequence[EditRequest], statistics: Statistics, progress: Progress
) -> Masters:
    """Target vectors come from the user's cache where they are there."""
    lab = Laboratory(preset.name, base, preset, statistics, cache_dir() / TARGETS, progress=progress)
    return lab.edit(PRISTINE, requests, lab.targets(requests)).masters


def fine_tuning(changes: Mapping[str, Any]) -> Method:
    """FT-W with other values for some of its settings. Raises UsageError for a setting that it does not have."""
    known = [field.name for field in fields(FineTuning)]
    for name in changes:
        if name not in known:
            raise UsageError(f"ft-w has no setting {name!r}", hint=f"one of: {', '.join(known)}")

    def method(
        base: Base, _preset: Preset, requests: Sequence[EditRequest], _statistics: Statistics, progress: Progress
    ) -> Masters:
        return _added(base, finetune(base, requests, replace(FineTuning.of(base), **changes), progress=progress))

    return method


def _rome(
    base: Base, preset: Preset, requests: Sequence[EditRequest], statistics: Statistics, progress: Progress
) -> Masters:
    return _added(base, rome(base, requests, statistics, rome_settings(preset), progress=progress))


def _added(base: Base, deltas: Mapping[str, Tensor]) -> Masters:
    return {name: base.weight(name).double() + delta for name, delta in deltas.items()}


METHODS: dict[str, Method] = {"memit": _memit, "ft-w": fine_tuning({}), "rome": _rome}
