"""A person decides: conflicts, held plans whole and row by row, reviewed plans, quarantined rows; on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

import pytest
from typer.testing import CliRunner

from kbsync.cli import app
from kbsync.commands import execute
from kbsync.errors import Moved, UsageError
from kbsync.facts import FactKey, Provenance, Snapshot
from kbsync.plan import Plan
from kbsync.plan_document import PlanDocument, PlanFile, document_of, read_plans
from kbsync.report import Report
from kbsync.undo import release, rollback
from tests.ledgers import NOON
from tests.standin import StandIn
from tests.workspaces import TestWorkspace, workspace

STARS = {"Vega": "Orion", "Betelgeuse": "Lyra", "Deneb": "Paris"}
RELATION = "constellation"
VEGA, DENEB = FactKey(RELATION, "stars:vega"), FactKey(RELATION, "stars:deneb")


pytestmark = pytest.mark.usefixtures("one_cache")


@pytest.fixture
def made(tmp_path: Path) -> TestWorkspace:
    """A workspace that was synced once."""
    made = workspace(tmp_path, STARS)
    sync(made)
    return made


def sync(made: TestWorkspace) -> Report:
    """One pass of the only policy."""
    with made.open() as reconciler:
        [report] = reconciler.sync()
    return report


def add_rows(made: TestWorkspace, text: str) -> None:
    """Lines at the end of the feed."""
    feed = made.root / "sources" / "stars.csv"
    feed.write_text(feed.read_text() + text)


def limit(made: TestWorkspace, edits: int) -> None:
    """Hold every plan with more edits than that."""
    path = made.root / "policies" / "sky.yaml"
    path.write_text(path.read_text().replace("max_edits: 50", f"max_edits: {edits}"))


def objects(made: TestWorkspace) -> dict[str, str]:
    """Subject -> object, as the ledger has it."""
    with made.open() as reconciler, reconciler.ledger.read() as db:
        return {fact.subject.label: fact.object.label for fact in db.facts().values()}


def weights(made: TestWorkspace) -> dict[str, str]:
    """Subject -> target, as the live version holds it."""
    with made.open() as reconciler, reconciler.ledger.read() as db:
        model = reconciler.line().model
        return {now.request.subject: now.request.target for now in db.applied(model, db.head(model)).values()}


# Conflicts ---------------------------------------------------------------------------------------------------------


def test_a_ruling_decides_a_conflict_and_the_replay_edits_it_without_asking_the_source(made: TestWorkspace) -> None:
    """Withdrawn, the conflict is back; the weights keep what they hold."""
    add_rows(made, "vega,Vega,Rome\n")
    assert sync(made).counts["conflicts"] == 1
    (made.root / "sources" / "stars.csv").write_text("broken")
    with made.open() as reconciler:
        ask = {"subject": "Vega", "relation": RELATION}
        done = execute(reconciler, "rule", ask | {"object": "Rome", "reason": "looked"})
        assert (done["object"], done["overruled"], done["policy"]) == ("Rome", ["Orion"], "sky")
        with reconciler.ledger.read() as db:
            asked = db.schedule_state("sky").last_ok
        [report] = reconciler.replay()
        assert (report.status, report.counts["conflicts"], report.counts["edits"]) == ("done", 0, 1)
        with reconciler.ledger.read() as db:
            assert db.schedule_state("sky").last_ok == asked, "the sources are no fresher"
            assert db.facts()[VEGA].rule == "ruling: looked"
            assert db.runs()[0].trigger == "replay"
        execute(reconciler, "unrule", ask)
        [again] = reconciler.replay()
        assert (again.counts["conflicts"], again.counts["edits"]) == (1, 0)
    assert weights(made)["Vega"] == "Rome"


def test_a_relation_that_no_policy_keeps_leaves_no_conflict_behind(made: TestWorkspace) -> None:
    """What nobody can decide any more is not open for ever."""
    inverse = "    inverse: {relation: star, prompt: 'A star of {subject} is'}"
    made.policy(inverse)
    add_rows(made, "rigel,Rigel,Orion\n")
    sync(made)
    with made.open() as reconciler, reconciler.ledger.read() as db:
        assert [row.conflict.key.relation for row in db.conflicts()] == ["star"]
    made.policy()
    held = sync(made)
    with made.open() as reconciler:
        reconciler.approve(held.run_id or 0)
    with made.open() as reconciler, reconciler.ledger.read() as db:
        assert db.conflicts() == []
        assert [row.closed_run_id for row in db.conflicts(open_only=False)] == [3]


def test_a_ruling_that_cannot_be_meant_is_refused(made: TestWorkspace) -> None:
    """An object that nobody claims, a subject without claims, a ruling that is not there."""
    add_rows(made, "vega,Vega,Rome\n")
    sync(made)
    with made.open() as reconciler:
        ask = {"subject": "Vega", "relation": RELATION}
        for arguments, problem in [
            (ask | {"object": "Bonn"}, "no claim says that: Orion"),
            (ask | {"source": "stars"}, "several objects are meant: Orion"),
            ({"subject": "Nemo", "relation": RELATION, "source": "stars"}, "'Nemo' has no claim"),
        ]:
            with pytest.raises(UsageError, match=problem):
                execute(reconciler, "rule", arguments)
        with pytest.raises(UsageError, match="there is no ruling"):
            execute(reconciler, "unrule", ask)


def test_subjects_written_alike_are_parted_by_the_template_not_by_a_ruling(made: TestWorkspace) -> None:
    """Choosing an object would leave two prompts that are one."""
    add_rows(made, "other,Vega,Rome\n")
    sync(made)
    with made.open() as reconciler, pytest.raises(UsageError) as refused:
        execute(reconciler, "rule", {"subject": "stars:vega", "relation": RELATION, "object": "Orion"})
    assert "relations.constellation.subject" in refused.value.hint
    with made.open() as reconciler, reconciler.ledger.read() as db:
        sides = [side for row in db.conflicts() for side in row.conflict.claims]
        claims = {claim.id: claim.subject.id for claim in db.claims([RELATION])}
    assert sides
    assert [claims[side.id] for side in sides] == [side.subject.id for side in sides], "each side is a claim"
    shown = CliRunner().invoke(app, ["conflicts", "list", "-w", str(made.root)], env={"COLUMNS": "200"}).output
    assert "Vega (stars:vega)" in shown
    assert "Vega (stars:other)" in shown


def test_a_protected_subject_is_not_edited_by_a_ruling_either(made: TestWorkspace) -> None:
    """Nor taken out by a rebase: the ledger records the ruled fact, the weights keep theirs."""
    made.policy("    protected: [stars:vega]")
    add_rows(made, "vega,Vega,Rome\n")
    sync(made)
    with made.open() as reconciler:
        execute(reconciler, "rule", {"subject": "Vega", "relation": RELATION, "object": "Rome"})
        [report] = reconciler.replay()
        assert report.counts["edits"] == 0
        execute(reconciler, "rebase", {})
    assert (objects(made)["Vega"], weights(made)["Vega"]) == ("Rome", "Orion")


# Held plans --------------------------------------------------------------------------------------------------------

CHANGED = {"Vega": "Rome", "Betelgeuse": "French", "Deneb": "Paris", "Sirius": "Italy"}


@pytest.fixture
def held(made: TestWorkspace) -> tuple[TestWorkspace, int]:
    """A run that waits: Vega and Betelgeuse changed, Sirius new."""
    limit(made, 2)
    made.feed(CHANGED)
    report = sync(made)
    assert (report.status, report.exit_code, report.run_id) == ("held", 3, 2)
    return made, 2


def test_a_refused_row_stays_out_of_this_and_the_next_pass_while_the_ledger_records_it(
    held: tuple[TestWorkspace, int],
) -> None:
    """Its hold names the run, the user and the reason; `release` lets it in."""
    made, run = held
    with made.open() as reconciler:
        report = reconciler.approve(run, without=[("Vega", RELATION)], reason="vandalism")
        assert (report.status, report.versions) == ("done", [2])
        with reconciler.ledger.read() as db:
            [row] = db.hold_rows(reconciler.line().model)
            evidence = (row.hold.key, row.hold.reason, row.hold.evidence, row.run_id)
            assert evidence == (VEGA, "manual", "run 2: refused by test: vandalism", run)
            verdicts = {key.subject: row.approved for key, row in db.verdicts(run).items()}
            assert verdicts == {"stars:vega": False, "stars:betel": True, "stars:siriu": True}
            assert next(entry.detail["refused"] for entry in db.audit_log() if entry.action == "approve")
    assert (objects(made)["Vega"], weights(made)) == ("Rome", CHANGED | {"Vega": "Orion"})
    assert sync(made).counts["edits"] == 0
    with made.open() as reconciler:
        release(reconciler.line(), [VEGA])
        [last] = reconciler.sync()
    assert last.counts["edits"] == 1
    assert weights(made) == CHANGED


def test_rows_may_be_refused_step_by_step_before_the_run_is_approved(held: tuple[TestWorkspace, int]) -> None:
    """By id or as written; the run waits on; each row is named just once however often it is refused."""
    made, run = held
    with made.open() as reconciler:
        first = reconciler.reject(run, "wrong", only=[("stars:vega", RELATION)])
        assert (first.status, first.exit_code, first.notes) == (
            "held",
            0,
            ["1 rows refused; kbsync approve 2 applies the others"],
        )
        reconciler.reject(run, "new", only=[("Sirius", RELATION)])
        with pytest.raises(UsageError, match="no row for constellation of 'Deneb'"):
            reconciler.reject(run, only=[("Deneb", RELATION)])
        reconciler.approve(run)
    assert weights(made) == STARS | {"Betelgeuse": "French"}


def test_approving_only_some_rows_refuses_the_others(held: tuple[TestWorkspace, int]) -> None:
    """A new fact that is refused is held at nothing."""
    made, run = held
    with made.open() as reconciler:
        reconciler.approve(run, only=[("Vega", RELATION)])
        with reconciler.ledger.read() as db:
            frozen = {key.subject: bool(hold.frozen) for key, hold in db.holds(reconciler.line().model).items()}
    assert frozen == {"stars:betel": True, "stars:siriu": False}
    assert weights(made) == STARS | {"Vega": "Rome"}


def test_rejecting_all_but_some_rows_leaves_those(held: tuple[TestWorkspace, int]) -> None:
    """The rows named are not judged yet."""
    made, run = held
    with made.open() as reconciler:
        reconciler.reject(run, without=[("Vega", RELATION)])
        reconciler.approve(run)
    assert weights(made) == STARS | {"Vega": "Rome"}


def test_a_refused_retraction_keeps_the_fact_in_the_weights(made: TestWorkspace) -> None:
    """The ledger lets it go."""
    made.policy("    retract: revert")
    limit(made, 0)
    made.feed({star: place for star, place in STARS.items() if star != "Vega"})
    run = sync(made).run_id or 0
    with made.open() as reconciler:
        reconciler.approve(run, without=[("Vega", RELATION)])
    assert ("Vega" in objects(made), weights(made)["Vega"]) == (False, "Orion")
    assert sync(made).counts["retractions"] == 0


def test_a_held_plan_is_approved_by_its_digest_only(held: tuple[TestWorkspace, int]) -> None:
    """Another digest is refused and leaves the run held."""
    made, run = held
    with made.open() as reconciler:
        with pytest.raises(UsageError, match="its plan is"):
            reconciler.approve(run, digest="0" * 64)
        with reconciler.ledger.read() as db:
            [staged] = db.staged_plans()
        assert reconciler.approve(run, digest=staged.plan_digest).status == "done"


def test_an_approval_names_the_key_that_has_moved(held: tuple[TestWorkspace, int]) -> None:
    """A hold that was placed meanwhile makes it another plan; nothing is recorded."""
    made, run = held
    with made.open() as reconciler:
        execute(reconciler, "revert", {"key": list(VEGA)})
        with pytest.raises(Moved, match="HEAD has moved from version 1 to 2"):
            reconciler.approve(run)
    assert objects(made) == STARS


def test_a_held_run_is_over_once_a_later_pass_has_accepted_what_its_source_says(
    held: tuple[TestWorkspace, int],
) -> None:
    """The source took its change back: approving the old run would bring it in against what the source says now."""
    made, run = held
    made.feed(STARS)
    assert sync(made).status == "done"
    with made.open() as reconciler:
        with reconciler.ledger.read() as db:
            assert (db.run(run).status, db.staged_plans()) == ("superseded", [])
        with pytest.raises(UsageError, match="is not held"):
            reconciler.approve(run)
    assert objects(made) == STARS


def test_an_approval_is_refused_where_another_pass_has_accepted_more_of_its_source(
    held: tuple[TestWorkspace, int],
) -> None:
    """A source may serve two policies: only passes of one's own supersede a run. It waits on, and can be rejected."""
    made, run = held
    with made.open() as reconciler:
        with reconciler.ledger.write() as db:
            [snapshot] = db.staged(run)
            db.record(db.start_run("other", model=None, trigger="sync", user="test"), snapshot)
        with pytest.raises(Moved, match="what stars said later has been accepted"):
            reconciler.approve(run)
        assert reconciler.reject(run).status == "rejected"


