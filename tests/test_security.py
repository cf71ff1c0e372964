"""What an attacker would try, requirement by requirement of docs/security.md: what no module's own tests hold.

The page has a table of requirements and the tests that hold them; it is checked here that each of those exists.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kbsync.cli.common import TameConsole
from kbsync.config import Workspace
from kbsync.connectors import Place
from kbsync.connectors.http import HttpOptions, send
from kbsync.connectors.text import clean_label
from kbsync.documents import read_document
from kbsync.editor.model import load_base
from kbsync.errors import ConfigError, KbsyncError, ModelError, SourceInvalid
from kbsync.exports import write_csv
from kbsync.facts import Entity, Fact
from kbsync.hub import resolve_model
from kbsync.policy import Relation, render
from kbsync.terminal import tame
from tests.feeds import CSV, connector
from tests.standin import StandIn
from tests.tiny import save, tiny_llama
from tests.workspaces import workspace

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
PACKAGE = sorted((ROOT / "kbsync").rglob("*.py"))
REQUIREMENTS = [f"R6.{number}" for number in range(1, 12)]


# the page


def rows() -> dict[str, str]:
    """Requirement -> the rest of its row in the page's table."""
    found = re.findall(r"^\| (R6\.\d+) (.*)$", PAGE, re.MULTILINE)
    assert len(found) == len({name for name, _ in found})
    return dict(found)


@pytest.mark.parametrize("requirement", REQUIREMENTS)
def test_every_requirement_names_tests_that_exist(requirement: str) -> None:
    named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", rows()[requirement])
    assert named, f"{requirement} names no test"
    for file, test in named:
        tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"))
        assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"


# R6.1: files of the workspace


@settings(max_examples=200)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))))
def test_any_bytes_are_a_document_or_an_error_of_one_line(tmp_path_factory: Any, body: bytes) -> None:
    path = tmp_path_factory.mktemp("yaml", numbered=True) / "file.yaml"
    path.write_bytes(body)
    problem = ""
    try:
        read_document(path)
    except ConfigError as error:
        problem = error.message
    assert "\n" not in problem


def test_an_alias_bomb_is_refused_before_it_grows(tmp_path: Path) -> None:
    """Nine lists of nine times the one before: 3 GB of text from 400 bytes."""
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"bomb.yaml:1: a0: anchors"):
        read_document(tmp_path / "bomb.yaml")


# R6.3: paths


HOSTILE = ["../secret.txt", "sub/../../secret.txt", "/etc/passwd", "/proc/self/environ", "/dev/zero", "link/secret.txt"]
FILE_KEYS: dict[str, Callable[[str], dict[str, Any]]] = {
    "location": lambda path: {"location": path},
    "sha256": lambda path: {"sha256": path},
    "minisign": lambda path: {
        "minisign": {
            "public_key": "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3",
            "signature": path,
        }
    },
    "lookup": lambda path: {"columns": {"subject": "name", "object": {"column": "con", "lookup": path}}},
}


@pytest.mark.parametrize("path", HOSTILE)
@pytest.mark.parametrize("key", FILE_KEYS)
def test_no_key_of_a_source_reads_a_file_outside_its_folders(tmp_path: Path, key: str, path: str) -> None:
    """Up, absolute, through /proc, a device, through a link in the folder."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("canary")
    (folder / "stars.csv").write_text(CSV)
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises((ValidationError, KbsyncError), match="outside the folders") as caught:
        connector(folder, **FILE_KEYS[key](path)).fetch(None)
    assert "canary" not in str(caught.value)


def test_a_folder_that_becomes_a_link_after_the_check_leads_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The swap comes just between the judgement of the path and its opening."""
    inside, outside = tmp_path / "sources" / "daily", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir(parents=True)
        (folder / "stars.csv").write_text(f"{folder.name}\n")
    place = Place(tmp_path / "sources", ())
    assert place.read("daily/stars.csv", 100) == b"daily\n"
    judged = place.path("daily/stars.csv")
    (inside / "stars.csv").unlink()
    inside.rmdir()
    inside.symlink_to(outside)
    monkeypatch.setattr(Place, "path", lambda *_: judged)
    with pytest.raises(OSError, match=r"[Nn]ot a directory|symbolic link"):
        place.read("daily/stars.csv", 100)


