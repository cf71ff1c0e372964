"""YAML documents: what is read, what is refused, and that every refusal names file, line and key."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from kbsync.documents import MAX_BYTES, nearest, read_document, redact, validate
from kbsync.errors import ConfigError
from kbsync.policy import Policy, Source


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size: int = 1


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    inner: Inner = Inner()
    parts: list[int] = []


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "file.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refused(folder: Path, text: str | bytes) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        validate(written(folder, text), Outer)
    assert "\n" not in caught.value.message
    return caught.value


def test_text_that_other_versions_of_yaml_take_for_something_else_stays_text(tmp_path: Path) -> None:
    """YAML 1.2: NO is Norway, 12:30 is a text, a date is the text that was written, numbers and null are themselves."""
    path = written(tmp_path, "a: NO\nb: 12:30\nc: 2022-11-08\nd: 'yes'\ne: 010\nf: null\ng: true\nh: 1.5\n")
    value = read_document(path).value
    assert value == {
        "a": "NO",
        "b": "12:30",
        "c": "2022-11-08",
        "d": "yes",
        "e": 10,
        "f": None,
        "g": True,
        "h": 1.5,
    }


def test_each_key_and_item_has_its_line(tmp_path: Path) -> None:
    """Lines count from 1, nested keys and list items have their own, an absent key has its parent's."""
    document = read_document(written(tmp_path, "name: x\ninner:\n  size: 2\nparts:\n  - 1\n  - 2\n"))
    assert document.line(("inner", "size")) == 3
    assert document.line(("parts", 1)) == 6
    assert document.line(("inner", "absent")) == 2
    assert document.line(("absent",)) == 0


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    """Files of Windows editors begin with one."""
    assert validate(written(tmp_path, b"\xef\xbb\xbfname: x\n"), Outer).name == "x"


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("name: x\nname: y\n", ":2: name:", "appears twice, first in line 1"),
        ("name: x\ninner: {size: 1, size: 2}\n", ":2: inner.size:", "appears twice"),
        ("name: &a x\n", ":1: name:", "anchors"),
        ("name: x\ninner: &a {size: 1}\nother: *a\n", ":2: inner:", "anchors"),
        ("name: *a\n", ":1:", "undefined alias"),
        ("name: x\n<<: {parts: [1]}\n", ":2:", "keys must be plain text"),
        ("name: !!python/object/apply:os.system [id]\n", ":1: name:", "tags are not allowed"),
        ("name: !secret x\n", ":1: name:", "tags are not allowed"),
        ("name: !!int x\n", ":1: name:", "is not a int"),
        ("name: x\n1: y\n", ":2:", "keys must be plain text"),
        ("name: x\n? [a, b]\n: y\n", ":2:", "keys must be plain text"),
        ("name: [x\n", ":2:", "expected ',' or ']'"),
        ("name: x\n  bad: y\n", ":2:", "mapping values are not allowed"),
        ("name: x\n\tinner: y\n", ":2:", "\\t"),
        ("name: x\n---\nname: y\n", ":2:", "another document"),
        ("- name\n", ":1:", "must be a mapping"),
        ("", "file.yaml:", "empty"),
        ("# nothing\n", "file.yaml:", "empty"),
        ("name: x\x00\n", "file.yaml:", "does not allow"),
        (b"name: x\ninner: \xff\n", ":2:", "not UTF-8"),
        ("[" * 500, "file.yaml:", "nested too deeply"),
        ("inner: {}\n", "file.yaml: name:", "is missing"),
        ("name: x\nnam: y\n", ":2: nam:", "not a known key"),
        ("name: x\ninner:\n  sise: 1\n", ":3: inner.sise:", "not a known key"),
        ("name: x\ninner:\n  size: many\n", ":3: inner.size:", "(got 'many')"),
        ("name: x\nparts: [1,\n  two]\n", ":3: parts.1:", "(got 'two')"),
    ],
)
def test_what_is_wrong_is_named_with_file_line_and_key(
    tmp_path: Path, text: str | bytes, place: str, problem: str
) -> None:
    """One line each, and nothing of the file is taken."""
    message = refused(tmp_path, text).message
    assert message.startswith(str(tmp_path / "file.yaml"))
    assert place in message
    assert problem in message


