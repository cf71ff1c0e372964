"""Where a feed lies: a file inside the allowed folders or an address, and the small files beside it.

    fetched = Location("stars", "https://example.org/stars.csv", options, place).read(previous)
    fetched.body, fetched.provenance

A file must be a regular one that nobody writes to meanwhile; an address is asked by `http.send`, and with the
validators of `previous` where that was read under the same declaration.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urljoin

import httpx
from pydantic import ByteSize, SecretStr, ValidationInfo

from kbsync.connectors import Place
from kbsync.connectors.http import HttpOptions, Reply, check_url, send
from kbsync.connectors.text import printable
from kbsync.errors import SourceError, SourceInvalid, SourceUnavailable
from kbsync.facts import Provenance
from kbsync.references import FILE, filled, redacted, secrets_of

__all__ = ["Fetched", "Location", "check_location", "is_url"]

SMALL_BYTES = ByteSize(65_536)
"""Largest checksum or signature file."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A body and where it is from; None where the server vouched (304) for the one of the last time. `framed`: the
    server said where it ends (see `Reply`)."""

    body: bytes | None
    provenance: Provenance
    framed: bool = True

    def repeats(self, previous: Provenance | None) -> bool:
        """Whether the body is, byte for byte, the one of `previous`, and read with the same declaration."""
        return previous is not None and _content_of(self.provenance) == _content_of(previous)


@dataclass(frozen=True, slots=True)
class Location:
    """One file or address of a source. `declaration`: the digest of what its body will be read with."""

    source: str
    location: str
    options: HttpOptions
    place: Place
    declaration: str | None = None
    headers: Mapping[str, SecretStr] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """The location as it may be shown and kept: secrets not filled in, no query string."""
        return redacted(self.location)

    @property
    def file(self) -> str:
        """The source file, for hints."""
        return f"sources/{self.source}.yaml"

    @property
    def host(self) -> str | None:
        """The host of an address, with its port where that is not the usual one; None of a file."""
        return httpx.URL(self.location).netloc.decode() if is_url(self.location) else None

    @property
    def name(self) -> str:
        """The last part of the path: `stars.csv.gz`."""
        path = httpx.URL(self.location).path if is_url(self.location) else self.location
        return path.rpartition("/")[2]

    def exists(self) -> bool:
        """Whether a local file is there (of an address, nothing is known)."""
        return is_url(self.location) or self.place.path(self.location).exists()

    def beside(self, other: str) -> Location:
        """A small file that the source names: an address, or a path from where this location's own paths start."""
        if is_url(self.location):
            other = urljoin(self.location, other)
        return self._small(other)

    def with_suffix(self, suffix: str) -> Location:
        """The small file that has this one's name and `suffix`."""
        if is_url(self.location):
            return self._small(re.sub(r"^[^?#]*", lambda path: path[0] + suffix, self.location))
        return self._small(self.location + suffix)

    def _small(self, location: str) -> Location:
        options = self.options.model_copy(update={"max_bytes": min(SMALL_BYTES, self.options.max_bytes)})
        ours = is_url(location) and _origin(location) == _origin(self.location)
        return Location(self.source, location, options, self.place, headers=self.headers if ours else {})

    def read(
        self, previous: Provenance | None = None, *, accept: str = "*/*", content_types: Collection[str] = ()
    ) -> Fetched:
        """The whole body. `content_types`: what an answer may call itself; none: anything.

        Raises SourceUnavailable, SourceBlocked, SourceInvalid (see `http.send`).
        """
        if not is_url(self.location):
            path, body = self._read_file()
            return Fetched(body, self._provenance(str(path), hashlib.sha256(body).hexdigest()))
        known = previous if previous and self._vouches_for(previous) else None
        reply = self._ask(known, accept)
        if reply.status == 200 and content_types and reply.content_type not in content_types:
            problem = f"{self.shown}: the answer is {printable(reply.content_type, 60)}, not such a feed"
            raise SourceInvalid(self.source, problem, hint=f"see `location` and `type` in {self.file}")
        unchanged = known if reply.status == 304 else None
        provenance = self._provenance(
            self.shown,
            unchanged.body_sha256 if unchanged else reply.sha256,
            status=reply.status,
            etag=reply.validator("etag") or (unchanged.etag if unchanged else None),
            last_modified=reply.validator("last-modified") or (unchanged.last_modified if unchanged else None),
            verified=unchanged.verified if unchanged else None,
        )
        return Fetched(None if unchanged else reply.body, provenance, reply.framed)

    def _vouches_for(self, previous: Provenance) -> bool:
        return (previous.location, previous.declaration) == (self.shown, self.declaration)

    def _ask(self, known: Provenance | None, accept: str) -> Reply:
        headers = {"Accept": accept}
        if known and known.etag:
            headers["If-None-Match"] = known.etag
        if known and known.last_modified:
            headers["If-Modified-Since"] = known.last_modified
        secrets = secrets_of(self.location)
        try:
            for name, value in self.headers.items():
                headers[name] = self._secret(name, value, secrets)
            url = check_url(filled(self.location), dict(self.options))
        except ValueError as error:
            raise SourceInvalid(self.source, f"{self.shown}: {error}", hint=f"see {self.file}") from None
        try:
            return send(self.source, httpx.Request("GET", url, headers=headers), self.options)
        except SourceError as error:
            _hide(secrets | {url.partition("?")[2]}, error)
            raise error from None

    def _secret(self, name: str, value: SecretStr, secrets: set[str]) -> str:
        """What a header is sent with; added to `secrets`. Raises ValueError, which never has it in it."""
        text = value.get_secret_value()
        text = self.place.text(text.removeprefix(FILE)).strip() if text.startswith(FILE) else filled(text)
        if not (text.isascii() and text.isprintable() and text):
            raise ValueError(f"the header {name} is empty, or has characters that no header may have")
        secrets.update((text, text.rpartition(" ")[2], *secrets_of(value.get_secret_value())))
        return text

    def _provenance(
        self,
        location: str,
        sha256: str,
        *,
        status: int = 200,
        etag: str | None = None,
        last_modified: str | None = None,
        verified: str | None = None,
    ) -> Provenance:
        return Provenance(
            location=location,
            fetched_at=datetime.now(UTC),
            status=status,
            body_sha256=sha256,
            etag=etag,
            last_modified=last_modified,
            declaration=self.declaration,
            verified=verified,
        )

    def _read_file(self) -> tuple[Path, bytes]:
        """The file's real path and its bytes, where it is a regular file that nobody is writing to."""
        name, location = self.source, self.location
        try:
            path = self.place.path(location)
            with self.place.open(location) as file:
                before = os.fstat(file.fileno())
                body = file.read(self.options.max_bytes + 1)
                after = os.fstat(file.fileno())
        except ValueError as error:
            raise SourceInvalid(name, str(error)) from error
        except OSError as error:
            hint = f"see `location` in {self.file}, then run `kbsync check`"
            raise SourceUnavailable(name, f"{path}: {error.strerror}", hint=hint) from error
        if len(body) > self.options.max_bytes:
            limit = self.options.max_bytes.human_readable(decimal=True)
            raise SourceInvalid(name, f"{location}: is larger than {limit}", hint=f"`max_bytes` in {self.file}")
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise SourceUnavailable(name, f"{location}: was written to while it was read", hint="run `kbsync sync`")
        return path, body


def _hide(secrets: Collection[str], error: SourceError) -> None:
    """Take secrets out of an error: a server may repeat what it was asked."""
    for secret in secrets:
        if secret:
            error.message = error.message.replace(secret, "***")
    error.args = (error.message,)


def _origin(url: str) -> tuple[str, str, int | None]:
    parsed = httpx.URL(url)
    return parsed.scheme, parsed.host, parsed.port


def _content_of(seen: Provenance) -> tuple[str | None, ...]:
    return seen.location, seen.declaration, seen.body_sha256


def is_url(location: str) -> bool:
    """Whether a location is an address, not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location) is not None


def check_location(location: str, info: ValidationInfo) -> str:
    """`location`, if a source may read from it. Raises ValueError (see `check_url` and `Place.path`)."""
    if is_url(location):
        return check_url(location, info.data)
    Place.of(info).path(location)
    return location
