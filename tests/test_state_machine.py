"""The life of a workspace as a state machine: feeds that change, break and contradict each other, held runs, approvals,
edits that die, rollbacks, reverts, changed policies, in any order that hypothesis finds.

After every step the ledger is sound and complete, at most one object stands for each key and each prompt, and what the
version holds can be explained; in the end every earlier moment is asked for again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, event, settings, stateful
from hypothesis import strategies as st
from sqlalchemy import select

from kbsync.aliases import demote, history, promote
from kbsync.catalog import load_catalog
from kbsync.config import Workspace
from kbsync.errors import GateRejected, Inseparable, Moved, UsageError
from kbsync.facts import EditRequest, FactKey, Ruling
from kbsync.ledger import Ledger, schema
from kbsync.ledger.records import StagedPlan
from kbsync.policy import Policy, render
from kbsync.reconcile import Reconciler
from kbsync.report import Report
from kbsync.resolve import resolve
from kbsync.serving import verify_workspace
from kbsync.undo import release, revert_fact, revert_version, rollback
from tests.ledgers import Clock
from tests.standin import StandIn
from tests.tiny import save, tiny_llama
from tests.workspaces import CONFIG, PRESET

SOURCES = ("alpha", "beta")
SUBJECTS = ("s1", "s2", "s3", "s4")
LABELS = ("Vega", "Deneb", "Rigel")
OBJECTS = ("Lyra", "Orion", "Cygnus")
SOURCE = """\
source: {name}
type: csv
location: {name}.csv
row_id: id
ids: star
object_ids: constellation
columns: {{subject: name, object: constellation}}
relation: constellation
snapshot: {snapshot}
"""
Said = dict[str, tuple[str, str]]
"""What a feed says: subject -> (label, object); an empty object makes a row that cannot be used."""
News = list[tuple[str, str, tuple[str, str] | None]]
"""What changes at the feeds: (source, subject, what it says of it now; None: nothing)."""
NEWS = st.lists(
    st.tuples(
        st.sampled_from(SOURCES),
        st.sampled_from(SUBJECTS),
        st.none() | st.tuples(st.sampled_from(LABELS), st.sampled_from((*OBJECTS, ""))),
    ),
    max_size=4,
)
PLAIN = {"precedence": "order", "retract": "keep", "inverse": False, "confirm": "fetches: 1"}
MISHAPS = ("none", "dies", "drifts", "poisons")


@pytest.fixture(scope="module", autouse=True)
def _template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A workspace that every life begins as a copy of."""
    folder = tmp_path_factory.mktemp("machine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KBSYNC_CACHE", str(folder / "cache"))
        save(tiny_llama(), folder / "model")
        made = folder / "template"
        for name in ("sources", "policies"):
            (made / name).mkdir(parents=True)
        (made / "kbsync.yaml").write_text(CONFIG.replace("model: model", f"model: {folder / 'model'}"))
        (made / "preset.yaml").write_text(PRESET)
        Ledger.open(f"sqlite:///{made / 'data' / 'ledger.db'}").close()
        Life.template = made
        yield


