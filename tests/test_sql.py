"""SQL sources: real SQLite files and a real PostgreSQL, what a query may be, and what it can never do."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import struct
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from sqlalchemy import NullPool, create_engine, make_url

from kbsync.connectors import Connector, make_connector
from kbsync.connectors.sql import _scrubbed, as_text
from kbsync.errors import SourceError, SourceInvalid, SourceUnavailable
from kbsync.facts import Snapshot
from kbsync.policy import Source
from tests import postgres
from tests.feeds import pairs, reasons

TABLE = (
    "CREATE TABLE office (id INTEGER PRIMARY KEY, name TEXT, holder TEXT, since DATE)",
    "INSERT INTO office VALUES (1, 'Governor of Ohio', 'Mike DeWine', '2019-01-14'), (2, 'Mayor of X', 'Ann', NULL)",
)
QUERY = "SELECT id, name, holder, since FROM office ORDER BY id"
ENDLESS = (
    "WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n) "
    "SELECT id, 'a' AS name, 'b' AS holder, 'c' AS since FROM n LIMIT 100000"
)
NEVER = (
    "WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n) "
    "SELECT count(*) AS id, '' AS name, '' AS holder, '' AS since FROM n"
)
CANARY = "canary-3f9c"


@dataclass
class Database:
    """A database with the table above. `url`: as a source in `folder` names it."""

    url: str
    engine_url: str
    folder: Path

    def run(self, *statements: str) -> list[Any]:
        """As another program does; the rows of the last statement."""
        engine = create_engine(self.engine_url, poolclass=NullPool)
        with engine.begin() as connection:
            for statement in statements:
                found = connection.exec_driver_sql(statement)
            return list(found) if found.returns_rows else []


@pytest.fixture(params=["sqlite", "postgresql"])
def offices(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """The same table in a SQLite file and in a PostgreSQL database of the test's own."""
    if request.param == "sqlite":
        found = Database("sqlite:///offices.db", f"sqlite:///{tmp_path}/offices.db", tmp_path)
        found.run(*TABLE)
        yield found
        return
    server = request.getfixturevalue("_postgresql")
    if not isinstance(server, postgres.Server):
        pytest.skip(server)
    name = f"offices_{abs(hash(tmp_path)):x}"
    server.create(name)
    try:
        found = Database(server.url(name), server.url(name), tmp_path)
        found.run(*TABLE)
        yield found
    finally:
        server.drop(name)


def connector(folder: Path, url: str, query: str = QUERY, **keys: Any) -> Connector:
    declared = {
        "source": "offices",
        "type": "sql",
        "relation": "holder",
        "url": url,
        "query": query,
        "row_id": "id",
        "columns": {"subject": "name", "object": "holder", "start": "since"},
        **keys,
    }
    return make_connector(Source.model_validate(declared), folder=folder)


def ask(database: Database, query: str = QUERY, **keys: Any) -> Snapshot:
    return connector(database.folder, database.url, query, **keys).fetch(None)


def test_an_answer_becomes_claims(offices: Database) -> None:
    """NULL is not given, a date is ISO 8601, the row's number is the origin; the URL is kept without its secrets."""
    snapshot = ask(offices)
    assert [(claim.subject.id, claim.object.label, claim.start, claim.origin) for claim in snapshot.claims] == [
        ("offices:1", "Mike DeWine", "2019-01-14", "row 1"),
        ("offices:2", "Ann", None, "row 2"),
    ]
    assert snapshot.complete
    assert snapshot.claims == snapshot.claims
    assert len(snapshot.provenance.body_sha256) == 64
    assert "?" not in snapshot.provenance.location


def test_the_same_answer_has_the_same_hash(offices: Database) -> None:
    """And another one another."""
    first, second = ask(offices), ask(offices)
    assert first.provenance.body_sha256 == second.provenance.body_sha256
    offices.run("UPDATE office SET holder = 'Bea' WHERE id = 2")
    assert ask(offices).provenance.body_sha256 != first.provenance.body_sha256
    assert pairs(first)["Mayor of X"] == "Ann"


