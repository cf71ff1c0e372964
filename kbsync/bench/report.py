"""Results of benchmarks as rows of a table, from the JSON documents that `--json` prints. Torch-free.

columns, rows = sequential_table(result)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kbsync.bench.settings import OWN_TEXT

__all__ = [
    "SCORES",
    "drift_cells",
    "drift_of",
    "edit_table",
    "interval",
    "mix_table",
    "points_table",
    "scaling_table",
    "score_cells",
    "sequential_table",
    "title",
]

SCORES = {"S": "score", "ES": "efficacy", "PS": "paraphrase", "NS": "neighborhood", "whole": "accuracy"}
"""Columns of a table and what they show; `whole`: the greedy continuation says the whole object."""

Result = Mapping[str, Any]
Table = tuple[Sequence[str], list[Sequence[object]]]


def interval(value: Mapping[str, Any] | None, *, sign: bool = False) -> str:
    """A value with its interval, `83.2 (78.1 to 87.5)`; – where it was not measured."""
    if value is None:
        return "–"
    shown = f"{value['value']:+.1f}" if sign else f"{value['value']:.1f}"
    return f"{shown} ({value['low']:.1f} to {value['high']:.1f})"


def score_cells(scores: Mapping[str, Any] | None) -> list[str]:
    """S with its interval; ES, PS, NS and whole-object accuracy as numbers."""
    found = scores or {}
    rest = [found.get(key) for name, key in SCORES.items() if name != "S"]
    return [interval(found.get("score")), *(f"{one['value']:.1f}" if one else "–" for one in rest)]


def drift_of(drift: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The drift that is shown: on the text that was asked for, else on the held-out one; None where there is none."""
    texts = sorted((drift or {}).items(), key=lambda item: item[0] == OWN_TEXT)
    return texts[0][1] if texts else None


def drift_cells(drift: Mapping[str, Any] | None) -> list[str]:
    """KL and the change of the perplexity."""
    shown = drift_of(drift)
    return [f"{shown['kl']:.4f}", f"{shown['change']:+.1f} %"] if shown else ["–", "–"]


def title(result: Result) -> str:
    """What was measured, in a line."""
    batch = f" in batches of {result['batch']}" if "batch" in result else ""
    return f"bench {result['benchmark']}: {result['model']}, {result['facts']} facts of {result['dataset']}{batch}"


def sequential_table(result: Result) -> Table:
    """A row per strategy, at the end of all batches; the first is the unedited model."""
    columns = ("strategy", *SCORES, "first batch", "KL", "perplexity", "S − one-batch", "minutes")
    rows: list[Sequence[object]] = [("unedited", *score_cells(result["unedited"]))]
    rows[0] = [*rows[0], *[""] * (len(columns) - len(rows[0]))]
    for name, run in result["strategies"].items():
        first = f"{run['steps'][-1]['first_batch']:.0f}" if run["steps"] else "–"
        difference = interval(run["difference"]["score"], sign=True) if run["difference"] else ""
        cells = [*score_cells(run["scores"]), first, *drift_cells(run["drift"]), difference]
        rows.append((name, *cells, f"{sum(run['seconds'].values()) / 60:.1f}"))
    return columns, rows


def points_table(result: Result) -> Table:
    """A row per point; * marks those that no other point beats in both S and perplexity."""
    columns = ("point", *SCORES, "KL", "perplexity", "‖ΔW‖/‖W‖", "")
    unedited = ("unedited", *score_cells(result["unedited"]), "", "", "", "")
    rows: list[Sequence[object]] = [unedited]
    for point in result["points"]:
        largest = f"{max(point['norms'].values()):.3f}" if point["norms"] else "–"
        note = point["stopped"] or ("*" if point["pareto"] else "")
        rows.append((point["name"], *score_cells(point["scores"]), *drift_cells(point["drift"]), largest, note))
    return columns, rows


def scaling_table(result: Result) -> Table:
    """A row per method and number of facts, with what the unedited model scores on them."""
    columns = ("method", "facts", *SCORES, "KL", "perplexity", "seconds", "unedited S")
    rows: list[Sequence[object]] = []
    for point in result["points"]:
        numbers = (*score_cells(point["scores"]), *drift_cells(point["drift"]), f"{sum(point['seconds'].values()):.1f}")
        before = interval(point["unedited"]["score"])
        rows.append((point["method"], point["facts"], *numbers, point["stopped"] or before))
    return columns, rows


def mix_table(result: Result) -> Table:
    """Three rows per pair: each relation alone, and the mix with its difference from the same facts alone."""
    columns = ("relations", *SCORES, "S − alone")
    rows: list[Sequence[object]] = []
    for pair in result["pairs"]:
        for relation, scores in zip(pair["relations"], pair["alone"], strict=True):
            rows.append((relation, *score_cells(scores), ""))
        difference = interval(pair["difference"]["score"], sign=True)
        rows.append((" + ".join(pair["relations"]), *score_cells(pair["mixed"]), difference))
    return columns, [*rows, ("all pairs", *[""] * len(SCORES), interval(result["difference"]["score"], sign=True))]


def edit_table(result: Result) -> Table:
    """One row per way to the same facts: seconds per fact, how much faster than the baseline, scores."""
    paths: Mapping[str, Any] = result["paths"]
    plain = paths.get("baseline")
    columns = (
        "way",
        "facts",
        "steps",
        "z s/fact",
        "x",
        "insert s/fact",
        "x",
        *(f"{name}" for name in SCORES),
        "S - exact",
    )
    rows: list[Sequence[object]] = []
    for name, path in paths.items():
        row: list[object] = [name, path["facts"], f"{path['steps']:.1f}"]
        for phase in ("z_seconds", "insert_seconds"):
            each = path[phase] / path["facts"]
            row += [f"{each:.3f}", f"{plain[phase] / plain['facts'] / each:.1f}" if plain else "–"]
        difference = result["differences"].get(name)
        rows.append([*row, *score_cells(path["scores"]), interval(difference and difference["score"], sign=True)])
    return columns, rows
