"""Reading the workspace's YAML files: YAML 1.2 (`NO` stays `NO`), each value with its line, everything clever refused.

Duplicate keys, anchors and aliases, tags, keys that are not text, more than one document and files above 1 MB are
errors (RELIABILITY R6.1). Nodes are composed by ruamel.yaml (https://yaml.org/spec/1.2.2/), never constructed as
objects.

    document = read_document(Path("sources/star-catalog.yaml"))
    source = document.validate(Source)       # or in one step: validate(path, Source)
    raise document.error(("columns", "subject"), "no such column")
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from kbsync.errors import ConfigError
from kbsync.references import names_secret, noted

__all__ = ["MAX_BYTES", "Document", "KeyPath", "describe", "nearest", "read_document", "redact", "validate"]

MAX_BYTES = 1_000_000
"""Largest file read, in bytes; a policy of a thousand relations is below 500 kB."""

KeyPath = tuple[str | int, ...]
"""Where a value stands: `("relations", "constellation", "prompt")`, `("sources", 0)`."""

ModelT = TypeVar("ModelT", bound=BaseModel)

_TAG = "tag:yaml.org,2002:"
_TYPED = {_TAG + name for name in ("int", "float", "bool", "null")}
_TEXT = {_TAG + name for name in ("str", "timestamp", "value")}
"""Dates stay the text that was written: YAML 1.2 knows no timestamp."""
_SHOWN = 60
"""Characters of a wrong value that an error repeats."""


@dataclass(frozen=True, slots=True)
class Document:
    """A YAML mapping with the line of every key path."""

    path: Path
    value: Mapping[str, Any]
    lines: Mapping[KeyPath, int]

    def line(self, key: Sequence[str | int]) -> int:
        """Line (from 1) of the deepest part of `key` that the file has; 0 where it has none of it."""
        for length in range(len(key), 0, -1):
            if (line := self.lines.get(tuple(key[:length]))) is not None:
                return line
        return 0

    def error(self, key: Sequence[str | int], problem: str, *, hint: str = "") -> ConfigError:
        """The error (not raised) that names the file, the line of `key`, the key and the problem."""
        name = ".".join(str(part) for part in key)
        return ConfigError(problem, file=self.path, line=self.line(key), key=name, hint=hint)

    def note(self, key: Sequence[str | int], remark: str) -> str:
        """A warning as one line, placed as an error is."""
        return self.error(key, remark).message

    def validate(self, model: type[ModelT]) -> ModelT:
        """The file's content as `model`. Raises ConfigError for the first thing that is wrong."""
        try:
            return model.model_validate(dict(self.value))
        except ValidationError as error:
            raise self.explain(error, model) from error

    def explain(self, error: ValidationError, model: type[BaseModel] | None = None, *, at: KeyPath = ()) -> ConfigError:
        """What pydantic found, as one line: the first finding, with its place in this file (under `at`).

        An unknown key comes first: it is the misspelt name of one that is missing, more often than not.
        """
        finding = min(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
        key = self._known(at + tuple(finding["loc"]), missing=finding["type"] == "missing")
        more = error.error_count() - 1
        problem, hint = describe(finding), ""
        if finding["type"] == "extra_forbidden":
            hint = nearest(str(finding["loc"][-1]), model.model_fields if model and len(finding["loc"]) == 1 else ())
        return self.error(key, problem + (f" (and {more} more)" if more else ""), hint=hint)

    def _known(self, loc: KeyPath, *, missing: bool) -> KeyPath:
        """`loc` without what pydantic adds for unions and validators; a missing key keeps its own name."""
        known: KeyPath = ()
        for part in loc:
            if (*known, part) in self.lines:
                known = (*known, part)
        if not known:
            return loc
        return (*known, loc[-1]) if missing and known[-1] != loc[-1] else known


def read_document(path: Path) -> Document:
    """Read one YAML file. Raises ConfigError naming file and line."""
    text = _read_text(path)
    noted(text)
    yaml = YAML(typ="safe", pure=True)
    try:
        node = yaml.compose(text)
    except (YAMLError, RecursionError, ValueError) as error:
        raise _syntax_error(path, error) from error
    if not isinstance(node, MappingNode):
        problem = "the file is empty" if node is None else "must be a mapping of keys to values"
        raise ConfigError(problem, file=path, line=0 if node is None else 1)
    reader = _Reader(path, yaml, {})
    value = reader.mapping(node, ())
    return Document(path, value, reader.lines)


def validate(path: Path, model: type[ModelT]) -> ModelT:
    """Read `path` and validate it as `model`. Raises ConfigError naming file, line, key and value."""
    return read_document(path).validate(model)


def redact(text: str) -> str:
    """`text` with the password of every URL in it replaced by `***`."""
    return re.sub(r"(://[^/\s:@]*):[^@\s]*@", r"\1:***@", text)


def _read_text(path: Path) -> str:
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError("is no regular file", file=path)
            body = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror or error}", file=path) from error
    if len(body) > MAX_BYTES:
        raise ConfigError(f"is larger than {MAX_BYTES:,} bytes", file=path)
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError("is not UTF-8", file=path, line=body[: error.start].count(b"\n") + 1) from error


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; to open a pipe would wait for its writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def _syntax_error(path: Path, error: Exception) -> ConfigError:
    if isinstance(error, MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        problem = " ".join((error.problem or error.context or "is not YAML").split())
        return ConfigError(problem, file=path, line=mark.line + 1 if mark else 0)
    if isinstance(error, ReaderError):
        return ConfigError(f"has a character that YAML does not allow (position {error.position})", file=path)
    if isinstance(error, RecursionError):
        return ConfigError("is nested too deeply", file=path)
    return ConfigError(f"is not YAML: {error}", file=path)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Turns composed nodes into plain values and notes where each stands."""

    path: Path
    yaml: YAML
    lines: dict[KeyPath, int]

    def value(self, node: Node, at: KeyPath) -> Any:
        if node.anchor is not None:
            raise self._refuse(node, at, "anchors (&) and aliases (*) are not allowed")
        if isinstance(node, MappingNode):
            return self.mapping(node, at)
        if isinstance(node, SequenceNode):
            return self.sequence(node, at)
        return self.scalar(node, at)

    def mapping(self, node: MappingNode, at: KeyPath) -> dict[str, Any]:
        self._plain(node, at, {_TAG + "map"})
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode) or key_node.tag not in _TEXT or key_node.anchor is not None:
                raise self._refuse(key_node, at, "keys must be plain text (put the key in quotes)")
            key = str(key_node.value)
            if key in found:
                raise self._refuse(key_node, (*at, key), f"appears twice, first in line {self.lines[*at, key]}")
            self.lines[*at, key] = key_node.start_mark.line + 1
            found[key] = self.value(value_node, (*at, key))
        return found

    def sequence(self, node: SequenceNode, at: KeyPath) -> list[Any]:
        self._plain(node, at, {_TAG + "seq"})
        found = []
        for index, item in enumerate(node.value):
            self.lines[*at, index] = item.start_mark.line + 1
            found.append(self.value(item, (*at, index)))
        return found

    def scalar(self, node: Node, at: KeyPath) -> Any:
        self._plain(node, at, _TYPED | _TEXT)
        if node.tag in _TEXT:
            return str(node.value)
        try:
            return self.yaml.constructor.construct_object(node)
        except (YAMLError, ValueError) as error:
            raise self._refuse(node, at, f"is not a {str(node.tag).removeprefix(_TAG)}") from error

    def _plain(self, node: Node, at: KeyPath, tags: set[str]) -> None:
        if node.tag not in tags:
            raise self._refuse(node, at, f"tags are not allowed ({str(node.tag).replace(_TAG, '!!')})")

    def _refuse(self, node: Node, at: KeyPath, problem: str) -> ConfigError:
        name = ".".join(str(part) for part in at)
        return ConfigError(problem, file=self.path, line=node.start_mark.line + 1, key=name)


def describe(finding: ErrorDetails) -> str:
    """One finding of pydantic in our words, with the wrong value (no secret, one line)."""
    kind, message, value = finding["type"], finding["msg"], finding["input"]
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        return "is not a known key"
    message = message.removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    secret = any(names_secret(str(part)) for part in finding["loc"])
    if secret or (isinstance(value, Mapping | Sequence) and not isinstance(value, str)):
        return message
    shown = " ".join(redact(str(value)).split())
    return f"{message} (got {shown[:_SHOWN] + '…' if len(shown) > _SHOWN else shown!r})"


def nearest(key: str, known: Iterable[str]) -> str:
    """A hint with the one of `known` that looks most like `key`; all of them where none does."""
    names = sorted(known)
    close = difflib.get_close_matches(key, names, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"known: {', '.join(names)}" if names else ""