# R6.4: addresses


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "127.1", "[::ffff:127.0.0.1]", "[::]", "0"])
def test_this_machine_is_not_reached_by_another_spelling_of_its_address(host: str) -> None:
    """As a number, in hexadecimal, shortened, mapped: what it resolves to is judged, not how it is written."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        request = httpx.Request("GET", f"http://{host}:{server.getsockname()[1]}/")
        with pytest.raises(KbsyncError, match=r"not on the public network|does not resolve"):
            send("stars", request, HttpOptions(insecure_http=True, private_network=True))
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize("host", ["169.254.169.254", "metadata.example", "[fe80::1]"])
def test_a_database_is_at_no_metadata_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    plain = socket.getaddrinfo
    metadata = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", 0))]
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda name, *a, **k: metadata if name == "metadata.example" else plain(name, *a, **k)
    )
    source = connector(
        tmp_path,
        "sql",
        location=None,
        url=f"postgresql+psycopg://reader@{host}/facts",
        query="SELECT hip, name, con FROM stars",
    )
    with pytest.raises(SourceInvalid, match="is no database's"):
        source.fetch(None)


# R6.5 and R6.11: what sources write


LABELS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=60)
FORMULA = st.builds(str.__add__, st.sampled_from("=+-@\t\r"), st.text("=+-@|!A1()'\" ", max_size=20))
HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@settings(max_examples=300)
@given(st.text(st.characters(), max_size=80))
def test_no_text_is_an_order_to_a_terminal(text: str) -> None:
    """Printed, as markup or escaped, as a cell or a line, or as JSON, which stays the same JSON."""
    out = io.StringIO()
    console = TameConsole(file=out, force_terminal=False, width=4000, highlight=False)
    console.print(text, markup=False)
    assert not HARMFUL.search(out.getvalue())
    assert not HARMFUL.search(tame(text))
    assert json.loads(tame(json.dumps(text, ensure_ascii=False))) == text


@settings(max_examples=300)
@given(LABELS, LABELS)
def test_a_label_stays_data_from_the_source_to_the_prompt(subject: str, object_: str) -> None:
    """It fills its place and changes nothing around it; braces and markup in it mean nothing."""
    try:
        one, other = clean_label(subject, "subject"), clean_label(object_, "object")
    except ValueError:
        return
    assert not HARMFUL.search(one)
    assert len(one) <= 512
    wording = Relation(prompt="Where is {subject}", paraphrases=["The home of {subject}"])
    request = render(Fact("home", Entity("x:1", one), Entity("x:2", other), "here", "live", "1"), wording)
    assert (request.prompt, request.paraphrases) == (f"Where is {one}", (f"The home of {one}",))
    assert (request.subject, request.target) == (one, other)


@given(FORMULA)
def test_no_cell_of_an_export_is_a_formula(text: str) -> None:
    out = io.StringIO()
    write_csv(["label"], [{"label": text}], out)
    assert re.match(r"^\"?'", out.getvalue().splitlines()[1])


# R6.6: models and code


BANNED_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "telnetlib"}
BANNED_CALLS = {"eval", "exec", "compile", "__import__"}
BANNED_ATTRIBUTES = {
    ("torch", "load"),
    ("torch", "save"),
    ("os", "system"),
    ("os", "popen"),
    ("os", "umask"),
    ("tempfile", "mktemp"),
    ("numpy", "load"),
    ("np", "load"),
    ("yaml", "load"),
    ("hub", "load"),
}
SHELL = "kbsync/hook.py"


def test_no_module_runs_data_as_code() -> None:
    """By its syntax, not its text: no pickle, no eval, no shell but the owner's own commands, no remote code."""
    found = [
        f"{path.relative_to(ROOT)}:{danger}"
        for path in PACKAGE
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for danger in _dangers(node, shell_allowed=str(path.relative_to(ROOT)) == SHELL)
    ]
    assert not found, "\n".join(found)


