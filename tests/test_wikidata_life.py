"""Passes over a source that people edit, on a tiny real model: relabelled, merged, emptied, held back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kbsync.facts import FactKey
from kbsync.report import Report
from tests.livedata import GOVERNORS, STATES, World
from tests.sparqlserver import Oxigraph
from tests.workspaces import TestWorkspace, workspace

SOURCE = """\
source: stars
type: sparql
endpoint: {endpoint}
query: stars.rq
ids: wikidata
relation: constellation
lag: true
max_lag: 10000d
chunks: {{subjects: all.rq, size: 5}}
incremental: {{every: 7d}}
"""
STARS = [
    "Vega",
    "Deneb",
    "Sirius",
    "Polaris",
    "Altair",
    "Rigel",
    "Mira",
    "Spica",
    "Castor",
    "Pollux",
    "Electra",
    "Maia",
]
PLACES = {"Q101": "Lyra", "Q102": "Orion", "Q103": "Paris", "Q104": "Rome"}


pytestmark = pytest.mark.usefixtures("one_cache")


@pytest.fixture(scope="module")
def server() -> Iterator[Oxigraph]:
    with Oxigraph() as running:
        yield running


@pytest.fixture
def world(server: Oxigraph) -> World:
    """Twelve stars, each in a place, edited a day after the other."""
    made = World()
    for number, star in enumerate(STARS, 1):
        made.tick(days=1)
        place = f"Q10{number % 4 + 1}"
        made.set(f"Q{number}", star, place, PLACES[place])
    made.publish(server)
    return made


@pytest.fixture
def made(tmp_path: Path, server: Oxigraph) -> TestWorkspace:
    found = workspace(tmp_path, {})
    (tmp_path / "sources" / "stars.yaml").write_text(SOURCE.format(endpoint=server.endpoint))
    (tmp_path / "sources" / "stars.rq").write_text(GOVERNORS)
    (tmp_path / "sources" / "all.rq").write_text(STATES)
    return found


def sync(made: TestWorkspace) -> Report:
    with made.open() as reconciler:
        [report] = reconciler.sync()
    return report


def whole_again(made: TestWorkspace) -> None:
    """Let the next fetch be a complete snapshot: the declaration is another one."""
    query = made.root / "sources" / "stars.rq"
    query.write_text(query.read_text() + "# again\n")


def facts(made: TestWorkspace) -> dict[str, str]:
    with made.open() as reconciler, reconciler.ledger.read() as db:
        return {key.subject: fact.object.label for key, fact in db.facts(["constellation"]).items()}


def claims(made: TestWorkspace) -> set[tuple[str, str]]:
    with made.open() as reconciler, reconciler.ledger.read() as db:
        return {(one.subject.id, one.object.id) for one in db.claims_of("stars")}


def cursor(made: TestWorkspace) -> str | None:
    with made.open() as reconciler, reconciler.ledger.read() as db:
        last = db.last_accepted("stars")
    assert last is not None
    return last.cursor


def test_a_new_label_is_no_new_fact_but_is_rendered_anew(made: TestWorkspace, world: World, server: Oxigraph) -> None:
    """The item got another name: the same fact, another prompt, one edit in place of the old one."""
    assert sync(made).counts["edits"] == 12
    world.tick(days=1)
    world.set("Q1", "Wega", "Q102", "Orion")
    world.publish(server)
    report = sync(made)
    assert report.plan is not None
    assert [(change.kind, change.key.subject) for change in report.changes] == [("relabelled", "wikidata:Q1")]
    [edit] = report.plan.edits
    assert (edit.kind, edit.request.subject, edit.request.target, edit.before) == (
        "re-rendered",
        "Wega",
        "Orion",
        "Orion",
    )
    assert report.versions == [2]
    assert sync(made).counts["edits"] == 0


def test_a_merged_item_keeps_its_fact_its_column_and_its_history(
    made: TestWorkspace, world: World, server: Oxigraph
) -> None:
    """No change, no edit, no version; the weights' column is the new id's, and its history begins with the old one."""
    sync(made)
    world.tick(days=1)
    world.merge("Q1", "Q901")
    world.publish(server)
    whole_again(made)
    report = sync(made)
    assert report.plan is not None
    assert (report.status, list(report.changes), report.plan.empty, report.versions) == ("done", [], True, [])
    with made.open() as reconciler, reconciler.ledger.read() as db:
        key = FactKey("constellation", "wikidata:Q901")
        [model] = db.models()
        assert db.applied(model.id, 1)[key].column == 0
        assert db.redirects() == {"wikidata:Q1": "wikidata:Q901"}
        assert db.ids_of("wikidata:Q901") == ("wikidata:Q901", "wikidata:Q1")
    assert sync(made).counts["edits"] == 0


def test_a_merge_of_two_items_that_disagree_waits_for_a_person(
    made: TestWorkspace, world: World, server: Oxigraph
) -> None:
    """Both statements are on the item that is left: a conflict, and the model keeps what it holds for it."""
    sync(made)
    world.tick(days=1)
    world.merge("Q1", "Q2")
    world.publish(server)
    turtle = world.turtle() + "\nwd:Q2 p:P6 wds:moved . wds:moved ps:P6 wd:Q102 ; wikibase:rank wikibase:NormalRank ."
    server.load(turtle.encode())
    whole_again(made)
    report = sync(made)
    assert report.counts["conflicts"] == 1
    assert facts(made)["wikidata:Q2"] == "Paris"
    assert report.plan is not None
    assert [gone.key.subject for gone in report.plan.retractions] == ["wikidata:Q1"], "the prompt of the old item goes"


@pytest.mark.parametrize("fault", ["no rows", "half of the rows", "all changed"])
def test_a_suspicious_answer_is_held_and_moves_nothing(
    made: TestWorkspace, world: World, server: Oxigraph, fault: str
) -> None:
    """The claims and the cursor stay where they were; when the source is itself again, the next run works."""
    made.policy("    cardinality: many")  # what is recorded and never edited: this is about the ledger
    sync(made)
    before, place = claims(made), cursor(made)
    good = world.turtle()
    world.tick(days=1)
    if fault == "no rows":
        world.states.clear()
    elif fault == "half of the rows":
        world.states = dict(list(world.states.items())[:5])
    else:
        for state, (label, *_) in list(world.states.items()):
            world.set(state, label, "Q104", "Rome")
    world.publish(server)
    whole_again(made)
    report = sync(made)
    assert report.status == "held", report.reasons
    assert (claims(made), cursor(made)) == (before, place)
    server.load(good.encode())
    report = sync(made)
    assert (report.status, claims(made)) == ("done", before)
