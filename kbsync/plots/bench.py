"""Pictures of benchmarks, from the JSON documents that `--json` prints: a saved result can be drawn again.

draw_sequential(json.loads(text), Path("out/sequential"))          # sequential.png, sequential.svg
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kbsync.bench.report import SCORES, drift_of, title
from kbsync.plots import figure

__all__ = ["draw_mix", "draw_points", "draw_scaling", "draw_sequential"]

Result = Mapping[str, Any]

TARGET_SCORE, TARGET_CHANGE = 78.0, 8.0
"""The aim for 400 facts in SmolLM2-135M: at least this S at no more than this change of the perplexity in per cent."""


def draw_sequential(result: Result, path: Path) -> None:
    """Over the facts held: S of the sample, what is left of the first batch, KL and perplexity. A line per strategy."""
    with figure(path, width=10, height=6.5) as drawn:
        drawn.suptitle(title(result), fontsize=10)
        for panel, (label, value) in zip(drawn.subplots(2, 2).flat, _PANELS, strict=True):
            for name, run in result["strategies"].items():
                places = [(step["facts"], value(step)) for step in run["steps"]]
                known = [(x, y) for x, y in places if y is not None]
                look: dict[str, Any] = (
                    {"marker": "o", "ms": 3} if len(known) > 1 else {"marker": "*", "ms": 12, "ls": ""}
                )
                panel.plot([x for x, _ in known], [y for _, y in known], label=name, zorder=3, **look)
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


_PANELS: Sequence[tuple[str, Callable[[Result], float | None]]] = (
    ("S of the sampled facts", _score),
    ("first batch: whole object said, %", lambda step: step["first_batch"]),
    ("KL to the base, nats per token", _drift("kl")),
    ("perplexity, change in %", _drift("change")),
)


def draw_points(result: Result, path: Path) -> None:
    """S over the change of the perplexity, with its interval; the aim as a box, and a line through the points that no
    other one beats."""
    places = [(point, drift_of(point["drift"]), (point["scores"] or {}).get("score")) for point in result["points"]]
    known = [(drift["change"], score, point) for point, drift, score in places if drift and score]
    with figure(path, width=9, height=6) as drawn:
        panel = drawn.subplots()
        panel.set_title(title(result), fontsize=10)
        for x, score, point in known:
            colour = "tab:red" if point["pareto"] else "tab:gray"
            panel.errorbar(x, score["value"], _spread(score), fmt="o", color=colour, elinewidth=0.5)
            panel.annotate(point["name"], (x, score["value"]), (5, 3), textcoords="offset points", size=8)
        best = sorted((x, score["value"]) for x, score, point in known if point["pareto"])
        panel.plot([x for x, _ in best], [y for _, y in best], color="tab:red", lw=1, label="not beaten in both")
        left, top = panel.get_xlim()[0], max(panel.get_ylim()[1], TARGET_SCORE + 2)
        aim = f"S ≥ {TARGET_SCORE:.0f}, change ≤ {TARGET_CHANGE:.0f} %"
        panel.fill_between([left, TARGET_CHANGE], TARGET_SCORE, top, color="tab:green", alpha=0.12, lw=0, label=aim)
        panel.legend(loc="lower right", fontsize=8)
        panel.set(xlabel="perplexity of held-out text, change in %", ylabel="S", xlim=(left, None), ylim=(None, top))
        panel.grid(alpha=0.3)


def _spread(score: Result) -> list[list[float]]:
    """How far the ends of an interval are from its value, as error bars want it."""
    return [[score["value"] - score["low"]], [score["high"] - score["value"]]]


def draw_scaling(result: Result, path: Path) -> None:
    """Figure 5: S, ES, PS and NS over the number of facts, with their intervals; the unedited model dashed."""
    methods: dict[str, list[Result]] = {}
    for point in result["points"]:
        if point["scores"]:
            methods.setdefault(point["method"], []).append(point)
    counts = sorted({point["facts"] for point in result["points"]})
    with figure(path, width=10, height=6.5) as drawn:
        drawn.suptitle(title(result), fontsize=10)
        for panel, name in zip(drawn.subplots(2, 2).flat, list(SCORES)[:4], strict=True):
            for method, points in methods.items():
                _line(panel, method, [(point["facts"], point["scores"][SCORES[name]]) for point in points])
            before = [(point["facts"], point["unedited"][SCORES[name]]) for point in next(iter(methods.values()), [])]
            known = [(facts, score["value"]) for facts, score in before if score]
            panel.plot([x for x, _ in known], [y for _, y in known], "--", color="tab:gray", label="unedited")
            panel.set(xscale="log", xlabel="facts inserted", ylabel=name, ylim=(0, 102))
            panel.set_xticks(counts, [str(count) for count in counts], minor=False)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        drawn.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)


def _line(panel: Any, label: str, places: Sequence[tuple[int, Result | None]]) -> None:
    """A line with its interval as a band."""
    known = [(x, score) for x, score in places if score]
    across = [x for x, _ in known]
    (drawn,) = panel.plot(across, [score["value"] for _, score in known], marker="o", label=label)
    low, high = [score["low"] for _, score in known], [score["high"] for _, score in known]
    panel.fill_between(across, low, high, color=drawn.get_color(), alpha=0.2, lw=0)


def draw_mix(result: Result, path: Path) -> None:
    """Bars of S: each relation alone, and both together."""
    with figure(path, width=2 + 2.2 * len(result["pairs"]), height=4) as drawn:
        panel = drawn.subplots()
        panel.set_title(title(result), fontsize=9)
        for at, pair in enumerate(result["pairs"]):
            labels = (*pair["relations"], "mixed")
            for place, (label, scores) in enumerate(zip(labels, (*pair["alone"], pair["mixed"]), strict=True)):
                score = scores["score"]
                panel.bar(4 * at + place, score["value"], yerr=_spread(score), color=f"C{place}", capsize=3)
                panel.annotate(label, (4 * at + place, 2), rotation=90, ha="center", color="white", size=9)
        panel.set(ylabel="S", xticks=[])
