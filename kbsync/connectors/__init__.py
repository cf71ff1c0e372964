"""Connectors read a declared source and give a snapshot of all that it says; they decide nothing and store nothing.

A connector is a class registered under the entry point group `kbsync.connectors` by the name that `type:` uses. It has
an `Options` model for the keys of the source file beyond the common ones, takes (source, options, place), and fetches:

    connector = make_connector(source, folder=Path("sources"), allowed_dirs=[Path("/srv/feeds")])
    snapshot = connector.fetch(previous)
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Protocol, cast, runtime_checkable

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

from kbsync.errors import SourceUnavailable
from kbsync.facts import Provenance, Snapshot
from kbsync.policy import Source

__all__ = [
    "GROUP",
    "STALE_RETRY_SECONDS",
    "Connector",
    "ConnectorType",
    "Options",
    "Place",
    "Redirecting",
    "known_types",
    "make_connector",
    "refuse_older",
]

GROUP = "kbsync.connectors"
"""The entry point group that a package registers its connectors under."""
STALE_RETRY_SECONDS = 600.0
"""A source that lags behind is asked again after this time."""
LARGEST_TEXT = 5_000_000
"""Bytes of a query or a list that a source file names."""


class Connector(Protocol):
    """One source, ready to be read."""

    @property
    def warnings(self) -> Sequence[str]:
        """What `kbsync check` should say about the declaration: one sentence each, usually none."""

    # May have `host: str`, the host that it asks: one that wants to be left alone is asked by no source of it.

    def fetch(self, previous: Provenance | None) -> Snapshot:
        """Read the source once and whole. `previous` is the provenance of the last accepted snapshot.

        Raises SourceUnavailable (may work later), SourceBlocked (refused) or SourceInvalid (not what was declared).
        """


@runtime_checkable
class Redirecting(Protocol):
    """A connector whose source merges entities and remembers the ids that they had: what it may have beside `fetch`."""

    def redirects(self, ids: Collection[str]) -> Mapping[str, str]:
        """Which of these whole ids (`space:local`) the source has merged into which others. Asked for ids that a
        complete snapshot no longer has, before they count as gone. Raises what `fetch` raises."""


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

    def open(self, location: str) -> BinaryIO:
        """A file, open for reading. Raises ValueError where it lies elsewhere or is no regular file (a pipe would be
        waited for); OSError where it cannot be read."""
        handle = _open_plain(self.path(location))
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise ValueError(f"{location}: is not a regular file")
        return os.fdopen(handle, "rb")

    def read(self, location: str, max_bytes: int) -> bytes:
        """All bytes of a file. Raises ValueError also where it is larger than `max_bytes`."""
        with self.open(location) as file:
            body = file.read(max_bytes + 1)
        if len(body) > max_bytes:
            raise ValueError(f"{location} is larger than {max_bytes:,} bytes")
        return body

    def text(self, location: str) -> str:
        """The UTF-8 text of a small file. Raises ValueError where it lies elsewhere, cannot be read or is too large."""
        try:
            return self.read(location, LARGEST_TEXT).decode("utf-8-sig")
        except OSError as error:
            raise ValueError(f"{location} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{location} is not UTF-8") from error


def _open_plain(path: Path) -> int:
    """Open a resolved path, folder by folder: what is a link on it by now was put there since it was judged.

    Non-blocking, as opening a pipe would wait. Raises OSError.
    """
    folder = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(path.anchor, folder)
    try:
        for part in path.parts[1:-1]:
            inside = os.open(part, folder, dir_fd=handle)
            os.close(handle)
            handle = inside
        return os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=handle)
    finally:
        os.close(handle)


class ConnectorType(Protocol):
    """What an entry point of the group must name: usually a class."""

    Options: ClassVar[type[Options]]

    def __call__(self, source: Source, options: Any, place: Place) -> Connector:
        """The connector of a source whose options are valid."""


def refuse_older(source: str, as_of: datetime | None, previous: Provenance | None) -> None:
    """Raise SourceUnavailable for an answer that is older than the last accepted one: the servers behind one address
    may differ in age, and facts must not go back. A connector may call it as soon as it knows `as_of`."""
    known = previous.as_of if previous else None
    if as_of is not None and known is not None and as_of < known:
        problem = f"stale, it shows {as_of:%Y-%m-%d %H:%M:%S} UTC; an answer of {known:%Y-%m-%d %H:%M:%S} was accepted"
        raise SourceUnavailable(
            source, problem, retry_after=STALE_RETRY_SECONDS, hint="another server answered; it is asked again later"
        )


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
