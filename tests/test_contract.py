"""The connector contract: ours keep it, a stranger's package is used from end to end, and every test of it can fail."""

from __future__ import annotations

import csv
import json
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import SkipTest
from uuid import uuid4

import pytest

from kbsync.catalog import load_catalog
from kbsync.config import Workspace
from kbsync.connectors import Connector, make_connector
from kbsync.connectors.query import VARIABLES
from kbsync.errors import SourceInvalid
from kbsync.facts import Entry, Provenance, QuarantinedRow, Snapshot
from kbsync.intake import take_in
from kbsync.observe import observe
from kbsync.policy import Source
from kbsync.testing import SECRET, ConnectorContract, Said
from tests.faultserver import SPARQL_JSON, FaultServer, answer
from tests.ledgers import opened

PAGE = Path(__file__).parents[1] / "docs" / "connectors.md"
COLUMNS = {"row_id": "id", "columns": {"subject": "subject", "object": "object"}}


class TestCsv(ConnectorContract):
    type = "csv"
    path_keys = ("location",)

    def arrange(self, folder: Path, rows: Sequence[Said]) -> Mapping[str, Any]:
        with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("id", "subject", "object"))
            writer.writerows((row.id, row.subject, row.object) for row in rows)
        return {"location": "rows.csv", **COLUMNS}

    def ruin(self, folder: Path) -> None:
        (folder / "rows.csv").write_bytes(b"\xff\xfe")

    def arrange_secret(self, folder: Path) -> Mapping[str, Any]:  # noqa: ARG002 (the contract's)
        return {"location": "https://127.0.0.1:1/rows.csv?key=${KBSYNC_CONTRACT_SECRET}", **COLUMNS}


