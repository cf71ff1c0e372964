"""Metrics: each one is declared and documented, parses, and says what the tables say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kbsync import metrics as metrics_module
from kbsync.catalog import load_catalog
from kbsync.errors import LedgerError, SourceInvalid, SourceUnavailable
from kbsync.ledger import Reader
from kbsync.lock import writer_lock
from kbsync.metrics import DECLARED, Exposition, measure
from kbsync.observe import observe
from kbsync.reconcile import Reconciler
from tests.ledgers import Clock, claims, decide, facts, fill, opened, register, snapshot, tampered
from tests.standin import StandIn
from tests.workspaces import TestWorkspace, workspace

ROOT = Path(__file__).parents[1]
STARS = {"Vega": "Orion", "Betelgeuse": "Lyra", "Deneb": "Paris"}

pytestmark = pytest.mark.usefixtures("one_cache")

Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> Values:
    """Every sample of an exposition by name and labels; fails where one comes twice."""
    found: Values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def value(found: Values, name: str, **labels: str) -> float:
    """The one sample of this name with (at least) these labels."""
    wanted = frozenset(labels.items())
    [one] = [number for (has, given), number in found.items() if has == f"kbsync_{name}" and wanted <= given]
    return one


@pytest.fixture
def made(tmp_path: Path, database: str) -> TestWorkspace:
    """A workspace that was never synced, with its ledger in each database."""
    return workspace(tmp_path, STARS)


def exposed(reconciler: Reconciler) -> Values:
    """What /metrics would say now."""
    return parsed(exposition_of(reconciler)().decode())


def exposition_of(reconciler: Reconciler, fresh: float = 0) -> Exposition:
    """It reads sources and policies from their files each time, as the command does."""
    workspace = reconciler.workspace
    return Exposition(reconciler.ledger, lambda: load_catalog(workspace), fresh=fresh)


def test_a_workspace_that_never_ran_has_metrics_and_none_is_nan(made: TestWorkspace) -> None:
    with made.open() as reconciler:
        found = exposed(reconciler)
    assert value(found, "daemon_running") == 0
    assert all(number == number for number in found.values())
    assert not [name for name, _ in found if name.startswith(("kbsync_head", "kbsync_probe", "kbsync_edit"))]


def test_the_numbers_are_those_of_the_tables(made: TestWorkspace) -> None:
    """A pass that publishes, one that fails, one that is held; each number beside SQL of its own."""
    with made.open() as reconciler:
        reconciler.run_edit = engine = StandIn()
        engine.failing = {"Lyra"}
        reconciler.sync()
        engine.dies = True
        made.feed(STARS | {"Sirius": "Rome"})
        reconciler.sync()
        engine.dies = False
        made.feed(STARS | new_stars(60))
        reconciler.sync()
        found = exposed(reconciler)
    for status, number in sql(made, "SELECT status, count(*) FROM run WHERE status <> 'held' GROUP BY status"):
        assert value(found, "runs_total", policy="sky", status=status) == number
    [[live]] = sql(made, "SELECT count(*) FROM fact WHERE until IS NULL AND status = 'live'")
    assert value(found, "facts", relation="constellation", status="live") == live > 0
    [[head, version]] = sql(made, "SELECT model, version FROM head ORDER BY id DESC LIMIT 1")
    assert value(found, "head_version", model=head) == version == value(found, "alias_version", alias="live")
    [[held]] = sql(made, "SELECT count(*) FROM hold WHERE until IS NULL AND reason = 'probe'")
    assert value(found, "held_facts", reason="probe") == held == 1
    [[waits]] = sql(made, "SELECT count(*) FROM staged")
    assert value(found, "held_runs", policy="sky") == waits == 1
    [[versions]] = sql(made, "SELECT count(*) FROM version WHERE number > 0")
    assert value(found, "gate_results_total", result="published") == versions
    for phase, number, total in sql(made, "SELECT phase, count(*), sum(milliseconds) FROM phase GROUP BY phase"):
        assert value(found, "run_phase_seconds_count", phase=phase) == number
        assert value(found, "run_phase_seconds_sum", phase=phase) == pytest.approx(float(total) / 1000)
    [[answers]] = sql(made, "SELECT sum(count) FROM source_answer WHERE source = 'stars' AND outcome = '200'")
    assert value(found, "source_answers_total", source="stars", outcome="200") == answers == 3


def new_stars(number: int) -> dict[str, str]:
    """So many more stars."""
    return {f"s{one:03}": "Paris" for one in range(number)}


def sql(made: TestWorkspace, statement: str) -> list[tuple[Any, ...]]:
    """Rows of a query past kbsync."""
    folder = made.root if (made.root / "ledger.db").exists() else made.root / "data"
    return tampered(folder if (folder / "ledger.db").exists() else made.root, statement)


def test_every_kind_of_row_is_counted(tmp_path: Path, database: str) -> None:
    """A ledger with a conflict, a quarantined row, a key that waits, a hold, and a source in cooldown."""
    with opened(tmp_path, clock := Clock()) as ledger:
        register(ledger)
        fill(ledger, clock)
        with ledger.read() as db:
            assert db.conflict_counts() == {("constellation", "rows"): 1}
            assert db.quarantine_counts() == {("feed",): 1}
            assert db.waiting_counts() == {("constellation", "confirm"): 1}
            [model] = db.models()
            assert db.hold_counts(model.id) == db.hold_counts(model.id, ever=True) == {("manual",): 1}
            assert db.version_counts(model.id) == {("edit",): 2}
            assert [state.source for state in db.source_states()] == ["broken"]
            assert db.size() > 100_000


def test_counters_outlive_a_restart(made: TestWorkspace) -> None:
    with made.open() as reconciler:
        reconciler.run_edit = StandIn()
        reconciler.sync()
        before = exposed(reconciler)
    with made.open() as reconciler:
        reconciler.sync()
        after = exposed(reconciler)
    assert value(before, "runs_total", status="done") == 1
    assert value(after, "runs_total", status="done") == 2
    assert all(after[key] >= before[key] for key in before if key[0].endswith("_total"))


def test_how_a_source_answered_is_counted_by_kind_each_try(made: TestWorkspace) -> None:
    class Source:
        warnings = ()

        def __init__(self, *errors: Exception) -> None:
            self.errors = list(errors)

        def fetch(self, _: object) -> Any:
            if self.errors:
                raise self.errors.pop(0)
            return snapshot(*claims(Vega="Lyra"))

    late, cut = SourceUnavailable("feed", "late", retry_after=3600), SourceInvalid("feed", "cut")
    late.outcome = "503"
    with made.open() as reconciler:
        for source in (Source(late), Source(cut), Source(RuntimeError("x")), Source()):
            with reconciler.ledger.write() as db:
                db.set_source_state(type(db.source_state("feed"))("feed"))
            observe({"feed": source}, reconciler.ledger)  # type: ignore[dict-item]
        with reconciler.ledger.read() as db:
            found = {outcome: number for (_, outcome), (number, _) in db.answers().items()}
    assert found == {"503": 1, "invalid": 1, "failed": 1, "200": 2}


def test_failures_in_a_row_end_with_the_first_pass_that_does_not_fail(tmp_path: Path, database: str) -> None:
    with opened(tmp_path) as ledger:
        for status, expected in [
            ("failed", 1), ("failed", 2), ("cancelled", 2), ("postponed", 2), ("done", 0), ("failed", 1), ("held", 0)
        ]:  # fmt: skip
            with ledger.write() as db:
                run = db.start_run("sky", model=None, trigger="schedule", user="daemon")
                db.finish_run(run, status)  # type: ignore[arg-type]
            with ledger.read() as db:
                assert db.failures_in_a_row() == {"sky": expected}, status


def test_signs_of_life_are_as_old_as_the_part_was_silent_and_end_with_it(tmp_path: Path, database: str) -> None:
    with opened(tmp_path, clock := Clock()) as ledger:
        with ledger.write() as db:
            db.beat("main", 7)
            db.beat("scheduler", 7, {"jobs": 3}, ago=60)
        with ledger.read() as db:
            beats = db.beats()
        assert beats["main"].at - beats["scheduler"].at == timedelta(seconds=60)
        assert (beats["scheduler"].process, beats["scheduler"].detail) == (7, {"jobs": 3})
        clock.turn(minutes=5)
        with ledger.write() as db:
            db.beat("main", 8)
            db.end_beats("scheduler")
        with ledger.read() as db:
            assert {part: beat.process for part, beat in db.beats().items()} == {"main": 8}


def test_phases_of_a_run_that_goes_on_later_add_up(tmp_path: Path, database: str) -> None:
    """A held run that is approved is decided twice."""
    with opened(tmp_path) as ledger:
        run = decide(ledger, facts(Vega="Lyra"))
        with ledger.write() as db:
            db.note_phases(run, {"fetch": 1.5, "decide": 0.25}, {})
            db.note_phases(run, {"decide": 0.5, "targets": 6.0}, {"targets": 3})
        with ledger.read() as db:
            assert {phase: (took.seconds, took.amount) for phase, took in db.phases(run).items()} == {
                "fetch": (1.5, 0), "decide": (0.75, 0), "targets": (6.0, 3)
            }  # fmt: skip
            assert db.phase_totals()["astronomy", "targets"].amount == 3
            last = db.last_targets()
        assert last is not None
        assert last.seconds / last.amount == 2.0


def test_a_real_edit_says_how_long_its_phases_took_and_for_how_many_vectors(made: TestWorkspace) -> None:
    with made.open() as reconciler:
        [report] = reconciler.sync()
        found = exposed(reconciler)
    assert set(report.seconds) >= {"fetch", "decide", "load", "statistics", "targets", "insert", "probe", "publish"}
    assert value(found, "target_vector_seconds_count", policy="sky") == report.computed == 3
    assert value(found, "last_target_vector_seconds") == pytest.approx(report.seconds["targets"] / 3, rel=0.01)
    assert value(found, "capacity_norm_ratio") > 0
    assert 0 <= value(found, "probe_efficacy_ratio") <= 1


def test_the_command_runs_shows_one_run_with_its_phases(tmp_path: Path) -> None:
    made = workspace(tmp_path, STARS)
    with made.open() as reconciler:
        reconciler.run_edit = StandIn()
        reconciler.sync()
    kbsync = [sys.executable, "-m", "kbsync", "runs", "1", "-w", str(made.root)]
    shown = json.loads(subprocess.run([*kbsync, "--json"], capture_output=True, text=True, check=True).stdout)
    assert (shown["status"], shown["counts"]["added"]) == ("done", 3)
    assert {"fetch", "decide", "publish"} <= set(shown["seconds"])
    assert "phases" in subprocess.run(kbsync, capture_output=True, text=True, check=True).stdout
    refused = subprocess.run([*kbsync[:4], "7", *kbsync[5:]], capture_output=True, text=True)
    assert (refused.returncode, "run 7: there is no such run" in refused.stderr) == (2, True)


def test_the_text_is_kept_for_a_while_and_one_reading_serves_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = []
    measured = metrics_module.measure

    def counted(*arguments: Any) -> Any:
        readings.append(1)
        return measured(*arguments)

    monkeypatch.setattr(metrics_module, "measure", counted)
    with workspace(tmp_path, STARS).open() as reconciler:
        exposition = exposition_of(reconciler, fresh=3600)
        assert exposition() == exposition()
    assert len(readings) == 1


def test_a_writer_comes_to_its_turn_between_what_takes_long_to_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite's rollback journal lets nobody commit while it is read: each count has a reading of its own."""
    readers: list[Reader] = []

    def noted(count: Callable[..., Any]) -> Callable[..., Any]:
        def counted(self: Reader, *arguments: Any) -> Any:
            readers.append(self)
            return count(self, *arguments)

        return counted

    for name in ("fact_counts", "accepted"):
        monkeypatch.setattr(Reader, name, noted(getattr(Reader, name)))
    made = workspace(tmp_path, STARS)
    for file in (made.root / "sources" / "stars.yaml", made.root / "policies" / "sky.yaml"):
        text = file.read_text().replace("constellation:\n", "place:\n")
        for old, new in {"relation: constellation": "relation: place", "source: stars": "source: more"}.items():
            text = text.replace(old, new)
        file.with_name(f"more{file.suffix}").write_text(text.replace("sky", "two").replace("[stars]", "[more]"))
    with made.open() as reconciler:
        exposed(reconciler)
    assert len(readers) == len({id(reader) for reader in readers}) == 3


