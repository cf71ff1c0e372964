"""A batch that the gate rejects: the facts to blame are held with what was measured, the rest is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kbsync.editor.job import EditJob, EditResult
from kbsync.facts import FactKey, Hold
from kbsync.reconcile import Reconciler
from kbsync.report import Report
from kbsync.undo import release, revert_fact
from tests.standin import StandIn
from tests.test_cli import Line
from tests.workspaces import POLICY, TestWorkspace, workspace

GATE = "gate: {efficacy: 0.0, paraphrase: 0.0, specificity_drop: 100%%, drift: 1000}"
STARS = {f"Star{letter}": f"Home{letter}" for letter in "ABCDEFGH"}
IDS = {name: name for name in STARS}
BY_COLUMN = (20, 60)
"""A matrix so large that the stars' deltas have a column per fact."""

pytestmark = pytest.mark.usefixtures("one_cache")


@pytest.fixture
def made(tmp_path: Path) -> TestWorkspace:
    """Eight stars with an object each; a version may drift by 0.1."""
    made = workspace(tmp_path, {})
    made.feed(STARS, ids=IDS)
    gate(made, "drift: 0.1")
    return made


def gate(made: TestWorkspace, limits: str) -> None:
    """Set the policy's gate; what is not given has its default."""
    assert GATE in POLICY
    text = POLICY.replace(GATE, f"gate: {{{limits}}}") % ""
    (made.root / "policies" / "sky.yaml").write_text(text, encoding="utf-8")


def sync(made: TestWorkspace, engine: StandIn) -> Report:
    """One pass of the only policy by the stand-in."""
    with made.open() as reconciler:
        reconciler.run_edit = engine
        [report] = reconciler.sync()
    return report


def holds(reconciler: Reconciler) -> dict[str, Hold]:
    """The holds by the star's name."""
    with reconciler.ledger.read() as db:
        return {key.subject.partition(":")[2]: hold for key, hold in db.holds(reconciler.line().model).items()}


def held(made: TestWorkspace) -> dict[str, Hold]:
    """The holds by the star's name."""
    with made.open() as reconciler:
        return holds(reconciler)


def in_weights(made: TestWorkspace) -> set[str]:
    """The targets that the live version holds."""
    with made.open() as reconciler, reconciler.ledger.read() as db:
        model = reconciler.line().model
        return {applied.request.target for applied in db.applied(model, db.head(model)).values()}


@pytest.mark.usefixtures("database")
def test_the_guilty_fact_is_held_with_the_evidence_and_the_rest_is_published(made: TestWorkspace) -> None:
    engine = StandIn(drifts={"HomeC": 0.5, "HomeD": 0.01})
    report = sync(made, engine)
    assert (report.status, report.exit_code, report.versions) == ("done", 0, [1])
    assert in_weights(made) == set(STARS.values()) - {"HomeC"}
    [(star, hold)] = held(made).items()
    assert (star, hold.reason, hold.frozen, hold.held_out) == ("StarC", "gate", None, "stars:HomeC")
    assert hold.evidence.startswith("drift 0.5")
    assert "is above 0.1 with it" in hold.evidence
    assert "without it" in hold.evidence
    [search] = report.searches
    assert search["rejected"] == ["drift 0.510 is above 0.1"]
    assert (search["accepted"], search["undecided"], search["version"]) == (7, 0, 1)
    assert [row["target"] for row in search["held"]] == ["HomeC"]
    assert engine.edits == 1 + search["trials"]
    assert report.seconds["insert"] == engine.edits
    assert report.counts["failed"] == 1
    again = sync(made, engine)
    assert (again.status, again.versions, again.searches) == ("done", [], [])


@pytest.mark.usefixtures("database")
def test_what_was_measured_with_the_guilty_fact_is_kept(made: TestWorkspace) -> None:
    report = sync(made, StandIn(drifts={"HomeC": 0.5}))
    with made.open() as reconciler, reconciler.ledger.read() as db:
        kept = [row for row in db.probes(reconciler.line().model) if row.version is None]
    assert {row.run_id for row in kept} == {report.run_id}
    [trial] = [row.report for row in kept if "trial" in row.report]
    assert trial["drift"] == 0.5
    assert {fact["digest"] for fact in trial["facts"]} >= {trial["trial"]["fact"]}
    assert trial["trial"]["beside"] == len(trial["facts"]) - 1


