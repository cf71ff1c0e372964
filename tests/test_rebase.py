"""Rebase on a tiny real model: what is held does not change by it, and no live fact is lost without a word."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import kbsync
from kbsync.config import Workspace
from kbsync.editor import worker
from kbsync.editor.answers import answers, log_probabilities
from kbsync.editor.job import EditJob, EditResult, FailedFact
from kbsync.editor.memit import insert
from kbsync.editor.target_store import TargetStore
from kbsync.editor.targets import Target
from kbsync.errors import GateRejected, Inseparable, UsageError
from kbsync.facts import Applied, EditRequest, FactKey, Hold
from kbsync.garbage import collect, retire
from kbsync.ledger import Ledger
from kbsync.ledger.records import VersionRow
from kbsync.rebase import forecast, rebase
from kbsync.reconcile import Reconciler
from kbsync.serving import Versions, verify_workspace
from kbsync.undo import release, revert_fact, revert_version, rollback
from kbsync.versions.delta import read_delta
from tests.tiny import save, tiny_llama
from tests.workspaces import TestWorkspace, run_here, workspace

STARS = {"Vega": "Orion", "Betelgeuse": "Lyra", "Deneb": "Paris", "Sirius": "Rome", "Polaris": "French"}
CHANGED = STARS | {"Vega": "Rome", "Altair": "Paris"}
LAYER = "model.layers.2.mlp.down_proj"
VEGA = FactKey("constellation", "stars:vega")
TOO_ALIKE = "a fact's key is too much like the others'"


pytestmark = pytest.mark.usefixtures("one_cache")


@pytest.fixture
def made(tmp_path: Path) -> TestWorkspace:
    """A workspace at version 2: five stars, then one that changed and one more."""
    found = workspace(tmp_path, STARS)
    with found.open() as reconciler:
        assert reconciler.sync()[0].versions == [1]
        found.feed(CHANGED)
        assert reconciler.sync()[0].versions == [2]
    return found


def holds(reconciler: Reconciler, version: int | None = None) -> dict[str, str]:
    """Subject -> object of a version's weights, by the ledger."""
    line = reconciler.line()
    with reconciler.ledger.read() as db:
        number = db.head(line.model) if version is None else version
        return {applied.request.subject: applied.request.target for applied in db.applied(line.model, number).values()}


def row(reconciler: Reconciler) -> VersionRow:
    """The live version."""
    line = reconciler.line()
    with reconciler.ledger.read() as db:
        return db.version(line.model, db.head(line.model))


def held(reconciler: Reconciler) -> dict[FactKey, Hold]:
    """The holds in force."""
    line = reconciler.line()
    with reconciler.ledger.read() as db:
        return db.holds(line.model)


def do(reconciler: Reconciler) -> dict[str, Any]:
    """`kbsync rebase`."""
    return rebase(reconciler.line(), reconciler.judge, reconciler.controls())


def problems(made: TestWorkspace) -> list[str]:
    """What `verify` finds."""
    opened = Workspace.load(made.root)
    ledger = Ledger.open(opened.ledger_url)
    found = list(verify_workspace(opened, ledger))
    ledger.close()
    return found


def test_a_rebase_holds_the_same_facts_in_one_delta_that_no_path_shows_in(made: TestWorkspace, tmp_path: Path) -> None:
    with made.open() as reconciler:
        before = holds(reconciler)
        done = do(reconciler)
        live = row(reconciler)
        assert (done["version"], done["facts"], live.kind, live.parent) == (3, 6, "rebase", 2)
        assert holds(reconciler) == before == CHANGED
        with reconciler.ledger.read() as db:
            [active] = db.active(live.model, 3)
        assert (active.excluded, active.corrections) == ((), None)
        assert do(reconciler)["version"] is None
        assert reconciler.sync()[0].counts["edits"] == 0
    assert problems(made) == []

    (tmp_path / "other").mkdir()
    straight = workspace(tmp_path / "other", CHANGED)
    (straight.root / "data").mkdir()
    (made.root / "data" / "targets").rename(straight.root / "data" / "targets")
    with straight.open() as reconciler:
        reconciler.sync()
        assert row(reconciler).weights_sha256 == live.weights_sha256


