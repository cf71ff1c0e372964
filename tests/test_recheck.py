"""Old facts are asked again; what has faded is edited once more, and held where that is no help."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import kbsync
from kbsync.cli import main
from kbsync.daemon.chores import CHORES
from kbsync.editor.answers import log_probabilities
from kbsync.errors import Cancelled
from kbsync.facts import FactKey
from kbsync.recheck import AGES, FactCheck, Share
from kbsync.undo import release, rollback
from tests.standin import StandIn
from tests.workspaces import TestWorkspace, run_here, workspace

STARS = {"Vega": "Orion", "Betelgeuse": "Lyra", "Deneb": "Paris"}


@pytest.fixture
def made(tmp_path: Path) -> TestWorkspace:
    """Three stars."""
    return workspace(tmp_path, STARS)


class Life:
    """A workspace whose edits and questions the stand-in answers."""

    def __init__(self, made: TestWorkspace) -> None:
        self.made, self.engine = made, StandIn(shape=(20, 60))

    def sync(self) -> tuple[str, list[int], dict[str, str]]:
        """A pass: how it ended, its versions, and kind of edit by object."""
        with self.made.open() as reconciler:
            reconciler.run_edit = self.engine
            [report] = reconciler.sync()
        assert report.plan is not None
        return report.status, report.versions, {edit.request.target: edit.kind for edit in report.plan.edits}

    def recheck(self, *, everything: bool = True) -> dict[str, object]:
        """Ask again; by default all."""
        with self.made.open() as reconciler:
            reconciler.run_ask = self.engine.ask
            return reconciler.recheck(everything=everything)

    def kinds(self) -> list[str]:
        """The notices, oldest first."""
        with self.made.open() as reconciler, reconciler.ledger.read() as db:
            return [notice.kind for notice in db.notices()][::-1]


@pytest.fixture
def life(made: TestWorkspace) -> Life:
    """Three stars in version 1."""
    found = Life(made)
    assert found.sync()[1] == [1]
    return found


@pytest.mark.usefixtures("database")
def test_what_has_faded_is_edited_once_more_and_people_are_told(life: Life) -> None:
    life.engine.forgotten = {"Lyra"}
    done = life.recheck()
    assert (done["asked"], done["answered"], done["faded"], done["held"]) == (3, 2, 1, [])
    assert life.kinds() == ["faded"]
    assert life.sync() == ("done", [2], {"Lyra": "faded"})
    assert life.sync() == ("done", [], {})
    life.engine.forgotten = set()
    assert life.recheck()["faded"] == 0
    assert life.kinds() == ["faded", "recovered"]
    with life.made.open() as reconciler, reconciler.ledger.read() as db:
        model = reconciler.line().model
        live = {fact.request.target: fact.delta for fact in db.applied(model, 2).values()}
        assert len(set(live.values())) == 2
        assert live["Orion"] == live["Paris"] != live["Lyra"]


def test_nothing_is_asked_before_it_is_due(life: Life) -> None:
    assert life.recheck(everything=False)["asked"] == 0
    assert life.engine.asked == []
    (life.made.root / "kbsync.yaml").write_text(
        (life.made.root / "kbsync.yaml").read_text() + "recheck: {first: 0.001, facts: 2}\n"
    )
    assert life.recheck(everything=False)["asked"] == 2
    assert life.recheck(everything=False)["asked"] == 2
    assert set(life.engine.asked) == set(STARS.values())


def test_a_fact_that_fades_again_and_again_is_held_with_the_evidence(life: Life) -> None:
    life.engine.forgotten = {"Lyra"}
    for version in (2, 3, 4):
        assert life.recheck()["held"] == []
        assert life.sync()[1] == [version]
    assert life.recheck()["held"] == [["constellation", "stars:betel"]]
    assert life.sync() == ("done", [], {})
    with life.made.open() as reconciler, reconciler.ledger.read() as db:
        [hold] = db.holds(reconciler.line().model).values()
    assert (hold.reason, hold.held_out) == ("probe", "stars:Lyra")
    assert hold.evidence == "not answered, though edited 3 times once more: the model answers 'no'"
    with life.made.open() as reconciler:
        release(reconciler.line(), [hold.key])
    assert life.sync()[1] == [5]


def test_a_held_fact_is_not_edited_once_more(life: Life) -> None:
    life.made.feed(STARS | {"Betelgeuse": "Rome"})
    assert life.sync()[1] == [2]
    with life.made.open() as reconciler:
        rollback(reconciler.line(), 1)
    life.engine.forgotten = {"Lyra"}
    assert life.recheck()["faded"] == 0
    assert life.sync() == ("done", [], {})


@pytest.mark.parametrize("unwilling", ["a protected subject", "a relation of no policy"])
def test_nobody_is_promised_an_edit_that_no_pass_makes(life: Life, unwilling: str) -> None:
    policy = life.made.root / "policies" / "sky.yaml"
    if unwilling == "a protected subject":
        policy.write_text(policy.read_text().replace("prompt:", "protected: ['stars:betel']\n    prompt:"))
    else:
        policy.unlink()
        (life.made.root / "sources" / "stars.yaml").unlink()
    life.engine.forgotten = {"Lyra"}
    done = life.recheck()
    assert (done["answered"], done["faded"], done["held"]) == (2, 0, [])
    assert life.kinds() == []


@pytest.mark.usefixtures("database")
def test_what_is_still_answered_is_counted_by_relation_and_age(life: Life) -> None:
    now = datetime(2026, 7, 1, 12, tzinfo=UTC)

    def check(age: float, answered: bool) -> FactCheck:
        served = now - timedelta(days=age)
        return FactCheck(FactKey("constellation", "stars:vega"), "r", 1, 1, answered, served, now, now)

    with life.made.open() as reconciler:
        model, ledger = reconciler.line().model, reconciler.ledger
        with ledger.write() as db:
            assert db.decay(model) == []
            db.note_checks(model, [check(age, age != 6) for age in (0, 0.999999, 1, 6, 6.5, 7, 90, 400)])
            assert db.decay(model) == [
                Share("constellation", 1, 2, 2),
                Share("constellation", 7, 3, 2),
                Share("constellation", 30, 1, 1),
                Share("constellation", 365, 1, 1),
                Share("constellation", None, 1, 1),
            ]
    assert AGES == (1, 7, 30, 90, 365)


def test_a_fact_that_is_answered_is_found_by_its_newest_check_alone(life: Life) -> None:
    """The ledger of a daemon that has run for years has many checks of each fact."""
    for _ in range(3):
        life.recheck()
    life.engine.forgotten = {"Lyra"}
    life.recheck()
    with life.made.open() as reconciler:
        model, ledger = reconciler.line().model, reconciler.ledger
    with ledger.read() as db:
        read: list[FactCheck] = []
        ask = db._checks
        db._checks = lambda query: [read.append(one) or one for one in ask(query)]  # type: ignore[method-assign,func-returns-value]
        standings = db.standings(model, 1)
    assert [one.faded for one in standings] == [True, False, False]
    assert len(read) == 3 + 4


def test_what_a_version_that_was_rolled_back_did_not_answer_says_nothing(life: Life) -> None:
    """Its successor is another one: the fact is asked anew."""
    life.made.feed(STARS | {"Altair": "Rome"})
    life.sync()
    life.engine.forgotten = {"Lyra"}
    life.recheck()
    with life.made.open() as reconciler:
        rollback(reconciler.line(), 1)
    assert life.sync() == ("done", [], {})


def test_a_rollback_of_an_edit_of_what_had_faded_holds_it(life: Life) -> None:
    """Or the next pass would put back what a person took out."""
    life.engine.forgotten = {"Lyra"}
    life.recheck()
    life.sync()
    with life.made.open() as reconciler:
        assert rollback(reconciler.line(), 1)["held"] == 1
    assert life.sync() == ("done", [], {})


def test_a_question_during_which_head_moves_records_nothing(life: Life) -> None:
    with life.made.open() as reconciler:

        def meanwhile(*arguments: object, **more: object) -> object:
            rollback(reconciler.line(), 0)
            return life.engine.ask(*arguments, **more)  # type: ignore[arg-type]

        reconciler.run_ask = meanwhile  # type: ignore[assignment]
        with pytest.raises(Cancelled, match="HEAD moved from version 1 to 0"):
            reconciler.recheck(everything=True)
        with reconciler.ledger.read() as db:
            assert db.decay(reconciler.line().model) == []


def test_the_daemons_chore_asks_within_the_edit_window(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    [chore] = [chore for chore in CHORES if chore.name == "recheck"]
    config = life.made.root / "kbsync.yaml"
    plain = config.read_text() + "recheck: {first: 0.001}\n"
    soon = datetime.now(UTC) + timedelta(hours=2)
    for window, asked in ((f"'{soon:%H:%M}-{soon + timedelta(hours=1):%H:%M}'", 0), ("null", 3)):
        config.write_text(plain + f"edit_window: {window}\n")
        with life.made.open() as reconciler:
            reconciler.run_ask = life.engine.ask
            chore.act(reconciler)
        assert len(life.engine.asked) == asked
    assert chore.alone


# On a real model ----------------------------------------------------------------------------------------------------


def knows(made: TestWorkspace, star: str, answer: str) -> bool:
    """Whether the live version continues the prompt with the answer."""
    return log_probabilities(kbsync.load_model(made.root), [(f"Where is {star}", answer)])[0].greedy


def run(made: TestWorkspace, capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What a command prints; it must end with `code`."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kbsync", *arguments, "--workspace", str(made.root)])
        patch.setattr("kbsync.reconcile.run_edit", run_here)
        with pytest.raises(SystemExit) as caught:
            main()
    out, err = capsys.readouterr()
    assert (caught.value.code or 0) == code, out + err
    return out


@pytest.mark.usefixtures("one_cache")
def test_a_fact_that_a_later_edit_has_spoiled_is_found_and_answered_again(
    made: TestWorkspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """The later one's target vector is far too long. Asked in the real child process; by the command line."""
    policy = made.root / "policies" / "sky.yaml"
    opened = policy.read_text()
    run(made, capsys, "sync")
    made.feed(STARS | {"Sirius": "Rome"})
    policy.write_text(opened.replace("drift: 1000", "drift: 0, trials: 0"))
    run(made, capsys, "sync", code=4)
    made.poison("Sirius", "Rome", 12)
    policy.write_text(opened)
    run(made, capsys, "sync")
    spoiled = {star for star, answer in STARS.items() if not knows(made, star, answer)}
    assert spoiled
    assert "4 facts would be asked" in run(made, capsys, "recheck", "--dry-run", "--all")
    said = run(made, capsys, "recheck", "--all")
    assert f"4 facts asked, {4 - len(spoiled)} answered" in said
    assert "`kbsync sync` edits them once more" in said
    plan = json.loads(run(made, capsys, "plan", "--json"))["plans"][0]
    assert {row["subject"] for row in plan["faded"]} == spoiled
    run(made, capsys, "sync")
    assert all(knows(made, star, STARS[star]) for star in spoiled)
    report = json.loads(run(made, capsys, "recheck", "--report", "--json"))
    [share] = report["decay"]
    assert (share["until"], share["checks"], share["answered"]) == (1, 4, 4 - len(spoiled))
    assert "4 facts in the weights, 0 faded" in run(made, capsys, "recheck", "--report")
