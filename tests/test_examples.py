"""The shipped sources and policies: they load, what they say is true, and their queries run on a real SPARQL server."""

from __future__ import annotations

import csv
import gzip
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

import httpx
import pytest

from kbsync.catalog import Catalog, load_catalog
from kbsync.config import Workspace, examples
from kbsync.connectors import make_connector
from kbsync.documents import validate
from kbsync.facts import Claim, Fact, Snapshot
from kbsync.policy import Source, render
from kbsync.resolve import resolve
from tests.conftest import shared_data

ROOT = Path(__file__).parents[1]
LEADERS = ROOT / "tests" / "data" / "leaders.ttl"
SENATE_CLASS_OF_2024 = "1"

Ask = Callable[[str, bytes], Snapshot]


@pytest.fixture
def shipped(tmp_path: Path) -> Catalog:
    """Every shipped source and policy in one workspace."""
    (tmp_path / "kbsync.yaml").write_text("model: smollm2-135m\n", encoding="utf-8")
    for folder in ("sources", "policies"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return load_catalog(Workspace.load(tmp_path))


@pytest.fixture(scope="module")
def oxigraph() -> Iterator[str]:
    """The address of a real SPARQL server with an empty store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [Path(sys.executable).with_name("oxigraph"), "serve", "--bind", f"127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/store?default")
                break
            except httpx.ConnectError:
                if time.monotonic() > deadline or server.poll() is not None:
                    raise
                time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture
def ask(oxigraph: str) -> Ask:
    """What a shipped SPARQL source says when the endpoint holds exactly these triples (Turtle)."""

    def ask_of(name: str, triples: bytes) -> Snapshot:
        headers = {"Content-Type": "text/turtle"}
        httpx.put(f"{oxigraph}/store?default", content=triples, headers=headers, timeout=60).raise_for_status()
        source = validate(ROOT / "sources" / f"{name}.yaml", Source)
        source = source.model_copy(update={"endpoint": f"{oxigraph}/query"})
        return make_connector(source, folder=ROOT / "sources").fetch(None)

    return ask_of


def said(claims: Sequence[Claim]) -> dict[str, str]:
    return {claim.subject.label: claim.object.label for claim in claims}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def accepted(catalog: Catalog, name: str, claims: list[Claim]) -> dict[str, Fact]:
    """The facts of one policy, by relation and subject; there are no conflicts."""
    resolution = resolve(claims, {}, catalog.policy(name))
    assert resolution.conflicts == ()
    return {f"{fact.relation} {fact.subject.label}": fact for fact in resolution.facts.values()}


def test_all_shipped_sources_and_policies_fit_together(shipped: Catalog) -> None:
    """Only the contact, which is the user's own, is left to be put in."""
    assert set(shipped.sources) == {"star-catalog", "us-governors", "heads-of-government", "election-results"}
    assert set(shipped.policies) == {"astronomy", "us-elections", "world-leaders"}
    assert all("contact of your own" in warning for warning in shipped.check())
    assert len(shipped.check()) == 2


def test_a_new_workspace_needs_no_network_and_has_nothing_to_warn_of(tmp_path: Path) -> None:
    """Its examples are files of its own."""
    Workspace.init(tmp_path)
    catalog = load_catalog(Workspace.load(tmp_path))
    assert catalog.check() == []
    for name, source in catalog.sources.items():
        assert (tmp_path / "sources" / source.options["location"]).is_file()
        snapshot = catalog.connector(name).fetch(None)
        assert snapshot.complete
        assert snapshot.quarantined == ()


def test_examples_are_found_in_a_checkout_and_in_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The top-level folders here, kbsync/examples in a wheel."""
    assert (examples() / "sources" / "star-catalog.yaml").is_file()
    (tmp_path / "kbsync" / "examples").mkdir(parents=True)
    monkeypatch.setattr(resources, "files", lambda _: tmp_path / "kbsync")
    assert examples() == tmp_path / "kbsync" / "examples"


def test_stars_become_facts_of_the_right_constellation(shipped: Catalog) -> None:
    """At least sixty, each star once."""
    claims = list(shipped.connector("star-catalog").fetch(None).claims)
    facts = accepted(shipped, "astronomy", claims)
    assert len(facts) == len(claims) >= 60
    betelgeuse = facts["constellation Betelgeuse"]
    assert betelgeuse.key.subject == "hip:27989"
    request = render(betelgeuse, shipped.policy_of("constellation").wording()["constellation"])
    assert f"{request.prompt} {request.target}" == "Betelgeuse belongs to the constellation of Orion"


def test_stars_are_as_the_iau_catalog_has_them() -> None:
    """Hipparcos number, name and constellation of every row (IAU Catalog of Star Names)."""
    with shared_data("stars/IAU-CSN.tsv").open(encoding="utf-8", newline="") as file:
        catalog = {row["HIP"]: (row["Name/ASCII"], row["Con"]) for row in csv.DictReader(file, delimiter="\t")}
    names = {row["abbreviation"]: row["name"] for row in rows(shared_data("stars/constellations.csv"))}
    for row in rows(ROOT / "sources" / "star-catalog.csv"):
        name, constellation = catalog[row["hip"]]
        assert (row["name"], row["constellation"]) == (name, names[constellation])


def test_an_election_is_taught_in_both_directions(shipped: Catalog) -> None:
    """Person -> seat and seat -> person, the seat named by state, chamber and district or class."""
    claims = list(shipped.connector("election-results").fetch(None).claims)
    facts = accepted(shipped, "us-elections", claims)
    assert len(facts) == 2 * len(claims) >= 60
    wording = shipped.policy("us-elections").wording()
    texts = set()
    for fact in facts.values():
        request = render(fact, wording[fact.relation])
        texts.add(f"{request.prompt} {request.target}")
    assert "Marcy Kaptur was elected to Congress from Ohio, House district 9" in texts
    assert "The member of Congress for Ohio, House district 9 is Marcy Kaptur" in texts
    assert "The member of Congress for Vermont, Senate class 1 is Bernie Sanders" in texts
    assert "Sarah McBride was elected to Congress from Delaware, House at large" in texts


def test_the_elected_are_as_congress_has_them() -> None:
    """Identity, state, chamber and seat of every row, three months after the election."""
    congress = {row["bioguide_id"]: row for row in rows(shared_data("elections/legislators-current-2025-01-30.csv"))}
    states = {}
    for row in rows(ROOT / "sources" / "election-results.csv"):
        member = congress[row["bioguide"]]
        assert row["last_name"] in member["full_name"]
        assert states.setdefault(row["state"], member["state"]) == member["state"]
        if row["chamber"] == "Senate":
            assert (member["type"], member["senate_class"]) == ("sen", SENATE_CLASS_OF_2024)
            assert row["seat"] == f"class {SENATE_CLASS_OF_2024}"
        else:
            district = "at large" if member["district"] == "0" else f"district {member['district']}"
            assert (member["type"], row["seat"]) == ("rep", district)
    assert len(set(states.values())) == len(states)


@pytest.mark.parametrize(
    ("file", "columns", "person", "seat", "nobody"),
    [
        (
            "election_results_2022.csv",
            {"subject": "{First Name} {Last Name}", "object": "{Race}"},
            "Dale Strong",
            "AL5",
            ["line 446"],
        ),
        ("election_results_2024.csv", {"subject": "Name", "object": "Race"}, "Ruben Gallego", "AZ", []),
        (
            "legislators-current-2022-10-26.csv",
            {"subject": "{first_name} {last_name}", "object": "{state} {type} {district}{senate_class}"},
            "Sherrod Brown",
            "OH sen 1",
            [],
        ),
    ],
)
def test_real_election_files_are_read_by_templates_over_their_columns(
    file: str, columns: dict[str, str], person: str, seat: str, nobody: list[str]
) -> None:
    """No file of this kind has the columns that a prompt needs. Every row is used but that of a vacant seat."""
    path = shared_data(f"elections/{file}")
    source = Source.model_validate(
        {"source": "real", "type": "csv", "relation": "elected_from", "location": file, "columns": columns}
    )
    snapshot = make_connector(source, folder=path.parent).fetch(None)
    assert said(snapshot.claims)[person] == seat
    assert [row.origin for row in snapshot.quarantined] == nobody
    assert snapshot.rows == len(rows(path))


def test_governors_are_those_in_office(ask: Ask, shipped: Catalog) -> None:
    """Ended and future terms are left out, unknown dates understood, labels taken in English or by default."""
    snapshot = ask("us-governors", LEADERS.read_bytes())
    facts = accepted(shipped, "world-leaders", [replace(claim, seen=2) for claim in snapshot.claims])
    assert {name: fact.object.label for name, fact in facts.items()} == {
        "governor California": "Carl Present",
        "governor Texas": "Tina True",
        "governor Alaska": "Alex Multilingual",
        "governor New York": "Nora Now",
    }
    assert facts["governor Texas"].origin == "wds:Q1439-true"
    assert all(fact.key.subject.startswith("wikidata:Q") for fact in facts.values())


def test_a_change_of_wikidata_counts_only_when_it_is_seen_again(ask: Ask, shipped: Catalog) -> None:
    """Anyone can edit it."""
    claims = list(ask("us-governors", LEADERS.read_bytes()).claims)
    assert accepted(shipped, "world-leaders", claims) == {}


def test_a_governor_without_a_label_still_counts_as_present(ask: Ask) -> None:
    """Florida and Ohio are quarantined by name, so nothing of them is withdrawn; Utah has no governor."""
    snapshot = ask("us-governors", LEADERS.read_bytes())
    assert {row.subject_id for row in snapshot.quarantined} == {"wikidata:Q812", "wikidata:Q1397"}
    assert snapshot.complete


def test_heads_of_government_are_those_of_states_that_exist(ask: Ask) -> None:
    """Czechoslovakia has none."""
    snapshot = ask("heads-of-government", LEADERS.read_bytes())
    assert said(snapshot.claims) == {"France": "Francine Première", "Japan": "Jun Daiichi"}
    assert snapshot.quarantined == ()


def test_the_queries_understand_real_wikidata(ask: Ask) -> None:
    """A country has one head of government in office; this sample of items lacks most people's labels."""
    triples = gzip.decompress(shared_data("wikidata/entities.nt.gz").read_bytes())
    snapshot = ask("heads-of-government", triples)
    assert {row.subject_id for row in snapshot.quarantined} >= {"wikidata:Q183", "wikidata:Q45", "wikidata:Q155"}
    assert {row.reason for row in snapshot.quarantined} == {"the label of the object is empty"}
    named = triples + b'<http://www.wikidata.org/entity/Q567> <http://www.w3.org/2000/01/rdf-schema#label> "A. M."@en .'
    assert said(ask("heads-of-government", named).claims) == {"Germany": "A. M."}


@pytest.mark.parametrize("name", ["us-governors", "heads-of-government"])
def test_queries_are_standard_sparql_without_paging(name: str) -> None:
    """They run where Wikidata's own services and prefixes do not exist."""
    query = (ROOT / "sources" / f"{name}.rq").read_text(encoding="utf-8")
    assert "SERVICE" not in query
    assert "OFFSET" not in query
    used = set(re.findall(r"\b([a-z]+):[A-Z_a-z]", re.sub(r"<[^>]*>|#.*", "", query)))
    assert used == set(re.findall(r"PREFIX (\w+):", query))


def test_every_prompt_names_its_subject_before_the_object(shipped: Catalog) -> None:
    """MEMIT edits at the subject, so it must stand in the prompt; the object follows the prompt directly."""
    for policy in shipped.policies.values():
        for wording in policy.wording().values():
            assert len(wording.paraphrases) >= 2
            for text in (wording.prompt, *wording.paraphrases):
                assert text == text.strip()
                assert text[-1].isalpha() or text.endswith("}")