def test_a_rebase_of_nothing_is_refused(tmp_path: Path) -> None:
    with workspace(tmp_path, STARS).open() as reconciler, pytest.raises(UsageError, match="holds no facts"):
        do(reconciler)


def test_every_so_many_versions_the_next_one_is_a_rebase_with_the_batch_in_it(made: TestWorkspace) -> None:
    made.strategy(rebase_every=2)
    made.feed(CHANGED | {"Rigel": "French", "Deneb": "Rome"})
    with made.open() as reconciler:
        [planned] = reconciler.plan()
        assert planned.rebase is not None
        assert "rebase_every is 2" in planned.rebase
        [report] = reconciler.sync()
        assert report.versions == [3]
        assert (row(reconciler).kind, row(reconciler).facts) == ("rebase", 7)
        assert holds(reconciler) == CHANGED | {"Rigel": "French", "Deneb": "Rome"}
        made.feed(CHANGED)
        assert reconciler.sync()[0].rebase is None
        assert row(reconciler).kind == "edit"
    assert problems(made) == []


def test_a_limit_of_the_odometer_is_answered_by_a_rebase_once_not_for_ever(made: TestWorkspace) -> None:
    made.strategy(max_relative_norm=0.001)
    with made.open() as reconciler:
        for number, answer in ((3, "Lyra"), (4, "home"), (5, "star")):
            made.feed(CHANGED | {"Vega": answer})
            assert reconciler.sync()[0].versions == [number]
            assert row(reconciler).kind == ("rebase" if number == 3 else "edit")


def test_mode_rebase_makes_every_version_anew_and_the_batch_bound_does_not_split_it(made: TestWorkspace) -> None:
    made.strategy(mode="rebase")
    policy = made.root / "policies" / "sky.yaml"
    policy.write_text(policy.read_text() + "batch: {max_facts: 1}\n")
    made.feed(CHANGED | {"Vega": "Lyra", "Sirius": "home"})
    with made.open() as reconciler:
        assert reconciler.sync()[0].versions == [3]
        assert row(reconciler).kind == "rebase"


def test_what_is_held_stays_frozen_over_a_rebase(made: TestWorkspace) -> None:
    with made.open() as reconciler:
        rollback(reconciler.line(), 1)
        made.feed(CHANGED | {"Sirius": "home"})
        reconciler.sync()
        do(reconciler)
        assert holds(reconciler) == STARS | {"Sirius": "home"}
        assert reconciler.sync()[0].counts["edits"] == 0
        release(reconciler.line(), everything=True)
        reconciler.sync()
        assert holds(reconciler) == CHANGED | {"Sirius": "home"}


def test_a_version_older_than_the_rebase_is_reverted_by_another_rebase_and_the_plan_says_so(
    made: TestWorkspace,
) -> None:
    with made.open() as reconciler:
        do(reconciler)
        plan = revert_version(reconciler.line(), 2, dry=True)
        assert "older than the rebase in version 3" in plan["rebase"]
        assert row(reconciler).number == 3
        done = revert_version(reconciler.line(), 2)
        assert (done["version"], done["held"], row(reconciler).kind) == (4, 2, "rebase")
        assert holds(reconciler) == STARS
        assert reconciler.sync()[0].counts["edits"] == 0
        with pytest.raises(UsageError, match="nothing of version 3 is left in HEAD") as refused:
            revert_version(reconciler.line(), 3)
        assert "rollback --to 2" in refused.value.hint
    assert problems(made) == []


def test_a_fact_is_taken_out_exactly_as_if_it_had_never_been(made: TestWorkspace) -> None:
    with made.open() as reconciler:
        done = revert_fact(reconciler.line(), VEGA, exact=True)
        assert (done["rebase"], done["facts"], row(reconciler).kind) == ("--exact", 5, "rebase")
        assert holds(reconciler) == {star: answer for star, answer in CHANGED.items() if star != "Vega"}
        assert list(held(reconciler)) == [VEGA]
        assert reconciler.sync()[0].counts["edits"] == 0


