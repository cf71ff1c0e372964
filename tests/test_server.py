"""Health and metrics over HTTP: a real server in this process, asked with a real client."""

from __future__ import annotations

import select
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kbsync.catalog import load_catalog
from kbsync.config import Workspace
from kbsync.errors import ConfigError
from kbsync.ledger import Ledger
from kbsync.lock import writer_lock
from kbsync.metrics import Exposition
from kbsync.pulse import Pulse
from kbsync.web import server as server_module
from kbsync.web.server import serving
from tests.daemons import Running as Daemon
from tests.tiny import save, tiny_llama
from tests.workspaces import POLICY, SOURCE, workspace

CANARY = "canary-of-sixteen-and-more"


class Running:
    """A server, what it looks at, and a client with its token."""

    def __init__(self, workspace: Workspace, ledger: Ledger, pulse: Pulse, address: str) -> None:
        self.workspace, self.ledger, self.pulse, self.address = workspace, ledger, pulse, address
        self.token = (workspace.server_token or (workspace.data / "server.token").read_text()).strip()

    def get(self, path: str, *, token: str | None = None, method: str = "GET", **more: Any) -> httpx.Response:
        """The answer to a request with this token; None: with the right one, empty: with none."""
        headers = more.pop("headers", {})
        if given := self.token if token is None else token:
            headers["Authorization"] = f"Bearer {given}"
        return httpx.request(method, self.address + path, headers=headers, timeout=30, trust_env=False, **more)


@contextmanager
def running(root: Path, settings: str = "port: 0") -> Iterator[Running]:
    """A server on the workspace at `root`, as the daemon starts it when it has come up."""
    (root / "kbsync.yaml").write_text(f"model: model\nserver: {{{settings}}}\n")
    if not (root / "model").exists():
        save(tiny_llama(), root / "model")
    workspace = Workspace.load(root)
    pulse = Pulse()
    with (
        writer_lock(workspace.lock),
        Ledger.open(workspace.ledger_url) as ledger,
        serving(ledger, pulse, lambda: load_catalog(workspace)) as address,
    ):
        assert address is not None
        pulse.phase = "running"
        pulse.beat("main")
        yield Running(workspace, ledger, pulse, address)


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Running]:
    """A server with its settings at their defaults, on a free port."""
    with running(tmp_path) as found:
        yield found


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The same, for tests that leave it as it is."""
    with running(tmp_path_factory.mktemp("calm")) as found:
        yield found


def failed_runs(ledger: Ledger, number: int) -> None:
    """So many failed passes of the policy sky."""
    for _ in range(number):
        with ledger.write() as db:
            db.finish_run(db.start_run("sky", model=None, trigger="schedule", user="daemon"), "failed", "no answer")


def test_without_the_section_nothing_listens(tmp_path: Path) -> None:
    (tmp_path / "kbsync.yaml").write_text("model: model\n")
    workspace = Workspace.load(tmp_path)
    catalog = load_catalog(workspace)
    with Ledger.open(workspace.ledger_url) as ledger, serving(ledger, Pulse(), lambda: catalog) as address:
        assert address is None
        with ledger.read() as db:
            assert db.beats() == {}
    assert not (tmp_path / "data" / "server.token").exists()


def test_the_real_address_is_in_the_log_and_in_the_ledger(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as logs, running(tmp_path) as up, up.ledger.read() as db:
        assert db.beats()["server"].detail == {"address": up.address}
    assert [event["address"] for event in logs if event["event"] == "server_started"] == [up.address]
    assert up.address.startswith("http://127.0.0.1:")
    with pytest.raises(httpx.ConnectError):
        up.get("/livez")


def test_the_token_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    with running(tmp_path) as first:
        assert stat.S_IMODE((tmp_path / "data" / "server.token").stat().st_mode) == 0o600
        assert len(first.token) >= 43
    with running(tmp_path) as again:
        assert again.token == first.token


def test_an_empty_token_of_the_own_is_made_anew(tmp_path: Path) -> None:
    """What a crash or a full disk may leave must not keep the daemon from ever starting."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "server.token").touch(0o600)
    with running(tmp_path) as up:
        assert len(up.token) >= 43
        assert up.get("/metrics").status_code == 200
    assert [path.name for path in (tmp_path / "data").glob(".tmp-*")] == []


