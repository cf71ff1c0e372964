"""The settings that are in force, each with where it is from, and with nothing secret in them.

for setting in effective(Path(".")):
    setting.key, setting.value, setting.origin      # "retention.versions", 20, "default"
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr
from pydantic_settings import EnvSettingsSource

from kbsync.config import CONFIG, ENVIRONMENT, Settings, Workspace
from kbsync.documents import Document, KeyPath, read_document
from kbsync.log import redact
from kbsync.references import FILE, holds_password, is_reference

__all__ = ["Setting", "effective"]

HIDDEN = "***"


@dataclass(frozen=True, slots=True)
class Setting:
    """One value of kbsync.yaml. `value`: as JSON has it; `origin`: `kbsync.yaml:LINE`, `KBSYNC_<KEY>` or `default`."""

    key: str
    value: Any
    origin: str


def effective(root: Path) -> list[Setting]:
    """Every setting of the workspace at `root`, in the order of its documentation. Raises ConfigError."""
    settings, document = Workspace.load(root).settings, read_document(root / CONFIG)
    environment = EnvSettingsSource(Settings)()
    return [
        Setting(".".join(map(str, at)), _shown(value), _origin(at, environment, document))
        for at, value in _leaves((), settings)
    ]


def _leaves(at: KeyPath, value: object) -> Iterator[tuple[KeyPath, object]]:
    """Every value below `at` that is no model, mapping or list of such."""
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, list | tuple) and any(isinstance(item, BaseModel | Mapping) for item in value):
        value = dict(enumerate(value))
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves((*at, name), inner)
    else:
        yield at, value


def _origin(at: KeyPath, environment: Mapping[str, Any], document: Document) -> str:
    if _has(environment, at):
        return f"{ENVIRONMENT}{at[0]}".upper()
    return f"{CONFIG}:{document.line(at)}" if _has(document.value, at) else "default"


def _has(value: object, at: KeyPath) -> bool:
    """Whether a value of JSON or YAML says anything at `at`: what is no container says all that is below it."""
    for name in at:
        if isinstance(value, Mapping):
            if name not in value:
                return False
            value = value[name]
        elif isinstance(value, Sequence) and not isinstance(value, str) and isinstance(name, int):
            if name >= len(value):
                return False
            value = value[name]
    return True


def _shown(value: object) -> Any:
    if isinstance(value, SecretStr):
        return _reference(value.get_secret_value())
    plain = [str(item) for item in value] if isinstance(value, list | tuple) else value
    return redact(None, "", {"value": plain})["value"]


def _reference(text: str) -> str:
    """A secret as it is declared, where all that is secret in it stands elsewhere."""
    whole = re.fullmatch(r"\$\{\w+\}", text) or text.startswith(FILE)
    part = "://" in text and is_reference(text) and not holds_password(text)
    return text if whole or part else HIDDEN