def test_a_rollback_over_a_rebase_holds_only_what_differs(made: TestWorkspace) -> None:
    with made.open() as reconciler:
        do(reconciler)
        assert rollback(reconciler.line(), 2)["held"] == 0
        assert rollback(reconciler.line(), 1)["held"] == 2


class _Spoiled:
    """Edits of which every rebase is said to have lost facts that HEAD answers."""

    def __init__(self, lost: int) -> None:
        self.lost = lost

    def __call__(self, job: EditJob, **kwargs: Any) -> EditResult:
        result = run_here(job, **kwargs)
        gone = [{"digest": digest, "evidence": "spoiled"} for digest in job.settled[: self.lost]]
        return EditResult.model_validate(result.model_dump(by_alias=True) | {"lost": gone})


def test_a_rebase_that_loses_live_facts_is_rejected_and_head_stays(made: TestWorkspace) -> None:
    made.strategy(min_retention="90%")
    with made.open() as reconciler:
        reconciler.run_edit = _Spoiled(1)
        with pytest.raises(GateRejected, match="1 of 6 live facts are no longer answered"):
            do(reconciler)
        assert row(reconciler).number == 2
        assert held(reconciler) == {}
        with reconciler.ledger.read() as db:
            assert db.runs()[0].status == "rejected"


@pytest.mark.parametrize(("mode", "kind"), [("auto", "edit"), ("rebase", None)])
def test_a_rejected_rebase_holds_up_no_edit_in_mode_auto(made: TestWorkspace, mode: str, kind: str | None) -> None:
    made.strategy(mode=mode, rebase_every=1, min_retention="90%")
    made.feed(CHANGED | {"Vega": "Lyra"})
    with made.open() as reconciler:
        reconciler.run_edit = _Spoiled(2)
        [report] = reconciler.sync()
        if kind is None:
            assert (report.status, report.exit_code) == ("rejected", 4)
            assert row(reconciler).number == 2
        else:
            assert (report.status, row(reconciler).kind, holds(reconciler)["Vega"]) == ("done", kind, "Lyra")
            assert "a rebase of what HEAD holds falls short without any of these facts" in report.notes[0]
            assert "was rejected" in report.notes[1]


def test_a_rejected_rebase_is_tried_again_after_as_many_versions_or_with_other_settings(made: TestWorkspace) -> None:
    made.strategy(rebase_every=2, min_retention="90%")
    tried: list[int] = []
    spoil = _Spoiled(6)

    def watch(job: EditJob, **kwargs: Any) -> EditResult:
        tried.append(len(job.settled))
        return spoil(job, **kwargs)

    def versions(answers: list[str]) -> list[bool]:
        """Which of the versions that these changes of a star make were tried as a rebase."""
        found = []
        for answer in answers:
            tried.clear()
            made.feed(CHANGED | {"Vega": answer})
            assert reconciler.sync()[0].status == "done"
            found.append(any(tried))
        return found

    with made.open() as reconciler:
        reconciler.run_edit = watch
        assert versions(["Lyra", "home", "star", "Orion"]) == [True, False, True, False]
    made.strategy(rebase_every=2, min_retention="91%")
    with made.open() as reconciler:
        reconciler.run_edit = watch
        assert versions(["Lyra", "home"]) == [True, False]


