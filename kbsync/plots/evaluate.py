"""The paper's Figure 6 for one's own facts: bars per relation, before and after, from `kbsync evaluate --json`.

draw(json.loads(text), Path("out/evaluate"))          # evaluate.png, evaluate.svg
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kbsync.plots import figure

__all__ = ["draw"]

_PANELS = {
    "score": "score",
    "efficacy": "efficacy",
    "paraphrase": "paraphrase",
    "neighborhood": "neighborhood",
    "specificity": "specificity",
    "accuracy": "whole object",
    "chat_accuracy": "whole object, in a chat",
}
_COLOURS = {"before": "#b8b8b8", "after": "#3568a8"}
_BAR = 0.38
_MOST = 40
"""Relations that have room for a label."""

Result = Mapping[str, Any]


def draw(result: Result, path: Path) -> None:
    """A panel per metric with a pair of bars for all records and for each relation, with 95 % intervals."""
    groups = {"all": result["all"] | {"records": result["records"]}, **result["relations"]}
    shown = dict(list(groups.items())[:_MOST])
    metrics = [name for name in _PANELS if result["all"]["before"].get(name)]
    with figure(path, width=1.5 + 2.2 * len(metrics), height=1.9 + 0.32 * len(shown)) as drawn:
        drawn.suptitle(_title(result), fontsize=10)
        panels = drawn.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
        for panel, metric in zip(panels, metrics, strict=True):
            for state in [state for state in _COLOURS if state in result["all"]]:
                _bars(panel, shown, metric, state)
            panel.set(title=_PANELS[metric], xlim=(0, 100), xlabel="%")
            panel.grid(axis="x", alpha=0.3)
            panel.set_axisbelow(True)
        panels[0].set_yticks(range(len(shown)), [f"{name} ({one['records']})" for name, one in shown.items()])
        panels[0].invert_yaxis()
        handles, labels = panels[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)


def _title(result: Result) -> str:
    what = Path(result["dataset"]).name if result["dataset"] else f"facts of version {result['version']}"
    return f"{result['model']}, {result['records']} of {result['total']} {what}"


def _bars(panel: Any, groups: Mapping[str, Any], metric: str, state: str) -> None:
    places = [(at, one[state][metric]) for at, one in enumerate(groups.values()) if one[state].get(metric)]
    values = [one["value"] for _, one in places]
    # A bootstrapped interval may lie wholly beside its value by rounding; a length below zero is none.
    errors = [
        [max(0.0, one["value"] - one["low"]) for _, one in places],
        [max(0.0, one["high"] - one["value"]) for _, one in places],
    ]
    shift = -_BAR / 2 if state == "before" else _BAR / 2
    style = {"height": _BAR, "color": _COLOURS[state], "label": state, "error_kw": {"elinewidth": 0.8}}
    panel.barh([at + shift for at, _ in places], values, xerr=errors, **style)