class Life(stateful.RuleBasedStateMachine):
    """One workspace from its first sync on."""

    template: Path

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.root = Path(self.folder.name) / "w"
        shutil.copytree(self.template, self.root)
        self.clock, self.engine = Clock(), StandIn()
        self.said: dict[str, Said] = {name: {} for name in SOURCES}
        self.broken: set[str] = set()
        self.files: dict[str, Said] = {}
        self.claimed: dict[str, Said] = {name: {} for name in SOURCES}
        self.fetches = dict.fromkeys(SOURCES, 0)
        self.options: dict[str, Any] = {
            "precedence": "order",
            "retract": "keep",
            "inverse": False,
            "confirm": "fetches: 1",
        }
        self.snapshots = dict.fromkeys(SOURCES, "complete")
        self.resolved = True
        self.promoted: dict[str, list[int]] = {"live": [], "canary": []}
        self.remembered: list[tuple[Any, Any]] = []
        self.closed: dict[int, tuple[Any, ...]] = {}
        self.ledger = Ledger.open(f"sqlite:///{self.root / 'data' / 'ledger.db'}", clock=self.clock)
        self._declare()
        for name in SOURCES:
            self._write(name)

    def teardown(self) -> None:
        """Every moment gives the facts that were held true then."""
        with self.ledger.read() as db:
            for moment, facts in self.remembered:
                assert db.facts(as_of=moment) == facts
        self.ledger.close()
        self.folder.cleanup()

    # What happens outside kbsync -------------------------------------------------------------------------------------

    @stateful.rule(source=st.sampled_from(SOURCES), broken=st.booleans())
    def a_feed_breaks_or_is_mended(self, source: str, broken: bool) -> None:
        (self.broken.add if broken else self.broken.discard)(source)
        self._write(source)

    @stateful.rule(hours=st.integers(1, 48))
    def time_passes(self, hours: int) -> None:
        self.clock.turn(hours=hours)

    @stateful.rule(
        precedence=st.sampled_from(("order", "newest", "quorum(2)")),
        retract=st.sampled_from(("keep", "revert")),
        inverse=st.booleans(),
        confirm=st.sampled_from(("fetches: 1", "fetches: 2", "hours: 24", "fetches: 1, flip_flop: 2d")),
    )
    def the_policy_changes(self, **options: Any) -> None:
        self.options = options
        self.resolved = False
        self._declare()

    @stateful.rule(source=st.sampled_from(SOURCES), snapshot=st.sampled_from(("complete", "partial")))
    def a_source_is_declared_anew(self, source: str, snapshot: str) -> None:
        self.snapshots[source] = snapshot
        self._declare()

    # What kbsync is asked to do --------------------------------------------------------------------------------------

    @stateful.rule(news=NEWS)
    def a_pass(self, news: News) -> None:
        self._hear(news)
        (report,) = self._reconciler().sync()
        self._passed(report)

    @stateful.rule(news=NEWS, failing=st.sets(st.sampled_from(OBJECTS), max_size=1), mishap=st.sampled_from(MISHAPS))
    def a_pass_with_trouble(self, news: News, failing: set[str], mishap: str) -> None:
        with self._trouble(mishap, failing):
            self.a_pass(news)

    @stateful.rule()
    def a_replay(self) -> None:
        (report,) = self._reconciler().replay()
        self._passed(report)

    @stateful.rule(news=NEWS)
    def a_dry_run_changes_nothing(self, news: News) -> None:
        self._hear(news)
        before = self._everything()
        self._reconciler().plan()
        assert self._everything() == before

    @stateful.precondition(lambda self: self._staged())
    @stateful.rule(approve=st.booleans(), mishap=st.sampled_from(MISHAPS))
    def a_held_run_is_decided(self, approve: bool, mishap: str) -> None:
        staged = self._staged()
        reconciler = self._reconciler()
        if not approve:
            reconciler.reject(staged[0].run_id, "no")
            return
        with self._trouble(mishap):
            self._attempt("approval", lambda: self._passed(reconciler.approve(staged[0].run_id)))
        with self.ledger.read() as db:
            held = {plan.run_id for plan in db.staged_plans()}
            assert held == {run.id for run in db.runs(limit=None, status="held")}
            assert db.runs(limit=None, status="running") == []

    @stateful.precondition(lambda self: self._staged())
    @stateful.rule(which=st.integers(0, 9), approve=st.booleans())
    def a_row_of_a_held_run_is_judged(self, which: int, approve: bool) -> None:
        plan = self._staged()[0]
        rows = [*plan.plan["adds"], *plan.plan["changes"], *plan.plan["retractions"]]
        if not rows:
            return
        row = rows[which % len(rows)]
        only = [(row["subject_id"], row["relation"])]
        if approve:
            judge = self._reconciler().approve
            self._attempt("approval of a row", lambda: self._passed(judge(plan.run_id, only=only)))
        else:
            self._attempt("rejection of a row", lambda: self._reconciler().reject(plan.run_id, only=only))

    @stateful.rule(news=NEWS, moved=st.booleans())
    def a_reviewed_plan_is_applied(self, news: News, moved: bool) -> None:
        self._hear(news)
        (seen,) = self._reconciler().plan()
        if seen.document is None:
            return
        if moved:
            self._hear([("alpha", "s1", ("Vega", "Draco"))])
        (report,) = self._reconciler().sync(reviewed=[seen.document])
        event(f"reviewed plan {report.status}")
        self._passed(report)

    @stateful.precondition(lambda self: self._undecided())
    @stateful.rule(which=st.integers(0, 9))
    def a_person_rules(self, which: int) -> None:
        choices = self._undecided()
        key, object_, others = choices[which % len(choices)]
        with self.ledger.write() as db:
            db.rule(key, Ruling(object_, others - {object_}, "known"), user="test")

    @stateful.precondition(lambda self: self._newest())
    @stateful.rule(back=st.integers(0, 6))
    def a_rollback(self, back: int) -> None:
        line = self._reconciler().line()
        to = max(0, self._newest() - back)
        rollback(line, to)
        with self.ledger.read() as db:
            assert db.head(line.model) == to

    @stateful.precondition(lambda self: self._newest())
    @stateful.rule(back=st.integers(0, 4))
    def a_version_is_reverted(self, back: int) -> None:
        line, number = self._reconciler().line(), max(1, self._newest() - back)
        self._attempt("revert of a version", lambda: revert_version(line, number))

    @stateful.precondition(lambda self: self._newest())
    @stateful.rule(subject=st.sampled_from(SUBJECTS), exact=st.booleans())
    def a_fact_is_reverted(self, subject: str, exact: bool) -> None:
        line = self._reconciler().line()
        key = FactKey("constellation", f"star:{subject}")
        self._attempt("revert of a fact", lambda: revert_fact(line, key, exact=exact))

    @stateful.precondition(lambda self: self._newest())
    @stateful.rule(alias=st.sampled_from(("live", "canary")), back=st.integers(0, 4))
    def a_version_is_promoted(self, alias: str, back: int) -> None:
        number = max(0, self._newest() - back)
        promote(self._reconciler().line(), number, alias)
        if self.promoted[alias][-1:] != [number]:
            self.promoted[alias].append(number)

    @stateful.rule(alias=st.sampled_from(("live", "canary")), end=st.booleans())
    def an_alias_is_demoted(self, alias: str, end: bool) -> None:
        if self.promoted[alias]:
            demote(self._reconciler().line(), alias, end=end)
            self.promoted[alias] = [] if end else self.promoted[alias][:-1]

    @stateful.precondition(lambda self: self._newest())
    @stateful.rule()
    def everything_is_released(self) -> None:
        line = self._reconciler().line()
        self._attempt("release", lambda: release(line, everything=True))

    # What must always be so ------------------------------------------------------------------------------------------

    @stateful.invariant()
    def the_ledger_is_sound(self) -> None:
        assert self.ledger.check() == []

    @stateful.invariant()
    def one_object_stands_for_each_prompt(self) -> None:
        policy = self._policy()
        words = policy.wording()
        line = self._reconciler().line()
        with self.ledger.read() as db:
            facts, applied = db.facts(), db.applied(line.model, db.head(line.model))
        if self.resolved:
            _one_target_each([render(fact, words[fact.relation]) for fact in facts.values() if fact.relation in words])
        _one_target_each([held.request for held in applied.values()])

    @stateful.invariant()
    def no_claim_is_lost(self) -> None:
        with self.ledger.read() as db:
            for source in SOURCES:
                live = {
                    claim.subject.id.removeprefix("star:"): (claim.subject.label, claim.object.label)
                    for claim in db.claims_of(source)
                }
                assert live == self.claimed[source]

    @stateful.invariant()
    def what_is_over_never_changes(self) -> None:
        table = schema.fact
        with self.ledger.read() as db:
            rows = db._connection.execute(select(table).where(table.c.until.is_not(None)))
            closed = {row.id: tuple(row) for row in rows}
        assert {id_: closed.get(id_) for id_ in self.closed} == self.closed
        self.closed = closed

    @stateful.invariant()
    def the_files_are_as_the_ledger_says(self) -> None:
        reconciler = self._reconciler()
        assert list(verify_workspace(reconciler.workspace, self.ledger, weights=False)) == []

    @stateful.invariant()
    def what_is_promoted_stays_whatever_head_does(self) -> None:
        line = self._reconciler().line()
        with self.ledger.read() as db:
            named, heads = db.aliases(line.model), db.head_moves(line.model)[::-1]
            log = db.promotions(line.model, "live")
        wanted = {alias: numbers[-1] for alias, numbers in self.promoted.items() if numbers}
        assert named == {"live": heads[-1].number, **wanted} == line.store.aliases()
        assert history("live", log, heads)[-1].version == named["live"]

    @stateful.invariant()
    def every_moment_is_remembered(self) -> None:
        moment = self.clock.turn(seconds=1)
        with self.ledger.read() as db:
            self.remembered.append((moment, db.facts()))
        self.clock.turn(seconds=1)

    # ---------------------------------------------------------------------------------------------------------------

    def _hear(self, news: News) -> None:
        for source, subject, said in news:
            if said is None:
                self.said[source].pop(subject, None)
            else:
                self.said[source][subject] = said
        for source in SOURCES:
            self._write(source)

    def _staged(self) -> list[StagedPlan]:
        with self.ledger.read() as db:
            return db.staged_plans()

    def _undecided(self) -> list[tuple[FactKey, str, frozenset[str]]]:
        """(key, an object that a person could choose, all objects that are claimed) of each key in conflict."""
        with self.ledger.read() as db:
            found = [row.conflict for row in db.conflicts() if row.conflict.key.relation == "constellation"]
        objects = [(one.key, frozenset(claim.object.id for claim in one.claims)) for one in found]
        return [(key, object_, said) for key, said in objects for object_ in sorted(said)]

    def _newest(self) -> int:
        with self.ledger.read() as db:
            return max((version.number for row in db.models() for version in db.versions(row.id)), default=0)

    def _reconciler(self) -> Reconciler:
        workspace = Workspace.load(self.root)
        reconciler = Reconciler(workspace, load_catalog(workspace), self.ledger, "test")
        reconciler.run_edit = self.engine
        return reconciler

    def _policy(self) -> Policy:
        return load_catalog(Workspace.load(self.root)).policies["sky"]

    def _passed(self, report: Report) -> None:
        """Which fetches were accepted, and that a pass that ended well leaves nothing to do."""
        event(f"pass {report.status}")
        for what in ("conflicts", "pending", "quarantined", "retractions", "failed"):
            if report.counts.get(what):
                event(f"pass with {what}")
        with self.ledger.read() as db:
            for source in SOURCES:
                last = db.last_accepted(source)
                number = db._connection.scalar(
                    select(schema.fetch.c.number)
                    .where(schema.fetch.c.source == source)
                    .order_by(schema.fetch.c.number.desc())
                    .limit(1)
                )
                if last is None or number == self.fetches[source]:
                    continue
                self.fetches[source] = number
                self._accepted(source, self.files[last.body_sha256])
        if report.status in ("done", "rejected") or (report.status == "failed" and report.plan is not None):
            self.resolved = True
            self._facts_follow_from_claims()
        if report.status == "done" and not report.problems:
            assert self._plan().empty

    def _facts_follow_from_claims(self) -> None:
        """Deciding all again, from all claims, gives just what stands in the ledger."""
        policy = self._policy()
        relations = tuple(policy.wording())
        with self.ledger.write() as db:
            context = db.decision_context(policy)
            db.rollback()
        with self.ledger.read() as db:
            facts = db.facts(relations)
            conflicts = sorted((row.conflict.key, row.conflict.kind) for row in db.conflicts())
            waiting = sorted((row.waiting.key, row.waiting.reason) for row in db.waiting(relations))
            again = resolve(db.claims(tuple(policy.relations)), facts, policy, context)
        assert again.facts == facts
        assert [(one.key, one.kind) for one in again.conflicts] == conflicts
        assert [(one.key, one.reason) for one in again.pending] == waiting

    def _plan(self) -> Any:
        reconciler = self._reconciler()
        with self.ledger.read() as db:
            return reconciler._carrier(self._policy(), reconciler.line()).plan(db)

    def _accepted(self, source: str, rows: Said) -> None:
        """The feed's claims are its good rows, and what was said before of subjects that it does not speak about."""
        before = self.claimed[source]
        partial = self.snapshots[source] == "partial"
        kept = {subject: said for subject, said in before.items() if partial or not rows.get(subject, ("", "x"))[1]}
        self.claimed[source] = {s: said for s, said in {**kept, **rows}.items() if said[1]} | {
            subject: before[subject] for subject, said in rows.items() if not said[1] and subject in before
        }

    def _attempt(self, what: str, act: Any) -> None:
        """Do it; kbsync may refuse what cannot be meant or has moved, or what the gate does not let through."""
        try:
            act()
            event(f"{what} done")
        except (UsageError, Moved, Inseparable, GateRejected) as error:
            event(f"{what} refused: {type(error).__name__}")

    @contextmanager
    def _trouble(self, mishap: str, failing: Collection[str] = ()) -> Iterator[None]:
        """Edits go wrong meanwhile."""
        self.engine.failing, self.engine.dies = set(failing), mishap == "dies"
        self.engine.drift = 9.0 if mishap == "drifts" else 0.0
        self.engine.drifts = {OBJECTS[0]: 9.0} if mishap == "poisons" else {}
        try:
            yield
        finally:
            self.engine.failing, self.engine.dies, self.engine.drift = set(), False, 0.0
            self.engine.drifts = {}

    def _write(self, source: str) -> None:
        rows = self.said[source]
        header = "id,nom,constellation" if source in self.broken else "id,name,constellation"
        text = "\n".join([header, *(f"{subject},{label},{object_}" for subject, (label, object_) in rows.items())])
        (self.root / "sources" / f"{source}.csv").write_text(text + "\n", encoding="utf-8")
        self.files[hashlib.sha256((text + "\n").encode()).hexdigest()] = dict(rows)

    def _declare(self) -> None:
        for name in SOURCES:
            text = SOURCE.format(name=name, snapshot=self.snapshots[name])
            (self.root / "sources" / f"{name}.yaml").write_text(text, encoding="utf-8")
        inverse = "    inverse: {relation: star, prompt: 'A star of {subject} is'}\n" if self.options["inverse"] else ""
        (self.root / "policies" / "sky.yaml").write_text(
            "policy: sky\nsources: [alpha, beta]\nschedule: {every: 1h}\n"
            f"precedence: {self.options['precedence']}\nconfirm: {{{self.options['confirm']}}}\n"
            "guard: {max_edits: 3}\ngate: {efficacy: 0.0, paraphrase: 0.0, specificity_drop: 100%, drift: 1}\n"
            "relations:\n  constellation:\n    prompt: 'Where is {subject}'\n"
            f"    retract: {self.options['retract']}\n{inverse}",
            encoding="utf-8",
        )

    def _everything(self) -> dict[str, list[tuple[Any, ...]]]:
        with self.ledger.read() as db:
            return {
                name: [tuple(row) for row in db._connection.execute(select(table))]
                for name, table in schema.metadata.tables.items()
                if name not in ("source_state", "source_answer")
            }


def _one_target_each(requests: list[EditRequest]) -> None:
    targets: dict[str, set[str]] = {}
    for request in requests:
        targets.setdefault(request.prompt, set()).add(request.target)
    assert [prompt for prompt, said in targets.items() if len(said) > 1] == []


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=int(os.environ.get("LIVES", "12")),
    stateful_step_count=int(os.environ.get("STEPS", "20")),
    deadline=timedelta(seconds=60),
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    print_blob=True,
)
