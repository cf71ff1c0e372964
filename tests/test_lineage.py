"""`kbsync blame`: the chain from the row of a source to the column in the weights is complete, and true."""

from __future__ import annotations

import csv
import gzip
import hashlib
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from kbsync.facts import FactKey
from kbsync.ledger import Ledger
from kbsync.ledger.lineage import Lineage, lineage
from kbsync.rebase import rebase
from kbsync.undo import release, revert_fact, rollback
from kbsync.versions.store import VersionStore
from tests.test_cli import Line
from tests.workspaces import TestWorkspace, run_here, workspace

LEDGERS = Path(__file__).parent / "data" / "ledgers"
SECOND = """\
source: almanac
type: csv
location: almanac.csv
row_id: id
ids: stars
columns: {subject: name, object: constellation}
relation: constellation
"""
CITIES = """\
source: cities
type: csv
location: cities.csv
row_id: id
columns: {subject: name, object: country}
relation: country
"""
POLICIES = {
    "sky": """\
policy: sky
sources: [stars, almanac]
schedule: {every: 1h}
relations:
  constellation:
    prompt: "Where is {subject}"
    paraphrases: ["The home of {subject}"]
    controls: controls.txt
    retract: keep
    inverse: {relation: star_of, prompt: "A star of {subject}"}
    protected: ["stars:polar"]
guard: {max_changed: 90%, max_removed: 90%, max_edits: 50}
gate: {efficacy: 0.0, paraphrase: 0.0, specificity_drop: 100%, drift: 1000}
""",
    "earth": """\
policy: earth
sources: [cities]
schedule: {every: 1h}
relations:
  country:
    prompt: "Home of {subject}"
    controls: controls.txt
guard: {max_changed: 90%, max_removed: 90%, max_edits: 50}
gate: {efficacy: 0.0, paraphrase: 0.0, specificity_drop: 100%, drift: 1000}
""",
}


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestWorkspace]:
    """A workspace that saw everything: two sources of one relation, two policies, an inverse relation, a relabelled and
    a withdrawn fact, a fact reverted, a rollback, a rebase and what came after it, subjects that share a column."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KBSYNC_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("kbsync.reconcile.run_edit", run_here)
        patch.setenv("COLUMNS", "100")
        root = tmp_path_factory.mktemp("rich")
        first = {"Vega": "Orion", "Betelgeuse": "Lyra", "Deneb": "Paris", "Polar": "home"}
        made = workspace(root, first)
        folder = root / "sources"
        (folder / "stars.yaml").write_text((folder / "stars.yaml").read_text() + "ids: stars\n")
        (folder / "almanac.yaml").write_text(SECOND)
        (folder / "cities.yaml").write_text(CITIES)
        (folder / "cities.csv").write_text("id,name,country\n1,Danielle,France\n2,Sirius,Italy\n3,Sirius,Italy\n")
        for name, text in POLICIES.items():
            (root / "policies" / f"{name}.yaml").write_text(text)
        almanac(made, {"altai": ("Altair", "Rome"), "vega": ("Vega", "Lyra")})
        with made.open() as it:
            it.sync()
            made.feed(first | {"Vega": "Rome", "Rigel": "French"})
            it.sync()
            line = it.line()
            rollback(line, 1, "looks wrong")
            release(line, everything=True)
            made.feed({"Vega": "Rome", "Betelgeuse": "Lyra", "Rigel": "French", "Polar": "home"})
            it.sync()
            revert_fact(it.line(), FactKey("constellation", "stars:betel"), "a mistake")
            it.sync()
            rebase(it.line(), it.judge, it.controls())
            made.feed({"Vega": "Rome", "Betelgeuse": "Lyra", "RIGEL": "French", "Polar": "home"}, {"RIGEL": "rigel"})
            it.sync()
        yield made


def almanac(made: TestWorkspace, rows: dict[str, tuple[str, str]]) -> None:
    """Write the second source's feed: id -> (name, constellation)."""
    lines = ["id,name,constellation", *(f"{id_},{name},{value}" for id_, (name, value) in rows.items())]
    (made.root / "sources" / "almanac.csv").write_text("\n".join(lines) + "\n")