def test_a_token_that_cannot_be_made_is_said_and_leaves_no_file(tmp_path: Path) -> None:
    """A real process with no room for a byte in any file: what a full disk does."""
    (tmp_path / "kbsync.yaml").write_text("model: model\n")
    code = """
import resource, signal, sys
from pathlib import Path
from kbsync.config import Workspace
from kbsync.errors import KbsyncError
from kbsync.web.access import read_token
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
try:
    read_token(Workspace.load(Path(sys.argv[1])))
except KbsyncError as error:
    print(error.message)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=90)
    assert "server.token: cannot be written: File too large" in done.stdout, done.stderr
    assert list((tmp_path / "data").iterdir()) == []


def test_a_token_that_others_can_read_is_refused(tmp_path: Path) -> None:
    with running(tmp_path):
        pass
    (tmp_path / "data" / "server.token").chmod(0o644)
    with pytest.raises(ConfigError, match=r"server\.token: others can read") as caught, running(tmp_path):
        pass
    assert "chmod 600" in caught.value.hint


@pytest.mark.parametrize(
    ("token", "problem"),
    [("short", "16 or more"), ("with a space and enough more", "16 or more"), ("", "16 or more")],
)
def test_a_token_that_can_be_guessed_is_refused(
    token: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN_OF_TEST", token)
    with (
        pytest.raises(ConfigError, match=problem) as caught,
        running(tmp_path, "port: 0, token: '${TOKEN_OF_TEST}'"),
    ):
        pass
    assert not token or token not in str(caught.value)


def test_the_token_may_come_from_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN_OF_TEST", CANARY)
    with running(tmp_path, "port: 0, token: '${TOKEN_OF_TEST}'") as up:
        assert up.get("/metrics", token=CANARY).status_code == 200
    (tmp_path / "secret").write_text(f"{CANARY}\n")
    with running(tmp_path, "port: 0, token: 'file:secret'") as up:
        assert up.get("/metrics", token=CANARY).status_code == 200
    assert not (tmp_path / "data" / "server.token").exists()


def test_a_token_in_the_file_itself_is_refused_and_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "kbsync.yaml").write_text(f"model: model\nserver: {{token: {CANARY}}}\n")
    with pytest.raises(ConfigError, match=r"kbsync\.yaml:2: server\.token: .*must be \$\{NAME\}") as caught:
        Workspace.load(tmp_path)
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ("host: 0.0.0.0", "it needs tls"),
        ("host: '::'", "it needs tls"),
        ("host: 192.168.1.7", "it needs tls"),
        ("host: 192.168.1.7, tls: {certificate: c.pem, key: k.pem}, metrics: open", "for a loopback host only"),
        ("host: example.org", "must be an IP address"),
        ("cors: all", "not a known key"),
    ],
)
def test_what_other_machines_could_read_in_clear_is_refused(settings: str, problem: str, tmp_path: Path) -> None:
    """By `check` and at start alike: both load kbsync.yaml."""
    (tmp_path / "kbsync.yaml").write_text(f"model: model\nserver: {{{settings}}}\n")
    with pytest.raises(ConfigError, match=problem):
        Workspace.load(tmp_path)


@pytest.mark.parametrize("token", ["", "wrong", "wrong-token-of-the-usual-length-0123456789", "Bearer", "ä"])
def test_metrics_want_the_right_token(token: str, calm: Running) -> None:
    headers = {"Authorization": f"Bearer {token}".encode("latin-1")} if token else {}
    answer = calm.get("/metrics", token="", headers=headers)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Bearer realm="kbsync"')
    assert "kbsync_" not in answer.text
    assert calm.get("/metrics").status_code == 200


def test_a_token_counts_only_as_a_bearer_token_and_only_once(calm: Running) -> None:
    for values in ([f"Basic {calm.token}"], [f"Bearer {calm.token}", f"Bearer {calm.token}"], [calm.token]):
        headers = [("Authorization", value) for value in values]
        assert httpx.get(f"{calm.address}/metrics", headers=headers, trust_env=False).status_code == 401
    assert calm.get(f"/metrics?token={calm.token}", token="").status_code == 401


def test_metrics_can_be_opened_on_loopback(tmp_path: Path) -> None:
    with running(tmp_path, "port: 0, metrics: open") as up:
        assert up.get("/metrics", token="").status_code == 200


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/nothing"])
@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example", "", "10.0.0.1"])
def test_a_foreign_host_header_is_refused_with_the_token_too(host: str, path: str, calm: Running) -> None:
    """What stops a page in a browser here that had its own name resolved to 127.0.0.1."""
    host = host.format(port=httpx.URL(calm.address).port)
    assert calm.get(path, headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1", "[::1]:99", "probe.internal"])
def test_own_names_and_those_allowed_are_taken(host: str, tmp_path: Path) -> None:
    with running(tmp_path, "port: 0, hosts: [Probe.internal]") as up:
        assert up.get("/livez", token="", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/redoc", "/livez/x", "/../data"])
def test_an_unknown_path_is_404_and_none_of_fastapis_pages_is_there(path: str, calm: Running) -> None:
    assert calm.get(path).status_code == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "BREW"])
@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics"])
def test_nothing_but_get_is_allowed(method: str, path: str, calm: Running) -> None:
    answer = calm.get(path, method=method)
    assert answer.status_code == 405
    assert "access-control-allow-origin" not in answer.headers


def test_no_other_origin_is_ever_allowed(calm: Running) -> None:
    answer = calm.get("/metrics", headers={"Origin": "https://evil.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_request_with_a_body_or_an_endless_head_is_refused(calm: Running) -> None:
    assert calm.get("/livez", content=b"x").status_code == 413
    assert calm.get("/livez", headers={"X-Long": "x" * 100_000}).status_code == 431


TLS = ", tls: {certificate: cert.pem, key: key.pem}"


def trusting(folder: Path) -> ssl.SSLContext:
    """A client's context that trusts the certificate in `folder`."""
    return ssl.create_default_context(cafile=str(folder / "cert.pem"))