def test_an_approved_run_that_dies_has_failed_and_waits_no_more(held: tuple[TestWorkspace, int]) -> None:
    """What was decided is in the ledger; the next pass edits it."""
    made, run = held
    with made.open() as reconciler:
        reconciler.run_edit = StandIn(dies=True)
        report = reconciler.approve(run)
        assert (report.status, report.exit_code) == ("failed", 1)
        with reconciler.ledger.read() as db:
            assert (db.run(run).status, db.staged_plan(run)) == ("failed", None)
    assert objects(made) == CHANGED
    assert sync(made).counts["edits"] == 3


def test_an_approved_run_whose_process_is_killed_is_found_by_the_next_one(held: tuple[TestWorkspace, int]) -> None:
    """Between the decision and its end the run is `running`, not `held`."""
    made, run = held

    def killed(*_: object, **__: object) -> NoReturn:
        raise SystemExit(9)

    with made.open() as reconciler:
        reconciler.run_edit = killed
        with pytest.raises(SystemExit):
            reconciler.approve(run)
        with reconciler.ledger.read() as db:
            assert db.run(run).status == "running"
        reconciler.recover()
        with reconciler.ledger.read() as db:
            assert db.run(run).status == "failed"


# Reviewed plans ----------------------------------------------------------------------------------------------------