def test_a_query_may_be_a_file_and_its_columns_may_be_worked_on(offices: Database) -> None:
    """Comments and a semicolon at the end are fine, `%` and `:name` are what they are."""
    text = (
        "-- offices\n/* all */ WITH o AS (SELECT * FROM office) SELECT id, name, holder FROM o\n"
        "WHERE name LIKE 'M%' OR name = ':x';\n"
    )
    (offices.folder / "offices.sql").write_text(text)
    columns = {"subject": {"column": "name", "then": "upper"}, "object": "{holder} ({id})"}
    assert pairs(ask(offices, "offices.sql", columns=columns)) == {"MAYOR OF X": "Ann (2)"}


def test_a_column_that_the_answer_lacks_is_named(offices: Database) -> None:
    """As in a feed whose header has changed; so is one that is there twice."""
    with pytest.raises(SourceInvalid, match=r"the answer has no column 'holder' \(columns.object\), near: 'holders'"):
        ask(offices, "SELECT id, name, since, holder AS holders FROM office")
    with pytest.raises(SourceInvalid, match="repeats the column 'id'"):
        ask(offices, "SELECT id, id, name, since, holder FROM office")


@pytest.mark.parametrize(
    "query",
    [
        "WITH x AS (SELECT 1) UPDATE office SET holder = 'nobody' RETURNING id, name, holder, since",
        "WITH x AS (SELECT 1) DELETE FROM office RETURNING id, name, holder, since",
        "WITH x(id, name, holder, since) AS (SELECT 9, 'a', 'b', NULL) INSERT INTO office SELECT * FROM x",
    ],
)
def test_no_query_can_write(offices: Database, query: str) -> None:
    """What begins like a question and is none is refused by the database, and nothing is changed."""
    before = offices.run("SELECT * FROM office")
    with pytest.raises(SourceError):
        ask(offices, query)
    assert offices.run("SELECT * FROM office") == before


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM office",
        "SELECT 1; DELETE FROM office",
        "SELECT 1 /* ; */; DROP TABLE office",
        "ATTACH '/etc/passwd' AS x",
        "PRAGMA query_only = OFF",
        "selection",
        "no-such-file.sql",
        "../outside.sql",
        "",
    ],
)
def test_one_select_statement_is_all_that_is_sent(tmp_path: Path, query: str) -> None:
    """Anything else is refused when it is declared."""
    (tmp_path / "sources").mkdir()
    (tmp_path / "outside.sql").write_text(QUERY)
    with pytest.raises(ValidationError) as caught:
        connector(tmp_path / "sources", "sqlite:///x.db", query)
    assert caught.value.errors()[0]["loc"] == ("query",)


def test_a_query_that_takes_too_long_ends(offices: Database) -> None:
    """By the database's own timeout, so that it does not go on there."""
    with pytest.raises(SourceUnavailable, match=r"no whole answer|statement timeout") as caught:
        ask(offices, NEVER, deadline=0.3)
    assert "offices.yaml" in caught.value.hint


def test_an_answer_has_at_most_so_many_rows_and_bytes(offices: Database) -> None:
    """An endless answer stops at the cap."""
    with pytest.raises(SourceInvalid, match="more than 5,000 rows"):
        ask(offices, ENDLESS, max_rows=5_000)
    with pytest.raises(SourceInvalid, match=r"larger than 50\.0KB"):
        ask(offices, ENDLESS, max_bytes=50_000)


def test_an_error_of_the_database_is_one_line(offices: Database) -> None:
    """What it said, without the statement."""
    with pytest.raises(SourceInvalid, match="no_such_table") as caught:
        ask(offices, "SELECT 1 AS secret_column FROM no_such_table")
    assert "secret_column" not in caught.value.message
    assert "\n" not in caught.value.message


def test_bytes_are_no_text(offices: Database) -> None:
    """Such a row waits; its subject is known, and what is not asked for may be anything."""
    blob = "X'00ff'" if offices.url.startswith("sqlite") else r"'\x00ff'::bytea"
    query = "SELECT id, name, CASE WHEN id = 1 THEN @ END AS holder, since, @ AS photo FROM office WHERE id = 1"
    snapshot = ask(offices, query.replace("@", blob))
    assert reasons(snapshot) == [("row 1", "holder is bytes, which is no text", "offices:1")]