@pytest.mark.parametrize("tls", ["", TLS], ids=["plain", "tls"])
def test_a_connection_that_says_nothing_is_ended(tls: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "LIFETIME", 5.0)
    certificate(tmp_path)
    with running(tmp_path, f"port: 0{tls}") as up:
        url = httpx.URL(up.address)
        silent = socket.create_connection((url.host, url.port), timeout=30)
        with trusting(tmp_path).wrap_socket(silent, server_hostname=url.host) if tls else silent as silent:
            silent.sendall(b"GET /livez HTTP/1.1\r\nHost: local")
            assert silent.recv(100) == b""
        monkeypatch.undo()
        assert httpx.get(f"{up.address}/livez", verify=trusting(tmp_path), trust_env=False).status_code == 200


@pytest.mark.parametrize("tls", ["", TLS], ids=["plain", "tls"])
def test_silent_connections_take_few_descriptors_and_none_stays(
    tls: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hundred clients that say nothing, not even a TLS handshake: most are turned away at once."""
    monkeypatch.setattr(server_module, "LIFETIME", 10.0)
    certificate(tmp_path)
    with structlog.testing.capture_logs() as logs, running(tmp_path, f"port: 0{tls}") as up, ExitStack() as clients:
        url = httpx.URL(up.address)
        before = descriptors()
        made = [clients.enter_context(socket.create_connection((url.host, url.port), 30)) for _ in range(200)]
        assert ended(made, 200 - server_module.MOST_CONNECTIONS) == 200 - server_module.MOST_CONNECTIONS
        assert descriptors() - before - len(made) <= server_module.MOST_CONNECTIONS
        assert ended(made, 200) == 200
        assert httpx.get(f"{up.address}/livez", verify=trusting(tmp_path), trust_env=False).status_code == 200
    assert len([event for event in logs if event["event"] == "server_full"]) == 1


@pytest.mark.parametrize("tls", ["", TLS], ids=["plain", "tls"])
def test_an_answer_that_takes_longer_than_a_request_may_arrives(
    tls: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metrics of a ledger that has become large."""
    monkeypatch.setattr(server_module, "LIFETIME", 3.0)

    def slow(_: Exposition) -> bytes:
        time.sleep(4)
        return b"kbsync_facts 1\n"

    monkeypatch.setattr(Exposition, "__call__", slow)
    certificate(tmp_path)
    with running(tmp_path, f"port: 0{tls}") as up:
        assert up.get("/metrics", verify=trusting(tmp_path)).text == "kbsync_facts 1\n"


def test_an_answer_that_is_never_found_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "ANSWER", 0.5)
    found = threading.Event()
    monkeypatch.setattr(Exposition, "__call__", lambda _: found.wait() and b"")
    with running(tmp_path) as up:
        with pytest.raises(httpx.RemoteProtocolError):
            up.get("/metrics")
        found.set()


