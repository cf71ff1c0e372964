"""The documents say what the code does: every command, key and name; no link leads nowhere."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel

from kbsync.cli import app
from kbsync.config import Settings
from kbsync.connectors.columns import Aliases, Cell, Columns
from kbsync.connectors.csv_feed import CsvOptions
from kbsync.connectors.feed import Minisign
from kbsync.connectors.parts import Chunks, Incremental, Pages
from kbsync.connectors.sparql import SparqlOptions
from kbsync.connectors.sql import SqlOptions
from kbsync.editor.job import ExecutorSettings
from kbsync.ledger.schema import metadata
from kbsync.ledger.views import VIEWS
from kbsync.notify.message import Message
from kbsync.notify.settings import Command, Email, Notify, Webhook
from kbsync.plan_document import PlanFile
from kbsync.policy import Confirm, Gate, Guard, Inverse, Policy, Relation, Source
from kbsync.strategy import Strategy
from kbsync.web.settings import Server, Tls

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
KEYS = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
MODELS: list[type[BaseModel]] = [
    Settings,
    ExecutorSettings,
    Source,
    CsvOptions,
    Minisign,
    Columns,
    Cell,
    Aliases,
    SparqlOptions,
    SqlOptions,
    Chunks,
    Pages,
    Incremental,
    Policy,
    Relation,
    Inverse,
    Confirm,
    Guard,
    Gate,
    Strategy,
    Server,
    Tls,
    Notify,
    Webhook,
    Command,
    Email,
]


def commands() -> Iterator[str]:
    """Every command as it is typed: `sync`, `model pull`."""
    group = typer.main.get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        if hasattr(command, "commands"):
            yield from (f"{name} {inner}" for inner in command.commands)
        else:
            yield name


def exported() -> Iterator[tuple[str, object]]:
    """Every name in an `__all__`, with what it stands for."""
    for path in sorted((ROOT / "kbsync").rglob("*.py")):
        if "migrations" in path.parts or path.name == "__main__.py":
            continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):
            yield f"{name}.{public}", getattr(module, public)


@pytest.mark.parametrize("command", sorted(commands()))
def test_every_command_is_in_the_readmes_table(command: str) -> None:
    rows = [line.split("|")[1] for line in README.splitlines() if line.startswith("| `")]
    assert any(re.search(rf"`{re.escape(command)}\b", row) for row in rows)


def test_every_command_has_a_help_text() -> None:
    group = typer.main.get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        assert command.help or hasattr(command, "commands"), name


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_key_is_documented(model: type[BaseModel]) -> None:
    missing = [name for name in model.model_fields if not re.search(rf"[`{{ ]{name}[`:]", KEYS)]
    assert missing == []


def test_every_exported_class_and_function_has_a_docstring() -> None:
    bare = [
        name
        for name, value in exported()
        if (inspect.isclass(value) or inspect.isfunction(value)) and not inspect.getdoc(value)
    ]
    assert bare == []


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_no_link_leads_nowhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target]
    assert [target for target in targets if not ((ROOT / page).parent / target).exists()] == []


def test_every_table_and_column_of_the_ledger_is_documented() -> None:
    page = (ROOT / "docs" / "ledger.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    tables = metadata.tables
    assert rows.keys() == tables.keys() | {view.name for view in VIEWS}
    for name, table in tables.items():
        assert [column.name for column in table.c if f"`{column.name}`" not in rows[name]] == []


def test_every_field_of_a_notices_message_is_documented() -> None:
    page = (ROOT / "docs" / "notices.md").read_text(encoding="utf-8")
    assert [name for name in Message.model_fields if f"| `{name}` |" not in page] == []


def test_the_schema_of_plan_documents_is_the_one_that_they_are_checked_by() -> None:
    """docs/plan.schema.json is `PlanFile.model_json_schema()`, with sorted keys."""
    assert json.loads((ROOT / "docs" / "plan.schema.json").read_text(encoding="utf-8")) == PlanFile.model_json_schema()


def test_the_readmes_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"$ make {target}" in README
        assert re.search(rf"^{target}:.*## ", makefile, re.MULTILINE)