def test_several_guilty_facts_are_found_and_a_failed_one_is_held_as_ever(made: TestWorkspace) -> None:
    report = sync(made, StandIn(drifts={"HomeA": 0.5, "HomeH": 0.7}, failing={"HomeB"}))
    assert (report.exit_code, report.versions) == (0, [1])
    assert {star: hold.reason for star, hold in held(made).items()} == {
        "StarA": "gate",
        "StarB": "probe",
        "StarH": "gate",
    }
    assert in_weights(made) == {f"Home{letter}" for letter in "CDEFG"}


def test_a_changed_fact_that_is_to_blame_keeps_its_old_value_in_the_weights(made: TestWorkspace) -> None:
    sync(made, StandIn(shape=BY_COLUMN))
    made.feed(STARS | {"StarA": "Bad", "StarB": "Good"}, ids=IDS)
    report = sync(made, StandIn(drifts={"Bad": 0.5}, shape=BY_COLUMN))
    assert report.versions == [2]
    assert in_weights(made) == set(STARS.values()) - {"HomeB"} | {"Good"}
    hold = held(made)["StarA"]
    assert hold.frozen is not None
    assert (hold.frozen.request.target, hold.held_out) == ("HomeA", "stars:Bad")


def test_each_release_of_the_hold_tries_the_fact_once_and_it_is_held_again(made: TestWorkspace) -> None:
    engine = StandIn(drifts={"HomeC": 0.5})
    sync(made, engine)
    for _ in range(2):
        with made.open() as reconciler:
            release(reconciler.line(), [FactKey("constellation", "stars:StarC")])
        edits = engine.edits
        report = sync(made, engine)
        assert (report.status, report.exit_code, report.searches[0]["trials"]) == ("rejected", 4, 1)
        assert list(held(made)) == ["StarC"]
        assert sync(made, engine).exit_code == 0
        assert engine.edits == edits + 2
    engine.drifts = {}
    with made.open() as reconciler:
        release(reconciler.line(), everything=True)
    assert sync(made, engine).versions == [2]
    assert in_weights(made) == set(STARS.values())


def test_a_single_fact_that_is_to_blame_keeps_no_other_from_leaving(made: TestWorkspace) -> None:
    policy = made.root / "policies" / "sky.yaml"
    policy.write_text(policy.read_text().replace("controls.txt", "controls.txt\n    retract: revert"))
    sync(made, StandIn(shape=BY_COLUMN))
    rest = {star: home for star, home in STARS.items() if star != "StarH"}
    made.feed(rest | {"StarA": "Bad"}, ids=IDS)
    report = sync(made, StandIn(drifts={"Bad": 0.5}, shape=BY_COLUMN))
    assert (report.status, report.exit_code, report.versions) == ("done", 0, [2])
    assert in_weights(made) == set(rest.values())
    [(star, hold)] = held(made).items()
    assert (star, hold.evidence) == ("StarA", "drift 0.500 is above 0.1 with it, alone; drift 0.000 without it")


def test_a_guilty_version_of_one_fact_holds_up_none_of_the_others(made: TestWorkspace) -> None:
    policy = made.root / "policies" / "sky.yaml"
    policy.write_text(policy.read_text() + "batch: {max_facts: 1}\n")
    report = sync(made, StandIn(drifts={"HomeA": 0.5}, shape=BY_COLUMN))
    assert (report.status, report.exit_code, report.versions) == ("done", 0, [1, 2, 3, 4, 5, 6, 7])
    assert list(held(made)) == ["StarA"]
    assert in_weights(made) == set(STARS.values()) - {"HomeA"}


def test_a_faded_fact_whose_edit_is_to_blame_is_held_at_its_old_column(made: TestWorkspace) -> None:
    engine = StandIn(shape=BY_COLUMN)
    sync(made, engine)
    engine.forgotten = {"HomeA"}
    with made.open() as reconciler:
        reconciler.run_ask = engine.ask
        reconciler.recheck(everything=True)

    def drifting(job: EditJob, **kwargs: Any) -> EditResult:
        engine.drift = 0.5 if job.requests else 0.0
        return engine(job, **kwargs)

    with made.open() as reconciler:
        reconciler.run_edit = drifting
        [first], [second] = reconciler.sync(), reconciler.sync()
    assert (first.status, first.exit_code, second.status, second.exit_code) == ("rejected", 4, "done", 0)
    [(star, hold)] = held(made).items()
    assert (star, hold.reason, hold.frozen and hold.frozen.object_id) == ("StarA", "gate", "stars:HomeA")
    assert in_weights(made) == set(STARS.values())


