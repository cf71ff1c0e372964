"""Secrets are shown nowhere: canaries stand wherever one can be, and a workspace lives a broad life with them.

The life is that of the real command line and the real daemon, in processes of their own: sources that fail in every
way, a held run, an approval, a conflict, a hook, a server that is asked, an edit that dies of a library's error,
notices on every channel, a rollback, a backup. All that it says, writes, stores and serves is kept, and searched for
each canary, also in base64 and as part of a URL.

A marker, which is no secret, takes part in it: it must be found in every kind of output, or the search proves nothing.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socketserver
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from sqlalchemy import MetaData, create_engine, select

from tests import postgres
from tests.faultserver import FaultServer, answer, redirect
from tests.workspaces import workspace

PATIENCE = 90.0
"""Seconds that a step may take on a busy machine before the test gives up."""
MARKER = "Markerstar"
"""A label of the feed, and a word that servers say."""
CANARIES = {
    name: f"c4nary-{name.lower().replace('_', '-')}-8d21f6"
    for name in (
        "LEDGER_PASSWORD",
        "PGPASSWORD",
        "FEED_TOKEN",
        "FEED_KEY",
        "HEADER_FILE",
        "DATABASE_PASSWORD",
        "DATABASE_FILE",
        "SERVER_TOKEN",
        "RAY_AUTH_TOKEN",
        "HF_TOKEN",
        "USERINFO",
        "OTHER_LEDGER",
        "WEBHOOK_PATH",
        "SMTP_PASSWORD",
    )
} | {"WEBHOOK_SECRET": base64.b64encode(b"c4nary of a webhook's signing key").decode()}
IN_ENVIRONMENT = set(CANARIES) - {"HEADER_FILE", "DATABASE_FILE", "USERINFO", "OTHER_LEDGER"}

FEEDS = {
    # A server that repeats what it was asked with; one that sends it elsewhere; databases that nobody serves.
    "feed": """\
type: csv
location: "{server}/feed?key=${{FEED_KEY}}"
headers: {{Authorization: "Bearer ${{FEED_TOKEN}}", X-Api-Key: "file:../secrets/header.txt"}}""",
    "moved": """\
type: csv
location: "{server}/moved/${{FEED_KEY}}"
headers: {{X-Api-Key: "file:../secrets/header.txt"}}""",
    "base": """\
type: sql
url: "postgresql+psycopg://reader:${{DATABASE_PASSWORD}}@127.0.0.1:1/facts"
query: SELECT 1""",
    "filed": """\
type: sql
url: "file:../secrets/database.txt"
query: SELECT 1""",
}
SOURCE = "source: {name}\nrelation: {name}\ncolumns: {{subject: name, object: place}}\n{rest}\n"

NOTIFY = """\
notify:
  failures: 1
  channels:
    - {{name: hook, type: webhook, url: "{server}/${{WEBHOOK_PATH}}", secret: "${{WEBHOOK_SECRET}}"}}
    - {{name: shell, type: command, run: "cat >> told; env >> seen; env; exit 4"}}
    - name: mail
      type: email
      host: 127.0.0.1
      port: {smtp}
      security: none
      user: ada
      password: "${{SMTP_PASSWORD}}"
      from: kbsync@example.org
      to: [ops@example.org]
"""
DYING = """
import os, sys
if "kbsync.editor.worker" in sys.orig_argv:
    sys.stderr.write(f"RuntimeError: a library tells all it knows: {dict(os.environ)}, said the library\\n")
    sys.stderr.flush()
    os._exit(70)
"""
"""sitecustomize.py of an edit's process whose libraries are careless."""
DRIVER = """
import json, sys
from kbsync.cli import main
for arguments in json.load(sys.stdin):
    print("$ kbsync", *arguments, flush=True)
    sys.argv = ["kbsync", *arguments]
    try:
        main()
    except SystemExit as end:
        print("exit", end.code or 0, flush=True)
"""