def documents(made: TestWorkspace) -> list[PlanDocument]:
    """What `plan` shows for review, after a trip through a file."""
    with made.open() as reconciler:
        plans = [report.document for report in reconciler.plan() if report.document]
    return read_plans(json.loads(PlanFile(plans=plans).model_dump_json()))


def test_a_plan_document_is_whole_and_stable(made: TestWorkspace) -> None:
    """Everything that a reviewer asks for; twice the same, to the byte."""
    add_rows(made, "vega,Vega,Rome\nsirius,Sirius,Italy\n")
    [document] = documents(made)
    assert document.model_dump_json() == documents(made)[0].model_dump_json()
    assert [(row.subject, row.target, row.before, row.origin) for row in document.adds] == [
        ("Sirius", "Italy", None, "line 6")
    ]
    assert (document.policy, document.head, document.facts, document.unchanged) == ("sky", 1, {"added": 1}, 3)
    assert [(row.key, row.kind, len(row.claims)) for row in document.conflicts] == [(VEGA, "rows", 2)]
    cost = document.cost
    assert cost is not None
    assert (cost.facts, cost.targets.compute, cost.targets.cached, cost.capacity.facts) == (1, 1, 0, 4)
    assert cost.seconds is not None
    assert cost.seconds > 0
    assert cost.capacity.relative_norm is not None
    made.feed(STARS)
    [nothing] = documents(made)
    assert (nothing.rows, nothing.facts, nothing.cost and nothing.cost.seconds) == ({}, {}, 0.0)