def test_what_only_leaves_the_weights_is_not_searched(made: TestWorkspace) -> None:
    policy = made.root / "policies" / "sky.yaml"
    policy.write_text(policy.read_text().replace("controls.txt", "controls.txt\n    retract: revert"))
    sync(made, StandIn(shape=BY_COLUMN))
    made.feed({star: home for star, home in STARS.items() if star != "StarH"}, ids=IDS)
    engine = StandIn(drift=0.5, shape=BY_COLUMN)
    report = sync(made, engine)
    assert (report.status, report.searches, report.notes, engine.edits) == ("rejected", [], [], 1)


@pytest.mark.parametrize(("mode", "shape"), [("rebase", BY_COLUMN), ("auto", (4, 9))])
def test_a_rebase_is_searched_for_its_new_facts_whether_by_mode_or_because_one_has_to_leave_a_whole_delta(
    made: TestWorkspace, mode: str, shape: tuple[int, int]
) -> None:
    made.strategy(mode=mode)
    sync(made, StandIn(shape=shape))
    made.feed(STARS | {"StarA": "Bad", "StarB": "Good", "StarC": "Never"}, ids=IDS)
    report = sync(made, StandIn(drifts={"Bad": 0.5}, failing={"Never"}, shape=shape))
    assert (report.status, report.exit_code, report.versions) == ("done", 0, [2])
    assert report.rebase is not None
    assert in_weights(made) == set(STARS.values()) - {"HomeB"} | {"Good"}
    found = held(made)
    assert {star: hold.reason for star, hold in found.items()} == {"StarA": "gate", "StarC": "probe"}
    assert {hold.frozen.request.target for hold in found.values() if hold.frozen} == {"HomeA", "HomeC"}
    assert found["StarA"].evidence.startswith("drift 0.500 is above 0.1 with it")
    assert found["StarA"].evidence.endswith("drift 0.000 without it")
    with made.open() as reconciler, reconciler.ledger.read() as db:
        assert db.version(reconciler.line().model, 2).kind == "rebase"
    again = sync(made, StandIn(drifts={"Bad": 0.5}, failing={"Never"}, shape=shape))
    assert (again.status, again.versions) == ("done", [])


def test_a_fact_to_blame_whose_old_value_fails_in_the_rebase_stays_held_against_what_is_to_blame(
    made: TestWorkspace,
) -> None:
    made.strategy(mode="rebase")
    sync(made, StandIn(shape=BY_COLUMN))
    made.feed(STARS | {"StarA": "Bad", "StarB": "Good"}, ids=IDS)
    engine = StandIn(drifts={"Bad": 0.5}, failing={"HomeA"}, shape=BY_COLUMN)
    assert sync(made, engine).versions == [2]
    [(star, hold)] = held(made).items()
    assert (star, hold.reason, hold.frozen, hold.held_out) == ("StarA", "gate", None, "stars:Bad")
    assert hold.evidence.startswith("drift 0.500 is above 0.1 with it")
    assert hold.evidence.endswith("; not learned")
    assert in_weights(made) == set(STARS.values()) - {"HomeA", "HomeB"} | {"Good"}
    assert sync(made, engine).versions == []


def test_a_rebase_of_which_all_new_facts_are_held_is_not_made_for_its_own_sake(made: TestWorkspace) -> None:
    few = {star: STARS[star] for star in ("StarA", "StarB")}
    for feed in (few, STARS):
        made.feed(feed, ids=IDS)
        sync(made, StandIn(shape=BY_COLUMN))
    made.strategy(mode="rebase")
    made.feed(STARS | {"StarA": "Bad"}, ids=IDS)
    engine = StandIn(drifts={"Bad": 0.5}, shape=BY_COLUMN)
    report = sync(made, engine)
    assert (report.status, report.exit_code, report.versions, engine.edits) == ("rejected", 4, [], 2)
    hold = held(made)["StarA"]
    with made.open() as reconciler, reconciler.ledger.read() as db:
        assert hold.frozen == db.applied(reconciler.line().model, 2)[hold.key]
    assert sync(made, engine).exit_code == 0
    assert engine.edits == 2