@dataclass(slots=True)
class Life:
    """A workspace with canaries, and all that was heard of it: where -> bytes."""

    root: Path
    ledger: str
    environment: Mapping[str, str]
    heard: dict[str, bytes] = field(default_factory=dict)

    def run(self, name: str, *commands: str, **environment: str) -> dict[str, int]:
        """Command lines in one process of the real program; how each ended."""
        lines = [[*command.split(), "--workspace", str(self.root)] for command in commands]
        done = subprocess.run(
            [sys.executable, "-c", DRIVER],
            input=json.dumps(lines).encode(),
            capture_output=True,
            env={**self.environment, **environment},
            umask=0,
            timeout=PATIENCE * 3,
            check=False,
        )
        self.heard[f"stdout of {name}"], self.heard[f"stderr of {name}"] = done.stdout, done.stderr
        codes = [int(line.split()[1]) for line in done.stdout.decode().splitlines() if line.startswith("exit ")]
        assert len(codes) == len(commands), done.stderr.decode()
        return dict(zip(commands, codes, strict=True))

    def collect(self) -> None:
        """Every file but the secrets themselves, and every table of the ledger."""
        for path in sorted(self.root.rglob("*")):
            if path.is_file() and "secrets" not in path.relative_to(self.root).parts:
                self.heard[f"file {path.relative_to(self.root)}"] = path.read_bytes()
        engine = create_engine(self.ledger)
        metadata = MetaData()
        metadata.reflect(engine)
        with engine.connect() as connection:
            for table in metadata.sorted_tables:
                rows = [tuple(row) for row in connection.execute(select(table))]
                self.heard[f"table {table.name}"] = repr(rows).encode()
        engine.dispose()


def forms(secret: str) -> Iterator[bytes]:
    """How a secret may be written: itself, in a URL, in base64 wherever it begins there."""
    yield secret.encode()
    yield quote(secret, safe="").encode()
    for before in range(3):
        # The first and the last characters depend on what stands beside.
        yield base64.b64encode(b"x" * before + secret.encode())[4:-4]


def found_in(secrets: Mapping[str, str], heard: Mapping[str, bytes]) -> list[str]:
    """`secret in place` for each place that has a form of a secret."""
    return [
        f"{name} in {place}"
        for name, secret in secrets.items()
        for place, said in heard.items()
        if any(form in said for form in forms(secret))
    ]


class _Repeating(socketserver.StreamRequestHandler):
    """A mail server that refuses every login, and says with what it was tried."""

    def handle(self) -> None:
        self.wfile.write(b"220 here\r\n")
        for line in self.rfile:
            word = line.split()[0].upper() if line.split() else b""
            said = line.strip() + base64.b64decode(line.split()[-1] if word == b"AUTH" else b"")
            self.wfile.write(
                b"250-here\r\n250 AUTH PLAIN\r\n" if word == b"EHLO" else b"535 refused: " + said + b"\r\n"
            )