def test_a_file_above_the_limit_is_refused_unread(tmp_path: Path) -> None:
    """1 MB is enough for a thousand relations."""
    assert "larger" in refused(tmp_path, b"name: " + b"x" * MAX_BYTES).message


def test_an_absent_file_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    """Not a traceback."""
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_document(tmp_path / "absent.yaml")


def test_a_misspelt_key_comes_before_the_one_that_is_missing_for_it(tmp_path: Path) -> None:
    """`nmae: x` lacks name and has nmae: the second says what to mend."""
    error = refused(tmp_path, "nmae: x\n")
    assert error.key == "nmae"
    assert error.hint == "did you mean name?"
    assert "(and 1 more)" in error.message


def test_a_long_wrong_value_is_cut_and_a_password_never_shown(tmp_path: Path) -> None:
    """An error is one line for a person, and may end up in a log."""
    message = refused(tmp_path, f"name: x\ninner: {{size: 'postgresql://me:canary@host/{'x' * 200}'}}\n").message
    assert "canary" not in message
    assert len(message) < 250


def test_redact_hides_passwords_only() -> None:
    """User and host stay readable."""
    assert redact("postgresql://me:pw@host/db and sqlite:///x") == "postgresql://me:***@host/db and sqlite:///x"


def test_nearest_names_one_or_all() -> None:
    """A likely misspelling gets its word, anything else the list."""
    assert nearest("sorces", ["sources", "guard"]) == "did you mean sources?"
    assert nearest("x", ["b", "a"]) == "known: a, b"
    assert nearest("x", []) == ""


@pytest.mark.parametrize(
    "prompt", ["The constellation is", "{subject} or {subject} is in", "{subject} {other} in", "{subject"]
)
def test_a_template_has_its_subject_exactly_once(tmp_path: Path, prompt: str) -> None:
    """Without it nothing is said of the subject; twice, the position of the edit is ambiguous."""
    path = written(
        tmp_path,
        "policy: p\nsources: [s]\nschedule: {every: 1h}\nrelations:\n"
        f'  r:\n    prompt: "{prompt}"\n    paraphrases: ["{{subject}} is"]\n',
    )
    with pytest.raises(ConfigError, match=r"file\.yaml:6: relations\.r\.prompt: .*(exactly once|braces)"):
        validate(path, Policy)


def test_a_missing_template_is_named(tmp_path: Path) -> None:
    """At the relation that lacks it."""
    path = written(tmp_path, "policy: p\nsources: [s]\nschedule: {every: 1h}\nrelations:\n  r:\n    retract: keep\n")
    with pytest.raises(ConfigError, match=r"file\.yaml:5: relations\.r\.prompt: is missing"):
        validate(path, Policy)


def test_a_source_keeps_the_keys_of_its_connector(tmp_path: Path) -> None:
    """They are checked by the connector, not here."""
    source = validate(written(tmp_path, "source: s\ntype: csv\nrelation: r\nlocation: NO\n"), Source)
    assert source.options == {"location": "NO"}


_WORDS = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), max_size=12)


@settings(max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(10**9), 10**9) | _WORDS,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_WORDS, inner, max_size=4),
        max_leaves=12,
    )
)
def test_json_is_read_as_json_reads_it(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    """JSON is a part of YAML 1.2."""
    path = tmp_path_factory.mktemp("yaml") / "file.yaml"
    path.write_text(json.dumps({"key": value}, ensure_ascii=False), encoding="utf-8")
    assert read_document(path).value == {"key": value}


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    """The open of a pipe that nobody writes to would hang whoever reads the workspace."""
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    found: list[str] = []

    def read() -> None:
        for name in ("pipe.yaml", "folder.yaml"):
            try:
                read_document(tmp_path / name)
            except ConfigError as error:
                found.append(error.message)

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    reading.join(60)
    assert found == [
        f"{tmp_path}/pipe.yaml: is no regular file",
        f"{tmp_path}/folder.yaml: cannot be read: Is a directory",
    ]
