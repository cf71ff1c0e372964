"""The long run, in short: what `make soak` looks at, and that it would see a leak."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kbsync.facts import Hold
from tests.soak import EVERY, Sample, drift, report, soaking, unbounded

STEADY = [
    Sample(
        syncs=number * EVERY,
        changes=number * EVERY,
        seconds=number,
        rss=500_000_000,
        objects=500_000,
        handles=7,
        threads=2,
        ledger=400_000 + 1000 * number,
        deltas=40,
        delta_bytes=200_000,
        versions=number * EVERY,
        restorable=43,
        needed=43,
        manifest_bytes=5000 * number,
        targets=60,
    )
    for number in range(1, 21)
]
"""Twenty measurements of a run in which nothing leaks."""


@pytest.mark.usefixtures("one_cache")
def test_after_a_month_of_passes_the_weights_hold_what_the_ledger_wants(tmp_path: Path) -> None:
    """Sixty passes, with what people do in between: the files verify, handles and threads are those of the start, and
    no more versions are restorable than retention asks for and shares deltas with."""
    with soaking(tmp_path) as soak:
        soak.run(60)
        soak.settle()
        assert drift(soak.reconciler) == []
        found = report(soak, 0.0)
    assert soak.counts["versions"] > 20
    assert {sample.handles for sample in soak.samples[2:]} == {soak.samples[2].handles}
    assert {sample.threads for sample in soak.samples} == {soak.samples[0].threads}
    assert [problem for problem in found["problems"] if "grows" not in problem] == []


@pytest.mark.usefixtures("one_cache")
def test_a_model_that_was_taught_nothing_is_no_model_without_drift(tmp_path: Path) -> None:
    with soaking(tmp_path) as soak:
        soak.run(1)
        with soak.reconciler.ledger.write() as db:
            model = db.models()[0].id
            for key, fact in db.applied(model, db.head(model)).items():
                db.hold(model, Hold(key, None, fact.object_id, "manual", "planted"))
        soak.reconciler.sync()
        assert any("are held after" in problem for problem in drift(soak.reconciler))


def test_a_run_in_which_nothing_leaks_passes() -> None:
    assert unbounded(STEADY) == []


@pytest.mark.parametrize(
    ("name", "step", "problem"),
    [
        ("rss", 2_000_000, "rss grows"),
        ("objects", 1000, "objects grows"),
        ("delta_bytes", 20_000, "delta_bytes grows"),
        ("restorable", 10, "restorable grows"),
        ("handles", 1, "handles are not constant"),
        ("threads", 1, "threads are not constant"),
        ("needed", 10, "versions had to stay"),
    ],
)
def test_a_leak_is_seen(name: str, step: int, problem: str) -> None:
    """A little more at each measurement."""
    leaking = [replace(one, **{name: getattr(one, name) + step * index}) for index, one in enumerate(STEADY)]
    assert any(problem in said for said in unbounded(leaking))


def test_a_ledger_whose_changes_cost_more_and_more_is_seen() -> None:
    bent = [replace(one, ledger=400_000 + 1000 * index**2) for index, one in enumerate(STEADY)]
    assert any("a change costs the ledger" in said for said in unbounded(bent))