def test_a_ledger_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    with workspace(tmp_path, STARS).open() as reconciler:
        exposition = exposition_of(reconciler)
        exposition()
        reconciler.ledger.close()
        (tmp_path / "data" / "ledger.db").write_bytes(b"no database, " * 1000)
        with pytest.raises(LedgerError):
            exposition()


def test_how_what_is_no_longer_declared_stands_is_not_told(made: TestWorkspace) -> None:
    """A policy and its source that failed and were renamed: no alert on them could ever end."""
    feed, renamed = made.root / "sources" / "stars.csv", {"stars": "lights", "sky": "heaven"}
    with made.open() as reconciler:
        reconciler.run_edit = StandIn()
        reconciler.sync()
        feed.rename(away := feed.with_suffix(".away"))
        reconciler.sync()
        failing = exposed(reconciler)
        assert value(failing, "policy_failures", policy="sky") == value(failing, "source_failures", source="stars") == 1
        away.rename(feed)
        for file in (made.root / "sources" / "stars.yaml", made.root / "policies" / "sky.yaml"):
            text = file.read_text()
            for old, new in renamed.items():
                text = re.sub(rf"\b{old}\b(?!\.csv)", new, text)
            file.write_text(text)
        found = exposed(reconciler)
    left = {name for name, labels in found for _, label in labels if label in renamed}
    assert left >= {"kbsync_runs_total", "kbsync_source_answers_total"}
    assert not [name for name in left if name.startswith(("kbsync_policy_", "kbsync_source_")) and "_total" not in name]