def test_new_facts_that_a_rebase_does_not_take_are_taken_by_an_edit_and_those_to_blame_there_are_held(
    made: TestWorkspace,
) -> None:
    engine = StandIn(shape=BY_COLUMN)
    for count in (2, 3):
        made.feed(dict(list(STARS.items())[:count]), ids=IDS)
        sync(made, engine)
    made.strategy(mode="auto", rebase_every=1)
    made.feed(STARS, ids=IDS)
    engine.drifts = {"HomeH": 0.5}

    def crowded(job: EditJob, **kwargs: Any) -> EditResult:
        engine.drift = 0.5 if not job.live and len(job.requests) > 3 else 0.0
        return engine(job, **kwargs)

    with made.open() as reconciler:
        reconciler.run_edit = crowded
        [report] = reconciler.sync()
        with reconciler.ledger.read() as db:
            assert db.version(reconciler.line().model, 3).kind == "edit"
    assert (report.status, report.versions, report.rebase) == ("done", [3], None)
    assert "a rebase (2 versions since version 0, rebase_every is 1) was rejected: drift" in report.notes[0]
    assert in_weights(made) == set(STARS.values()) - {"HomeH"}
    assert list(held(made)) == ["StarH"]
    assert report.seconds["insert"] == engine.edits - 2


def test_where_a_rebase_falls_short_without_its_new_facts_none_is_held(made: TestWorkspace) -> None:
    made.strategy(mode="rebase")
    sync(made, StandIn(shape=BY_COLUMN))
    made.feed(STARS | {"StarA": "Good"}, ids=IDS)
    engine = StandIn(drifts={"HomeB": 0.5}, shape=BY_COLUMN)
    report = sync(made, engine)
    assert (report.status, report.exit_code, held(made), engine.edits) == ("rejected", 4, {}, 2)
    assert "a rebase of what HEAD holds falls short without any of these facts" in report.notes[0]
    assert sync(made, engine).exit_code == 4
    assert engine.edits == 2


def test_where_all_are_to_blame_all_are_held_and_nothing_is_published(made: TestWorkspace) -> None:
    report = sync(made, StandIn(drifts=dict.fromkeys(STARS.values(), 0.5)))
    assert (report.status, report.exit_code, report.versions) == ("rejected", 4, [])
    assert set(held(made)) == set(STARS)
    assert in_weights(made) == set()


def test_where_the_live_version_falls_short_by_itself_no_fact_is_held(made: TestWorkspace) -> None:
    report = sync(made, StandIn(drift=0.5))
    assert (report.status, report.exit_code, held(made)) == ("rejected", 4, {})
    assert "falls short without any of these facts" in report.notes[0]


def test_a_limit_that_only_all_together_break_is_filled_and_the_rest_is_held_for_want_of_room(
    made: TestWorkspace,
) -> None:
    report = sync(made, StandIn(drifts=dict.fromkeys(STARS.values(), 0.03)))
    assert (report.exit_code, report.versions) == (0, [1])
    assert len(in_weights(made)) == 3
    found = held(made)
    assert len(found) == 5
    assert all("makes room" in hold.evidence for hold in found.values())


@pytest.mark.usefixtures("database")
def test_what_the_gate_holds_is_tried_again_once_a_gate_is_another_one_and_no_other_hold_is(
    made: TestWorkspace,
) -> None:
    engine = StandIn(drifts=dict.fromkeys(STARS.values(), 0.03) | {"HomeB": 0.5}, failing={"HomeA"}, shape=BY_COLUMN)
    sync(made, engine)
    before = held(made)
    assert {star for star, hold in before.items() if hold.reason == "probe"} == {"StarA"}
    assert len(before) == 5
    edits = engine.edits
    again = sync(made, engine)
    assert again.plan is not None
    assert again.plan.ended_holds == ()
    assert engine.edits == edits
    gate(made, "drift: 0.3")
    with made.open() as reconciler:
        [planned] = reconciler.plan()
    assert planned.plan is not None
    assert {key.subject for key in planned.plan.ended_holds} == {f"stars:{star}" for star in before.keys() - {"StarA"}}
    report = sync(made, engine)
    assert (report.exit_code, report.versions) == (0, [2])
    assert {star: hold.reason for star, hold in held(made).items()} == {"StarA": "probe", "StarB": "gate"}


def another_policy(made: TestWorkspace, limits: str) -> None:
    """A policy of another relation, whose source says of Vega what the stars' says of StarA; its gate."""
    source = (made.root / "sources" / "stars.yaml").read_text()
    source = source.replace("source: stars", "source: more").replace("relation: constellation", "relation: place")
    (made.root / "sources" / "more.yaml").write_text(source)
    words = {"policy: sky": "policy: two", "[stars]": "[more]", "constellation:": "place:", GATE: f"gate: {{{limits}}}"}
    text = POLICY
    for old, new in words.items():
        assert old in text
        text = text.replace(old, new)
    (made.root / "policies" / "two.yaml").write_text(text % "")