def chains(made: TestWorkspace) -> list[Lineage]:
    """The chain of every live fact."""
    with made.open() as it, it.ledger.read() as db:
        model = db.models()[0].id
        return [lineage(db, key, model=model) for key in db.facts()]


def test_the_chain_is_complete_for_every_live_fact(rich: TestWorkspace) -> None:
    """Each fact has its claim, fetch, run and rule, and either a column with plan and measurement, or words why not."""
    found = chains(rich)
    assert {chain.key.relation for chain in found} == {"constellation", "star_of", "country"}
    assert {"live", "withdrawn"} == {chain.fact.fact.status for chain in found if chain.fact}
    assert sum(chain.current for chain in found) >= 6
    for chain in found:
        assert not {"fact", "claim", "fetch", "run", "rule"} & chain.gaps.keys(), chain
        assert chain.claim
        assert chain.fetch
        assert chain.run
        assert chain.rule
        missing = {name for name in ("plan", "column", "measured") if getattr(chain, name) is None}
        assert missing <= chain.gaps.keys(), chain
        assert all(chain.gaps.values())


def test_each_link_says_what_the_next_one_says(rich: TestWorkspace) -> None:
    """The claim says the fact (an inverse one the other way round), its fetch is of the same source and of the run that
    decided, and the file has the recorded hash and the row where the claim says."""
    for chain in chains(rich):
        fact, claim, fetch = chain.fact, chain.claim, chain.fetch
        assert fact
        assert claim
        assert fetch
        said = (claim.subject.id, claim.object.id)
        inverse = chain.key.relation == "star_of"
        assert said == (
            (fact.fact.object.id, fact.fact.subject.id) if inverse else (fact.fact.subject.id, fact.fact.object.id)
        )
        assert claim.source == fact.fact.source
        assert claim.first_said <= fact.since
        assert fetch.run_id <= fact.run_id == chain.run.id  # type: ignore[union-attr]
        if claim.until is None:
            data = Path(fetch.provenance.location).read_bytes()
            newest = fetch.provenance.body_sha256 == hashlib.sha256(data).hexdigest()
            rows = list(csv.reader(data.decode().splitlines()))
            row = rows[int(claim.last_origin.removeprefix("line ")) - 1]
            assert claim.subject.label in row
            assert claim.object.label in row
            assert newest or fetch.provenance.location.endswith("stars.csv")


def test_the_column_is_the_facts_own_and_active_in_the_live_version(rich: TestWorkspace) -> None:
    """Manifest, delta file and list of active deltas agree with the chain; the plan asked for the very request."""
    with rich.open() as it, it.ledger.read() as db:
        model = db.models()[0]
        store = VersionStore(it.workspace.data, model.id)
        active = {entry.delta: entry.excluded for entry in db.active(model.id, model.head)}
        held = db.applied(model.id, model.head)
        versions = {row.number: row for row in db.versions(model.id)}
        plans = {row.id: row for run in db.runs(None) for row in db.plans(run.id)}
    for chain in chains(rich):
        column = chain.column
        if column is None:
            assert chain.key not in held
            continue
        applied = held[chain.key]
        assert (applied.delta, applied.column) == (column.delta, column.column)
        assert column.column not in active[column.delta]
        assert column.request == applied.request
        manifest = store.manifest(column.version, versions[column.version].manifest_sha256)
        own = [fact for fact in manifest.facts if (fact.delta, fact.column) == (column.delta, column.column)]
        assert chain.key in {fact.edit_request.key for fact in own}
        assert hashlib.sha256(store.delta_path(column.delta).read_bytes()).hexdigest() == column.delta
        assert chain.plan
        plan = plans[chain.plan.id]
        assert plan.digest == chain.plan.digest == plan.document["digest"]
        assert chain.plan.run_id == plan.run_id == column.run_id
        assert chain.plan.kind in ("added", "changed", "re-rendered", "kept")
        assert chain.measured
        assert chain.measured.version >= column.version