def test_postgresql_values_keep_every_digit(offices: Database) -> None:
    """Numbers with their scale, times with their zone, UUIDs, truth; SQLite has only three of them."""
    if offices.url.startswith("sqlite"):
        query = "SELECT 1 AS id, 12345678901234567 AS name, 0.1 AS holder, '007' AS since"
        assert pairs(ask(offices, query, columns={"subject": "name", "object": "holder"})) == {
            "12345678901234567": "0.1"
        }
        return
    query = (
        "SELECT TRUE AS id, 0.00000000::numeric(20,8) AS name, 12345678901234567890.10 AS holder,"
        " '2024-11-05 12:00:00+00'::timestamptz AS since, 'c0ffee00-0000-4000-8000-000000000000'::uuid AS object_id"
    )
    (claim,) = ask(
        offices, query, columns={"subject": "name", "object": "holder", "start": "since", "object_id": "object_id"}
    ).claims
    assert (claim.subject.id, claim.subject.label, claim.object.label) == (
        "offices:true",
        "0.00000000",
        "12345678901234567890.10",
    )
    assert claim.object.id == "offices:c0ffee00-0000-4000-8000-000000000000"
    assert datetime.fromisoformat(claim.start or "") == datetime(2024, 11, 5, 12, tzinfo=UTC)


@given(
    st.decimals(allow_nan=False, allow_infinity=False)
    | st.integers()
    | st.floats(allow_nan=False)
    | st.dates()
    | st.datetimes()
    | st.uuids()
    | st.text()
)
def test_a_value_is_the_text_that_is_exactly_it(value: Any) -> None:
    """Read back as its type, it is the value again."""
    back = {date: date.fromisoformat, datetime: datetime.fromisoformat}.get(type(value), type(value))
    text = as_text(value)
    assert text is not None
    assert back(text) == value
    if isinstance(value, Decimal):
        assert "E" not in text


def test_what_has_no_text_has_none() -> None:
    assert [as_text(value) for value in (None, b"x", memoryview(b"x"), [1], {"a": 1})] == [None] * 5
    assert as_text(UUID(int=1)) == "00000000-0000-0000-0000-000000000001"


# -- SQLite files


@pytest.mark.parametrize("url", ["sqlite:////etc/passwd", "sqlite:///../outside.db", "sqlite:///link.db"])
def test_a_sqlite_file_outside_the_allowed_folders_is_refused(tmp_path: Path, url: str) -> None:
    """By name, by `..` and by a link."""
    folder = tmp_path / "sources"
    folder.mkdir()
    outside = Database("", f"sqlite:///{tmp_path}/outside.db", tmp_path)
    outside.run(*TABLE)
    (folder / "link.db").symlink_to(tmp_path / "outside.db")
    with pytest.raises(SourceInvalid, match="outside the folders"):
        connector(folder, url).fetch(None)


@pytest.mark.parametrize("query", ["SELECT load_extension('x') AS id", "SELECT name AS id FROM pragma_database_list"])
def test_a_query_cannot_leave_its_sqlite_file(tmp_path: Path, query: str) -> None:
    """No extension is loaded, no other file attached, no setting read."""
    Database("", f"sqlite:///{tmp_path}/o.db", tmp_path).run(*TABLE)
    with pytest.raises(SourceInvalid, match=r"not authorized|not allowed|prohibited"):
        connector(tmp_path, "sqlite:///o.db", query).fetch(None)


def test_a_sqlite_file_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    """It may come later; a file that is no database is wrong."""
    with pytest.raises(SourceUnavailable, match="unable to open"):
        connector(tmp_path, "sqlite:///o.db").fetch(None)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "o.db").write_bytes(b"hip,name\n" * 1000)
    with pytest.raises(SourceInvalid, match="not a database"):
        connector(tmp_path, "sqlite:///o.db").fetch(None)


def test_reading_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """To the byte, and without journal files beside it."""
    Database("", f"sqlite:///{tmp_path}/o.db", tmp_path).run(*TABLE)
    before = (tmp_path / "o.db").read_bytes()
    assert connector(tmp_path, "sqlite:///o.db").fetch(None).rows == 2
    assert (tmp_path / "o.db").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["o.db"]