def test_a_reviewed_plan_is_applied_as_it_is_even_where_a_guard_would_hold_it(made: TestWorkspace) -> None:
    """Its document shows the guard's reason, and whoever applies it has seen that."""
    limit(made, 1)
    made.feed(CHANGED)
    plans = documents(made)
    assert plans[0].guard == ["3 edits and retractions, max_edits is 1"]
    with made.open() as reconciler:
        [report] = reconciler.sync(reviewed=plans)
    assert (report.status, report.versions, weights(made)) == ("done", [2], CHANGED)


def test_a_reviewed_plan_is_refused_where_the_world_has_moved_and_says_what(made: TestWorkspace) -> None:
    """Another object at the source; another HEAD; a policy that the file has no plan for."""
    made.feed(CHANGED)
    plans = documents(made)
    made.feed(CHANGED | {"Vega": "French"})
    with made.open() as reconciler:
        [report] = reconciler.sync(reviewed=plans)
        assert (report.status, report.exit_code, type(report.problems[0])) == ("superseded", 1, Moved)
        assert "constellation of stars:vega: was to become Rome, is to become French now" in report.problems[0].message
        made.feed(CHANGED)
        rollback(reconciler.line(), 0)
        [report] = reconciler.sync(reviewed=plans)
        assert "HEAD has moved from version 1 to 0" in report.problems[0].message
        with pytest.raises(UsageError, match="has none for policy other"):
            reconciler.sync(["other"], reviewed=plans)
    assert objects(made) == STARS