def test_what_is_not_in_the_weights_says_why(rich: TestWorkspace) -> None:
    """Held, protected, never said: each in words."""
    by_key = {chain.key: chain for chain in chains(rich)}
    assert "a mistake" in by_key[FactKey("constellation", "stars:betel")].gaps["column"]
    with rich.open() as it, it.ledger.read() as db:
        unknown = lineage(db, FactKey("country", "stars:vega"), model=db.models()[0].id)
        assert unknown.gaps["fact"] == "no source has said anything of it"
        polar = lineage(db, FactKey("constellation", "stars:polar"), model=db.models()[0].id, kept_out="protected")
        assert polar.gaps["column"] == "protected"


def test_blame_prints_the_chain_and_measures_the_live_model(
    rich: TestWorkspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a tree and as JSON; `--now` gives the probability on the live weights."""
    line = Line(rich.root, capsys)
    said = line.run("blame", "Vega", "constellation")
    for part in ("Rome", "stars, line 2", "sha256", "weighed", "Lyra", "almanac", "delta", "P 0."):
        assert part in said
    assert max(map(len, said.splitlines())) <= 100
    chain = line.json("blame", "Vega", "constellation", "--now")
    assert chain["current"]
    asked = line.json("ask", "Where is Vega", "--object", "Rome")["versions"][0]
    assert chain["now"]["version"] == asked["version"] == chain["column"]["head"]
    assert chain["now"]["probability"] == pytest.approx(asked["probabilities"]["Rome"], rel=1e-6)
    assert "protects" in line.json("blame", "Polar", "constellation")["gaps"]["column"]
    assert "label of 2 subjects" in line.fails("blame", "Sirius", "country", code=2)[0]
    assert "nothing of that" in line.fails("blame", "Nobody", "country", code=2)[0]


def test_the_chain_of_a_ledger_of_an_earlier_schema_is_found_as_far_as_it_was_kept(tmp_path: Path) -> None:
    """Claims and fetches are found by what they say; rule and plan were not kept, which the chain says."""
    (tmp_path / "ledger.db").write_bytes(gzip.decompress((LEDGERS / "0001.db.gz").read_bytes()))
    with Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}") as ledger, ledger.read() as db:
        model = db.models()[0].id
        found = [lineage(db, key, model=model) for key in db.facts()]
    assert len(found) == 4
    for chain in found:
        assert chain.claim
        assert chain.fact
        assert chain.claim.object == chain.fact.fact.object
        assert chain.fetch
        assert "earlier kbsync" in chain.gaps["rule"]
        assert chain.column
        assert chain.measured
    [vega] = [chain for chain in found if chain.subject.label == "Vega"]
    assert not vega.current
    assert "rolled back from 2 to 1" in vega.gaps["column"]


_A_TIME = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d")


def times(value: object) -> Iterator[str]:
    """Every text in a JSON value that is a time."""
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from times(one)
    elif isinstance(value, str) and _A_TIME.match(value):
        yield value


def test_every_command_prints_times_in_one_form(rich: TestWorkspace, capsys: pytest.CaptureFixture[str]) -> None:
    """ISO 8601 with T and zone, in every JSON document."""
    line, seen = Line(rich.root, capsys), 0
    for command in (
        ("status",),
        ("log",),
        ("show", "1"),
        ("facts",),
        ("entity", "Vega"),
        ("history", "Vega"),
        ("changes", "--since", "2026-01-01"),
        ("blame", "Vega", "constellation"),
        ("runs",),
        ("holds",),
        ("conflicts", "list"),
        ("quarantine", "list"),
    ):
        for text in times(line.json(*command)):
            assert datetime.fromisoformat(text).isoformat() == text, command
            assert datetime.fromisoformat(text).tzinfo, command
            seen += 1
    assert seen > 100