class TestJsonLines(ConnectorContract):
    type = "jsonl"
    path_keys = ("location",)

    def arrange(self, folder: Path, rows: Sequence[Said]) -> Mapping[str, Any]:
        lines = [json.dumps({"id": row.id, "subject": row.subject, "object": row.object or None}) for row in rows]
        (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
        return {"location": "rows.jsonl", **COLUMNS}

    def ruin(self, folder: Path) -> None:
        (folder / "rows.jsonl").unlink()

    def arrange_secret(self, folder: Path) -> Mapping[str, Any]:  # noqa: ARG002 (the contract's)
        headers = {"Authorization": "Bearer ${KBSYNC_CONTRACT_SECRET}"}
        return {"location": "https://127.0.0.1:1/rows.jsonl", "headers": headers, **COLUMNS}


class TestCsvAtAnAddress(TestCsv):
    """With an ETag that changes with the rows."""

    path_keys = ()

    @pytest.fixture(autouse=True)
    def _serve(self) -> Iterator[None]:
        with FaultServer() as self.server:
            yield

    def arrange(self, folder: Path, rows: Sequence[Said]) -> Mapping[str, Any]:
        super().arrange(folder, rows)
        body = (folder / "rows.csv").read_bytes()
        (folder / "rows.csv").unlink()
        etag = f'"{hash(body)}"'

        def serve(handler: Any) -> None:
            known = handler.headers.get("If-None-Match") == etag
            answer(status=304)(handler) if known else answer(body, headers={"ETag": etag})(handler)

        return {"location": self.server.on("/rows.csv", serve), **COLUMNS}

    def ruin(self, folder: Path) -> None:  # noqa: ARG002 (the contract's)
        self.server.on("/rows.csv", answer(status=500))


class TestSql(ConnectorContract):
    type = "sql"
    path_keys = ("url",)

    def arrange(self, folder: Path, rows: Sequence[Said]) -> Mapping[str, Any]:
        (folder / "rows.db").unlink(missing_ok=True)
        with closing(sqlite3.connect(folder / "rows.db")) as connection, connection:
            connection.execute("CREATE TABLE said (id, subject, object)")
            values = [(row.id, row.subject, row.object or None) for row in rows]
            connection.executemany("INSERT INTO said VALUES (?, ?, ?)", values)
        return {"url": "sqlite:///rows.db", "query": "SELECT * FROM said", **COLUMNS}

    def ruin(self, folder: Path) -> None:
        (folder / "rows.db").unlink()

    def arrange_secret(self, folder: Path) -> Mapping[str, Any]:
        url = "postgresql+psycopg://reader:${KBSYNC_CONTRACT_SECRET}@127.0.0.1:1/crm"
        return {**self.arrange(folder, ()), "url": url}


class TestSparql(ConnectorContract):
    type = "sparql"
    path_keys = ("query",)

    @pytest.fixture(autouse=True)
    def _serve(self) -> Iterator[None]:
        with FaultServer() as self.server:
            yield

    def arrange(self, folder: Path, rows: Sequence[Said]) -> Mapping[str, Any]:
        query = "SELECT ?subject ?subjectLabel ?object ?objectLabel { ?subject ?subjectLabel ?object, ?objectLabel }"
        (folder / "rows.rq").write_text(query, encoding="utf-8")
        bindings = [{name: term for name, term in self._terms(row) if term["value"]} for row in rows]
        body = json.dumps({"head": {"vars": list(VARIABLES)}, "results": {"bindings": bindings}}).encode()
        return {"endpoint": self.server.on("/sparql", answer(body, kind=SPARQL_JSON)), "query": "rows.rq"}

    def _terms(self, row: Said) -> Iterator[tuple[str, dict[str, str]]]:
        subject = f"http://www.wikidata.org/entity/Q{row.id}" if row.id else ""
        yield "subject", {"type": "uri", "value": subject}
        for name, text in (("subjectLabel", row.subject), ("object", row.object), ("objectLabel", row.object)):
            yield name, {"type": "literal", "value": text}

    def ruin(self, folder: Path) -> None:  # noqa: ARG002 (the contract's)
        self.server.on("/sparql", answer(b"{", kind=SPARQL_JSON))


# -- a stranger's package


def blocks(language: str) -> list[str]:
    """The examples of docs/connectors.md in one language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's example, installed as pip would: a module and its metadata on the path."""
    site = tmp_path / "site"
    metadata = site / "kbsync_lines-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "kbsync_lines.py").write_text(blocks("python")[0], encoding="utf-8")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kbsync-lines\nVersion: 1.0\n")
    (group, name) = re.findall(r'entry-points\."(.+)"\]\n(.+)\n', blocks("toml")[0])[0]
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{name.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(site)
    return site


def lines_contract() -> ConnectorContract:
    """The test class that the page shows for it."""
    namespace: dict[str, Any] = {}
    exec(blocks("python")[1], namespace)  # noqa: S102 (the page's own example is what is tested)
    found = namespace["TestLines"]()
    assert isinstance(found, ConnectorContract)
    return found


def rules() -> list[str]:
    """The names of the contract's tests."""
    return [name for name in vars(ConnectorContract) if name.startswith("test_")]


@pytest.mark.parametrize("rule", [rule for rule in rules() if rule != "test_no_secret_is_shown"])  # it takes none
def test_the_example_of_the_page_keeps_the_contract(package: Path, tmp_path: Path, rule: str) -> None:
    """Every test, as a stranger would run them."""
    (tmp_path / "run").mkdir()
    getattr(lines_contract(), rule)(tmp_path / "run")


def test_a_strangers_source_is_synced(package: Path, tmp_path: Path) -> None:
    """Installed, declared in a workspace, fetched, recorded and accepted; a wrong key is named by file and line."""
    root = tmp_path / "workspace"
    for folder in ("sources", "policies"):
        (root / folder).mkdir(parents=True)
    (root / "kbsync.yaml").write_text("model: smollm2-135m\n")
    (root / "sources" / "stars.yaml").write_text(blocks("yaml")[0])
    (root / "sources" / "stars.txt").write_text("27989|Betelgeuse|Orion\n91262|Vega|Lyra\n|broken\n", encoding="utf-8")
    (root / "policies" / "stars.yaml").write_text(
        "policy: stars\nsources: [stars]\nschedule: {every: 1h}\n"
        'relations: {constellation: {prompt: "{subject} is in"}}\n'
    )
    catalog = load_catalog(Workspace.load(root))
    assert catalog.check() == []
    with opened(tmp_path) as ledger:
        snapshots, errors = observe({"stars": catalog.connector("stars")}, ledger)
        assert errors == []
        with ledger.write() as db:
            run = db.start_run("stars", model=None, trigger="sync", user="me")
            taken = take_in(db, catalog.policy("stars"), run, snapshots)
            facts = {fact.subject.id: fact.object.label for fact in db.facts(("constellation",)).values()}
    assert taken.counts["quarantined"] == 1
    assert facts == {"hip:27989": "Orion", "hip:91262": "Lyra"}
    (root / "sources" / "stars.yaml").write_text(blocks("yaml")[0] + "fiel: x\n")
    with pytest.raises(Exception, match=r"stars\.yaml:7: fiel: is not a known key"):
        load_catalog(Workspace.load(root))


def test_the_page_names_every_rule() -> None:
    """Each test of the contract is in its table, and nothing else."""
    table = re.findall(r"^\| `(test_\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert table == rules()


# -- connectors that do not keep it


class Wrapped:
    """A connector that does something else with what the real one says."""

    def __init__(self, inner: Connector, change: Callable[[Snapshot], Snapshot]) -> None:
        self._inner = inner
        self._change = change

    warnings = ()

    def fetch(self, previous: Provenance | None) -> Snapshot:
        return self._change(self._inner.fetch(previous))


class Broken(TestCsv):
    """A CSV connector whose snapshots are changed."""

    change: Callable[[Snapshot], Snapshot]

    def connector(self, folder: Path, options: Mapping[str, Any], **common: Any) -> Any:
        return Wrapped(super().connector(folder, options, **common), self.change)


def rewriting(entries: Callable[[Iterable[Entry]], Iterable[Entry]]) -> Callable[[Snapshot], Snapshot]:
    """A change of the content alone."""
    return lambda snapshot: replace(snapshot, content=list(entries(snapshot.content)))


def subject_ids(name: Callable[[int], str]) -> Callable[[Snapshot], Snapshot]:
    """Subjects get other ids."""
    return rewriting(lambda entries: [(name(n), *e[1:]) if isinstance(e, tuple) else e for n, e in enumerate(entries)])


def first_only(entries: Iterable[Entry]) -> Iterable[Entry]:
    kept: dict[object, Entry] = {}
    for entry in entries:
        kept.setdefault(entry[0] if isinstance(entry, tuple) else entry, entry)
    return kept.values()


def forgetful(entries: Iterable[Entry]) -> Iterable[Entry]:
    return [replace(e, subject_id=None) if isinstance(e, QuarantinedRow) else e for e in entries]


def without_quarantine(entries: Iterable[Entry]) -> Iterable[Entry]:
    return [entry for entry in entries if not isinstance(entry, QuarantinedRow)]


def numbers(entries: Iterable[Entry]) -> Iterable[Entry]:
    return [(*e[:3], e[3].lstrip("0"), *e[4:]) if isinstance(e, tuple) else e for e in entries]


class Leaky(TestSql):
    """Says its URL."""

    def connector(self, folder: Path, options: Mapping[str, Any], **common: Any) -> Any:
        def fetch(previous: Provenance | None) -> Snapshot:
            raise SourceInvalid("contract", "no connection", hint=f"tried with {SECRET}")

        found = Wrapped(super().connector(folder, options, **common), lambda snapshot: snapshot)
        found.fetch = fetch  # type: ignore[method-assign]
        return found


class Lenient(TestCsv):
    """Ignores what it does not know."""

    def connector(self, folder: Path, options: Mapping[str, Any], **common: Any) -> Connector:
        return super().connector(folder, {k: v for k, v in options.items() if "no_such" not in k}, **common)


class Writing(TestCsv):
    """Keeps a cache beside the source."""

    def connector(self, folder: Path, options: Mapping[str, Any], **common: Any) -> Any:
        def cached(snapshot: Snapshot) -> Snapshot:
            (folder / "cache").write_text("rows")
            return snapshot

        return Wrapped(super().connector(folder, options, **common), cached)


class Raising(TestCsv):
    """Lets a bug of its own out."""

    def ruin(self, folder: Path) -> None:  # noqa: ARG002 (the contract's)
        self.ruined = True

    def connector(self, folder: Path, options: Mapping[str, Any], **common: Any) -> Any:
        def change(snapshot: Snapshot) -> Snapshot:
            return {False: snapshot}[getattr(self, "ruined", False)]

        return Wrapped(super().connector(folder, options, **common), change)


class Roaming(TestCsv):
    """Reads whatever it is told to."""

    def connector(self, folder: Path, options: Mapping[str, Any], **common: Any) -> Connector:
        declared = {"source": "contract", "type": "csv", "relation": "says", "ids": "contract_ids", **common, **options}
        return make_connector(Source.model_validate(declared), folder=folder, allowed_dirs=[Path("/")])


class Piped(TestCsv):
    """Reads something else than it is told to."""

    def connector(self, folder: Path, options: Mapping[str, Any], **common: Any) -> Connector:
        return super().connector(folder, {**options, "location": "rows.csv"}, **common)


class Unknown(TestCsv):
    """Was never installed."""

    type = "no_such_type"


BREAKAGES: list[tuple[str, type[ConnectorContract] | Callable[[Snapshot], Snapshot]]] = [
    ("test_it_is_found_by_its_type", Unknown),
    ("test_every_row_is_a_claim", rewriting(lambda entries: list(entries)[1:])),
    ("test_every_row_is_a_claim", lambda snapshot: replace(snapshot, source="other")),
    ("test_every_row_is_a_claim", subject_ids(lambda n: f"elsewhere:{n}")),
    ("test_values_stay_text", rewriting(numbers)),
    ("test_the_same_source_says_the_same", subject_ids(lambda _: f"contract_ids:{uuid4()}")),
    ("test_ids_do_not_depend_on_order_or_label", subject_ids(lambda n: f"contract_ids:{n}")),
    ("test_ids_do_not_depend_on_order_or_label", subject_ids(lambda _: "contract_ids:one")),
    ("test_rows_can_be_read_again", lambda snapshot: replace(snapshot, content=iter(snapshot.content))),
    ("test_nothing_is_decided", rewriting(first_only)),
    ("test_a_bad_row_keeps_its_subject", rewriting(forgetful)),
    ("test_a_bad_row_keeps_its_subject", rewriting(without_quarantine)),
    ("test_a_row_of_nobody_makes_it_incomplete", rewriting(without_quarantine)),
    ("test_complete_and_partial_are_as_declared", lambda snapshot: replace(snapshot, whole=True)),
    ("test_complete_and_partial_are_as_declared", lambda snapshot: replace(snapshot, whole=False)),
    (
        "test_the_provenance_is_filled",
        lambda snapshot: replace(snapshot, provenance=replace(snapshot.provenance, body_sha256="ab" * 32)),
    ),
    (
        "test_the_provenance_is_filled",
        lambda snapshot: replace(
            snapshot,
            provenance=replace(snapshot.provenance, fetched_at=snapshot.provenance.fetched_at.replace(tzinfo=None)),
        ),
    ),
    ("test_not_modified_is_said_only_to_who_knows", lambda snapshot: replace(snapshot, not_modified=True)),
    ("test_unknown_options_are_refused", Lenient),
    ("test_nothing_is_written", Writing),
    ("test_a_source_that_cannot_be_read_is_one_of_three_errors", Raising),
    ("test_no_file_outside_the_allowed_folders_is_read", Roaming),
    ("test_a_pipe_is_not_waited_for", Piped),
    ("test_no_secret_is_shown", Leaky),
]


@pytest.mark.parametrize(("rule", "broken"), BREAKAGES, ids=[f"{n}-{rule}" for n, (rule, _) in enumerate(BREAKAGES)])
def test_a_broken_connector_fails_the_rule(
    tmp_path: Path, rule: str, broken: type[ConnectorContract] | Callable[[Snapshot], Snapshot]
) -> None:
    """Each rule says what it is and what it saw instead."""
    if isinstance(broken, type):
        contract: ConnectorContract = broken()
    else:
        contract = Broken()
        contract.change = broken
    with pytest.raises(AssertionError, match=r"^connector contract: ") as caught:
        getattr(contract, rule)(tmp_path)
    assert SECRET not in str(caught.value)


def test_every_rule_can_fail() -> None:
    """No rule without a connector that breaks it."""
    assert {rule for rule, _ in BREAKAGES} == set(rules())


@pytest.mark.parametrize(
    "rule",
    ["test_no_file_outside_the_allowed_folders_is_read", "test_a_pipe_is_not_waited_for", "test_no_secret_is_shown"],
)
def test_what_is_not_named_is_skipped_and_said(tmp_path: Path, rule: str) -> None:
    """A package that names neither paths nor a secret has not passed the tests of them."""

    class Silent(TestCsv):
        path_keys = ()
        arrange_secret = ConnectorContract.arrange_secret  # type: ignore[assignment]

    with pytest.raises(SkipTest, match="ends when"):
        getattr(Silent(), rule)(tmp_path)
