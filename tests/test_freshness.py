"""How fresh the model is: what arrived, what waits and why, and when a target is missed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from kbsync.cli import app
from kbsync.facts import FactKey, Hold
from kbsync.freshness import FreshnessRow, duration, freshness_rows, histogram, quantile
from kbsync.ledger.arrivals import Backlog
from kbsync.reconcile import Reconciler
from kbsync.undo import rollback
from tests.standin import StandIn
from tests.workspaces import TestWorkspace, workspace

STARS = {"Vega": "Orion", "Deneb": "Paris", "Sirius": "Rome", "Polaris": "French"}
NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
SKIPPING = "    retract: keep\n    skip_known: true"

numbers = st.lists(st.floats(0, 1e7), min_size=1).map(sorted)


@pytest.fixture
def made(tmp_path: Path) -> TestWorkspace:
    """A workspace that was never synced; no relation knows a fact by itself."""
    return workspace(tmp_path, STARS)


def act(made: TestWorkspace, engine: StandIn | None = None) -> str:
    """One pass; how it ended."""
    with made.open() as reconciler:
        reconciler.run_edit = engine or StandIn()
        [report] = reconciler.sync()
    return report.status


def row_of(reconciler: Reconciler) -> FreshnessRow:
    """The only row."""
    with reconciler.ledger.read() as db:
        [row] = freshness_rows(db, reconciler.catalog, datetime.now(UTC))
    return row


def row(made: TestWorkspace) -> FreshnessRow:
    """The only row, of a workspace that nobody has open."""
    with made.open() as reconciler:
        return row_of(reconciler)


def backlog(made: TestWorkspace) -> dict[str, int]:
    """How many keys wait for which reason."""
    return {part.why: part.keys for part in row(made).backlog}


@pytest.mark.usefixtures("database")
def test_a_pass_notes_an_arrival_for_each_new_and_each_changed_fact_and_for_no_other(made: TestWorkspace) -> None:
    assert (row(made).seconds, row(made).waiting) == ((), 0)
    assert act(made) == "done"
    assert (len(row(made).seconds), row(made).waiting) == (4, 0)
    made.feed(STARS | {"Vega": "Rome"})
    act(made)
    made.policy('    retract: keep\n    subject: "the star {subject}"')
    act(made)
    assert len(row(made).seconds) == 5
    with made.open() as reconciler:
        line = reconciler.line()
        line.run_edit = StandIn()
        with reconciler.ledger.read() as db:
            arrived = db.arrivals(line.model, NOW - timedelta(days=10_000))
            assert [one.key.subject for one in arrived if one.version == 2] == ["stars:vega"]
            assert all(one.changed_at <= one.fetched_at <= one.served_at for one in arrived)


def test_facts_wait_while_the_last_pass_failed_and_have_arrived_once_one_is_done(made: TestWorkspace) -> None:
    assert act(made, StandIn(dies=True)) == "failed"
    assert backlog(made) == {"the last pass failed": 4}
    assert act(made) == "done"
    assert backlog(made) == {}


def test_what_is_held_for_approval_waits_since_it_was_first_held(made: TestWorkspace) -> None:
    made.feed({f"{number:02}Star": "Orion" for number in range(20)})
    act(made)
    made.feed({f"{number:02}Star": "Rome" for number in range(20)})
    assert act(made) == "held"
    first = row(made)
    assert {part.why: part.keys for part in first.backlog} == {"held for approval": 20}
    assert act(made) == "held"
    assert row(made).oldest == first.oldest


def test_what_was_rolled_back_waits_on_hold(made: TestWorkspace) -> None:
    act(made)
    with made.open() as reconciler:
        rollback(reconciler.line(), 0)
    assert backlog(made) == {"on hold": 4}


def test_a_hold_on_what_the_weights_answer_anyway_keeps_nothing_waiting(made: TestWorkspace) -> None:
    act(made)
    with made.open() as reconciler:
        model = reconciler.line().model
        with reconciler.ledger.write() as db:
            vega = FactKey("constellation", "stars:vega")
            db.hold(model, Hold(vega, db.applied(model, 1)[vega], "stars:Rome", "manual", "not sure"))
    assert backlog(made) == {}


def test_protected_subjects_do_not_wait(made: TestWorkspace) -> None:
    made.policy('    retract: keep\n    protected: ["stars:vega"]')
    act(made, StandIn(dies=True))
    assert backlog(made) == {"the last pass failed": 3}


def test_what_the_base_answers_by_itself_does_not_wait(made: TestWorkspace) -> None:
    made.policy(SKIPPING)
    act(made, StandIn(dies=True))
    with made.open() as reconciler:
        line = reconciler.line()
        with reconciler.ledger.read() as db:
            plan = reconciler._carrier(reconciler.catalog.policy("sky"), line).plan(db)
        known = {edit.request.digest: edit.request.subject == "Vega" for edit in plan.edits}
        with reconciler.ledger.write() as db:
            db.note_known(line.fingerprint, known)
    assert backlog(made) == {"the last pass failed": 3}


@given(numbers, st.floats(0.01, 1))
def test_a_quantile_is_one_of_the_numbers_and_so_many_of_them_are_up_to_it(seconds: list[float], share: float) -> None:
    found = quantile(seconds, share)
    assert found in seconds
    assert sum(one <= found for one in seconds) >= share * len(seconds)
    assert sum(one < found for one in seconds) < share * len(seconds)


def test_of_nothing_there_is_no_quantile_and_no_histogram() -> None:
    assert quantile([], 0.5) is None
    assert histogram([]) == []


@given(numbers)
def test_a_histogram_counts_every_number_once_below_its_limit(seconds: list[float]) -> None:
    steps = histogram(seconds)
    assert sum(count for _, count in steps) == len(seconds)
    for limit, _ in steps:
        assert sum(count for other, count in steps if other <= limit) == sum(max(one, 1) <= limit for one in seconds)


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0s"), (42, "42s"), (3600, "1h"), (21_900, "6h 5m"), (90_061, "1d 1h"), (86_460, "1d")]
)
def test_a_duration_is_said_in_two_units(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def aimed(
    *, seconds: Sequence[float] = (), waited: float = 0, lag: float = 0, target: float | None = 3600
) -> list[str]:
    """Why a target of an hour is missed where one key waits, changes arrived and the source lags so long."""
    waiting = Backlog("feed", "constellation", "conflict", 1, NOW - timedelta(seconds=waited))
    found = FreshnessRow(
        "sky", "feed", "constellation", target, 86_400, tuple(seconds), (waiting,), NOW - timedelta(seconds=lag)
    )
    return found.missed(NOW)


def test_a_target_is_missed_by_what_waits_longer_by_the_p95_and_by_a_source_that_was_not_seen() -> None:
    assert aimed() == aimed(seconds=[3600] * 20, waited=3600, lag=3600) == []
    assert aimed(waited=7200) == ["1 changes wait, the oldest for 2h (conflict), the target is 1h"]
    assert aimed(seconds=[*[60] * 9, 7200]) == ["p95 of the last 1d is 2h, the target is 1h"]
    assert aimed(seconds=[*[60] * 19, 7200]) == []
    assert aimed(lag=7200) == ["the source was last seen as it was 2h ago, the target is 1h"]
    assert aimed(waited=7200, lag=7200, seconds=[7200], target=None) == []


def test_status_and_freshness_show_what_arrived_and_what_waits(made: TestWorkspace) -> None:
    act(made)
    runner = CliRunner()
    for command in ("status", "freshness"):
        done = runner.invoke(app, [command, "--workspace", str(made.root)])
        assert done.exit_code == 0
        assert "stars" in done.output
    assert "up to" in done.output
    [row] = json.loads(runner.invoke(app, ["freshness", "--json", "-w", str(made.root)]).output)
    assert (row["source"], row["relation"], row["count"], row["waiting"]) == ("stars", "constellation", 4, 0)
    assert (row["p50"] <= row["p95"], len(row["seconds"]), row["missed"]) == (True, 4, [])
    [none] = json.loads(
        runner.invoke(app, ["freshness", "--json", "--since", "2100-01-01", "-w", str(made.root)]).output
    )
    assert none["count"] == 0
