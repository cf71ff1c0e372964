"""Settings of an experiment as they are typed: changes of a preset, and named points of a frontier. Torch-free.

changed(preset, typed(["covariance_weight=600", "layers=4-8"]))
points(["tight: clamp=0.5,steps=20"])            # {"tight": {"clamp": 0.5, "steps": 20}}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from kbsync.documents import describe, nearest
from kbsync.editor.preset import Preset
from kbsync.errors import UsageError

__all__ = ["OWN_TEXT", "changed", "points", "typed"]

OWN_TEXT = "holdout"
"""How results call the held-out text of the statistics' corpus."""


def typed(settings: Iterable[str]) -> dict[str, Any]:
    """`key=value` texts as a preset's values: numbers, true, false, null, and layers as `4-8` or `4+6+8`.

    Raises UsageError for a text without `=`.
    """
    found = {}
    for text in settings:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not (key and equals and value):
            raise UsageError(f"{text!r} is no setting", hint="write key=value, such as covariance_weight=600")
        found[key] = _layers(value) if key == "layers" else _value(value)
    return found


def points(texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """`name: key=value,key=value` texts as named changes of a preset. Raises UsageError for one without a name."""
    found = {}
    for text in texts:
        name, colon, settings = text.partition(":")
        if not (name.strip() and colon):
            raise UsageError(f"{text!r} is no point", hint='write "name: key=value,key=value"')
        found[name.strip()] = typed(part for part in settings.split(",") if part.strip())
    return found


def changed(preset: Preset, changes: Mapping[str, Any]) -> Preset:
    """The preset with other values; checked as a preset file is. Raises UsageError that names the key."""
    try:
        return Preset.model_validate(preset.model_dump() | dict(changes))
    except ValidationError as error:
        finding = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in finding["loc"])
        hint = nearest(key, Preset.model_fields) or "see the keys of a preset file"
        raise UsageError(f"setting {key}: {describe(finding)}", hint=hint) from error


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _layers(text: str) -> Sequence[int] | str:
    first, dash, last = text.partition("-")
    if dash and first.strip().isdecimal() and last.strip().isdecimal():
        return tuple(range(int(first), int(last) + 1))
    parts = text.split("+")
    return tuple(int(part) for part in parts) if all(part.strip().isdecimal() for part in parts) else text