def test_only_notices_that_are_still_tried_are_undelivered_and_those_given_up_are_counted(
    tmp_path: Path, database: str
) -> None:
    made = workspace(tmp_path, STARS)
    config = made.root / "kbsync.yaml"
    config.write_text(config.read_text() + "notify: {channels: [{name: ops, type: command, run: 'true'}]}\n")
    with made.open() as reconciler:
        before = exposed(reconciler)
        assert value(before, "notices_undelivered", channel="ops") == 0
        assert value(before, "notices_given_up_total", channel="ops") == 0
        with reconciler.ledger.write() as db:
            db.set_channels({"ops", "gone"})
            db.notify("held", "held sky", "one")
            db.notify("stale", "stale sky", "two")
            db.enqueue({"ops": ("held", "stale"), "gone": ("held", "stale")})
            row = next(row for row in db.deliveries([1])[1] if row.channel == "ops")
            db.note_delivery(replace(row, attempts=9, next_at=None, error="no answer"))
        found = exposed(reconciler)
    assert value(found, "notices_undelivered") == value(found, "notices_given_up_total", channel="ops") == 1


def test_the_daemon_is_running_while_the_lock_is_held(tmp_path: Path) -> None:
    with workspace(tmp_path, STARS).open() as reconciler:
        with writer_lock(reconciler.workspace.lock):
            assert value(exposed(reconciler), "daemon_running") == 1
        assert value(exposed(reconciler), "daemon_running") == 0