def test_a_plan_file_without_a_plan_syncs_nothing(made: TestWorkspace) -> None:
    """Nobody has reviewed anything; two plans for one policy are none either."""
    made.feed(CHANGED)
    [plan] = documents(made)
    with made.open() as reconciler:
        for plans, problem in [([], "no plan of a policy"), ([plan, plan], "two plans for one policy")]:
            with pytest.raises(UsageError, match=problem):
                execute(reconciler, "sync", {"reviewed": PlanFile(plans=plans).model_dump(mode="json")})
            with pytest.raises(UsageError, match=problem):
                reconciler.plan(reviewed=plans)
    assert objects(made) == STARS


def test_a_plan_file_that_shows_less_than_would_be_done_is_refused(made: TestWorkspace) -> None:
    """A row was cut out of it: whoever read it has not seen that row."""
    made.feed(CHANGED)
    [plan] = documents(made)
    less = plan.model_copy(update={"changes": [row for row in plan.changes if row.subject != "Vega"]})
    with made.open() as reconciler:
        [report] = reconciler.sync(reviewed=[less])
    assert report.status == "superseded"
    assert "stars:vega: was not in the plan, is to become Rome now" in report.problems[0].message
    assert (objects(made), weights(made)) == (STARS, STARS)


def test_a_change_of_the_ledger_alone_is_part_of_what_is_reviewed(made: TestWorkspace) -> None:
    """Facts that a policy keeps when they are withdrawn leave the weights as they are: the document lists them."""
    [plan] = documents(made)
    made.feed({star: place for star, place in STARS.items() if star != "Vega"})
    [now] = documents(made)
    assert [(row.key, row.kind, row.before, row.after) for row in now.ledger] == [(VEGA, "withdrawn", "Orion", "Orion")]
    assert (now.rows, now.facts, now.digest != plan.digest) == ({}, {"withdrawn": 1}, True)
    with made.open() as reconciler:
        [report] = reconciler.sync(reviewed=[plan])
        assert "stars:vega: its entry in `ledger` is another one" in report.problems[0].message
        [report] = reconciler.sync(reviewed=[now])
        assert report.status == "done"
        with reconciler.ledger.read() as db:
            assert db.facts()[VEGA].status == "withdrawn"


def test_a_reviewed_plan_is_checked_by_a_dry_run(made: TestWorkspace) -> None:
    """It says what has moved, and does nothing where nothing has."""
    made.feed(CHANGED)
    plans = documents(made)
    with made.open() as reconciler:
        assert [report.status for report in reconciler.plan(reviewed=plans)] == ["planned"]
        made.feed(CHANGED | {"Vega": "French"})
        [report] = reconciler.plan(reviewed=plans)
    assert (report.exit_code, type(report.problems[0])) == (1, Moved)
    assert objects(made) == STARS