@pytest.mark.parametrize("mode", ["auto", "incremental"])
def test_a_fact_that_cannot_leave_alone_leaves_by_a_rebase(
    made: TestWorkspace, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    def alike(*_args: Any) -> Any:
        raise Inseparable("layer: " + TOO_ALIKE)

    monkeypatch.setattr(worker, "hold", alike)
    made.strategy(mode=mode)
    made.feed(CHANGED | {"Vega": "Lyra"})
    with made.open() as reconciler:
        [report] = reconciler.sync()
        assert (report.status, report.versions, report.rebase) == ("done", [3], "layer: " + TOO_ALIKE)
        assert (row(reconciler).kind, holds(reconciler)) == ("rebase", CHANGED | {"Vega": "Lyra"})
        done = revert_fact(reconciler.line(), VEGA)
        assert (done["rebase"], row(reconciler).kind) == ("layer: " + TOO_ALIKE, "rebase")


def test_a_fact_leaves_weights_whose_lambda_has_grown_by_a_rebase(
    made: TestWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kbsync.editor.preset.GROWTH_FACTS", 5)
    preset = made.root / "preset.yaml"
    preset.write_text(preset.read_text() + "covariance_growth: 0.2\n")
    with made.open() as reconciler:
        made.feed(CHANGED | {"Rigel": "French"})
        assert reconciler.sync()[0].rebase is None
        made.feed(CHANGED | {"Rigel": "home"})
        report = reconciler.sync()[0]
        assert report.rebase is not None
        assert "has grown" in report.rebase
        assert row(reconciler).kind == "rebase"


def test_an_edit_that_fails_in_a_rebase_is_held_and_the_fact_it_was_to_replace_goes_back_in(
    made: TestWorkspace,
) -> None:
    made.strategy(mode="rebase")
    made.feed(CHANGED | {"Vega": "a long answer of many tokens", "Sirius": "home"})
    with made.open() as reconciler:
        [report] = reconciler.sync()
        assert (report.status, report.counts["failed"]) == ("done", 1)
        assert holds(reconciler) == CHANGED | {"Sirius": "home"}
        [hold] = held(reconciler).values()
        assert (hold.key, hold.reason) == (VEGA, "probe")
        with reconciler.ledger.read() as db:
            assert hold.frozen == db.applied(db.models()[0].id, 3)[VEGA]
        assert reconciler.sync()[0].counts["edits"] == 0


def test_what_a_failed_edit_was_to_replace_stays_out_where_the_live_version_does_not_answer_it(
    made: TestWorkspace,
) -> None:
    made.strategy(mode="rebase")
    made.feed(CHANGED | {"Vega": "another answer of many tokens"})
    with made.open() as reconciler:
        _unlearn(reconciler, VEGA)
        [report] = reconciler.sync()
        assert (report.status, report.counts["failed"]) == ("done", 1)
        assert "Vega" not in holds(reconciler)
        assert held(reconciler)[VEGA].frozen is None


def test_what_a_failed_edit_was_to_replace_counts_as_lost_where_it_has_no_target_vector(
    made: TestWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    get = TargetStore.get

    def nowhere(store: TargetStore, request: EditRequest) -> Target | None:
        if request.subject == "Vega":
            return Target(torch.full((32,), torch.nan), float("nan"), 3, False, True)
        return get(store, request)

    monkeypatch.setattr(TargetStore, "get", nowhere)
    made.strategy(mode="rebase", min_retention="100%")
    made.feed(CHANGED | {"Vega": "home"})
    with made.open() as reconciler:
        [report] = reconciler.sync()
        assert (report.status, row(reconciler).number) == ("rejected", 2)
        assert "1 of 6 live facts are no longer answered" in report.problems[0].message


def test_what_a_failed_edit_was_to_replace_gives_way_to_another_subject_of_that_name(made: TestWorkspace) -> None:
    made.strategy(mode="rebase")
    with made.open() as reconciler:
        made.feed(
            {star: answer for star, answer in CHANGED.items() if star not in ("Vega", "Deneb")}
            | {"Rigel": "a long answer of many tokens", "Vega": "Lyra"},
            {"Rigel": "vega", "Vega": "deneb"},
        )
        [report] = reconciler.sync()
        assert (report.status, report.counts["failed"]) == ("done", 1)
        assert holds(reconciler)["Vega"] == "Lyra"
        assert held(reconciler)[VEGA].frozen is None
        assert reconciler.sync()[0].counts["edits"] == 0
    assert problems(made) == []


def test_a_live_fact_that_neither_version_answers_is_taken_out_and_held_with_the_evidence(
    made: TestWorkspace,
) -> None:
    with made.open() as reconciler:
        _unlearn(reconciler, VEGA)
        done = do(reconciler)
        assert [fact["evidence"][:25] for fact in done["failed"]] == ["the edited model answers "]
        assert "Vega" not in holds(reconciler)
        [hold] = held(reconciler).values()
        assert (hold.key, hold.frozen, hold.reason) == (VEGA, None, "probe")
        again = reconciler.sync()[0]
        assert (again.counts["edits"], again.counts["held"], again.versions) == (0, 1, [])
        made.feed(CHANGED | {"Vega": "Lyra"})
        assert reconciler.sync()[0].versions == [4]  # the source says a third object, which ends the hold
        assert holds(reconciler)["Vega"] == "Lyra"


def test_what_a_person_rolled_back_does_not_come_in_because_the_fact_in_its_place_fails_in_a_rebase(
    made: TestWorkspace,
) -> None:
    with made.open() as reconciler:
        rollback(reconciler.line(), 1)
        before = held(reconciler)[VEGA]
        _unlearn(reconciler, VEGA)
        do(reconciler)
        after = held(reconciler)[VEGA]
        assert (after.frozen, after.held_out, after.reason) == (None, before.held_out, "rollback")
        assert reconciler.sync()[0].counts["edits"] == 0
        assert "Vega" not in holds(reconciler)


def _unlearn(reconciler: Reconciler, key: FactKey) -> None:
    """Let the ledger say of a live column that it is for another text than the weights were taught."""
    from sqlalchemy import update

    from kbsync.ledger import schema

    model = reconciler.line().model
    with reconciler.ledger.write() as db:
        applied: Applied = db.applied(model, db.head(model))[key]
        table = schema.delta_fact
        statement = update(table).where(table.c.delta == applied.delta, table.c.subject_id == key.subject)
        db._connection.execute(statement.values(target="a long answer of many tokens"))


def test_another_base_takes_over_the_live_facts_and_the_old_line_stays(made: TestWorkspace) -> None:
    save(tiny_llama(seed=1), made.root / "newer")
    made.strategy(min_retention="80%")
    with made.open() as reconciler:
        rollback(reconciler.line(), 1)
        old = row(reconciler)
        dry = reconciler.take_over("newer", "preset.yaml", dry=True)
        assert (dry["facts"], dry["targets"], dry["change"]) == (5, 5, "model: newer\npreset: preset.yaml")
        with reconciler.ledger.read() as db:
            assert len(db.models()) == 1
        done = reconciler.take_over("newer", "preset.yaml")
        assert (done["version"], done["facts"] + len(done["failed"])) == (1, 5)
        assert row(reconciler) == old
        with pytest.raises(UsageError, match="already"):
            reconciler.take_over("model", "preset.yaml")
    config = made.root / "kbsync.yaml"
    config.write_text(config.read_text().replace("model: model", "model: newer"))
    with made.open() as reconciler:
        live = row(reconciler)
        assert (live.number, live.kind, live.parent) == (1, "rebase", 0)
        assert live.model != old.model
        assert reconciler.sync()[0].counts["edits"] == 0  # what was rolled back stays so
    assert problems(made) == []


def test_a_base_that_holds_facts_or_undos_of_its_own_takes_over_nothing(made: TestWorkspace) -> None:
    save(tiny_llama(seed=1), made.root / "newer")
    config = made.root / "kbsync.yaml"
    old = config.read_text()
    with made.open() as reconciler:
        reconciler.take_over("newer", "preset.yaml")
    config.write_text(old.replace("model: model", "model: newer"))
    with made.open() as reconciler:
        revert_fact(reconciler.line(), VEGA)
    config.write_text(old)
    with made.open() as reconciler, pytest.raises(UsageError, match="has 1 facts rolled back or reverted, such as"):
        reconciler.take_over("newer", "preset.yaml")
    config.write_text(old.replace("model: model", "model: newer"))
    made.feed(CHANGED | {"Rigel": "French"})
    with made.open() as reconciler:
        release(reconciler.line(), everything=True)
        reconciler.sync()
        assert holds(reconciler)["Rigel"] == "French"
    config.write_text(old)
    with made.open() as reconciler, pytest.raises(UsageError, match=r"has 1 facts that HEAD of .* lacks"):
        reconciler.take_over("newer", "preset.yaml")


def test_a_base_that_takes_over_once_more_forgets_what_it_did_not_take_before(
    made: TestWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tiny_llama(seed=1), made.root / "newer")
    failing = worker._Editor.failing
    with made.open() as reconciler:
        monkeypatch.setattr(worker._Editor, "failing", _refusing("Vega"))
        assert [fact["evidence"] for fact in reconciler.take_over("newer", "preset.yaml")["failed"]] == ["refused"]
        newer = reconciler.ledger
        with newer.read() as db:
            [model] = [model.id for model in db.models() if model.name == "newer"]
            assert list(db.holds(model)) == [VEGA]
        monkeypatch.setattr(worker._Editor, "failing", failing)
        reconciler.take_over("newer", "preset.yaml")
        with newer.read() as db:
            assert db.applied(model, db.head(model))[VEGA].request.target == "Rome"
            assert VEGA not in db.holds(model)


def _refusing(subject: str) -> Any:
    """In the place of the worker's own question which facts failed: only this subject's."""

    def failing(_editor: Any, attempt: Any) -> list[FailedFact]:
        refused = [request for request in attempt.requests if request.subject == subject]
        return [FailedFact(digest=request.digest, evidence="refused") for request in refused]

    return failing


def test_facts_that_another_base_knows_by_itself_take_no_edit_there(made: TestWorkspace) -> None:
    save(tiny_llama(seed=1), made.root / "newer")
    policy = made.root / "policies" / "sky.yaml"
    policy.write_text(policy.read_text().replace('["The home of {subject}"]', "[]"))
    with made.open() as reconciler:
        shutil.copytree(made.root, made.root.parent / "asked", dirs_exist_ok=True)
        config = made.root.parent / "asked" / "kbsync.yaml"
        config.write_text(config.read_text().replace("model: model", "model: newer"))
        star, answer = _known_to_the_base(TestWorkspace(config.parent))
        made.feed(CHANGED | {star: answer}, {star: "known"})
        reconciler.sync()
    policy.write_text(policy.read_text().replace("retract: keep", "skip_known: true"))
    with made.open() as reconciler:
        done = reconciler.take_over("newer", "preset.yaml")
        with reconciler.ledger.read() as db:
            held_by = db.applied(done["model"], 1)
        assert star in holds(reconciler)
        assert FactKey("constellation", "stars:known") not in held_by
        assert done["facts"] + len(done["failed"]) == 6


def test_a_model_that_was_left_can_be_retired_which_frees_its_files_and_it_starts_anew_if_named_again(
    made: TestWorkspace,
) -> None:
    save(tiny_llama(seed=1), made.root / "newer")
    config = made.root / "kbsync.yaml"
    old = config.read_text()
    with made.open() as reconciler:
        reconciler.take_over("newer", "preset.yaml")
        with pytest.raises(UsageError, match=r"model model: kbsync\.yaml names it"):
            retire(reconciler.workspace, reconciler.ledger, "model", user="test")
    config.write_text(old.replace("model: model", "model: newer"))
    with made.open() as reconciler:
        model = reconciler.line().model
        with reconciler.ledger.read() as db:
            ours = {entry.delta for entry in db.active(model, 1)}
        with pytest.raises(UsageError, match="model gone: the ledger does not know it"):
            retire(reconciler.workspace, reconciler.ledger, "gone", user="test")
        retire(reconciler.workspace, reconciler.ledger, "model", user="test")
        collect(reconciler.workspace, reconciler.ledger, timedelta(0), user="test")
        assert {path.stem for path in reconciler.workspace.deltas.iterdir()} == ours
    assert problems(made) == []
    config.write_text(old)
    with made.open() as reconciler:
        assert reconciler.sync()[0].versions == [3]
        collect(reconciler.workspace, reconciler.ledger, timedelta(0), user="test")
        assert holds(reconciler) == CHANGED
    assert problems(made) == []


def test_a_base_that_takes_too_few_of_the_facts_is_rejected(made: TestWorkspace) -> None:
    save(tiny_llama(seed=1), made.root / "newer")
    made.strategy(min_retention="90%")
    preset = made.root / "weak.yaml"
    preset.write_text((made.root / "preset.yaml").read_text().replace("clamp: 6.0", "clamp: 0.01"))
    with made.open() as reconciler:
        with pytest.raises(GateRejected, match="live facts are no longer answered"):
            reconciler.take_over("newer", "weak.yaml")
        with reconciler.ledger.read() as db:
            assert [model.head for model in db.models()] == [2, 0]


def test_a_forecast_counts_facts_and_target_vectors_and_says_what_would_trigger(made: TestWorkspace) -> None:
    with made.open() as reconciler:
        found = forecast(reconciler.line())
        assert (found["head"], found["facts"], found["targets"], found["since"], found["due"]) == (2, 6, 0, 2, None)
        assert found["seconds"] > 0
        (made.root / "data" / "targets" / ("0" * 64 + ".safetensors")).write_bytes(b"of another fact")
        made.feed(CHANGED | {"Rigel": "French"})
        reconciler.sync()
        next((made.root / "data" / "targets").glob("[1-9]*")).unlink()
        assert forecast(reconciler.line())["targets"] == 1
        preset = made.root / "preset.yaml"
        preset.write_text(preset.read_text().replace("clamp: 6.0", "clamp: 5.0"))
        assert forecast(reconciler.line())["targets"] == 7


def test_each_version_measures_how_much_of_the_model_its_edits_are(made: TestWorkspace) -> None:
    opened = Workspace.load(made.root)
    ledger = Ledger.open(opened.ledger_url)
    versions = Versions.open(opened, ledger)
    manifest = versions.store.manifest(2, None)
    capacity = manifest.numerics["capacity"]
    base, live = versions.load(0), versions.load(2)
    for name, norm in capacity["norms"].items():
        pristine = base.weight(name).double()
        assert norm == pytest.approx(float((live.weight(name).double() - pristine).norm() / pristine.norm()), rel=1e-5)
    assert capacity["facts"] == 6
    assert capacity["retention"]["facts"] == 4  # Vega's is new
    assert 0 <= capacity["retention"]["share"] <= 1
    assert manifest.probe is not None
    assert capacity["drift"] == manifest.probe["drift"]
    ledger.close()


def test_incremental_keeps_the_keys_of_live_facts_over_a_restart_and_takes_superseded_ones_out(
    made: TestWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def spy(*args: Any, protected: Any, **kwargs: Any) -> Any:
        seen.append(protected)
        return insert(*args, protected=protected, **kwargs)

    monkeypatch.setattr(worker, "insert", spy)
    made.feed(CHANGED | {"Deneb": "Rome", "Rigel": "home"})
    with made.open() as reconciler:
        reconciler.sync()
        model = reconciler.line().model
        with reconciler.ledger.read() as db:
            first, second, third = db.active(model, 3)
            held = db.applied(model, 3).values()
    keys = torch.cat(
        [read_delta(made.root / "data/deltas/sha256", one.delta).factors[LAYER].keys for one in (first, second)]
    )
    gone = set(first.excluded)
    live = [column for column in range(len(keys)) if column not in gone]
    assert len(gone) == 2  # Vega in version 2, Deneb in version 3
    assert (second.excluded, third.excluded, second.corrections is not None) == ((), (), True)
    assert torch.equal(seen[0][LAYER], keys[live])
    assert len(held) == len(live) + 2


def test_a_fact_without_a_target_vector_is_reported_and_held_not_written(
    made: TestWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    get = TargetStore.get

    def nowhere(store: TargetStore, request: EditRequest) -> Target | None:
        if request.target == "home":
            return Target(torch.full((32,), torch.nan), float("nan"), 3, False, True)
        return get(store, request)

    monkeypatch.setattr(TargetStore, "get", nowhere)
    made.feed(CHANGED | {"Vega": "home", "Sirius": "star"})
    with made.open() as reconciler:
        [report] = reconciler.sync()
        assert (report.status, report.versions, report.counts["failed"]) == ("done", [3], 1)
        [hold] = held(reconciler).values()
        assert (hold.key, hold.reason) == (VEGA, "probe")
        assert hold.evidence == "no target vector for 'home': a loss of nan after 3 steps"
        assert holds(reconciler) == CHANGED | {"Sirius": "star"}
        assert reconciler.sync()[0].counts["edits"] == 0
    assert problems(made) == []


def test_a_fact_of_a_delta_stored_whole_leaves_by_a_rebase(tmp_path: Path) -> None:
    many = {f"Star{number:02}": "Orion" for number in range(48)}
    ids = {name: name for name in many}
    found = workspace(tmp_path, {})
    found.feed(many, ids)
    with found.open() as reconciler:
        assert reconciler.sync()[0].versions == [1]
        assert row(reconciler).facts > 32  # more columns than rows: stored dense
        star = next(iter(holds(reconciler)))
        assert revert_fact(reconciler.line(), FactKey("constellation", f"stars:{star}"), dry=True)["rebase"]
        found.feed(many | {star: "Italy"}, ids)
        [report] = reconciler.sync()
        assert report.rebase == "a fact is to leave a delta that is stored whole"
        assert row(reconciler).kind == "rebase"


def test_what_the_base_knows_takes_no_edit_is_asked_of_every_version_and_edited_once_forgotten(tmp_path: Path) -> None:
    found = workspace(tmp_path, {})
    found.policy("    skip_known: true")
    policy = found.root / "policies" / "sky.yaml"
    policy.write_text(policy.read_text().replace('["The home of {subject}"]', "[]"))
    star, answer = _known_to_the_base(found)
    found.feed({star: answer})
    with found.open() as reconciler:
        first = reconciler.sync()[0]
        assert (first.versions, first.counts["edits"]) == ([], 1)
        again = reconciler.sync()[0]
        assert again.plan is not None
        assert (again.counts["edits"], len(again.plan.known)) == (0, 1)

        found.feed({star: answer} | STARS)
        assert reconciler.sync()[0].versions == [1, 2]  # five edits of so small a model make it forget; then it learns
        assert holds(reconciler, 1) == STARS
        assert not log_probabilities(kbsync.load_model(found.root, 1), [(f"Where is {star}", answer)])[0].greedy
        assert holds(reconciler, 2) == STARS | {star: answer}
        assert log_probabilities(kbsync.load_model(found.root, 2), [(f"Where is {star}", answer)])[0].greedy
        with reconciler.ledger.read() as db:
            model = db.models()[0].id
            assert (len(db.forgotten(model, 1)), len(db.forgotten(model, 2))) == (1, 0)
            assert (len(db.known_to(model, 1)), len(db.known_to(model, 2))) == (0, 1)
        assert reconciler.sync()[0].counts["edits"] == 0


def test_what_the_base_knows_and_the_live_version_has_forgotten_is_edited(tmp_path: Path) -> None:
    found = workspace(tmp_path, STARS)
    found.policy("    skip_known: true")
    policy = found.root / "policies" / "sky.yaml"
    policy.write_text(policy.read_text().replace('["The home of {subject}"]', "[]"))
    star, answer = _known_to_the_base(found)
    with found.open() as reconciler:
        assert reconciler.sync()[0].versions == [1]
        found.feed({star: answer} | STARS)
        model = reconciler.line().model
        assert reconciler.sync()[0].versions == []  # known to the base, and not answered by version 1
        with reconciler.ledger.read() as db:
            assert (len(db.forgotten(model, 1)), db.known_to(model, 1)) == (1, set())
            assert db.version(model, 1).probe["efficacy"] == 1.0  # type: ignore[index]
        assert reconciler.sync()[0].versions == [2]
        assert holds(reconciler) == STARS | {star: answer}


def _known_to_the_base(made: TestWorkspace) -> tuple[str, str]:
    """A subject and an object that the random model happens to answer."""
    base = kbsync.load_model(made.root)
    stars = [f"{name}{number}" for name in ("Alpha", "Beta", "Gamma") for number in range(20)]
    said = [one.text for one in answers(base, [f"Where is {star}" for star in stars], tokens=1)]
    pairs = [(star, word) for star, word in zip(stars, said, strict=True) if word.isalpha()]
    scored = log_probabilities(base, [(f"Where is {star}", word) for star, word in pairs])
    return next(pair for pair, one in zip(pairs, scored, strict=True) if one.greedy)
