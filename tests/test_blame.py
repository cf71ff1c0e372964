"""`kbsync blame` of what the weights do not hold: every reason in words, each of the very key that is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from kbsync.facts import FactKey
from kbsync.log import configure
from kbsync.policy import render
from kbsync.reconcile import SCHEDULED
from kbsync.undo import release, revert_fact, rollback
from tests.test_cli import Line
from tests.workspaces import TestWorkspace, run_here, workspace

STARS = {"Vega": "Orion", "Betelgeuse": "Lyra"}
RELATION = "constellation"


@pytest.fixture(scope="module", autouse=True)
def _here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for all tests here; edits in this process, which log as a command does."""
    configure(level="warning")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KBSYNC_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("kbsync.reconcile.run_edit", run_here)
        patch.setenv("COLUMNS", "120")
        yield


@pytest.fixture
def made(tmp_path: Path) -> TestWorkspace:
    """A workspace that was never synced."""
    return workspace(tmp_path, STARS)


def sync(made: TestWorkspace) -> None:
    with made.open() as it:
        it.sync()


def reasons(line: Line, subject: str) -> dict[str, str]:
    """Link -> why there is none."""
    found: dict[str, str] = line.json("blame", subject, RELATION)["gaps"]
    return found


def test_a_hold_is_of_its_own_subject(made: TestWorkspace, capsys: pytest.CaptureFixture[str]) -> None:
    """Two facts of one relation are held: each says why it is, and one that is not held has no hold."""
    sync(made)
    with made.open() as it:
        revert_fact(it.line(), FactKey(RELATION, "stars:betel"), "Lyra is doubtful")
        revert_fact(it.line(), FactKey(RELATION, "stars:vega"), "Orion is wrong")
    capsys.readouterr()
    line = Line(made.root, capsys)
    assert "Lyra is doubtful" in reasons(line, "Betelgeuse")["column"]
    assert "Orion is wrong" in reasons(line, "Vega")["column"]
    made.feed(STARS | {"Rigel": "Paris"})
    later = datetime.now(UTC) + timedelta(hours=10)
    config = made.root / "kbsync.yaml"
    config.write_text(config.read_text() + f'edit_window: "{later:%H:%M}-{later + timedelta(minutes=1):%H:%M}"\n')
    with made.open() as it:
        it.sync(trigger=SCHEDULED)
    capsys.readouterr()
    assert reasons(line, "Rigel")["column"] == "not edited yet: kbsync sync"


def test_a_fact_that_no_prompt_can_teach_says_so(made: TestWorkspace, capsys: pytest.CaptureFixture[str]) -> None:
    """Its plan is empty and so is kept nowhere; the reason is found all the same."""
    made.feed({"is": "Lyra"})
    sync(made)
    line = Line(made.root, capsys)
    said = reasons(line, "is")["column"]
    assert said == "blocked: the prompt 'Where is is' has the subject 'is' 2 times"
    made.policy("    cardinality: many")
    assert "cardinality many" in reasons(line, "is")["column"]
    made.policy('    protected: ["stars:is"]')
    assert "protects" in reasons(line, "is")["column"]


def test_what_the_model_knows_and_what_was_rolled_past_say_so(
    made: TestWorkspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a rollback and a release the newer version holds it; known counts only where the policy skips it."""
    made.feed({"Vega": "Orion"})
    sync(made)
    with made.open() as it:
        rollback(it.line(), 0, "all of it")
        release(it.line(), everything=True)
    line = Line(made.root, capsys)
    assert reasons(line, "Vega")["column"] == "version 1 holds it, but HEAD is version 0"
    with made.open() as it, it.ledger.write() as db:
        [fact] = db.facts().values()
        request = render(fact, it.catalog.policy("sky").wording()[RELATION])
        db.note_known(db.models()[0].fingerprint, {request.digest: True})
    assert reasons(line, "Vega")["column"] == "version 1 holds it, but HEAD is version 0"
    made.policy("    skip_known: true")
    assert "knows it" in reasons(line, "Vega")["column"]


def test_what_waits_for_approval_and_what_is_gone_say_so(
    made: TestWorkspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """A held change is named beside the fact that it would change; a fact that no source says any more is told with its
    end, once its policy reverts it."""
    made.policy("    retract: revert")
    sync(made)
    path = made.root / "policies" / "sky.yaml"
    once = path.read_text()
    path.write_text(once.replace("max_edits: 50", "max_edits: 0"))
    made.feed(STARS | {"Vega": "Rome"})
    sync(made)
    line = Line(made.root, capsys)
    chain = line.json("blame", "Vega", RELATION)
    assert (chain["current"], chain["approval"]) == (True, 2)
    assert "run 2 waits for approval" in line.run("blame", "Vega", RELATION)
    with made.open() as it:
        rollback(it.line(), 0, "all of it")
        release(it.line(), everything=True)
    assert reasons(line, "Vega")["column"] == "run 2 waits for approval: kbsync approve 2"
    path.write_text(once)
    made.feed({"Vega": "Orion"})
    sync(made)
    gone = reasons(line, "Betelgeuse")
    assert gone["fact"].startswith("it was Lyra until ")
    assert gone["column"] == "the ledger holds no such fact"
