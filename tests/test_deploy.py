"""What is deployed: the wheel that the image installs, the image's command lines, the compose files."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from kbsync.config import Workspace
from tests.daemons import PATIENCE, Running
from tests.workspaces import workspace

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = YAML(typ="safe").load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
SERVICES = sorted(COMPOSE["services"])


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as the image builds it, installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "wheels")],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    [wheel] = (folder / "wheels").glob("*.whl")
    target = ["--no-deps", "--no-compile", "--quiet", "--target", str(folder / "site")]
    subprocess.run([sys.executable, "-m", "pip", "install", *target, str(wheel)], check=True, capture_output=True)
    return folder / "site"


def run(installed: Path, *arguments: str) -> str:
    """What the installed kbsync prints, run outside the checkout."""
    done = subprocess.run(
        [sys.executable, "-m", "kbsync", *arguments],
        cwd=installed.parent,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    return done.stdout


def test_the_wheel_has_all_that_a_new_workspace_takes(installed: Path) -> None:
    """Run from the wheel alone: help, the shipped examples, and a check of them."""
    assert "promote" in run(installed, "--help")
    root = installed.parent / "w"
    run(installed, "init", "--workspace", str(root))
    assert (root / "sources" / "star-catalog.csv").is_file()
    assert "2 policies: sound" in run(installed, "check", "--workspace", str(root))
    assert (installed / "kbsync" / "examples" / "policies" / "world-leaders.yaml").is_file()
    assert not (installed / "tests").exists()


def test_the_build_gets_what_the_dockerfile_copies_and_nothing_else() -> None:
    """The ignore file lets just those through; a workspace's data or secrets beside the checkout's files stay out."""
    copied = {
        name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()
    }
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line[1:] for line in ignore if line.startswith("!")} == copied
    assert "*" in ignore
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_runs_as_nobody_in_particular_and_installs_by_hash() -> None:
    assert re.search(r"^USER 10001:10001$", DOCKERFILE, re.MULTILINE)
    assert "--require-hashes --requirement requirements.lock" in DOCKERFILE
    assert re.search(r"^ARG PYTHON=\d+\.\d+\.\d+-", DOCKERFILE, re.MULTILINE)


def test_the_images_server_setting_leaves_what_the_workspace_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KBSYNC_SERVER", "{}")
    (tmp_path / "kbsync.yaml").write_text("model: tiny\nserver: {port: 9000}\n")
    server = Workspace.load(tmp_path).settings.server
    assert server is not None
    assert (server.host, server.port) == ("127.0.0.1", 9000)


def test_the_images_command_line_and_health_check_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENTRYPOINT and CMD run the daemon in the environment's workspace; the check fails once it is gone."""
    monkeypatch.setenv("KBSYNC_CACHE", str(tmp_path / "cache"))
    made = workspace(tmp_path, {"Vega": "Orion"})
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    entry, command = (
        json.loads(re.findall(rf"^{word} (\[.*)$", DOCKERFILE, re.MULTILINE)[0]) for word in ("ENTRYPOINT", "CMD")
    )
    assert entry == ["kbsync"]
    [check] = re.findall(r"HEALTHCHECK .*\\\n +CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    asks = [sys.executable, *json.loads(check.replace("8765", str(port)))[1:]]
    environment = {"KBSYNC_WORKSPACE": str(made.root), "KBSYNC_SERVER": json.dumps({"port": port})}
    daemon = Running(made.root, "-m", "kbsync", *command, **environment)
    try:
        daemon.wait_for(lambda: daemon.events("daemon_started"))
        assert subprocess.run(asks, timeout=PATIENCE, capture_output=True).returncode == 0
        assert daemon.end() == 0
        assert subprocess.run(asks, timeout=PATIENCE, capture_output=True).returncode != 0
    finally:
        daemon.process.kill()
        daemon.process.wait()


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_confined(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert not service.get("privileged")
    assert "docker.sock" not in str(service)


@pytest.mark.parametrize("name", SERVICES)
def test_every_image_is_pinned_and_no_secret_stands_in_the_file(name: str) -> None:
    service = COMPOSE["services"][name]
    assert re.search(r":v?\d+\.\d+", service["image"])
    secret = {key: value for key, value in service.get("environment", {}).items() if re.search("PASS|TOKEN|KEY", key)}
    assert all(key.endswith(("_FILE", "__FILE")) and value.startswith("/run/secrets/") for key, value in secret.items())
    assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"])


def test_the_database_reaches_nothing_outside_and_the_server_is_shared_with_prometheus_alone() -> None:
    services = COMPOSE["services"]
    assert services["postgres"]["networks"] == ["inside"]
    assert COMPOSE["networks"]["inside"]["internal"] is True
    sharing = {name for name, service in services.items() if service.get("network_mode") == "service:net"}
    assert sharing == {"kbsync", "prometheus"}
    assert "host" not in json.loads(services["kbsync"]["environment"]["KBSYNC_SERVER"])  # so that it is 127.0.0.1


def test_the_documented_first_start_has_a_namespace_before_a_container_joins_it() -> None:
    """`run --no-deps` starts nothing else: no engine shares the namespace of a container that is not there."""
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    started: set[str] = set()
    joined = []
    for kind, words in re.findall(r"^\$ docker compose (up|run) (.*)$", page, re.MULTILINE):
        named = [name for name in SERVICES if name in words.split()]
        for name in named if kind == "run" and "--no-deps" in words else ():
            joined += [name]
            assert COMPOSE["services"][name]["network_mode"].removeprefix("service:") in started
        started |= set(named or SERVICES)
    assert joined == ["kbsync"]


def test_unit_and_container_give_the_daemon_more_descriptors_than_a_shell() -> None:
    """As many in both: the server takes its connections from them, passes their files."""
    limit = COMPOSE["services"]["kbsync"]["ulimits"]["nofile"]
    [unit] = re.findall(r"^LimitNOFILE=(\d+)$", (DEPLOY / "kbsync.service").read_text(), re.MULTILINE)
    assert int(unit) == limit["soft"] == limit["hard"] > 1024


def test_hadolint_finds_nothing() -> None:
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([program, DEPLOY / "Dockerfile"], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="needs docker-compose on PATH to read the files")
@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.gpu.yaml"]], ids=["cpu", "gpu"])
def test_compose_reads_its_files(files: list[str]) -> None:
    named = [word for file in files for word in ("-f", str(DEPLOY / file))]
    done = subprocess.run(
        ["docker-compose", *named, "config", "--quiet"], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stderr) == (0, "")