def descriptors() -> int:
    """How many files and sockets this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def ended(clients: list[socket.socket], number: int) -> int:
    """How many of them the server has ended, once it is so many."""
    end = time.monotonic() + 30
    while len(found := select.select(clients, [], [], 0)[0]) < number and time.monotonic() < end:
        time.sleep(0.05)
    return len(found)


def test_live_while_every_part_beats_and_says_which_one_does_not(up: Running) -> None:
    up.pulse.beat("scheduler")
    assert checks(up.get("/livez", token="")).items() >= {"main": True, "scheduler": True}.items()
    up.pulse._last["scheduler"] -= 1000
    answer = up.get("/livez")
    assert answer.status_code == 503
    assert {"name": "scheduler", "ok": False, "why": "no sign of life for 1000 s"} in answer.json()["checks"]
    up.pulse.beat("scheduler")
    assert up.get("/livez").status_code == 200


def checks(answer: httpx.Response) -> dict[str, bool]:
    """Each check and whether it is well."""
    return {check["name"]: check["ok"] for check in answer.json()["checks"]}


def test_ready_while_all_that_a_pass_needs_is_there(up: Running) -> None:
    answer = up.get("/readyz", token="")
    assert (answer.status_code, checks(answer)) == (
        200,
        {"daemon": True, "lock": True, "model": True, "ledger": True},
    )


@pytest.mark.parametrize("phase", ["starting", "stopping"])
def test_not_ready_while_starting_or_stopping_but_live(phase: Any, up: Running) -> None:
    up.pulse.phase = phase
    answer = up.get("/readyz")
    assert (answer.status_code, answer.json()["checks"][0]["why"]) == (503, f"it is {phase}")
    assert up.get("/livez").status_code == 200


def test_not_ready_once_a_policy_has_failed_as_often_as_people_are_told(tmp_path: Path, up: Running) -> None:
    declare(tmp_path)
    failed_runs(up.ledger, 2)
    assert checks(up.get("/readyz"))["policy sky"]
    failed_runs(up.ledger, 1)
    answer = up.get("/readyz")
    assert (answer.status_code, checks(answer)["policy sky"]) == (503, False)
    assert "kbsync runs --policy sky" in answer.json()["checks"][-1]["why"]


def test_a_policy_that_failed_and_is_gone_keeps_nobody_from_being_ready(tmp_path: Path, up: Running) -> None:
    """Renamed while it failed: the one of the new name was never run."""
    declare(tmp_path)
    failed_runs(up.ledger, 3)
    assert up.get("/readyz").status_code == 503
    declare(tmp_path, "heaven")
    assert {name for name in checks(up.get("/readyz")) if "policy" in name} == {"policy heaven"}
    assert up.get("/readyz").status_code == 200


def declare(root: Path, name: str = "sky") -> None:
    """The workspace's one policy, under this name."""
    for file, text in {
        "sources/stars.yaml": SOURCE,
        "sources/stars.csv": "id,name,constellation\n",
        "policies/controls.txt": "Italy\n",
        "policies/it.yaml": (POLICY % "    retract: keep").replace("policy: sky", f"policy: {name}"),
    }.items():
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_text(text)


def test_the_checks_and_the_process_are_in_the_metrics_too(up: Running) -> None:
    up.pulse.phase = "stopping"
    text = up.get("/metrics").text
    assert 'kbsync_check_ok{check="daemon"} 0.0' in text
    assert 'kbsync_check_ok{check="ledger"} 1.0' in text
    assert "process_resident_memory_bytes" in text


def test_what_is_wrong_is_told_to_those_with_the_token_only(up: Running) -> None:
    (up.workspace.root / "model" / "config.json").unlink()
    open_, trusted = up.get("/readyz", token="").json(), up.get("/readyz").json()
    assert [check["ok"] for check in open_["checks"]] == [check["ok"] for check in trusted["checks"]]
    assert not any("why" in check for check in open_["checks"])
    assert "no config.json" in trusted["checks"][2]["why"]


def test_a_broken_ledger_is_503_and_the_server_goes_on(up: Running) -> None:
    up.ledger.close()
    (up.workspace.data / "ledger.db").write_bytes(b"no database at all, " * 1000)
    ready, metrics = up.get("/readyz"), up.get("/metrics")
    assert (ready.status_code, checks(ready)["ledger"]) == (503, False)
    assert metrics.status_code == 503
    assert "Traceback" not in metrics.text
    assert up.get("/livez").status_code == 200


