"""What people are told of passes and of freshness: each trouble once, and that it is over."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest

from kbsync.daemon.chores import CHORES, delivery
from kbsync.ledger.notices import NoticeRow
from kbsync.notify.outbox import Outbox
from kbsync.notify.telling import tell_end, tell_freshness
from tests.faultserver import FaultServer, answer
from tests.standin import StandIn
from tests.test_webhook import SECRET
from tests.workspaces import TestWorkspace, workspace

STARS = {f"{number:02}Star": "Orion" for number in range(20)}
OTHERS = dict.fromkeys(STARS, "Rome")


@pytest.fixture
def made(tmp_path: Path) -> TestWorkspace:
    """A workspace that was never synced."""
    return workspace(tmp_path, STARS)


def act(made: TestWorkspace, engine: StandIn | None = None) -> str:
    """One pass; how it ended."""
    with made.open() as reconciler:
        reconciler.run_edit = engine or StandIn()
        [report] = reconciler.sync()
    return report.status


def told(made: TestWorkspace) -> list[NoticeRow]:
    """Every notice, oldest first."""
    with made.open() as reconciler, reconciler.ledger.read() as db:
        return list(reversed(db.notices(None)))


def kinds(made: TestWorkspace) -> list[str]:
    """Their kinds."""
    return [notice.kind for notice in told(made)]


@pytest.mark.usefixtures("database")
def test_a_held_run_is_told_once_while_later_passes_are_held_too_and_again_when_none_waits(
    made: TestWorkspace,
) -> None:
    act(made)
    made.feed(OTHERS)
    assert [act(made), act(made)] == ["held", "held"]
    [held] = told(made)
    assert (held.kind, held.policy, held.run_id) == ("held", "sky", 2)
    assert "waits for approval: stars: 20 of 20 subjects changed" in held.message
    with made.open() as reconciler:
        reconciler.run_edit = StandIn()
        reconciler.approve(3)
    assert kinds(made) == ["held", "recovered"]


def test_a_run_that_a_person_rejects_waits_no_more(made: TestWorkspace) -> None:
    act(made)
    made.feed(OTHERS)
    act(made)
    with made.open() as reconciler:
        reconciler.reject(2, "no")
    assert [notice.message for notice in told(made)][-1] == "run 2 of policy sky was rejected"


def test_a_held_run_that_the_next_pass_makes_void_waits_no_more(made: TestWorkspace) -> None:
    act(made)
    made.feed(OTHERS)
    act(made)
    made.feed(STARS)
    act(made)
    assert kinds(made) == ["held", "recovered"]


def test_a_version_that_the_gate_rejects_is_told_once_until_one_passes(made: TestWorkspace) -> None:
    assert [act(made, StandIn(drift=5000)), act(made, StandIn(drift=5000))] == ["rejected", "rejected"]
    [rejected] = told(made)
    assert rejected.kind == "rejected"
    assert "drift" in rejected.message
    made.feed(STARS | {"00Star": "Rome"})
    act(made)
    assert kinds(made) == ["rejected", "recovered"]


def test_new_conflicts_of_a_pass_are_one_notice_and_those_of_the_next_another(made: TestWorkspace) -> None:
    act(made)
    feed = made.root / "sources" / "stars.csv"
    lines = feed.read_text()
    feed.write_text(lines + "00sta,00Star,Rome\n01sta,01Star,Rome\n")
    act(made)
    act(made)
    feed.write_text(lines + "00sta,00Star,Rome\n01sta,01Star,Rome\n02sta,02Star,Rome\n")
    act(made)
    first, second = told(made)
    assert first.message == "policy sky: 2 new conflicts: constellation of stars:00sta, constellation of stars:01sta"
    assert first.detail["conflicts"] == 2
    assert [one["subject_id"] for one in second.detail["first"]] == ["stars:02sta"]
    feed.write_text(lines)
    act(made)
    assert kinds(made) == ["conflict", "conflict", "recovered"]


def test_a_policy_that_failed_three_times_in_a_row_is_told_once_until_a_pass_ends_well(made: TestWorkspace) -> None:
    dead = StandIn(dies=True)
    assert [act(made, dead), act(made, dead)] == ["failed", "failed"]
    assert told(made) == []
    act(made, dead)
    act(made, dead)
    [failed] = told(made)
    assert failed.message == "3 passes of sky failed in a row, the last: the edit's process died"
    act(made)
    assert kinds(made) == ["failed", "recovered"]


def test_a_pass_that_ends_well_in_between_starts_the_count_anew(made: TestWorkspace) -> None:
    dead = StandIn(dies=True)
    for engine in (dead, dead, StandIn(), dead, dead):
        made.feed(STARS | {"00Star": "Rome" if engine is dead else "Orion"})
        act(made, engine)
    assert told(made) == []


def aim(made: TestWorkspace, target: str) -> None:
    """Give the policy a target."""
    made.policy()
    policy = made.root / "policies" / "sky.yaml"
    policy.write_text(policy.read_text() + f"freshness: {{target: {target}}}\n")


def look(made: TestWorkspace) -> None:
    """What the daemon does every minute."""
    with made.open() as reconciler:
        tell_freshness(reconciler.ledger, reconciler.catalog)


@pytest.mark.usefixtures("database")
def test_a_target_that_is_missed_is_told_once_until_it_is_kept_again(made: TestWorkspace) -> None:
    aim(made, "0.001")
    act(made, StandIn(dies=True))
    look(made)
    look(made)
    [stale] = told(made)
    assert stale.thread == "stale sky stars constellation"
    assert stale.message.startswith("constellation of source stars is stale: 20 changes wait, the oldest for ")
    assert (stale.detail["waiting"], stale.detail["target"]) == (20, 0.001)
    aim(made, "7d")
    look(made)
    assert [notice.message for notice in told(made)][1:] == ["stars constellation is as fresh as policy sky wants it"]


def stale(made: TestWorkspace) -> None:
    """A target is missed, and people are told."""
    aim(made, "0.001")
    act(made, StandIn(dies=True))
    look(made)
    assert kinds(made) == ["stale"]


def test_a_target_that_is_taken_away_is_not_called_kept(made: TestWorkspace) -> None:
    stale(made)
    made.policy()
    look(made)
    look(made)
    assert [notice.message for notice in told(made)][1:] == [
        "policy sky has no target of freshness any more, stars constellation may be stale still"
    ]


def test_a_source_that_a_policy_asks_no_more_is_not_called_fresh(made: TestWorkspace) -> None:
    stale(made)
    for file in ("sources/stars.yaml", "policies/sky.yaml"):
        path = made.root / file
        path.write_text(path.read_text().replace("source: stars", "source: others").replace("[stars]", "[others]"))
    (made.root / "sources" / "stars.yaml").rename(made.root / "sources" / "others.yaml")
    look(made)
    assert [notice.message for notice in told(made)][1:] == [
        "policy sky does not ask source stars for constellation any more"
    ]


def test_what_was_told_of_a_policy_that_is_gone_is_over(made: TestWorkspace) -> None:
    """Stale, held and failed alike: no pass of it will ever end that."""
    stale(made)
    with made.open() as reconciler, reconciler.ledger.write() as db:
        tell_end(db, "sky", 1, "held", "too much", 3)
        db.notify("faded", "faded tiny", "3 facts are not answered")
    path = made.root / "policies" / "sky.yaml"
    path.write_text(path.read_text().replace("policy: sky", "policy: heaven").replace("target: 0.001", "target: 7d"))
    path.rename(path.with_stem("heaven"))
    look(made)
    look(made)
    *_, one, other = told(made)
    assert {(one.thread, one.message), (other.thread, other.message)} == {
        ("held sky", "policy sky is gone"),
        ("stale sky stars constellation", "policy sky is gone"),
    }
    with made.open() as reconciler, reconciler.ledger.read() as db:
        assert [notice.thread for notice in db.troubles()] == ["faded tiny"]


def test_without_a_target_nothing_is_stale(made: TestWorkspace) -> None:
    act(made, StandIn(dies=True))
    look(made)
    assert told(made) == []


def test_the_daemon_looks_at_freshness_and_delivers_beside_its_passes() -> None:
    chores = {chore.name: (chore.every, chore.alone) for chore in (*CHORES, delivery(Outbox()))}
    assert chores["freshness"] == (timedelta(minutes=1), False)
    assert chores["notify"] == (timedelta(seconds=15), False)


def test_what_a_command_is_told_of_goes_out_when_it_ends(made: TestWorkspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the command itself fails, and from the first notice that there ever is."""
    from kbsync.commands import perform
    from kbsync.errors import KbsyncError

    monkeypatch.setenv("SECRET", SECRET)
    with FaultServer() as server:
        url = server.on("/hook", answer())
        channel = f'{{name: ops, type: webhook, url: "{url}", secret: "${{SECRET}}"}}'
        config = made.root / "kbsync.yaml"
        config.write_text(config.read_text() + f"notify: {{failures: 1, channels: [{channel}]}}\n")
        (made.root / "sources" / "stars.csv").unlink()
        done = perform(made.root, "sync", {}, user="me")
        assert done["reports"][0]["status"] == "failed"
        with pytest.raises(KbsyncError):
            perform(made.root, "approve", {"run": 99}, user="me")
    [request] = server.requests
    assert json.loads(request.body)["kind"] == "failed"
