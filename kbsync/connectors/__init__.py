"""Connectors read a declared source and give a snapshot of all that it says; they decide nothing and store nothing.

A connector is a class registered under the entry point group `kbsync.connectors` by the name that `type:` uses. It has
an `Options` model for the keys of the source file beyond the common ones, takes (source, options, place), and fetches:

    connector = make_connector(source, folder=Path("sources"), allowed_dirs=[Path("/srv/feeds")])
    snapshot = connector.fetch(previous)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

from kbsync.facts import Provenance, Snapshot
from kbsync.policy import Source

__all__ = ["GROUP", "Connector", "ConnectorType", "Options", "Place", "known_types", "make_connector"]

GROUP = "kbsync.connectors"
"""The entry point group that a package registers its connectors under."""


class Connector(Protocol):
    """One source, ready to be read."""

    @property
    def warnings(self) -> Sequence[str]:
        """What `kbsync check` should say about the declaration: one sentence each, usually none."""

    def fetch(self, previous: Provenance | None) -> Snapshot:
        """Read the source once and whole. `previous` is the provenance of the last accepted snapshot.

        Raises SourceUnavailable (may work later), SourceBlocked (refused) or SourceInvalid (not what was declared).
        """


class Options(BaseModel):
    """The keys of a source file that belong to its connector. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a source file lies: its folder (relative paths start there) and every folder that it may read from."""

    folder: Path
    allowed_dirs: tuple[Path, ...]

    @classmethod
    def of(cls, info: ValidationInfo) -> Place:
        """The place that `make_connector` hands to the validators of Options."""
        return cast(Place, info.context)

    def path(self, location: str) -> Path:
        """`location` as a real path. Raises ValueError where it leaves the allowed folders, by `..` or by a link."""
        try:
            found = (self.folder / location).resolve()
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{location} is a link to itself") from error
        if not any(found.is_relative_to(allowed.resolve()) for allowed in (self.folder, *self.allowed_dirs)):
            raise ValueError(f"{location} is outside the folders that sources may read (allowed_dirs in kbsync.yaml)")
        return found


class ConnectorType(Protocol):
    """What an entry point of the group must name: usually a class."""

    Options: ClassVar[type[Options]]

    def __call__(self, source: Source, options: Any, place: Place) -> Connector:
        """The connector of a source whose options are valid."""


def known_types() -> list[str]:
    """The names that `type:` may have, sorted."""
    return sorted(entry_points(group=GROUP).names)


def make_connector(source: Source, *, folder: Path, allowed_dirs: Sequence[Path] = ()) -> Connector:
    """The connector of `source`, whose file lies in `folder`; reads nothing from the source itself yet.

    Raises pydantic.ValidationError for an unknown type (at key `type`) and for options that the connector refuses.
    """
    found = entry_points(group=GROUP, name=source.type)
    if not found:
        problem = PydanticCustomError(
            "connector_type", "no connector of this type; known: {known}", {"known": ", ".join(known_types())}
        )
        detail = InitErrorDetails(type=problem, loc=("type",), input=source.type)
        raise ValidationError.from_exception_data("Source", [detail])
    kind = cast(ConnectorType, next(iter(found)).load())
    place = Place(folder, tuple(allowed_dirs))
    return kind(source, kind.Options.model_validate(source.options, context=place), place)
