"""What deploy/ has for Prometheus and Grafana: it loads, it names metrics that there are, and each alert fires."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from ruamel.yaml import YAML

from kbsync.cli import app
from kbsync.metrics import DECLARED

DEPLOY = Path(__file__).parents[1] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboards" / "kbsync.json").read_text())
RULES: list[dict[str, Any]] = [
    rule for group in YAML(typ="safe").load(PROMETHEUS / "kbsync.rules.yml")["groups"] for rule in group["rules"]
]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
OTHERS = {"process_resident_memory_bytes": set(), "up": set()}
"""What is asked for and is not kbsync's own."""

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not here; ends with: apt install prometheus"
)


def promtool(*arguments: str | Path, folder: Path = PROMETHEUS) -> None:
    """Run it; fails with what it says."""
    done = subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def exported() -> dict[str, set[str]]:
    """Every name that a query may use, with its labels."""
    found: dict[str, set[str]] = {name: set(labels) for name, labels in OTHERS.items()}
    for one in DECLARED:
        names = [f"{one.name}_sum", f"{one.name}_count"] if one.kind == "summary" else [one.name]
        found |= {name: set(one.labels) for name in names}
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of every rule, panel, annotation and variable."""
    yield from ((rule["alert"], rule["expr"]) for rule in RULES)
    for panel in PANELS:
        yield from ((panel["title"], target["expr"]) for target in panel["targets"])
    yield from ((one["name"], one["expr"]) for one in DASHBOARD["annotations"]["list"])
    for variable in DASHBOARD["templating"]["list"]:
        if match := re.fullmatch(r"label_values\((.*), \w+\)", variable["query"]):
            yield variable["name"], match[1]


ASKED = list(expressions())


@pytest.mark.parametrize(("where", "expression"), ASKED, ids=[where for where, _ in ASKED])
def test_a_query_names_metrics_and_labels_that_there_are(where: str, expression: str) -> None:
    known = exported()
    asked = re.findall(r"\b(kbsync_\w+|process_\w+|up)\b(?:\{([^}]*)\})?", expression)
    assert asked, where
    for name, selector in asked:
        labels = set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", selector))
        assert name in known, (where, name)
        assert labels <= known[name] | {"instance", "job"}, (where, name, labels)


def test_every_metric_that_counts_is_on_the_dashboard_or_in_an_alert() -> None:
    """But for those that say what there is rather than how it goes."""
    text = " ".join(expression for _, expression in ASKED)
    unseen = {one.name for one in DECLARED if one.name not in text}
    assert unseen == {
        "kbsync_daemon_running",
        "kbsync_notices_total",
        "kbsync_policy_last_start_timestamp_seconds",
        "kbsync_held_runs_oldest_timestamp_seconds",
        "kbsync_source_retry_timestamp_seconds",
        "kbsync_head_timestamp_seconds",
        "kbsync_versions_total",
        "kbsync_facts_held_total",
        "kbsync_capacity_facts_left",
    }


@needs_promtool
def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    """The token's file is the container's: here another one stands in for it."""
    promtool("check", "config", "--syntax-only", "prometheus.yml")
    (tmp_path / "token").write_text("a token of the test")
    for file in PROMETHEUS.iterdir():
        text = file.read_text().replace("/run/secrets/server_token", str(tmp_path / "token"))
        (tmp_path / file.name).write_text(text)
    promtool("check", "config", tmp_path / "prometheus.yml", folder=tmp_path)


@needs_promtool
def test_the_alerts_are_rules_and_each_fires_when_it_should() -> None:
    promtool("check", "rules", "kbsync.rules.yml")
    promtool("test", "rules", "kbsync.rules.test.yml")


def test_each_alert_is_tried_and_names_the_next_command() -> None:
    tried = (PROMETHEUS / "kbsync.rules.test.yml").read_text()
    page = (DEPLOY.parent / "docs" / "metrics.md").read_text()
    group = typer.main.get_command(app)
    for rule in RULES:
        assert rule["alert"] in tried
        assert f"| `{rule['alert']}` |" in page
        assert rule["labels"]["severity"] in ("critical", "warning")
        _, _, steps = rule["annotations"]["description"].partition("Next: ")
        named = re.findall(r"\bkbsync (\w+)", steps)
        assert named, rule["alert"]
        assert set(named) <= set(group.commands), rule["alert"]  # type: ignore[attr-defined]


@needs_promtool
def test_prometheus_understands_every_query_of_the_dashboard(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$instance", ".*")}
        for number, (_, expression) in enumerate(ASKED)
    ]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", "--lint=none", "rules.yml", folder=tmp_path)


def lost(written: Any, kept: Any, place: str = "") -> Iterator[str]:
    """What of `written` is not in `kept`."""
    if isinstance(written, Mapping):
        for name, inner in written.items():
            yield from lost(inner, kept[name], f"{place}.{name}") if name in kept else [f"{place}.{name}"]
    elif isinstance(written, list):
        yield from [place] if len(written) != len(kept) else ()
        for number, (inner, other) in enumerate(zip(written, kept, strict=False)):
            yield from lost(inner, other, f"{place}[{number}]")
    elif written != kept:
        yield place


def through_the_schema(dashboard: Mapping[str, Any]) -> Any:
    """The dashboard as Grafana's own types (made of its schema) read and write it: what they do not know is gone."""
    register_default_plugins()
    return json.loads(JSONEncoder().encode(Dashboard.from_json(dict(dashboard))))


def test_grafanas_schema_knows_every_key_of_the_dashboard() -> None:
    assert list(lost(DASHBOARD, through_the_schema(DASHBOARD))) == []
    wrong = json.loads(json.dumps(DASHBOARD))
    wrong["panels"][1]["options"]["colour"] = "red"
    assert list(lost(wrong, through_the_schema(wrong))) == [".panels[1].options.colour"]


def test_panels_have_a_place_of_their_own_a_description_and_the_chosen_datasource() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert taken.isdisjoint(cells), panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in PANELS:
        assert panel["description"].endswith("."), panel["title"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}


def test_the_paths_are_those_that_the_compose_file_mounts() -> None:
    compose = YAML(typ="safe").load(DEPLOY / "compose.yaml")["services"]
    mounted = dict(volume.split(":")[:2] for volume in compose["grafana"]["volumes"] if volume.startswith("./"))
    provider = YAML(typ="safe").load(DEPLOY / "grafana" / "provisioning" / "dashboards" / "kbsync.yaml")
    [source] = YAML(typ="safe").load(DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yaml")[
        "datasources"
    ]
    assert provider["providers"][0]["options"]["path"] == mounted["./grafana/dashboards"]
    assert source["url"] == "${PROMETHEUS_URL}"
    assert "PROMETHEUS_URL" in compose["grafana"]["environment"]
    assert DASHBOARD["templating"]["list"][0]["current"]["value"] == source["uid"]
    assert "./prometheus:/etc/prometheus:ro" in compose["prometheus"]["volumes"]
