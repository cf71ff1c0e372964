"""Who may ask the server: the token, the Host header, and the limits of a request. ASGI, in front of every route.

The Host check stops DNS rebinding: a page in a browser on this machine can reach a loopback port, but not choose the
name that its browser puts into the header.
"""

from __future__ import annotations

import hmac
import json
import secrets
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from kbsync.config import CONFIG, Workspace
from kbsync.errors import ConfigError
from kbsync.versions.files import write_durably

__all__ = ["HEAD_BYTES", "Access", "read_token"]

SHORTEST_TOKEN = 16
"""Characters: less than that can be guessed."""

HEAD_BYTES = 16_384

log = structlog.get_logger()


def read_token(workspace: Workspace) -> str:
    """The bearer token: what `server.token` refers to, or the content of data/server.token, which is made here if it is
    not there (256 random bits, mode 0600). Raises ConfigError where it cannot be read or is too short, StoreError where
    it cannot be made. For the holder of the writer lock."""
    declared = workspace.server_token
    if declared is not None:
        return _long_enough(declared, workspace.root / CONFIG)
    path = workspace.data / "server.token"
    if kept := _kept(path):
        return _long_enough(kept, path)
    token = secrets.token_urlsafe(32)
    write_durably(path, token.encode("ascii"), mode=0o600)
    return token


def _kept(path: Path) -> str:
    """Empty where there is none, or an empty file, such as a power cut leaves."""
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError("others can read or change it", file=path, hint=f"chmod 600 {path}")
        return path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("cannot be read", file=path, hint="remove it: the next start makes another") from error


def _long_enough(token: str, place: Path) -> str:
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        problem = f"must be {SHORTEST_TOKEN} or more ASCII characters without a space"
        raise ConfigError(problem, file=place, key="server.token", hint="openssl rand -hex 32 makes one")
    return token


class Access:
    """Answers 403 for a foreign Host, 401 without the token where a path wants it, 413 for a body, 431 for a long head;
    passes on the rest. `open_paths` need no token; `state.trusted` of a request says whether it was there."""

    def __init__(self, app: ASGIApp, *, token: str, hosts: Collection[str], open_paths: Collection[str]) -> None:
        self._app, self._hosts, self._open = app, hosts, open_paths
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return None  # no lifespan, no WebSocket: nothing here has either
        headers = Headers(scope=scope)
        refused = self._refusal(scope, headers)
        if refused is not None:
            log.warning("request_refused", status=refused[0], path=scope["path"][:200], client=_client(scope))
            return await _answer(send, *refused)
        with suppress(Exception):  # answered and logged by the application; Starlette raises it again for the server
            await self._app(scope, receive, send)
        return None

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        """Status and reason, or None. Whether the token was there is noted in the scope."""
        if _name(headers.get("host", "")) not in self._hosts:
            return 403, "the Host header names another machine; `server.hosts` in kbsync.yaml allows names"
        if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
            return 413, "a request has no body here"
        if sum(len(name) + len(value) for name, value in headers.raw) > HEAD_BYTES:
            return 431, f"the head is longer than {HEAD_BYTES} bytes"
        trusted = self._trusted(headers.getlist("authorization"))
        scope.setdefault("state", {})["trusted"] = trusted
        if not trusted and scope["path"] not in self._open:
            return 401, "needs the token: Authorization: Bearer TOKEN"
        return None

    def _trusted(self, given: list[str]) -> bool:
        scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        same = hmac.compare_digest(token.strip().encode("utf-8", "replace"), self._token)
        return same and scheme.lower() == "bearer"


def _name(host: str) -> str:
    """The name of a Host header (RFC 9110, 7.2), without the port, in lower case."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()


def _client(scope: Scope) -> str:
    return str((scope.get("client") or ("unknown",))[0])


async def _answer(send: Send, status: int, problem: str) -> None:
    body = json.dumps({"problem": problem}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="kbsync"'))
    start: dict[str, Any] = {"type": "http.response.start", "status": status, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": body})