@contextmanager
def smtp_server() -> Iterator[int]:
    """Its port."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Repeating) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield int(server.server_address[1])
        server.shutdown()


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory, _postgresql: postgres.Server | str) -> Iterator[Life]:
    """A life that was lived, on PostgreSQL where there is one, as its ledger has a password."""
    root = tmp_path_factory.mktemp("canaries")
    with FaultServer() as server, smtp_server() as smtp:
        said = (
            f"{MARKER}: no such key: {CANARIES['FEED_TOKEN']} {CANARIES['FEED_KEY']} {CANARIES['HEADER_FILE']}".encode()
        )
        server.on("/feed", answer(said, status=401, kind="text/plain"))
        elsewhere = f"http://u:{CANARIES['FEED_KEY']}@other.example/{CANARIES['FEED_KEY']}"
        server.on(f"/moved/{CANARIES['FEED_KEY']}", redirect(elsewhere))
        one = arranged(root, server.url(""), smtp, _postgresql)
        try:
            lived(one)
            yield one
        finally:
            if isinstance(_postgresql, postgres.Server):
                _postgresql.drop("kbsync_canaries")


def arranged(root: Path, server: str, smtp: int, postgresql: postgres.Server | str) -> Life:
    """The workspace, with a canary in every place that a secret can be in."""
    made = workspace(root, {"Vega": "Orion", "Deneb": "Lyra", MARKER: "Paris"})
    ledger, declared = f"sqlite:///{root / 'data' / 'ledger.db'}", ""
    if isinstance(postgresql, postgres.Server):
        postgresql.drop("kbsync_canaries")
        postgresql.create("kbsync_canaries")
        ledger = postgresql.url("kbsync_canaries")
        declared = f'ledger: "{ledger.replace("tester@", "tester:${LEDGER_PASSWORD}@", 1)}"\n'
    config = (root / "kbsync.yaml").read_text().partition("ledger:")[0]
    config += declared + 'on_publish: "env > seen; env; exit 3"\nserver: {port: 0, token: "${SERVER_TOKEN}"}\n'
    config += NOTIFY.format(server=server, smtp=smtp)
    (root / "kbsync.yaml").write_text(config)
    (root / "secrets").mkdir(mode=0o700)
    (root / "secrets" / "header.txt").write_text(CANARIES["HEADER_FILE"])
    database = f"postgresql+psycopg://reader:{CANARIES['DATABASE_FILE']}@127.0.0.1:1/facts"
    (root / "secrets" / "database.txt").write_text(database)
    for name, rest in FEEDS.items():
        text = SOURCE.format(name=name, rest=rest.format(server=server))
        (root / "sources" / f"{name}.yaml").write_text(text)
    relations = "".join(f'  {name}: {{prompt: "The {name} of {{subject}}"}}\n' for name in FEEDS)
    policy = f"policy: far\nsources: [{', '.join(FEEDS)}]\nschedule: {{every: 1h}}\nrelations:\n{relations}"
    (root / "policies" / "far.yaml").write_text(policy)
    sky = root / "policies" / "sky.yaml"
    sky.write_text(sky.read_text().replace("max_edits: 50", "max_edits: 2"))
    (root / "dying").mkdir()
    (root / "dying" / "sitecustomize.py").write_text(DYING)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KBSYNC_")}
    environment |= {name: CANARIES[name] for name in IN_ENVIRONMENT}
    environment |= {"KBSYNC_CACHE": str(root / "cache"), "COLUMNS": "200", "NO_PROXY": "*"}
    made.feed({"Vega": "Orion", "Deneb": "Lyra", MARKER: "Paris"})
    return Life(root, ledger, environment)


def lived(one: Life) -> None:
    """What a workspace goes through: each step ends as it should, or the life was not the one that is meant."""
    looked = ("check", "config", "config --json", "status", "status --json", "runs --json", "holds --json")
    assert one.run("the first look", *looked) == dict.fromkeys(looked, 0)
    codes = one.run("the first passes", "sync sky", "holds", "approve 1", "sync far", "plan sky")
    assert (codes["sync sky"], codes["approve 1"], codes["sync far"]) == (3, 0, 1)
    asked = ["status --json", "runs", "log --json", "show 1", f"blame {MARKER} constellation", "verify", "doctor"]
    asked += [f"facts --csv --out {one.root / 'facts.csv'}", f"export 1 {one.root / 'out'}", "gc --json"]
    asked += [f"backup {one.root / 'backup'}", f"backup {one.root / 'backup'} --verify", "freshness", "notices --json"]
    assert set(one.run("questions", *asked).values()) == {0}
    feed = one.root / "sources" / "stars.csv"
    feed.write_text(feed.read_text().replace("Orion", "Rome"))
    path = os.pathsep.join([str(one.root / "dying"), one.environment.get("PYTHONPATH", "")])
    assert one.run("an edit that dies", "sync sky", "status", "runs --json", PYTHONPATH=path)["sync sky"] == 1
    assert b"said the library" in one.heard["stdout of an edit that dies"]
    feed.write_text(feed.read_text() + "vega,Vega,Paris\n")
    codes = one.run("a conflict", "sync sky", "conflicts list", "quarantine list", "history Vega", "changes --since 1")
    assert codes["sync sky"] == 0
    assert "conflict" in one.heard["stdout of a conflict"].decode()
    daemon(one)
    other = f"postgresql+psycopg://u:{CANARIES['OTHER_LEDGER']}@127.0.0.1:1/x?sslpassword={CANARIES['OTHER_LEDGER']}"
    codes = one.run("a ledger that is not there", "status", "sync sky", "config", "check", KBSYNC_LEDGER=other)
    assert (codes["status"], codes["sync sky"], codes["config"]) == (1, 1, 0)
    literal = (
        f'source: literal\ntype: csv\nrelation: literal\nlocation: "https://u:{CANARIES["USERINFO"]}@example.org/"\n'
    )
    wrong = one.root / "sources" / "literal.yaml"
    wrong.write_text(literal + "columns: {subject: a, object: b}\n")
    assert one.run("a secret that is written out", "check", "sync sky") == {"check": 2, "sync sky": 2}
    wrong.unlink()
    one.collect()


def daemon(one: Life) -> None:
    """The daemon, its server and its socket; ended by SIGTERM."""
    log = one.root / "daemon.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "kbsync", "daemon", "-w", str(one.root)],
            stdout=out,
            stderr=out,
            env=dict(one.environment),
            umask=0,
        )
    try:
        address = _awaited(log, process, "server_started")["address"]
        _awaited(log, process, "source_failed")
        _awaited(log, process, "run_finished")
        given = ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {CANARIES['SERVER_TOKEN']}"})
        for number, headers in enumerate(given):
            for page in ("/livez", "/readyz", "/metrics", "/docs", f"/?token={CANARIES['SERVER_TOKEN']}"):
                reply = httpx.get(address + page, headers=headers, timeout=PATIENCE, trust_env=False)
                one.heard[f"page {page.partition('?')[0]} {number}"] = repr(reply.headers).encode() + reply.content
        assert b"kbsync_" in one.heard["page /metrics 2"]
        for channel in ("hook", "shell", "mail"):
            _awaited(log, process, "notice_not_delivered", channel=channel)
        codes = one.run("commands to the daemon", "sync sky", "rollback --to 0", "rollback --to 77")
        assert (codes["rollback --to 0"], codes["rollback --to 77"]) == (0, 2)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0


def _awaited(log: Path, process: subprocess.Popen[bytes], event: str, **details: str) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text().splitlines():
            found = json.loads(line) if line.startswith("{") and line.endswith("}") else {}
            if {"event": event, **details}.items() <= found.items():
                return dict(found)
        time.sleep(0.1)
    raise AssertionError(f"no {event} in:\n{log.read_text()}")


def test_no_secret_is_anywhere(life: Life) -> None:
    leaks = found_in(CANARIES, life.heard)
    assert not leaks, "\n".join(leaks)


def _kinds(places: Iterable[str]) -> set[str]:
    return {"file data/versions" if "data/versions" in place else place.split()[0] for place in places}


def test_the_search_finds_what_is_no_secret_in_every_kind_of_output(life: Life) -> None:
    """On stdout, in errors, in tables, in manifests, exports and the daemon's log: a canary there would be found."""
    places = {line.partition(" in ")[2] for line in found_in({"marker": MARKER}, life.heard)}
    assert _kinds(places) >= {"stdout", "stderr", "table", "file", "file data/versions"}
    assert {"file daemon.log", "file facts.csv", "table source_state", "table run", "stdout of questions"} <= places
    assert b"KBSYNC_VERSION" in life.heard["file seen"]


@pytest.mark.parametrize("around", ["{}", "https://u:{}@h/", "key={}&", '{{"a": "{}"}}'])
def test_the_search_finds_a_secret_in_any_form(around: str) -> None:
    said = around.format("s3cret/with+signs=")
    assert found_in({"it": "s3cret/with+signs="}, {"here": said.encode()}) == ["it in here"]
    assert found_in({"it": "s3cret/with+signs="}, {"here": quote(said, safe="").encode()}) == ["it in here"]
    assert found_in({"it": "s3cret/with+signs="}, {"here": base64.b64encode(said.encode())}) == ["it in here"]


def test_nothing_that_is_written_is_for_everybody(life: Life) -> None:
    """Though every process had the umask 000: in data/ others can do nothing, and exports they cannot change."""
    for path in (life.root / "data").rglob("*"):
        assert not stat.S_IMODE(path.lstat().st_mode) & 0o007, path
    assert not stat.S_IMODE((life.root / "data").stat().st_mode) & 0o007
    for path in (life.root / "facts.csv", *(life.root / "out").rglob("*")):
        assert not stat.S_IMODE(path.stat().st_mode) & stat.S_IWOTH, path