def _dangers(node: ast.AST, *, shell_allowed: bool) -> Iterator[str]:
    line = getattr(node, "lineno", 0)
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        for name in names:
            if name.partition(".")[0] in BANNED_IMPORTS or name == "apscheduler.jobstores.sqlalchemy":
                yield f"{line}: imports {name}"
    if not isinstance(node, ast.Call):
        return
    if isinstance(node.func, ast.Name) and node.func.id in BANNED_CALLS:
        yield f"{line}: calls {node.func.id}"
    if isinstance(node.func, ast.Attribute):
        owner = (
            node.func.value.attr if isinstance(node.func.value, ast.Attribute) else getattr(node.func.value, "id", "")
        )
        if (owner, node.func.attr) in BANNED_ATTRIBUTES:
            yield f"{line}: calls {owner}.{node.func.attr}"
    for keyword in node.keywords:
        true = isinstance(keyword.value, ast.Constant) and bool(keyword.value.value)
        if keyword.arg == "shell" and true and not shell_allowed:
            yield f"{line}: shell=True"
        if keyword.arg in ("trust_remote_code", "allow_pickle") and not (
            isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        ):
            yield f"{line}: {keyword.arg}"
        if keyword.arg in ("use_safetensors", "weights_only", "verify") and not true:
            yield f"{line}: {keyword.arg} is not True"
    loads = isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained"
    if loads and "trust_remote_code" not in {keyword.arg for keyword in node.keywords}:
        yield f"{line}: from_pretrained without trust_remote_code=False"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from torch.serialization import x; torch.load(f)",
        "torch.hub.load('a')",
        "eval(text)",
        "subprocess.run(c, shell=True)",
        "AutoModel.from_pretrained(f)",
        "AutoModel.from_pretrained(f, trust_remote_code=flag)",
        "np.load(f, allow_pickle=True)",
        "from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore",
        "httpx.get(u, verify=False)",
    ],
)
def test_the_search_for_such_code_finds_it(code: str) -> None:
    assert [one for node in ast.walk(ast.parse(code)) for one in _dangers(node, shell_allowed=False)]


def test_a_model_folder_cannot_bring_code(tmp_path: Path) -> None:
    """A config that names classes of a file beside it: the file is never run, whatever else becomes of the model."""
    folder = save(tiny_llama(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["evil.AutoTokenizer", "evil.AutoTokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with suppress(ModelError):
        load_base(folder, fingerprint="0" * 64, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_a_model_of_a_family_that_is_only_code_is_refused(tmp_path: Path) -> None:
    folder = save(tiny_llama(), tmp_path / "model")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError):
        load_base(folder, fingerprint="0" * 64, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    """A checkpoint whose pickle would run a command as it is read."""
    import pickle

    folder = save(tiny_llama(), tmp_path / "model")

    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Evil()))
    load_base(folder, fingerprint="0" * 64, device="cpu")  # the safetensors are taken
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        load_base(folder, fingerprint="0" * 64, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_a_manifest_names_the_commit_of_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of the Hub lies in a folder that is named by it; any other has none."""
    made = workspace(tmp_path, {"Vega": "Orion"})
    found = resolve_model("model", root=tmp_path)
    monkeypatch.setattr("kbsync.serving.resolve_model", lambda *_, **__: replace(found, revision="c0ffee"))
    with made.open() as reconciler:
        reconciler.run_edit = StandIn()
        [report] = reconciler.sync()
        assert report.versions == [1]
        [path] = (tmp_path / "data" / "versions").glob("*/000001.json")
    assert json.loads(path.read_text())["base_revision"] == "c0ffee"


@pytest.mark.parametrize(
    ("model", "unwise"),
    [("owner/name", True), ("owner/name@c0ffee", False), ("smollm2-135m", False), ("models/mine", False)],
)
def test_a_model_without_a_revision_is_warned_of(tmp_path: Path, model: str, unwise: bool) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "kbsync.yaml").write_text(f"model: {model}\n")
    warnings = [one for one in Workspace.load(tmp_path).warnings() if "names no revision" in one]
    assert bool(warnings) is unwise


@pytest.mark.parametrize("place", [".", "kbsync.yaml", "sources", "policies", "data"])
def test_what_everybody_may_write_to_is_warned_of(tmp_path: Path, place: str) -> None:
    root = tmp_path / "workspace"
    for folder in ("sources", "policies", "data"):
        (root / folder).mkdir(parents=True)
    (root / "kbsync.yaml").write_text("model: smollm2-135m\n")
    assert not [one for one in Workspace.load(root).warnings() if "everybody" in one]
    (root / place).chmod((root / place).stat().st_mode | stat.S_IWOTH)
    [warning] = [one for one in Workspace.load(root).warnings() if "everybody" in one]
    assert warning.startswith(f"{(root / place).absolute()}: everybody may write there")
