"""Causal tracing as pictures, drawn from the report's JSON (`kbsync trace --out DIR` writes it): no model is needed.

report = json.loads(Path("trace/trace.json").read_text())
draw(report, Path("trace"))        # severed, effects and a heatmap per fact, each as PNG and SVG
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbsync.plots import figure, files

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw", "draw_effects", "draw_grid", "draw_severed"]

_COLOURS = {"state": "#6a51a3", "mlp": "#238b45", "attention": "#cb181d"}
"""As in the papers: purple states, green MLPs, red attentions."""
_MAPS = {"state": "Purples", "mlp": "Greens", "attention": "Reds"}
_SITES = {"last_subject": "last subject token", "last_token": "last token"}


def draw(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """All pictures of a report, into `folder`. The answer: the files. Raises UsageError without matplotlib."""
    drawn = [draw_severed(report, folder / "severed"), draw_effects(report, folder / "effects")]
    drawn += [draw_grid(report, grid, folder / f"grid-{number}") for number, grid in enumerate(report["grids"], 1)]
    return [file for path in drawn for file in files(path)]


def draw_severed(report: Mapping[str, Any], path: Path) -> Path:
    """Figure 3 of MEMIT: bars of the state's effect at the last subject token, whole and with modules severed."""
    effects = report["effects"]["last_subject"]
    bars = [
        ("state", _COLOURS["state"], "state restored"),
        ("attention_severed", _COLOURS["attention"], "… with attention severed above it"),
        ("mlp_severed", _COLOURS["mlp"], "… with MLPs severed above it"),
    ]
    with figure(path, width=10, height=4.2) as drawn:
        axes = drawn.subplots()
        layers = range(len(effects["state"]["mean"]))
        chosen = report["suggested"]["layers"]
        axes.axvspan(chosen[0] - 0.5, chosen[-1] + 0.5, color="0.92", zorder=0)
        axes.text(
            (chosen[0] + chosen[-1]) / 2,
            0.98,
            f"largest MLP gap:\nlayers {chosen[0]}–{chosen[-1]}",
            ha="center",
            va="top",
            transform=axes.get_xaxis_transform(),
            fontsize=8,
            color="0.35",
        )
        for number, (kind, colour, label) in enumerate(bars):
            mean, low, high = (effects[kind][name] for name in ("mean", "low", "high"))
            errors = [[m - a for m, a in zip(mean, low, strict=True)], [b - m for m, b in zip(mean, high, strict=True)]]
            places = [layer + 0.27 * (number - 1) for layer in layers]
            thin = {"elinewidth": 0.7, "ecolor": "0.25"}
            axes.bar(places, mean, 0.27, color=colour, label=label, yerr=errors, error_kw=thin)
        axes.set_ylim(top=1.2 * max(max(effects[kind]["high"]) for kind, _, _ in bars))  # room for the words
        _label(axes, "layer at which the state is restored", len(layers))
        axes.set_ylabel("average indirect effect\n(gain in probability of the answer)")
        axes.set_title(
            f"{report['model']}: what the last subject token's state does, and through what\n{_facts(report)}"
        )
        axes.legend(frameon=False, loc="upper right")
    return path


def draw_effects(report: Mapping[str, Any], path: Path) -> Path:
    """Lines with 95 % bands: states, windows of MLPs and of attentions, at both sites."""
    labels = {
        "state": "one state",
        "mlp": f"MLPs of {report['window']} layers",
        "attention": f"attentions of {report['window']} layers",
    }
    with figure(path, width=10, height=4.2) as drawn:
        panels = drawn.subplots(1, 2, sharey=True)
        for axes, (site, name) in zip(panels, _SITES.items(), strict=True):
            effects = report["effects"][site]
            layers = range(len(effects["state"]["mean"]))
            for kind, label in labels.items():
                axes.plot(layers, effects[kind]["mean"], color=_COLOURS[kind], label=label, marker=".", markersize=4)
                axes.fill_between(
                    layers, effects[kind]["low"], effects[kind]["high"], color=_COLOURS[kind], alpha=0.18, linewidth=0
                )
            axes.axhline(0, color="0.6", linewidth=0.6)
            _label(axes, "layer restored (window: its middle)", len(layers))
            axes.set_title(f"at the {name}")
        panels[0].set_ylabel("average indirect effect\n(gain in probability of the answer)")
        panels[0].legend(frameon=False)
        drawn.suptitle(f"{report['model']}: what restoring brings back\n{_facts(report)}")
    return path


def draw_grid(report: Mapping[str, Any], grid: Mapping[str, Any], path: Path) -> Path:
    """One fact: heatmaps token x layer of the answer's probability under each kind of restoration."""
    titles = {
        "state": "one state restored",
        "mlp": f"MLPs of {report['window']} layers restored",
        "attention": f"attentions of {report['window']} layers restored",
    }
    start, stop = grid["subject"]
    names = [f"{token}*" if start <= at < stop else token for at, token in enumerate(grid["tokens"])]
    low = grid["corrupted"]
    values = {kind: [[low + gain for gain in row] for row in grid["effects"][kind]] for kind in titles}
    high = max(gain for rows in values.values() for row in rows for gain in row)
    with figure(path, width=12, height=1.9 + 0.24 * len(names)) as drawn:
        panels = drawn.subplots(1, len(titles), sharey=True)
        for axes, (kind, title) in zip(panels, titles.items(), strict=True):
            image = axes.imshow(
                values[kind], cmap=_MAPS[kind], vmin=low, vmax=high, aspect="auto", interpolation="nearest"
            )
            axes.set_title(title, fontsize=10)
            _label(axes, "layer", len(values[kind][0]))
            drawn.colorbar(image, ax=axes, label="p" if axes is panels[-1] else "", pad=0.02)
        panels[0].set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names])
        drawn.suptitle(
            f"{report['model']}: p({grid['attribute']}) clean {grid['clean']:.2f}, corrupted {low:.2f} (* = subject)",
            parse_math=False,
        )
    return path


def _label(axes: Axes, text: str, layers: int) -> None:
    axes.set_xlabel(text)
    axes.set_xticks(range(0, layers, max(1, round(layers / 6))))
    axes.spines[["top", "right"]].set_visible(False)


def _facts(report: Mapping[str, Any]) -> str:
    noise, probability = report["noise"], report["probability"]
    return (
        f"{report['facts']['traced']} facts, {noise['samples']} noise samples of {noise['factor']:g}σ, 95 % intervals; "
        f"probability of the answer {probability['clean']:.2f} clean, {probability['corrupted']:.2f} corrupted"
    )