def test_the_command_prints_the_same_and_writes_it_whole_for_others_to_read(tmp_path: Path) -> None:
    made = workspace(tmp_path, STARS)
    out = tmp_path / "kbsync.prom"
    kbsync = [sys.executable, "-m", "kbsync", "metrics", "-w", str(made.root)]
    printed = subprocess.run(kbsync, capture_output=True, text=True, check=True).stdout
    subprocess.run([*kbsync, "--out", str(out)], check=True)
    assert parsed(printed).keys() == parsed(out.read_text()).keys()
    assert out.stat().st_mode & 0o777 == 0o644
    shown = json.loads(subprocess.run([*kbsync, "--json"], capture_output=True, text=True, check=True).stdout)
    assert {row["name"] for row in shown} == {name for name, _ in parsed(printed)}


def test_every_sample_is_declared_with_its_labels(made: TestWorkspace) -> None:
    names = {declared.name: declared for declared in DECLARED}
    assert len(names) == len(DECLARED)
    with made.open() as reconciler:
        reconciler.sync()
        found = measure(reconciler.workspace, load_catalog(reconciler.workspace), reconciler.ledger)
    for name, labels, number in found:
        declared = names[f"kbsync_{name}"]
        assert len(labels) == len(declared.labels), name
        assert isinstance(number, tuple) == (declared.kind == "summary"), name


def test_names_follow_prometheus_conventions() -> None:
    for declared in DECLARED:
        assert re.fullmatch(r"kbsync_[a-z0-9_]+", declared.name)
        assert declared.name.endswith("_total") == (declared.kind == "counter"), declared.name
        assert "milli" not in declared.name
        assert declared.text.endswith(".")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not here; ends with: apt install prometheus")
def test_promtool_finds_nothing_to_say_about_the_text(tmp_path: Path) -> None:
    with workspace(tmp_path, STARS).open() as reconciler:
        reconciler.run_edit = StandIn()
        reconciler.sync()
        text = exposition_of(reconciler)()
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
    assert (done.returncode, done.stderr.decode()) == (0, "")


def documented() -> Iterator[tuple[str, str]]:
    """Name and labels of each row of the tables in docs/metrics.md."""
    for line in (ROOT / "docs" / "metrics.md").read_text().splitlines():
        if match := re.match(r"\| `(kbsync_\w+)` \| (.*?) \|", line):
            yield match[1], match[2]


def test_each_metric_is_documented_with_its_labels_and_each_documented_one_is_there() -> None:
    rows = dict(documented())
    assert rows == {one.name: ", ".join(f"`{label}`" for label in one.labels) for one in DECLARED}


def test_secrets_of_the_configuration_are_in_no_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = workspace(tmp_path, STARS)
    monkeypatch.setenv("TOKEN_OF_TEST", canary := "canary-of-sixteen-and-more")
    config = made.root / "kbsync.yaml"
    config.write_text(f"{config.read_text()}server: {{token: '${{TOKEN_OF_TEST}}'}}\n")
    with made.open() as reconciler:
        assert reconciler.workspace.server_token == canary
        assert canary not in exposition_of(reconciler)().decode()
