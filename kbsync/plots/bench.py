"""Pictures of benchmarks, from the JSON documents that `--json` prints: a saved result can be drawn again.

draw_sequential(json.loads(text), Path("out/sequential"))          # sequential.png, sequential.svg
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kbsync.bench.report import drift_of, title
from kbsync.plots import figure

__all__ = ["draw_sequential"]

Result = Mapping[str, Any]


def draw_sequential(result: Result, path: Path) -> None:
    """Over the facts held: S of the sample, what is left of the first batch, KL and perplexity. A line per strategy."""
    with figure(path, width=10, height=6.5) as drawn:
        drawn.suptitle(title(result), fontsize=10)
        for panel, (label, value) in zip(drawn.subplots(2, 2).flat, _PANELS, strict=True):
            for name, run in result["strategies"].items():
                places = [(step["facts"], value(step)) for step in run["steps"]]
                known = [(x, y) for x, y in places if y is not None]
                panel.plot([x for x, _ in known], [y for _, y in known], marker=".", label=name)
            panel.set(xlabel="facts held", ylabel=label)
            panel.grid(alpha=0.3)
        drawn.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)


def _score(step: Result) -> float | None:
    score = step["sample"]["score"]
    return None if score is None else float(score["value"])


def _drift(name: str) -> Callable[[Result], float | None]:
    def value(step: Result) -> float | None:
        shown = drift_of(step["drift"])
        return float(shown[name]) if shown else None

    return value


_PANELS = (
    ("S of the sampled facts", _score),
    ("first batch: whole object said, %", lambda step: step["first_batch"]),
    ("KL to the base, nats per token", _drift("kl")),
    ("perplexity, change in %", _drift("change")),
)