def test_a_mistake_in_kbsync_is_500_without_a_traceback(up: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistake(_: object) -> None:
        raise RuntimeError(CANARY)

    monkeypatch.setattr("kbsync.web.health.Health.live", mistake)
    with structlog.testing.capture_logs() as logs:
        answer = up.get("/livez")
    assert (answer.status_code, CANARY in answer.text) == (500, False)
    [event] = [event for event in logs if event["event"] == "request_failed"]
    assert event["problem"].startswith("RuntimeError at test_server.py:")


def test_refusals_are_logged_without_token_or_query(up: Running) -> None:
    with structlog.testing.capture_logs() as logs:
        up.get(f"/metrics?token={CANARY}", token=CANARY)
    [event] = [event for event in logs if event["event"] == "request_refused"]
    assert (event["status"], event["path"], event["client"]) == (401, "/metrics", "127.0.0.1")
    assert CANARY not in str(logs)


def test_a_port_that_is_taken_is_a_mistake_of_the_user(up: Running, tmp_path: Path) -> None:
    port = httpx.URL(up.address).port
    other = tmp_path / "other"
    other.mkdir()
    problem = f"server: cannot listen on 127.0.0.1 port {port}"
    with pytest.raises(ConfigError, match=problem), running(other, f"port: {port}"):
        pass


def test_many_ask_at_once(calm: Running) -> None:
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(calm.get("/metrics").status_code)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [200] * 8


def certificate(folder: Path) -> None:
    """A certificate of 127.0.0.1 that signs itself, and its key: cert.pem, key.pem."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kbsync")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(made.public_bytes(encoding))
    plain = serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain))


def test_with_tls_it_may_listen_for_other_machines(tmp_path: Path) -> None:
    certificate(tmp_path)
    settings = "host: 0.0.0.0, port: 0, hosts: [127.0.0.1], tls: {certificate: cert.pem, key: key.pem}"
    with running(tmp_path, settings) as up:
        port = httpx.URL(up.address).port
        context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
        with httpx.Client(verify=context, base_url=f"https://127.0.0.1:{port}", trust_env=False) as client:
            assert client.get("/livez").status_code == 200
            assert client.get("/metrics").status_code == 401
            assert client.get("/metrics", headers={"Authorization": f"Bearer {up.token}"}).status_code == 200
            assert client.get("/livez", headers={"Host": "localhost"}).status_code == 403
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{port}/livez", trust_env=False)


def test_a_certificate_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    settings, problem = "port: 0, tls: {certificate: cert.pem, key: key.pem}", r"cert\.pem and key\.pem cannot be used"
    with pytest.raises(ConfigError, match=f"{problem}: No such file"), running(tmp_path, settings):
        pass
    certificate(tmp_path)
    (tmp_path / "key.pem").write_text("nothing")
    with pytest.raises(ConfigError, match=problem), running(tmp_path, settings):
        pass


def test_settings_that_sighup_changed_hold_for_the_server_too(tmp_path: Path) -> None:
    """How many passes may fail in a row before the daemon is not ready, for one."""
    made = workspace(tmp_path, {"Vega": "Orion"})
    config = made.root / "kbsync.yaml"
    config.write_text(f"{config.read_text()}server: {{port: 0}}\nnotify: {{failures: 2}}\n")
    catalog = load_catalog(Workspace.load(made.root))
    with Ledger.open(catalog.workspace.ledger_url) as ledger, serving(ledger, Pulse(), lambda: catalog) as address:
        failed_runs(ledger, 2)
        assert address is not None
        assert not checks(httpx.get(f"{address}/readyz", trust_env=False))["policy sky"]
        config.write_text(config.read_text().replace("failures: 2", "failures: 3"))
        catalog = load_catalog(Workspace.load(made.root))
        assert checks(httpx.get(f"{address}/readyz", trust_env=False))["policy sky"]


@pytest.mark.usefixtures("one_cache")
def test_a_daemon_answers_while_it_runs_and_leaves_no_sign_of_life_once_it_ended(tmp_path: Path) -> None:
    made = workspace(tmp_path, {"Vega": "Orion"})
    config = made.root / "kbsync.yaml"
    config.write_text(f"{config.read_text()}server: {{port: 0}}\n")
    daemon = Daemon(made.root)
    try:
        daemon.wait_for(lambda: daemon.events("server_started"))
        address = daemon.events("server_started")[0]["address"]
        token = (made.root / "data" / "server.token").read_text()
        daemon.wait_for(lambda: httpx.get(f"{address}/readyz", trust_env=False).status_code == 200)
        assert httpx.get(f"{address}/livez", trust_env=False).json()["ok"]
        daemon.wait_for(lambda: {"main", "scheduler", "server"} <= set(beats(made.root)))
        answer = httpx.get(f"{address}/metrics", headers={"Authorization": f"Bearer {token}"}, trust_env=False)
        assert "kbsync_daemon_running 1.0" in answer.text
        assert daemon.end() == 0
    finally:
        daemon.process.kill()
        daemon.process.wait()
    assert beats(made.root) == {}
    assert token not in daemon.log.read_text()


def beats(root: Path) -> dict[str, Any]:
    """The signs of life in the ledger of a workspace."""
    with Ledger.open(Workspace.load(root).ledger_url) as ledger, ledger.read() as db:
        return dict(db.beats())