def test_a_locked_file_may_be_read_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program has it."""
    Database("", f"sqlite:///{tmp_path}/o.db", tmp_path).run(*TABLE)
    monkeypatch.setattr("kbsync.connectors.sql.BUSY_SECONDS", 0.05)
    with contextlib.closing(sqlite3.connect(tmp_path / "o.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(SourceUnavailable, match="locked"):
            connector(tmp_path, "sqlite:///o.db").fetch(None)


# -- secrets


def everything_said(found: Connector) -> str:
    """All that a connector shows of itself: warnings, its error, the hint, what it is printed as."""
    with pytest.raises(SourceError) as caught:
        found.fetch(None)
    error = caught.value
    chain = [error, error.__cause__, None if error.__suppress_context__ else error.__context__]
    return "\n".join([*found.warnings, error.message, error.hint, repr(error), repr(vars(found)), *map(repr, chain)])


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://reader:${DB_PASSWORD}@127.0.0.1:1/crm",
        "postgresql+psycopg://reader:x@127.0.0.1:1/crm?sslpassword=${DB_PASSWORD}",
        "no-such-driver://reader:${DB_PASSWORD}@127.0.0.1/crm",
        "postgresql+psycopg://reader:x@127.0.0.1:${DB_PASSWORD}/crm",
        "postgresql+psycopg://reader:x@127.0.0.1:1/crm?no_such_option=${DB_PASSWORD}",
        "postgresql+psycopg://reader:x@127.0.0.1:1/crm?connect_timeout=${DB_PASSWORD}",
        "sqlite:///${DB_PASSWORD}/../..",
        "postgresql+psycopg://reader:x@${DB_PASSWORD}@127.0.0.1:1/crm",
        "${DB_PASSWORD}",
        "file:url.txt",
    ],
)
def test_a_secret_is_in_nothing_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Taken from the environment or from a file, in a URL that works and in one that is none."""
    monkeypatch.setenv("DB_PASSWORD", CANARY)
    (tmp_path / "url.txt").write_text(f"postgresql+psycopg://reader:{CANARY}@127.0.0.1:1/crm\n")
    said = everything_said(connector(tmp_path, url))
    assert CANARY not in said
    assert "source offices:" in said


def test_a_secret_that_is_not_there_is_named(tmp_path: Path) -> None:
    """By the name of its variable or its file; `check` says so, too."""
    absent = connector(tmp_path, "postgresql+psycopg://reader:${DB_PASSWORD}@127.0.0.1/crm")
    assert absent.warnings == ["url: environment variable DB_PASSWORD is not set"]
    with pytest.raises(SourceInvalid, match="DB_PASSWORD is not set"):
        absent.fetch(None)
    with pytest.raises(SourceInvalid, match=r"url\.txt cannot be read"):
        connector(tmp_path, "file:url.txt").fetch(None)
    with pytest.raises(SourceInvalid, match="outside the folders"):
        connector(tmp_path, "file:/etc/hostname").fetch(None)


def test_what_is_unwise_is_warned_of(tmp_path: Path) -> None:
    """A password in the file; a kind of database that cannot be made read only."""
    (literal,) = connector(tmp_path, f"postgresql+psycopg://reader:{CANARY}@127.0.0.1/crm").warnings
    assert literal.startswith("url: holds a password")
    assert CANARY not in literal
    (writable,) = connector(tmp_path, "oracle://db.example.org/crm").warnings
    assert "cannot make oracle read only" in writable
    (odd,) = connector(tmp_path, "duckdb:///x.db").warnings
    assert "only SQLite's can be read" in odd


# -- what is hostile, or stays silent


@pytest.mark.parametrize("name", ["%252e%252e/secret.db", "x%252f..%252f..%252fsecret.db"])
def test_a_sqlite_url_is_decoded_once(tmp_path: Path, name: str) -> None:
    """What is a file's name after that stays one, so that no `..` in it leads out of the allowed folders."""
    (tmp_path / "sources").mkdir()
    Database("", f"sqlite:///{tmp_path}/secret.db", tmp_path).run(*TABLE)
    with pytest.raises(SourceUnavailable, match="unable to open"):
        connector(tmp_path / "sources", f"sqlite:///{name}").fetch(None)


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    """One with a percent sign, a question mark or a hash, too."""
    folder = tmp_path / "a%20b?c#d"
    folder.mkdir()
    with contextlib.closing(sqlite3.connect(folder / "o.db")) as made, made:
        for statement in TABLE:
            made.execute(statement)
    assert connector(folder, "sqlite:///o.db").fetch(None).rows == 2


