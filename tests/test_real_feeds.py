"""Real files, read by declared columns and followed over time; each count beside one that plain dicts come to.

The files are in the optional development data; the sources and the policy that read them are tests/data/congress.
"""

from __future__ import annotations

import csv
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kbsync.catalog import Catalog, load_catalog
from kbsync.config import Workspace
from kbsync.connectors import make_connector
from kbsync.facts import Change, Snapshot
from kbsync.intake import Intake, take_in
from kbsync.ledger import Ledger
from kbsync.policy import Guard, Policy, Relation, Schedule, Source, render
from tests.conftest import shared_data
from tests.ledgers import Clock, opened

CONGRESS = Path(__file__).parent / "data" / "congress"
PAGE = Path(__file__).parents[1] / "docs" / "congress.md"
DATES = ("2022-10-26", "2023-01-27", "2024-09-26", "2025-01-30", "2026-06-11")

Holders = dict[str, tuple[str, str]]
"""Seat -> id and name of who holds it."""


def table(name: str, delimiter: str = ",") -> list[dict[str, str]]:
    """The rows of a file of the development data, as the csv module has them."""
    with shared_data(name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def read(folder: Path, **keys: Any) -> Snapshot:
    """What a declared source says; its relation is `real`."""
    source = Source.model_validate({"source": "real", "relation": "real", "type": "csv", **keys})
    return make_connector(source, folder=folder).fetch(None)


def members(date: str) -> Holders:
    """Who held each seat at a date, by plain dicts."""
    return {
        (
            f"us-seats:sen {row['state']} {row['senate_class']}"
            if row["type"] == "sen"
            else f"us-seats:rep {row['state']} {row['district']}"
        ): (f"bioguide:{row['bioguide_id']}", row["full_name"] or f"{row['first_name']} {row['last_name']}")
        for row in table(f"elections/legislators-current-{date}.csv")
    }


def difference(before: Holders, after: Holders) -> Counter[str]:
    """What became of the seats."""
    both = before.keys() & after.keys()
    return Counter(
        added=len(after.keys() - before.keys()),
        removed=len(before.keys() - after.keys()),
        changed=sum(before[seat][0] != after[seat][0] for seat in both),
        relabelled=sum(before[seat][0] == after[seat][0] and before[seat] != after[seat] for seat in both),
    )


def documented() -> list[dict[str, int]]:
    """The table of docs/congress.md."""
    rows = re.findall(r"^\| \d{4}-.+$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    kinds = ("changed", "added", "removed", "relabelled")
    return [dict(zip(kinds, map(int, row.split("|")[3:7]), strict=True)) for row in rows]


def test_the_page_has_the_files_that_are_tested() -> None:
    """docs/congress.md shows the sources and the policy of tests/data/congress as they are."""
    blocks = re.findall(r"```yaml\n# (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert [name for name, _ in blocks] == [
        "sources/senators.yaml",
        "sources/representatives.yaml",
        "policies/congress.yaml",
    ]
    for name, text in blocks:
        assert (CONGRESS / name).read_text(encoding="utf-8") == text


@pytest.fixture
def congress(tmp_path: Path) -> Catalog:
    """A workspace that follows the Congress; its feed is put there date by date."""
    shutil.copytree(CONGRESS, tmp_path, dirs_exist_ok=True)
    (tmp_path / "kbsync.yaml").write_text("model: smollm2-135m\n", encoding="utf-8")
    return load_catalog(Workspace.load(tmp_path))


def publish(catalog: Catalog, date: str) -> None:
    """Put the feed of a date where the sources read it."""
    name = f"elections/legislators-current-{date}.csv"
    shutil.copyfile(shared_data(name), catalog.workspace.sources / "legislators-current.csv")


def sync(ledger: Ledger, policy: Policy, snapshots: list[Snapshot]) -> Intake:
    """One pass that nothing holds up."""
    with ledger.write() as db:
        run = db.start_run(policy.policy, model=None, trigger="sync", user="me")
        taken = take_in(db, policy, run, snapshots)
        db.finish_run(run, "done")
    return taken


def fetched(catalog: Catalog) -> list[Snapshot]:
    """What every source of the policy says now."""
    return [catalog.connector(name).fetch(None) for name in catalog.policy("congress").sources]


@pytest.mark.parametrize("date", DATES)
def test_every_member_is_read(congress: Catalog, date: str) -> None:
    """Each seat with its holder, none in quarantine, though some members have no full name."""
    publish(congress, date)
    snapshots = fetched(congress)
    claims = [claim for snapshot in snapshots for claim in snapshot.claims]
    assert {claim.subject.id: (claim.object.id, claim.object.label) for claim in claims} == members(date)
    assert len(claims) == len(table(f"elections/legislators-current-{date}.csv"))
    assert [row for snapshot in snapshots for row in snapshot.quarantined] == []


def test_five_congresses_come_out_as_holders_replaced(congress: Catalog, tmp_path: Path) -> None:
    """One ledger, five dates: seats added and vacated, holders replaced, and names only spelt otherwise apart."""
    clock, policy = Clock(), congress.policy("congress")
    seen: list[Counter[str]] = []
    replaced: dict[str, dict[str, Change]] = {}
    with opened(tmp_path, clock) as ledger:
        for date in DATES:
            clock.now = datetime.fromisoformat(date).replace(tzinfo=UTC)
            publish(congress, date)
            taken = sync(ledger, policy, fetched(congress))
            assert taken.reasons == []
            seen.append(Counter(change.kind for change in taken.changes))
            replaced[date] = {change.key.subject: change for change in taken.changes if change.kind == "changed"}
        with ledger.read() as db:
            facts = db.facts(("holder",))
    expected = [difference(members(one), members(two)) for one, two in pairwise(DATES)]
    assert expected == [Counter(kinds) for kinds in documented()]
    assert seen[0] == {"added": len(members(DATES[0]))}
    assert seen[1:] == expected
    assert {key.subject: (fact.object.id, fact.object.label) for key, fact in facts.items()} == members(DATES[-1])
    for date, seat, old, new in (
        ("2023-01-27", "us-seats:sen PA 3", "Patrick J. Toomey", "John Fetterman"),
        ("2025-01-30", "us-seats:sen OH 1", "Sherrod Brown", "Bernie Moreno"),
        ("2025-01-30", "us-seats:rep AK 0", "Mary Sattler Peltola", "Nicholas J. Begich III"),
    ):
        change = replaced[date][seat]
        assert change.before is not None
        assert change.after is not None
        assert (change.before.object.label, change.after.object.label) == (old, new)
        assert change.at == datetime.fromisoformat(date).replace(tzinfo=UTC)


def test_a_seat_is_asked_for_by_its_state(congress: Catalog, tmp_path: Path) -> None:
    """Fifty seats are called "Senator class 1" or "Representative for district 1": their states tell them apart."""
    publish(congress, DATES[-1])
    policy = congress.policy("congress")
    with opened(tmp_path) as ledger:
        taken = sync(ledger, policy, fetched(congress))
        with ledger.read() as db:
            facts = db.facts(("holder",))
    prompts = Counter(render(fact, policy.relations["holder"]).prompt for fact in facts.values())
    assert taken.counts["conflicts"] == 0
    assert set(prompts.values()) == {1}
    assert "The name of the Senator class 1 of Ohio is" in prompts
    assert "The name of the Representative at large of Alaska is" in prompts


def test_an_election_is_held_by_the_default_guard(congress: Catalog, tmp_path: Path) -> None:
    """Nov 2022 replaced a quarter of the seats: without a wider guard a person is asked."""
    policy = congress.policy("congress").model_copy(update={"guard": Guard()})
    with opened(tmp_path) as ledger:
        for date in DATES[:2]:
            publish(congress, date)
            reasons = sync(ledger, policy, fetched(congress)).reasons
    assert reasons
    assert all("representatives" in reason or "senators" in reason for reason in reasons)


def governors(date: str) -> Holders:
    """Who governed each state at a date, by plain dicts."""
    rows = table(f"elections/executive-{date}.csv")
    return {
        f"us-states:{row['state']}": (row["openstates_id"], row["holder"])
        for row in rows
        if row["office"] == "governor"
    }


def test_governors_are_followed(tmp_path: Path) -> None:
    """Two files of state executives: who is new, and that a later file which names fewer states withdraws nothing when
    it is declared partial."""
    columns = {
        "subject": "Governor of {state}",
        "object": "holder",
        "object_id": {"column": "openstates_id", "match": "^ocd-person/(.+)$"},
        "start": "start_date",
        "end": "end_date",
    }
    policy = Policy(
        policy="governors",
        sources=("real",),
        schedule=Schedule(every=3600),
        relations={"real": Relation(prompt="The {subject} is")},
        guard=Guard(max_changed=0.5),
    )
    dates = ("2022-10-27", "2026-08-05")
    clock = Clock()
    kinds = []
    with opened(tmp_path, clock) as ledger:
        for date in dates:
            clock.now = datetime.fromisoformat(date).replace(tzinfo=UTC)
            file = shared_data(f"elections/executive-{date}.csv")
            snapshot = read(
                file.parent,
                location=file.name,
                where={"office": "governor"},
                row_id="state",
                ids="us-states",
                columns=columns,
                snapshot="partial",
            )
            assert {claim.subject.id for claim in snapshot.claims} == governors(date).keys()
            assert snapshot.quarantined == ()
            taken = sync(ledger, policy, [snapshot])
            assert [reason for reason in taken.reasons if "removed" in reason] == []
            kinds.append(Counter(change.kind for change in taken.changes))
        with ledger.read() as db:
            facts = {key.subject: fact.object.label for key, fact in db.facts(("real",)).items()}
    before, after = (governors(date) for date in dates)
    found = difference(before, after)
    assert kinds[1]["changed"] == found["changed"]
    assert kinds[1]["relabelled"] == found["relabelled"]
    assert kinds[1]["added"] == found["added"]
    assert facts == {state: name for state, (_, name) in {**before, **after}.items()}


def test_the_921_stars_are_read() -> None:
    """All rows; the one whose subject is its own constellation waits."""
    file = shared_data("stars/star_constellation.csv")
    rows = table("stars/star_constellation.csv")
    snapshot = read(file.parent, location=file.name, columns={"subject": "subject", "object": "object"})
    assert snapshot.rows == len(rows) == 921
    odd = [row["subject"] for row in rows if row["subject"] == row["object"]]
    assert [row.subject_id for row in snapshot.quarantined] == [f"real:{name}" for name in odd]
    assert [row.reason for row in snapshot.quarantined] == [f"the object is the subject itself: {name}" for name in odd]
    assert {c.subject.label: c.object.label for c in snapshot.claims} == {
        row["subject"]: row["object"] for row in rows if row["subject"] not in odd
    }


def test_named_stars_get_their_constellation_by_its_abbreviation() -> None:
    """The IAU's catalog has `Lyr` where a prompt needs `Lyra`: the table of 88 is a file beside it."""
    file = shared_data("stars/IAU-CSN.tsv")
    rows = table("stars/IAU-CSN.tsv", "\t")
    names = {row["abbreviation"]: row["name"] for row in table("stars/constellations.csv")}
    columns = {
        "subject": "Name/Diacritics",
        "object": {"column": "Con", "lookup": "constellations.csv"},
        "aliases": "Name/ASCII",
    }
    snapshot = read(file.parent, location=file.name, columns=columns)
    found = {claim.subject.label: claim.object.label for claim in snapshot.claims}
    assert found == {row["Name/Diacritics"]: names[row["Con"]] for row in rows}
    assert snapshot.rows == len(rows) == 451
    assert snapshot.quarantined == ()
    other = {row["Name/Diacritics"]: row["Name/ASCII"] for row in rows if row["Name/Diacritics"] != row["Name/ASCII"]}
    assert snapshot.aliases == {f"real:{name}": (alias,) for name, alias in other.items()}


def test_a_missing_abbreviation_is_told_with_the_nearest() -> None:
    """Every star of the constellation that a table leaves out, and no other."""
    file = shared_data("stars/IAU-CSN.tsv")
    names = {row["abbreviation"]: row["name"] for row in table("stars/constellations.csv")}
    lacking = {abbreviation: name for abbreviation, name in names.items() if abbreviation != "UMa"}
    columns = {"subject": "Name/ASCII", "object": {"column": "Con", "lookup": lacking}}
    snapshot = read(file.parent, location=file.name, columns=columns)
    stars = [row["Name/ASCII"] for row in table("stars/IAU-CSN.tsv", "\t") if row["Con"] == "UMa"]
    assert [row.subject_id for row in snapshot.quarantined] == [f"real:{star}" for star in stars]
    assert {row.reason for row in snapshot.quarantined} == {"Con: 'UMa' is not in its lookup table; near: UMi"}


RACE = re.compile(r"([A-Z]{2})-?(\d*)")


@pytest.mark.parametrize(
    ("file", "columns", "names"),
    [
        (
            "election_results_2022.csv",
            {"object": "{First Name} {Last Name} {Suffix}"},
            ("First Name", "Last Name", "Suffix"),
        ),
        ("election_results_2024.csv", {"object": "Name"}, ("Name",)),
    ],
)
def test_the_winners_of_two_elections_are_read(file: str, columns: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """`AL5` and `AZ-1` are districts, `AK` is a seat of the Senate; a vacant seat's row waits by the seat's id."""
    rows = table(f"elections/{file}")
    columns = {
        "subject": {"column": "Race", "match": r"^([A-Z]{2})-?(\d*)$", "take": "{1} district {2}"},
        **columns,
    }
    folder = shared_data("elections")
    snapshot = read(folder, location=file, row_id="Race", columns=columns)
    expected = {}
    for row in rows:
        race = RACE.fullmatch(row["Race"])
        assert race is not None
        seat = f"{race[1]} district {race[2]}".strip()
        expected[seat] = " ".join(" ".join(row[name] for name in names).split())
    vacant = [row["Race"] for row in rows if not any(row[name].strip() for name in names)]
    assert snapshot.rows == len(rows)
    assert [row.subject_id for row in snapshot.quarantined] == [f"real:{race}" for race in vacant]
    assert {row.reason for row in snapshot.quarantined} <= {"the label of the object is empty"}
    assert {claim.subject.label: claim.object.label for claim in snapshot.claims} == {
        seat: name for seat, name in expected.items() if name
    }
