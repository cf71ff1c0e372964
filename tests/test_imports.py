"""Which module may import which: held here, so that the layers stay what docs/architecture.md says."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kbsync"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
HEAVY = ("torch", "transformers", "safetensors", "ray")
MAY_BE_HEAVY = (
    "kbsync.editor.",
    "kbsync.bench.",
    "kbsync.executor",
    "kbsync.versions.delta",
    "kbsync.versions.weights",
    "kbsync.versions.export",
)
ORDER_KNOWN_BY = ("kbsync.commands", "kbsync.daemon", "kbsync.cli", "kbsync.demo")


def imported(path: Path, *, top_level: bool) -> Iterator[str]:
    """Names of the modules that a file imports; `top_level`: only those that its own import loads."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = _top_level(tree) if top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def _top_level(tree: ast.Module) -> Iterator[ast.AST]:
    """Statements outside functions and `if TYPE_CHECKING`."""
    for node in tree.body:
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            yield node


@pytest.mark.parametrize("name", ["kbsync.facts", "kbsync.errors"])
def test_the_shared_words_import_nothing_of_ours(name: str) -> None:
    assert not [module for module in imported(MODULES[name], top_level=False) if module.startswith("kbsync")]


@pytest.mark.parametrize(
    "name",
    [
        "kbsync.weigh",
        "kbsync.resolve",
        "kbsync.plan",
        "kbsync.plan_document",
        "kbsync.gate",
        "kbsync.culprits",
        "kbsync.bisect",
        "kbsync.strategy",
    ],
)
def test_decisions_import_only_words_and_policies(name: str) -> None:
    ours = {module for module in imported(MODULES[name], top_level=False) if module in MODULES}
    assert ours <= {"kbsync.facts", "kbsync.errors", "kbsync.policy", "kbsync.weigh", "kbsync.resolve", "kbsync.plan"}
    theirs = {module.partition(".")[0] for module in imported(MODULES[name], top_level=False)}
    assert theirs.isdisjoint({"os", "io", "pathlib", "sqlite3", "sqlalchemy", "httpx", "torch", "random", "time"})


def test_only_the_editor_and_the_weights_import_torch() -> None:
    guilty = [
        (name, module)
        for name, path in MODULES.items()
        for module in imported(path, top_level=True)
        if module.partition(".")[0] in HEAVY and not name.startswith(MAY_BE_HEAVY)
    ]
    assert guilty == []


def test_only_commands_daemon_and_cli_know_the_order_of_a_pass() -> None:
    guilty = [
        name
        for name, path in MODULES.items()
        if not name.startswith(ORDER_KNOWN_BY) and "kbsync.reconcile" in imported(path, top_level=False)
    ]
    assert guilty == []


LIGHT = [
    ["--help"],
    ["check"],
    ["status"],
    ["freshness"],
    ["notices"],
    ["facts"],
    ["facts", "--csv"],
    ["entity", "Vega"],
    ["blame", "Vega", "constellation"],
    ["log"],
    ["history", "Vega"],
    ["changes", "--since", "2026-01-01"],
    ["conflicts", "list"],
    ["quarantine", "list"],
    ["holds"],
    ["runs"],
    ["metrics"],
]


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_help_and_every_ledger_query_load_no_torch(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from kbsync.cli import main\n"
        "sys.argv = ['kbsync', *sys.argv[1:]]\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "sys.exit(f'loads {loaded}' if loaded else 0)"
    )
    (tmp_path / "kbsync.yaml").write_text("model: smollm2-135m\n")
    where = [] if arguments == ["--help"] else ["--workspace", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *arguments, *where], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
