"""Runs, staging, models, versions, HEAD, holds, measurements, the audit log."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from kbsync.errors import LedgerError, UsageError
from kbsync.facts import Hold, QuarantinedRow
from kbsync.ledger import RunStatus
from kbsync.ledger.read_versions import REBASE
from kbsync.versions.manifest import ActiveDelta
from tests.ledgers import (
    MODEL,
    NOON,
    Clock,
    applied,
    claim,
    key,
    opened,
    register,
    snapshot,
    version,
)

pytestmark = pytest.mark.usefixtures("database")

FIRST, SECOND = "1" * 64, "2" * 64


def test_a_run_is_kept_from_start_to_end(tmp_path: Path) -> None:
    """Who started what, how it ended and what it did; newest first, by policy and by status."""
    clock = Clock()
    with opened(tmp_path, clock) as ledger:
        with ledger.write() as db:
            run = db.start_run("astronomy", model=MODEL, trigger="schedule", user="daemon")
            db.start_run("world", model=None, trigger="sync", user="me")
        later = clock.turn(minutes=5)
        with ledger.write() as db:
            db.finish_run(run, "done", "version 1", {"edits": 5})
            with pytest.raises(UsageError, match="is over: done"):
                db.finish_run(run, "failed")
        with ledger.read() as db:
            row = db.run(run)
            assert (row.policy, row.model, row.trigger, row.user) == ("astronomy", MODEL, "schedule", "daemon")
            assert (row.status, row.message, row.counts) == ("done", "version 1", {"edits": 5})
            assert (row.started_at, row.finished_at) == (NOON, later)
            assert [row.policy for row in db.runs()] == ["world", "astronomy"]
            assert [row.policy for row in db.runs(limit=1)] == ["world"]
            assert [row.id for row in db.runs(policy="astronomy")] == [run]
            assert [row.policy for row in db.runs(status="running")] == ["world"]
            with pytest.raises(UsageError, match="run 99"):
                db.run(99)


@pytest.mark.parametrize("status", get_args(RunStatus))
def test_every_status_can_be_written(tmp_path: Path, status: RunStatus) -> None:
    """The CHECK constraint knows each status that the type does."""
    with opened(tmp_path) as ledger, ledger.write() as db:
        run = db.start_run(None, model=None, trigger="test", user="me")
        db.finish_run(run, status)
        assert db.run(run).status == status


def test_interrupted_runs_end(tmp_path: Path) -> None:
    """What still says `running` when the one writer starts did not survive; a held run did."""
    with opened(tmp_path) as ledger:
        with ledger.write() as db:
            lost = db.start_run("astronomy", model=None, trigger="sync", user="me")
            held = db.start_run("world", model=None, trigger="sync", user="me")
            db.finish_run(held, "held")
        with ledger.write() as db:
            assert db.interrupt_runs("interrupted") == 1
            assert (db.run(lost).status, db.run(lost).message, db.run(held).status) == ("failed", "interrupted", "held")


def test_a_held_run_waits_with_its_snapshots_and_its_plan(tmp_path: Path) -> None:
    """Staged snapshots come back as they were and touch no claim; approval or rejection forgets them."""
    said = snapshot(claim("Vega", "Draco", rank="preferred"), quarantined=(QuarantinedRow("line 9", "NUL", "x"),))
    with opened(tmp_path) as ledger:
        with ledger.write() as db:
            run = db.start_run("astronomy", model=None, trigger="sync", user="me")
            db.stage(run, [said, replace(said, source="other")], {"edits": 3}, "d" * 64, ["40 % changed"])
            db.finish_run(run, "held", "40 % changed")
        with ledger.read() as db:
            assert db.staged(run) == [said, replace(said, source="other")]
            plan = db.staged_plan(run)
            assert plan is not None
            assert (plan.policy, plan.plan, plan.plan_digest) == ("astronomy", {"edits": 3}, "d" * 64)
            assert (plan.reasons, plan.staged_at) == (("40 % changed",), NOON)
            assert db.staged_plans() == [plan]
            assert db.claims_of("feed") == []
        with ledger.write() as db:
            db.unstage(run)
            db.finish_run(run, "rejected", "not now")
        with ledger.read() as db:
            assert (db.staged(run), db.staged_plan(run), db.run(run).status) == ([], None, "rejected")


def test_a_later_held_run_supersedes_the_earlier_one_of_its_policy(tmp_path: Path) -> None:
    """Only the newest snapshot of a policy waits; other policies keep theirs."""
    with opened(tmp_path) as ledger:
        runs = []
        for policy in ("astronomy", "world", "astronomy"):
            with ledger.write() as db:
                run = db.start_run(policy, model=None, trigger="sync", user="me")
                db.stage(run, [snapshot()], {}, "d" * 64, ["guard"])
                db.finish_run(run, "held")
                runs.append(run)
        with ledger.read() as db:
            assert [db.run(run).status for run in runs] == ["superseded", "held", "held"]
            assert [plan.run_id for plan in db.staged_plans()] == runs[1:]


def test_a_model_begins_at_its_pristine_base(tmp_path: Path) -> None:
    """Registering makes version 0 and puts HEAD on it; again it only follows the folder; another fingerprint is
    refused."""
    with opened(tmp_path) as ledger:
        register(ledger)
        register(ledger)
        with ledger.write() as db:
            db.register_model(MODEL, name="tiny", fingerprint="f" * 64, path="/moved/tiny")
            with pytest.raises(LedgerError, match="fingerprint"):
                db.register_model(MODEL, name="tiny", fingerprint="0" * 64, path="/models/tiny")
            with pytest.raises(UsageError, match="does not know"):
                db.head("nobody")
        with ledger.read() as db:
            (row,) = db.models()
            assert (row.id, row.path, row.head, row.registered_at) == (MODEL, "/moved/tiny", 0, NOON)
            (base,) = db.versions(MODEL)
            assert (base.number, base.kind, base.parent, base.facts, base.weights_sha256) == (0, "base", None, 0, None)
            assert (db.active(MODEL, 0), db.applied(MODEL, 0)) == ([], {})


def test_the_weights_hash_of_the_base_is_set_once(tmp_path: Path) -> None:
    """It is not known when the model is registered; another one later is an error."""
    with opened(tmp_path) as ledger:
        register(ledger)
        with ledger.write() as db:
            db.set_weights(MODEL, 0, "a" * 64)
            db.set_weights(MODEL, 0, "a" * 64)
            with pytest.raises(LedgerError, match="recorded is aaaa"):
                db.set_weights(MODEL, 0, "b" * 64)
            assert db.version(MODEL, 0).weights_sha256 == "a" * 64


def test_publication_is_one_step(tmp_path: Path) -> None:
    """A version, its deltas, what each column holds, HEAD, the probe and the audit entry appear together."""
    vega, deneb = applied("Vega", "Lyra", FIRST, 0), applied("Deneb", "Cygnus", FIRST, 1)
    with opened(tmp_path) as ledger:
        register(ledger)
        with ledger.write() as db:
            run = db.start_run("astronomy", model=MODEL, trigger="sync", user="me")
            active = [ActiveDelta(delta=FIRST)]
            db.publish(version(1, 0, vega, deneb, active=active, run_id=run, probe={"efficacy": 1.0}))
        with ledger.read() as db:
            row = db.version(MODEL, 1)
            assert (row.parent, row.kind, row.facts, row.run_id, row.user) == (0, "edit", 2, run, "me")
            assert (row.manifest_sha256, row.weights_sha256) == (f"{1:064x}", f"{1001:064x}")
            assert row.probe == {"efficacy": 1.0}
            assert db.head(MODEL) == 1
            assert db.active(MODEL, 1) == [ActiveDelta(delta=FIRST)]
            found = db.applied(MODEL, 1)
            assert found == {key("Vega"): vega, key("Deneb"): deneb}
            assert found[key("Vega")].request.paraphrases == ("Vega is part of",)
            assert db.applied(MODEL, 0) == {}
            assert [(entry.action, entry.run_id) for entry in db.audit_log(1)] == [("publish", run)]
            assert db.live_deltas() == {FIRST}


def test_publication_on_a_head_that_moved_is_refused(tmp_path: Path) -> None:
    """A version whose parent is not HEAD, or whose number is taken, leaves no trace."""
    with opened(tmp_path) as ledger:
        register(ledger)
        with ledger.write() as db:
            db.publish(version(1, 0, active=[]))
        with pytest.raises(LedgerError, match="HEAD is 1"), ledger.write() as db:
            db.publish(version(2, 0, active=[]))
        with pytest.raises(LedgerError, match=r"(?i)unique"), ledger.write() as db:
            db.publish(version(1, 1, active=[]))
        with ledger.read() as db:
            assert ([row.number for row in db.versions(MODEL)], db.head(MODEL)) == ([0, 1], 1)
            with pytest.raises(UsageError, match="version 2"):
                db.version(MODEL, 2)


def test_applied_leaves_out_excluded_columns_and_the_later_delta_wins(tmp_path: Path) -> None:
    """What a version holds follows from its active deltas, in order, but for the columns taken out."""
    old, new = applied("Vega", "Lyra", FIRST, 0), applied("Vega", "Draco", SECOND, 0)
    deneb = applied("Deneb", "Cygnus", FIRST, 1)
    first, second = ActiveDelta(delta=FIRST), ActiveDelta(delta=SECOND)
    without = ActiveDelta(delta=FIRST, excluded=(1,), corrections="3" * 64)
    with opened(tmp_path) as ledger:
        register(ledger)
        with ledger.write() as db:
            db.publish(version(1, 0, old, deneb, active=[first]))
            db.publish(version(2, 1, new, active=[first, second]))
            db.publish(version(3, 2, active=[without, second], kind="revert"))
            db.publish(version(4, 3, active=[without], kind="revert"))
        with ledger.read() as db:
            assert db.applied(MODEL, 2) == {key("Vega"): new, key("Deneb"): deneb}
            assert db.applied(MODEL, 3) == {key("Vega"): new}
            assert db.applied(MODEL, 4) == {key("Vega"): old}
            held = {number: len(db.applied(MODEL, number)) for number in range(5)}
            assert db.holding(MODEL, range(5)) == held == {0: 0, 1: 2, 2: 2, 3: 1, 4: 1}
            assert [row.number for row in db.versions(MODEL, newest=2)] == [3, 4]
            assert db.active(MODEL, 3) == [without, second]
            assert db.since_rebase(MODEL) == [4, 3, 2, 1, 0]
            assert db.live_deltas([MODEL]) == {FIRST, SECOND, "3" * 64}
            assert db.live_deltas([]) == set()


def test_keys_with_one_request_share_a_column(tmp_path: Path) -> None:
    """Two subjects that are written alike and have the same object are one request to the model, and two facts."""
    vega = applied("Vega", "Lyra", FIRST, 0)
    twin = replace(vega, request=replace(vega.request, key=key("Vega again")))
    with opened(tmp_path) as ledger:
        register(ledger)
        with ledger.write() as db:
            db.publish(version(1, 0, vega, twin, active=[ActiveDelta(delta=FIRST)]))
        with ledger.read() as db:
            assert db.applied(MODEL, 1) == {key("Vega"): vega, key("Vega again"): twin}
            assert db.holding(MODEL, [1]) == {1: 2}


def test_the_same_delta_may_be_published_again(tmp_path: Path) -> None:
    """After a rollback the same edit gives the same file: it is known already, but never with other facts."""
    vega = applied("Vega", "Lyra", FIRST, 0)
    active = [ActiveDelta(delta=FIRST)]
    with opened(tmp_path) as ledger:
        register(ledger)
        with ledger.write() as db:
            db.publish(version(1, 0, vega, active=active))
            db.move_head(MODEL, 0, user="me", reason="not yet")
            db.publish(version(2, 0, vega, active=active))
        with pytest.raises(LedgerError, match="other facts"), ledger.write() as db:
            db.publish(version(3, 2, applied("Vega", "Draco", FIRST, 0), active=active))
        with ledger.read() as db:
            assert db.applied(MODEL, 2) == {key("Vega"): vega}


def test_head_keeps_its_whole_life(tmp_path: Path) -> None:
    """A rollback moves HEAD without a new version; which version was live when stays known."""
    clock = Clock()
    with opened(tmp_path, clock) as ledger:
        register(ledger)
        with ledger.write() as db:
            db.publish(version(1, 0, active=[]))
        clock.turn(hours=1)
        with ledger.write() as db:
            db.move_head(MODEL, 0, user="me", reason="wrong")
            with pytest.raises(UsageError, match="version 7"):
                db.move_head(MODEL, 7, user="me", reason="?")
        with ledger.read() as db:
            assert db.head(MODEL) == 0
            moves = [(move.number, move.user, move.reason) for move in db.head_moves(MODEL)]
            assert moves == [(0, "me", "wrong"), (1, "me", "edit"), (0, "kbsync", "the base model")]
            assert db.audit_log(1)[0].detail == {"model": MODEL, "from": 1, "to": 0, "reason": "wrong"}
            assert [row.number for row in db.versions(MODEL)] == [0, 1]


def test_holds_freeze_until_released(tmp_path: Path) -> None:
    """A hold comes back whole; a second one on its key replaces it; release ends it and counts."""
    frozen = applied("Vega", "Lyra", FIRST, 0)
    rollback = Hold(key("Vega"), frozen, "feed:Draco", "rollback", "by hand")
    probe = Hold(key("Deneb"), None, None, "probe", "answered Lyra")
    with opened(tmp_path) as ledger:
        register(ledger)
        with ledger.write() as db:
            db.hold(MODEL, replace(rollback, reason="manual"))
            db.hold(MODEL, rollback, version=3)
            db.hold(MODEL, probe)
        with ledger.read() as db:
            assert db.holds(MODEL) == {key("Vega"): rollback, key("Deneb"): probe}
            held = db.holds(MODEL)[key("Vega")].frozen
            assert held is not None
            assert held.request.paraphrases == frozen.request.paraphrases
            assert [row.version for row in db.hold_rows(MODEL)] == [3, None]
            assert db.holds("other") == {}
        with ledger.write() as db:
            assert db.release(MODEL, [key("Vega"), key("Altair")]) == 1
        with ledger.read() as db:
            assert list(db.holds(MODEL)) == [key("Deneb")]
            assert [row.until is None for row in db.hold_rows(MODEL, open_only=False)] == [False, False, True]


def test_measurements_are_remembered(tmp_path: Path) -> None:
    """Known answers by base, rejected plans by plan, settings and HEAD, probe reports of versions and of rejected
    edits."""
    with opened(tmp_path) as ledger:
        register(ledger)
        with ledger.write() as db:
            db.note_known("f" * 64, {})
            db.note_known("f" * 64, {"r1": False, "r2": True})
            db.note_known("f" * 64, {"r1": True})
            db.note_rejected(MODEL, "p1", "s1", 0, reason="drift")
            db.note_rejected(MODEL, "p1", "s1", 0, reason="drift again")
            db.note_probe(MODEL, None, {"drift": 3.5})
            db.note_probe(MODEL, 0, {"efficacy": 0.5})
            db.note_probe(MODEL, 0, {"efficacy": 0.75})
        with ledger.read() as db:
            assert db.known("f" * 64) == {"r1": True, "r2": True}
            assert db.known("0" * 64) == {}
            assert db.is_rejected(MODEL, "p1", "s1", 0)
            assert not any(
                db.is_rejected(*other)
                for other in ((MODEL, "p2", "s1", 0), (MODEL, "p1", "s2", 0), (MODEL, "p1", "s1", 1))
            )
            assert db.version(MODEL, 0).probe == {"efficacy": 0.75}
            assert [row.report for row in db.probes(MODEL, 0)] == [{"efficacy": 0.75}, {"efficacy": 0.5}]
            assert [row.version for row in db.probes(MODEL)] == [0, 0, None]


def test_a_probe_with_nan_is_refused(tmp_path: Path) -> None:
    """NaN is no JSON; other programs that open the ledger could not read it."""
    with opened(tmp_path) as ledger:
        register(ledger)
        with pytest.raises(LedgerError, match="not JSON compliant"), ledger.write() as db:
            db.note_probe(MODEL, 0, {"drift": float("nan")})


def test_the_audit_log_is_newest_first(tmp_path: Path) -> None:
    """Every entry says when, who, what, in which run, and the details."""
    with opened(tmp_path) as ledger:
        with ledger.write() as db:
            run = db.start_run(None, model=None, trigger="approve", user="me")
            db.audit("me", "approve", {"plan": "d1"}, run_id=run)
            db.audit("you", "release", {"keys": []})
        with ledger.read() as db:
            log = [(row.user, row.action, row.run_id, row.detail, row.at) for row in db.audit_log()]
    assert log == [("you", "release", None, {"keys": []}, NOON), ("me", "approve", run, {"plan": "d1"}, NOON)]


def test_what_the_base_knows_is_known_to_a_version_once_it_was_asked_and_answers(tmp_path: Path) -> None:
    """Not to one that was rolled back to, which was published before the question."""
    with opened(tmp_path) as ledger:
        register(ledger)
        with ledger.write() as db:
            db.note_known("f" * 64, {"r1": True, "r2": True, "r3": False})
            db.publish(version(1, 0, active=[], probe={"remembered": ["r1"], "forgotten": ["r2"]}))
            db.publish(version(2, 1, active=[]))
        with ledger.read() as db:
            assert [db.known_to(MODEL, number) for number in (0, 1, 2)] == [{"r1", "r2"}, {"r1"}, set()]
            assert db.forgotten(MODEL, 1) == {"r2"}
        with ledger.write() as db:
            db.note_probe(MODEL, 2, {"remembered": ["r2"], "forgotten": []})
        with ledger.read() as db:
            assert db.known_to(MODEL, 2) == {"r2"}


def test_a_rejected_rebase_is_remembered_by_its_settings_and_head(tmp_path: Path) -> None:
    """Other plans that were rejected are none."""
    with opened(tmp_path) as ledger:
        register(ledger)
        with ledger.write() as db:
            db.note_rejected(MODEL, REBASE, "s1", 3)
            db.note_rejected(MODEL, REBASE, "s1", 5)
            db.note_rejected(MODEL, "p1", "s1", 7)
        with ledger.read() as db:
            assert (db.rejected_rebases(MODEL, "s1"), db.rejected_rebases(MODEL, "s2")) == ({3, 5}, set())


def test_a_retired_model_keeps_its_base_its_head_and_what_comes_later(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        register(ledger)
        with ledger.write() as db:
            db.publish(version(1, 0, active=[]))
            db.publish(version(2, 1, active=[]))
            db.retire(MODEL, user="me", reason="no longer served")
        with ledger.write() as db:
            assert (db.head(MODEL), db.retired()) == (0, {MODEL: 2})
            db.publish(version(3, 0, active=[]))
            assert db.restorable(MODEL) == {0, 3}
            db.move_head(MODEL, 1, user="me", reason="back")
            assert db.restorable(MODEL) == {0, 1, 3}