def _silent(listener: socket.socket, greeting: bytes, done: threading.Event) -> None:
    """A server that greets its first client as PostgreSQL does, and says nothing more."""
    client, _ = listener.accept()
    with client:
        while greeting:
            (length,) = struct.unpack("!I", client.recv(4))
            if client.recv(length - 4)[:2] != b"\x04\xd2":  # no more requests for encryption
                client.sendall(greeting)
                break
            client.sendall(b"N")
        done.wait(60)


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!I", len(body) + 4) + body


@pytest.mark.parametrize("greets", [False, True])
def test_a_server_that_goes_silent_is_left_at_the_deadline(tmp_path: Path, greets: bool) -> None:
    """Before it has answered anything, and after the connection stands."""
    settings = {"server_version": "15.0", "client_encoding": "UTF8", "standard_conforming_strings": "on"}
    greeting = _message(b"R", struct.pack("!I", 0))
    for name, value in settings.items():
        greeting += _message(b"S", f"{name}\0{value}\0".encode())
    greeting += _message(b"K", struct.pack("!II", 1, 2)) + _message(b"Z", b"I")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)
        done = threading.Event()
        server = threading.Thread(target=_silent, args=(listener, greeting if greets else b"", done))
        server.start()
        found = connector(tmp_path, f"postgresql+psycopg://u@127.0.0.1:{listener.getsockname()[1]}/d", deadline=1)
        with pytest.raises(SourceUnavailable, match="no whole answer in 1 s"):
            found.fetch(None)
        assert server.is_alive()
        done.set()
        server.join()


def test_wide_rows_stop_at_the_cap_one_by_one(tmp_path: Path) -> None:
    """No second row is asked for once the bytes of the first are too many, and no value can be larger than the cap."""
    Database("", f"sqlite:///{tmp_path}/o.db", tmp_path).run(*TABLE)
    wide = ENDLESS.replace("'a' AS name", "CAST(zeroblob(400000) AS TEXT) AS name")
    tracemalloc.start()
    try:
        with pytest.raises(SourceInvalid, match="larger than"):
            connector(tmp_path, "sqlite:///o.db", wide, max_bytes=1_000_000).fetch(None)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()
    with pytest.raises(SourceInvalid, match="too big"):
        connector(tmp_path, "sqlite:///o.db", wide, max_bytes=100_000).fetch(None)


@pytest.mark.parametrize("between", ["\n", "/**/", "-- x\n", "("])
def test_a_query_of_many_blanks_is_judged_at_once(tmp_path: Path, between: str) -> None:
    """The look for SELECT at its beginning goes over what is before it once (a slower look would never end here)."""
    with pytest.raises(ValidationError):
        connector(tmp_path, "sqlite:///o.db", between * 60 + "UPDATE office SET id = 1")


@pytest.mark.parametrize(
    ("query", "sent"),
    [
        ("SELECT ';' AS id", True),
        ("SELECT 'it''s; so' AS \"a;b\"  -- and; so\n;", True),
        ("SELECT 'a' AS id; DROP TABLE office", False),
        (r"SELECT E'\' ; DROP TABLE office --'", False),
        ("SELECT $$'$$; DROP TABLE office -- '", False),
        ("SELECT 1 # '\n; DROP TABLE office -- '", False),
        ("SELECT 1 /* /* */ ' */; DROP TABLE office -- '", False),
        ("SELECT `'`; DROP TABLE office -- '", False),
    ],
)
def test_a_semicolon_may_stand_in_a_string(tmp_path: Path, query: str, sent: bool) -> None:
    """Where every database agrees that it is one."""
    with contextlib.nullcontext() if sent else pytest.raises(ValidationError, match="semicolon"):
        connector(tmp_path, "sqlite:///o.db", query)


def test_no_option_of_a_url_is_in_an_error(tmp_path: Path) -> None:
    """A password may stand behind the question mark, too."""
    url = make_url(f"postgresql+psycopg://db.example.org/crm?user=u&password={CANARY}")
    assert CANARY not in _scrubbed(ValueError(f"cannot log in with {CANARY}"), url)


def test_a_pipe_is_no_database(tmp_path: Path) -> None:
    """It is refused, for opening it would wait for somebody who writes."""
    os.mkfifo(tmp_path / "o.db")
    with pytest.raises(SourceInvalid, match="not a regular file"):
        connector(tmp_path, "sqlite:///o.db").fetch(None)