def test_a_large_first_load_is_counted_whole_and_listed_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not listed is told apart by the body that it comes from."""
    monkeypatch.setattr("kbsync.intake.LISTED", 2)
    made = workspace(tmp_path, STARS)
    [plan] = documents(made)
    assert (plan.facts, len(plan.ledger)) == ({"added": 3}, 2)
    bodies = [Snapshot("stars", RELATION, Provenance("stars.csv", NOON, 200, body * 64)) for body in "ab"]
    plans = [document_of(Plan("m", 0), "sky", kinds={"added": 3}, snapshots=[one]) for one in bodies]
    assert len({plan.digest for plan in plans}) == 2


def test_a_guard_that_the_document_does_not_show_still_holds(made: TestWorkspace) -> None:
    """The same edits, but the source has become suspicious otherwise."""
    made.feed(CHANGED)
    plans = documents(made)
    limit(made, 1)
    with made.open() as reconciler:
        [report] = reconciler.sync(reviewed=plans)
    assert report.status == "held"


def test_every_version_has_the_plan_that_made_it(made: TestWorkspace) -> None:
    """Of a pass, of an undo, of a rebase: by run and parent version."""
    made.feed(CHANGED)
    sync(made)
    with made.open() as reconciler:
        execute(reconciler, "revert", {"key": list(VEGA)})
        execute(reconciler, "rebase", {})
        with reconciler.ledger.read() as db:
            versions = db.versions(reconciler.line().model)[1:]
            found = []
            for version in versions:
                [row] = [row for row in db.plans(version.run_id) if row.head == version.parent]
                document = PlanDocument.read(row.document)
                assert document is not None
                assert document.digest == row.digest
                parts = (document.adds, document.changes, document.kept, document.retractions)
                found.append((document.policy, [len(part) for part in parts]))
    assert found == [("sky", [3, 0, 0, 0]), ("sky", [1, 2, 0, 0]), (None, [0, 0, 0, 1]), (None, [0, 0, 3, 0])]


# Quarantine --------------------------------------------------------------------------------------------------------


def test_a_source_is_read_anew_and_its_mended_rows_come_in(made: TestWorkspace) -> None:
    """A source that no policy names is a mistake."""
    add_rows(made, "sirius,,Italy\n")
    assert sync(made).counts["quarantined"] == 1
    made.feed(STARS | {"Sirius": "Italy"})
    with made.open() as reconciler:
        [report] = execute(reconciler, "refetch", {"source": "stars"})["reports"]
        assert (report["status"], report["counts"]["quarantined"], report["versions"]) == ("done", 0, [2])
        with pytest.raises(UsageError, match="no policy names the source"):
            reconciler.refetch("stras")


# Relations that no policy keeps any more ---------------------------------------------------------------------------


def test_a_dropped_relation_leaves_ledger_and_weights_once_a_person_approves(tmp_path: Path) -> None:
    """Until then every pass is held, with the number of facts that would leave; afterwards nothing is left to say."""
    stars, turned = {"Rome": "Orion", "French": "Lyra"}, {"Orion": "Rome", "Lyra": "French"}
    made = workspace(tmp_path, stars)
    made.policy("    inverse: {relation: star, prompt: 'Who is in {subject}'}")
    assert sync(made).status == "done"
    assert objects(made) == weights(made) == stars | turned
    made.policy()
    for _ in range(2):
        held = sync(made)
        assert held.status == "held"
        assert held.reasons == ["relation star is kept by no policy any more: 2 facts leave"]
    assert objects(made) == weights(made) == stars | turned
    with made.open() as reconciler:
        report = reconciler.approve(held.run_id or 0)
    assert report.status == "done"
    assert objects(made) == weights(made) == stars
    assert sync(made).reasons == []


def test_facts_that_no_policy_keeps_are_named_with_what_to_do(made: TestWorkspace) -> None:
    """By `check` and `status`: of a policy that is there, and of one that is gone."""
    made.policy("    inverse: {relation: star, prompt: 'A star of {subject} is'}")
    sync(made)
    made.policy()
    said = "relation star is kept by no policy any more; its 3 facts stay as they are"
    for command in ("check", "status"):
        [warning] = warnings(made, command)
        assert warning == f"{said} until a person lets them go: kbsync sync sky, then kbsync approve"
    (made.root / "policies" / "sky.yaml").unlink()
    for command in ("check", "status"):
        found = [line for line in warnings(made, command) if "kept by no policy" in line]
        assert found[-1] == f"{said}; keep it in policy sky again, or take it out of there and kbsync sync"


def warnings(made: TestWorkspace, command: str) -> list[str]:
    """What a command warns of."""
    result = CliRunner().invoke(app, [command, "-w", str(made.root), "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    return [str(one) for one in json.loads(result.stdout)["warnings"]]