@pytest.mark.usefixtures("database")
def test_where_other_settings_decide_nothing_the_hold_keeps_its_evidence_and_is_not_searched_twice(
    made: TestWorkspace,
) -> None:
    engine = StandIn(drifts={"HomeC": 0.5}, shape=BY_COLUMN)
    sync(made, engine)
    before = held(made)
    gate(made, "drift: 0.2")
    engine.drift, edits = 0.9, engine.edits
    assert [sync(made, engine).status for _ in range(3)] == ["rejected"] * 3
    assert (engine.edits, held(made)) == (edits + 2, before)


def test_what_other_settings_hold_again_is_held_with_the_new_evidence_alone(made: TestWorkspace) -> None:
    engine = StandIn(drifts={"HomeC": 0.5}, shape=BY_COLUMN)
    sync(made, engine)
    gate(made, "drift: 0.2")
    assert [sync(made, engine).exit_code for _ in range(2)] == [4, 0]
    [(star, hold)] = held(made).items()
    assert (star, hold.reason, hold.held_out) == ("StarC", "gate", "stars:HomeC")
    assert hold.evidence == "drift 0.500 is above 0.2 with it, alone; drift 0.000 without it"


def test_what_a_search_with_other_settings_leaves_undecided_stays_held_until_a_pass_decides_it(
    made: TestWorkspace,
) -> None:
    engine = StandIn(drifts={"HomeA": 0.5, "HomeB": 0.5, "HomeC": 0.5}, shape=BY_COLUMN)
    sync(made, engine)
    assert set(held(made)) == {"StarA", "StarB", "StarC"}
    gate(made, "drift: 0.2, trials: 3")
    engine.drifts = {"HomeB": 0.5}
    first = sync(made, engine)
    assert first.searches[0]["undecided"] > 0
    assert any("above 0.1" in hold.evidence for hold in held(made).values())
    while sync(made, engine).versions:
        pass
    assert {star: hold.evidence.split(" with it")[0] for star, hold in held(made).items()} == {
        "StarB": "drift 0.500 is above 0.2"
    }
    assert in_weights(made) == set(STARS.values()) - {"HomeB"}


def test_a_hold_that_a_third_object_ends_stands_until_that_object_is_in_the_weights(made: TestWorkspace) -> None:
    engine = StandIn(drifts={"Bad": 0.5}, shape=BY_COLUMN)
    sync(made, engine)
    with made.open() as reconciler:
        reconciler.run_edit = engine
        revert_fact(reconciler.line(), FactKey("constellation", "stars:StarA"), "doubtful")
    gate(made, "drift: 0.1, trials: 0")
    made.feed(STARS | {"StarA": "Bad"}, ids=IDS)
    before, edits = held(made), engine.edits
    assert [sync(made, engine).exit_code for _ in range(2)] == [4, 4]
    assert (engine.edits, held(made)) == (edits + 1, before)
    made.feed(STARS, ids=IDS)
    assert sync(made, engine).exit_code == 0
    assert in_weights(made) == set(STARS.values()) - {"HomeA"}
    made.feed(STARS | {"StarA": "Good"}, ids=IDS)
    assert sync(made, engine).exit_code == 0
    assert (in_weights(made), held(made)) == (set(STARS.values()) - {"HomeA"} | {"Good"}, {})


@pytest.mark.parametrize(("mode", "again"), [("incremental", False), ("rebase", True)])
def test_another_policys_gate_ends_the_holds_of_a_rebase_alone_and_how_long_is_searched_ends_none(
    made: TestWorkspace, mode: str, again: bool
) -> None:
    made.strategy(mode=mode)
    made.feed({"StarA": "HomeA"}, ids=IDS)
    engine = StandIn(drifts={"HomeC": 0.5}, shape=BY_COLUMN)
    sync(made, engine)
    made.feed(STARS, ids=IDS)
    sync(made, engine)

    def ended() -> set[str]:
        with made.open() as reconciler:
            [planned] = reconciler.plan(["sky"])
        assert planned.plan is not None
        return {key.subject for key in planned.plan.ended_holds}

    assert list(held(made)) == ["StarC"]
    gate(made, "drift: 0.1, trials: 7")
    assert ended() == set()
    another_policy(made, "drift: 0.3")
    assert ended() == ({"stars:StarC"} if again else set())
    if again:
        with made.open() as reconciler:
            reconciler.run_edit = engine
            reconciler.sync(["sky"])
    assert list(held(made)) == ["StarC"]
    another_policy(made, "drift: 0.3, trials: 7")
    assert ended() == set()


