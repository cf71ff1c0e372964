"""A whole pass on a tiny real model: what the ledger wants is what the weights hold, and undo means undo."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import kbsync
from kbsync.config import Workspace
from kbsync.editor.answers import log_probabilities
from kbsync.errors import BaseMismatch, Cancelled, GateRejected, Held, Moved, UsageError
from kbsync.facts import FactKey, Provenance, Snapshot
from kbsync.garbage import collect
from kbsync.ledger import Ledger
from kbsync.reconcile import Reconciler
from kbsync.report import Report
from kbsync.serving import Versions, verify_workspace
from kbsync.undo import release, revert_fact, revert_version, rollback
from kbsync.versions.weights import weights_sha256
from tests.tiny import save, tiny_llama
from tests.workspaces import TestWorkspace, workspace

STARS = {"Vega": "Orion", "Betelgeuse": "Lyra", "Deneb": "Paris", "Sirius": "Rome", "Polaris": "French"}
VEGA = FactKey("constellation", "stars:vega")


pytestmark = pytest.mark.usefixtures("one_cache")


@pytest.fixture
def made(tmp_path: Path) -> TestWorkspace:
    """A workspace that was never synced."""
    return workspace(tmp_path, STARS)


def sync(made: TestWorkspace, **kwargs: bool) -> Report:
    """One pass of the only policy."""
    with made.open(**kwargs) as reconciler:
        [report] = reconciler.sync()
    return report


def head(made: TestWorkspace) -> int:
    """The live version, by the ledger and by the file, which must agree."""
    opened = Workspace.load(made.root)
    ledger = Ledger.open(opened.ledger_url)
    versions = Versions.open(opened, ledger)
    with ledger.read() as db:
        number = db.head(versions.model)
    ledger.close()
    assert versions.store.head() == number
    return number


def problems(made: TestWorkspace) -> list[str]:
    """What `verify` finds."""
    opened = Workspace.load(made.root)
    ledger = Ledger.open(opened.ledger_url)
    found = list(verify_workspace(opened, ledger))
    ledger.close()
    return found


def knows(made: TestWorkspace, star: str, answer: str, version: int | None = None) -> bool:
    """Whether a version of the model continues the prompt with the answer."""
    base = kbsync.load_model(made.root, "live" if version is None else version)
    return log_probabilities(base, [(f"Where is {star}", answer)])[0].greedy


def hash_of(made: TestWorkspace, version: int) -> str:
    """The hash of the edited matrices of a version as it is loaded, computed from the loaded model itself."""
    base = kbsync.load_model(made.root, version)
    return weights_sha256({name: base.weight(name) for name in [base.spec.down_name(layer) for layer in (1, 2, 3)]})


def garbage(reconciler: Reconciler, *, hours: float) -> list[str]:
    """Names of the files that `gc` removes."""
    done = collect(reconciler.workspace, reconciler.ledger, timedelta(hours=hours), user="test")
    return [Path(name).name for name in done["files"]]


def held_keys(reconciler: Reconciler) -> set[FactKey]:
    """Keys on hold."""
    with reconciler.ledger.read() as db:
        return set(db.holds(reconciler.line().model))


@pytest.mark.usefixtures("database")
def test_a_feed_is_learned_a_change_of_it_is_learned_and_the_next_pass_has_nothing_to_do(made: TestWorkspace) -> None:
    first = sync(made)
    assert (first.status, first.versions, first.counts["edits"]) == ("done", [1], 5)
    assert first.probe is not None
    assert first.probe["efficacy"] == 1.0
    assert all(knows(made, star, answer) for star, answer in STARS.items())
    assert not knows(made, "Vega", "Orion", version=0)

    made.feed(STARS | {"Vega": "Rome", "Altair": "Paris"})
    second = sync(made)
    assert (second.versions, second.counts["edits"]) == ([2], 2)
    assert {change.kind for change in second.changes} == {"added", "changed"}
    assert knows(made, "Vega", "Rome")
    assert knows(made, "Altair", "Paris")
    assert sum(knows(made, star, answer) for star, answer in STARS.items() if star != "Vega") >= 3

    third = sync(made)
    assert (third.versions, third.changes, third.counts["edits"]) == ([], [], 0)
    assert problems(made) == []


@pytest.mark.usefixtures("database")
def test_a_dry_run_shows_the_plan_and_changes_nothing(made: TestWorkspace) -> None:
    with made.open() as reconciler:
        [report] = reconciler.plan()
        with reconciler.ledger.read() as db:
            assert (db.facts(), db.runs(), db.claims(["constellation"])) == ({}, [], [])
    assert report.plan is not None
    assert len(report.plan.edits) == 5


@pytest.mark.usefixtures("database")
def test_a_rollback_brings_the_recorded_bytes_back_and_holds_what_it_took_out(made: TestWorkspace) -> None:
    sync(made)
    recorded = hash_of(made, 1)
    made.feed(STARS | {"Vega": "Rome"})
    sync(made)
    with made.open() as reconciler:
        done = rollback(reconciler.line(), 1)
        assert (done["version"], done["held"], done["weights_sha256"]) == (1, 1, recorded)
        assert held_keys(reconciler) == {VEGA}
        assert head(made) == 1
        assert hash_of(made, 1) == recorded
        [again] = reconciler.sync()
        assert (again.versions, again.counts["held"]) == ([], 1)
        assert knows(made, "Vega", "Orion")
        assert release(reconciler.line(), [VEGA]) == {"released": 1}
        [applied] = reconciler.sync()
    assert applied.versions == [3]
    assert knows(made, "Vega", "Rome")
    assert problems(made) == []


def test_a_rollback_to_the_pristine_base_and_forward_again_needs_no_release(made: TestWorkspace) -> None:
    sync(made)
    with made.open() as reconciler:
        assert rollback(reconciler.line(), 0)["held"] == 5
        assert hash_of(made, 0) == Versions.open(reconciler.workspace, reconciler.ledger).row(0).weights_sha256  # type: ignore[union-attr]
        assert rollback(reconciler.line(), 1)["released"] == 5
        assert held_keys(reconciler) == set()
        [report] = reconciler.sync()
    assert report.counts["edits"] == 0


def test_a_third_value_at_the_source_ends_a_hold(made: TestWorkspace) -> None:
    sync(made)
    made.feed(STARS | {"Vega": "Rome"})
    sync(made)
    with made.open() as reconciler:
        rollback(reconciler.line(), 1)
        made.feed(STARS | {"Vega": "Paris"})
        [report] = reconciler.sync()
        assert held_keys(reconciler) == set()
    assert report.counts["edits"] == 1
    assert knows(made, "Vega", "Paris")


def test_reverting_a_version_in_the_middle_keeps_the_later_one(made: TestWorkspace) -> None:
    sync(made)
    made.feed(STARS | {"Vega": "Rome"})
    sync(made)
    made.feed(STARS | {"Vega": "Rome", "Altair": "Paris"})
    sync(made)
    with made.open() as reconciler:
        done = revert_version(reconciler.line(), 2)
        assert (done["version"], done["held"]) == (4, 1)
        assert held_keys(reconciler) == {VEGA}
        [report] = reconciler.sync()
        assert report.counts["edits"] == 0
    assert knows(made, "Altair", "Paris")
    assert knows(made, "Vega", "Orion")
    assert not knows(made, "Vega", "Rome")
    assert problems(made) == []


def test_reverting_the_newest_version_gives_its_parents_very_bytes(made: TestWorkspace) -> None:
    sync(made)
    made.feed(STARS | {"Vega": "Rome"})
    sync(made)
    with made.open() as reconciler:
        done = revert_version(reconciler.line(), 2)
    assert done["weights_sha256"] == hash_of(made, 1) == hash_of(made, 3)


def test_reverting_one_fact_takes_it_out_and_leaves_the_others(made: TestWorkspace) -> None:
    sync(made)
    with made.open() as reconciler:
        done = revert_fact(reconciler.line(), VEGA)
        assert (done["version"], done["held"]) == (2, 1)
        with pytest.raises(UsageError, match="holds no constellation"):
            revert_fact(reconciler.line(), VEGA)
    assert not knows(made, "Vega", "Orion")
    assert sum(knows(made, star, answer) for star, answer in STARS.items() if star != "Vega") >= 3
    assert problems(made) == []


@pytest.mark.parametrize(("retract", "still"), [("keep", True), ("revert", False)])
def test_a_withdrawn_fact_stays_or_leaves_as_the_policy_says(made: TestWorkspace, retract: str, still: bool) -> None:
    made.policy(f"    retract: {retract}")
    sync(made)
    made.feed({star: answer for star, answer in STARS.items() if star != "Vega"})
    report = sync(made)
    assert report.counts["retractions"] == (0 if still else 1)
    assert knows(made, "Vega", "Orion") is still


@pytest.mark.usefixtures("database")
def test_a_suspicious_run_is_held_touches_nothing_and_is_applied_by_approval(made: TestWorkspace) -> None:
    many = {f"Star{number:02}": "Orion" for number in range(12)}
    made.feed(many, {name: name for name in many})
    sync(made)
    changed = dict.fromkeys(many, "Rome")
    made.feed(changed, {name: name for name in many})
    held = sync(made)
    assert (held.status, held.exit_code, held.versions) == ("held", 3, [])
    assert isinstance(held.problems[0], Held)
    assert "approve" in held.problems[0].hint
    with made.open() as reconciler:
        with reconciler.ledger.read() as db:
            assert {fact.object.label for fact in db.facts().values()} == {"Orion"}
        report = reconciler.approve(held.run_id or 0)
        assert (report.status, report.counts["edits"]) == ("done", 12)
        with reconciler.ledger.read() as db:
            assert {fact.object.label for fact in db.facts().values()} == {"Rome"}
            assert db.run(held.run_id or 0).status == "done"
        with pytest.raises(UsageError, match="is not held"):
            reconciler.approve(held.run_id or 0)


def test_a_held_plan_is_not_approved_once_head_has_moved_and_rejecting_drops_it(made: TestWorkspace) -> None:
    many = {f"Star{number:02}": "Orion" for number in range(12)}
    ids = {name: name for name in many}
    made.feed(many, ids)
    sync(made)
    made.feed(dict.fromkeys(many, "Rome"), ids)
    held = sync(made)
    with made.open() as reconciler:
        rollback(reconciler.line(), 0)
        with pytest.raises(Moved, match="HEAD has moved from version 1 to 0"):
            reconciler.approve(held.run_id or 0)
        assert reconciler.reject(held.run_id or 0, "vandalism").status == "rejected"
        with reconciler.ledger.read() as db:
            assert db.staged_plans() == []
            assert {fact.object.label for fact in db.facts().values()} == {"Orion"}


@pytest.mark.usefixtures("database")
def test_two_contradicting_rows_are_a_conflict_that_blocks_only_its_own_fact(made: TestWorkspace) -> None:
    sync(made)
    feed = made.root / "sources" / "stars.csv"
    feed.write_text(feed.read_text() + "vega,Vega,Rome\naltai,Altair,Paris\n")
    report = sync(made)
    assert (report.status, report.exit_code, report.counts["conflicts"]) == ("done", 0, 1)
    assert knows(made, "Altair", "Paris")
    assert knows(made, "Vega", "Orion")
    with made.open() as reconciler, reconciler.ledger.read() as db:
        [row] = db.conflicts()
        assert {(claim.object.label, claim.origin) for claim in row.conflict.claims} == {
            ("Orion", "line 2"),
            ("Rome", "line 7"),
        }


def test_two_subjects_with_one_request_share_a_column_that_stays_while_one_of_them_needs_it(
    made: TestWorkspace,
) -> None:
    feed = made.root / "sources" / "stars.csv"
    text = feed.read_text()
    feed.write_text(text + "other,Vega,Orion\n")
    assert sync(made).versions == [1]
    with made.open() as reconciler:
        revert_fact(reconciler.line(), FactKey("constellation", "stars:other"))
    assert knows(made, "Vega", "Orion")
    assert problems(made) == []


def test_facts_that_the_weights_do_not_take_are_held_and_the_rest_is_published(made: TestWorkspace) -> None:
    made.feed(STARS | {"Altair": "a long answer of many tokens"})
    report = sync(made)
    assert (report.status, report.versions, report.counts["failed"]) == ("done", [1], 1)
    with made.open() as reconciler, reconciler.ledger.read() as db:
        [row] = db.hold_rows(reconciler.line().model)
        assert (row.hold.key.subject, row.hold.reason) == ("stars:altai", "probe")
        assert "answers" in row.hold.evidence
    assert sync(made).counts["edits"] == 0


def test_a_version_that_misses_the_gate_is_not_published_nor_tried_again(made: TestWorkspace) -> None:
    policy = made.root / "policies" / "sky.yaml"
    policy.write_text(policy.read_text().replace("drift: 1000", "drift: 0, trials: 0"))
    report = sync(made)
    assert (report.status, report.exit_code, report.versions) == ("rejected", 4, [])
    assert isinstance(report.problems[0], GateRejected)
    assert "drift" in report.problems[0].message
    assert head(made) == 0
    again = sync(made)
    assert "before" in again.problems[0].message
    assert again.exit_code == 4


def test_batches_bound_a_version_and_the_rest_follows_in_the_same_run(made: TestWorkspace) -> None:
    policy = made.root / "policies" / "sky.yaml"
    policy.write_text(policy.read_text() + "batch: {max_facts: 2}\n")
    report = sync(made)
    assert report.versions == [1, 2, 3]
    assert problems(made) == []


def test_another_model_under_the_same_name_is_refused(made: TestWorkspace) -> None:
    sync(made)
    save(tiny_llama(seed=1), made.root / "model")
    with made.open() as reconciler, pytest.raises(BaseMismatch, match="not those that the versions were made on"):
        reconciler.sync()
    assert any("not those that the versions were made on" in problem for problem in problems(made))


def test_a_cancelled_edit_publishes_nothing_and_the_next_pass_does_it(made: TestWorkspace) -> None:
    with made.open() as reconciler:
        reconciler.cancelled.set()
        with pytest.raises(Cancelled):
            reconciler.sync()
        with reconciler.ledger.read() as db:
            assert db.runs()[0].status == "cancelled"
    assert head(made) == 0
    assert sync(made).versions == [1]


@pytest.mark.usefixtures("database")
def test_a_source_that_fails_leaves_the_ledger_as_it_was(made: TestWorkspace) -> None:
    sync(made)
    (made.root / "sources" / "stars.csv").write_text("id,wrong,header\n1,2,3\n")
    report = sync(made)
    assert (report.status, report.exit_code) == ("failed", 1)
    with made.open() as reconciler, reconciler.ledger.read() as db:
        assert len(db.facts()) == 5
        assert db.runs()[0].status == "failed"
        assert db.source_state("stars").failures == 1
    made.feed(STARS)
    assert sync(made).status == "done"


def test_the_hook_hears_of_a_publication_and_its_failure_is_not_fatal(made: TestWorkspace) -> None:
    config = made.root / "kbsync.yaml"
    config.write_text(config.read_text() + 'on_publish: "echo $KBSYNC_VERSION > published; exit 3"\n')
    assert sync(made).versions == [1]
    assert (made.root / "published").read_text() == "1\n"


def test_a_scheduled_pass_outside_the_edit_window_records_and_leaves_the_model_for_later(made: TestWorkspace) -> None:
    soon = datetime.now(UTC) + timedelta(hours=2)
    config = made.root / "kbsync.yaml"
    config.write_text(config.read_text() + f'edit_window: "{soon:%H:%M}-{soon + timedelta(minutes=1):%H:%M}"\n')
    with made.open() as reconciler:
        [report] = reconciler.sync(trigger="schedule")
        assert (report.status, report.versions) == ("postponed", [])
        with reconciler.ledger.read() as db:
            assert len(db.facts()) == 5
        [by_hand] = reconciler.sync()
    assert by_hand.versions == [1]


def test_the_edit_runs_in_a_child_process_of_its_own(made: TestWorkspace) -> None:
    report = sync(made, child=True)
    assert report.versions == [1]
    assert knows(made, "Vega", "Orion")


def test_garbage_collection_removes_only_what_no_version_names(made: TestWorkspace) -> None:
    sync(made)
    opened = Workspace.load(made.root)
    orphan = opened.deltas / ("0" * 64 + ".safetensors")
    orphan.write_bytes(b"left by a crash")
    with made.open() as reconciler:
        assert garbage(reconciler, hours=1) == []
        assert garbage(reconciler, hours=0) == [orphan.name]
    assert problems(made) == []


def test_garbage_collection_removes_target_vectors_of_requests_that_no_version_holds(made: TestWorkspace) -> None:
    sync(made)
    made.feed(STARS | {"Vega": "a long answer of many tokens"})
    assert sync(made).counts["failed"] == 1
    targets = Workspace.load(made.root).targets
    before = {path.name for path in targets.iterdir()}
    assert len(before) == 6
    with made.open() as reconciler:
        assert garbage(reconciler, hours=1) == []
        gone = before & set(garbage(reconciler, hours=0))
    assert len(gone) == 1
    assert {path.name for path in targets.iterdir()} == before - gone
    assert problems(made) == []


def test_two_subjects_that_change_to_one_request_both_lose_their_old_columns(made: TestWorkspace) -> None:
    made.feed(STARS, {"Vega": "a", "Deneb": "b"})
    sync(made)
    feed = made.root / "sources" / "stars.csv"
    feed.write_text(feed.read_text().replace("a,Vega,Orion", "a,Altair,home").replace("b,Deneb,Paris", "b,Altair,home"))
    assert sync(made).versions == [2]
    with made.open() as reconciler, reconciler.ledger.read() as db:
        first, second = db.active(reconciler.line().model, 2)
        assert (len(first.excluded), second.excluded) == (2, ())
    assert problems(made) == []


def test_a_withdrawn_subject_that_shares_a_column_leaves_with_the_last_that_has_it(made: TestWorkspace) -> None:
    made.policy("    retract: revert")
    feed = made.root / "sources" / "stars.csv"
    text = feed.read_text()
    feed.write_text(text + "other,Vega,Orion\n")
    sync(made)
    feed.write_text(text)
    for _ in range(2):
        again = sync(made)
        assert (again.versions, again.counts["retractions"], again.status) == ([], 0, "done")
    assert knows(made, "Vega", "Orion")
    made.feed({star: answer for star, answer in STARS.items() if star != "Vega"})
    last = sync(made)
    assert (last.versions, last.counts["retractions"]) == ([2], 2)
    assert not knows(made, "Vega", "Orion")


def test_a_flipped_byte_in_a_delta_is_named_refused_and_an_earlier_version_is_offered(made: TestWorkspace) -> None:
    sync(made)
    opened = Workspace.load(made.root)
    [path] = opened.deltas.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    assert any(path.name in problem for problem in problems(made))
    made.feed(STARS | {"Vega": "Rome"})
    report = sync(made)
    assert report.status == "failed"
    assert path.name in report.problems[0].message
    with made.open() as reconciler:
        rollback(reconciler.line(), 0)
    assert head(made) == 0


class _Mistaken:
    """A connector that fails while its rows are read: KeyError, with a secret in its text."""

    warnings = ()

    def fetch(self, previous: Provenance | None) -> Snapshot:  # noqa: ARG002 (the protocol's)
        """A snapshot without rows that can be read."""
        provenance = Provenance("stars.csv", datetime.now(UTC), 200, "ab" * 32)
        rows = (row[0] for row in [{"postgresql://me:secret@host": 1}])
        return Snapshot("stars", "constellation", provenance, content=rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["connector", "kbsync"])
def test_no_run_stays_running_whatever_fails(made: TestWorkspace, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A connector's mistake is a failed pass in one line, kbsync's own an exception; neither's text is kept."""
    with made.open() as reconciler:
        if where == "connector":
            monkeypatch.setattr(type(reconciler.catalog), "connector", lambda *_: _Mistaken())
            [report] = reconciler.sync()
            assert report.status == "failed"
            assert "its connector failed: KeyError at test_reconcile.py" in report.problems[0].message
        else:
            monkeypatch.setattr("kbsync.reconcile.take_in", lambda *_: {}["secret"])
            with pytest.raises(KeyError):
                reconciler.sync()
        with reconciler.ledger.read() as db:
            [run] = db.runs()
    assert run.status == "failed"
    assert "KeyError at test_reconcile.py" in run.message
    assert "secret" not in run.message