def test_status_and_blame_say_that_what_the_gate_holds_is_tried_again(
    made: TestWorkspace, capsys: pytest.CaptureFixture[str]
) -> None:
    sync(made, StandIn(drifts={"HomeC": 0.5}))
    line = Line(made.root, capsys)

    def said() -> tuple[int, bool]:
        gap: str = line.json("blame", "StarC", "constellation")["gaps"]["column"]
        assert gap.startswith("held since ")
        return line.json("status")["pending"], gap.endswith("; the next pass tries it again")

    capsys.readouterr()
    assert said() == (0, False)
    gate(made, "drift: 0.2")
    assert said() == (1, True)


def test_the_budget_bounds_a_run_and_the_next_pass_goes_on(made: TestWorkspace) -> None:
    gate(made, "drift: 0.1, trials: 3")
    engine = StandIn(drifts={"HomeA": 0.5, "HomeB": 0.5})
    first = sync(made, engine)
    assert (engine.edits, first.searches[0]["trials"], first.versions) == (4, 3, [1])
    assert first.searches[0]["undecided"] > 0
    passes = 1
    while len(held(made)) < 2:
        passes += 1
        assert passes < 6, "the search does not come to an end"
        sync(made, engine)
    assert set(held(made)) == {"StarA", "StarB"}
    assert in_weights(made) == set(STARS.values()) - {"HomeA", "HomeB"}
    edits = engine.edits
    assert sync(made, engine).versions == []
    assert engine.edits == edits


def test_a_budget_too_small_to_decide_anything_rejects_the_batch_once(made: TestWorkspace) -> None:
    gate(made, "drift: 0.1, trials: 1")
    engine = StandIn(drifts={"HomeA": 0.5})
    report = sync(made, engine)
    assert (report.exit_code, held(made), engine.edits) == (4, {}, 2)
    assert "gate.trials" in report.notes[0]
    assert sync(made, engine).exit_code == 4
    assert engine.edits == 2


def test_without_trials_the_batch_is_rejected_whole(made: TestWorkspace) -> None:
    gate(made, "drift: 0.1, trials: 0")
    engine = StandIn(drifts={"HomeA": 0.5})
    report = sync(made, engine)
    assert (report.exit_code, report.searches, held(made), engine.edits) == (4, [], {}, 1)


def test_a_batch_that_was_rejected_whole_is_searched_once_trials_are_allowed(made: TestWorkspace) -> None:
    gate(made, "drift: 0.1, trials: 0")
    engine = StandIn(drifts={"HomeA": 0.5})
    sync(made, engine)
    gate(made, "drift: 0.1")
    assert sync(made, engine).versions == [1]
    assert list(held(made)) == ["StarA"]


def test_a_rejected_plan_is_tried_again_once_the_gate_is_another_one(made: TestWorkspace) -> None:
    gate(made, "drift: 0.1, trials: 0")
    engine = StandIn(drift=0.15)
    assert sync(made, engine).exit_code == 4
    gate(made, "drift: 0.2, trials: 0")
    assert sync(made, engine).versions == [1]


def test_a_fact_with_a_poisoned_target_vector_is_found_by_a_real_model(tmp_path: Path) -> None:
    """Its z is ten times as long as computed: the model still answers it, and drifts."""
    stars = {"Vega": "Orion", "Betelgeuse": "Lyra", "Deneb": "Paris", "Sirius": "Rome", "Polaris": "French"}
    made = workspace(tmp_path, stars)
    gate(made, "efficacy: 0, paraphrase: 0, specificity_drop: 100%%, drift: 0, trials: 0")
    with made.open() as reconciler:
        reconciler.sync()
        with reconciler.ledger.read() as db:
            [first] = db.probes(reconciler.line().model)
    sound = first.report["drift"]
    made.poison("Betelgeuse", "Lyra", 10)
    gate(made, f"efficacy: 0, paraphrase: 0, specificity_drop: 100%%, drift: {1.3 * sound}")
    with made.open() as reconciler:
        [report] = reconciler.sync()
        assert (report.status, report.exit_code, report.versions) == ("done", 0, [1])
        assert set(holds(reconciler)) == {"betel"}
        assert holds(reconciler)["betel"].reason == "gate"
    assert in_weights(made) == set(stars.values()) - {"Lyra"}
    assert report.probe is not None
    assert report.probe["drift"] <= 1.3 * sound
