"""The HTTP server inside the daemon: uvicorn in a thread of its own, without signal handlers.

with serving(ledger, pulse, lambda: catalog) as address:
    ...                             # http://127.0.0.1:8765, or None where `server:` is absent
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import structlog
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kbsync.catalog import Catalog
from kbsync.config import CONFIG, Workspace
from kbsync.errors import ConfigError, KbsyncError
from kbsync.ledger import Ledger
from kbsync.metrics import Exposition
from kbsync.pulse import BEAT, Pulse
from kbsync.web.access import HEAD_BYTES, read_token
from kbsync.web.app import make_app
from kbsync.web.health import Health
from kbsync.web.settings import Server

__all__ = ["serving"]

PATIENCE = 10.0
"""Seconds in which the server has to start and stop."""
LIFETIME = 30.0
"""Seconds that a connection has for its handshake and its request, and once more for taking the answer."""
ANSWER = 600.0
"""Seconds in which an answer has to be found: metrics of a large ledger take their time."""
MOST_CONNECTIONS = 32

log = structlog.get_logger()


class _Door(socket.socket):
    """A listening socket that lets in no more than MOST_CONNECTIONS at a time, none for ever: whoever can reach it
    cannot take the file descriptors that passes need. uvicorn and asyncio themselves accept without a limit, and wait
    for ever for a request, a minute for a TLS handshake."""

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(listener.family, listener.type, listener.proto, listener.detach())
        self._inside: dict[tuple[str, int], tuple[socket.socket, asyncio.TimerHandle]] = {}
        self._silent_until = 0.0

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection. Raises ConnectionAbortedError, which asyncio expects, where it was one too many."""
        guest, address = super().accept()
        for gone in [name for name, (one, _) in self._inside.items() if one.fileno() == -1]:
            self._inside.pop(gone)[1].cancel()
        if len(self._inside) >= MOST_CONNECTIONS:
            guest.close()
            self._say_full()
            raise ConnectionAbortedError
        self._inside[address[:2]] = guest, _later(LIFETIME, guest)
        return guest, address

    def attend(self, app: ASGIApp) -> ASGIApp:
        """The application, with ANSWER for each of its answers: the request is whole when it is asked."""

        async def attended(scope: Scope, receive: Receive, send: Send) -> None:
            client = scope.get("client")

            async def sending(message: Message) -> None:
                if message["type"] == "http.response.start":
                    self._give(client, LIFETIME)
                await send(message)

            self._give(client, ANSWER)
            await app(scope, receive, sending)

        return attended

    def _give(self, client: tuple[str, int] | None, seconds: float) -> None:
        """A connection ends in so many seconds from now."""
        if client is not None and client in self._inside:
            guest, end = self._inside[client]
            end.cancel()
            self._inside[client] = guest, _later(seconds, guest)

    def _say_full(self) -> None:
        """Once in a while: a flood of connections is to be no flood of lines."""
        if (now := time.monotonic()) >= self._silent_until:
            self._silent_until = now + 60
            log.warning("server_full", connections=MOST_CONNECTIONS)


def _later(seconds: float, guest: socket.socket) -> asyncio.TimerHandle:
    return asyncio.get_running_loop().call_later(seconds, _end, guest)


def _end(guest: socket.socket) -> None:
    """Whoever reads or writes it is told by the operating system, and closes it."""
    with suppress(OSError):  # closed meanwhile
        guest.shutdown(socket.SHUT_RDWR)


@contextmanager
def serving(ledger: Ledger, pulse: Pulse, catalog: Callable[[], Catalog]) -> Iterator[str | None]:
    """Answer HTTP for the time of the block; its address, which is also in the log and the ledger's `heartbeat`.
    `catalog`: gives the settings, sources and policies that are in force; `server:` itself is looked at once.

    Raises ConfigError where the token, the certificate or the address cannot be used, StoreError where a token cannot
    be made.
    """
    workspace = catalog().workspace
    settings = workspace.settings.server
    if settings is None:
        yield None
        return

    health = Health(ledger, pulse, catalog)

    async def beat() -> None:
        pulse.beat("server")

    def checks() -> dict[str, bool]:
        return {check.name: check.ok for check in health.ready()}

    exposition = Exposition(ledger, catalog, checks=checks)
    app = make_app(settings, read_token(workspace), health, exposition)
    tls = _tls(workspace, settings)
    with _listening(workspace, settings) as door:
        config = uvicorn.Config(
            door.attend(app),
            http="h11",
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            headers=[("connection", "close")],
            proxy_headers=False,
            callback_notify=beat,
            timeout_notify=int(BEAT),
            limit_concurrency=MOST_CONNECTIONS + 1,  # of requests whose client has gone: the door counts connections
            h11_max_incomplete_event_size=HEAD_BYTES,
            timeout_graceful_shutdown=int(PATIENCE),
            **tls,
        )
        host, port = door.getsockname()[:2]
        address = f"{'http' if settings.tls is None else 'https'}://{f'[{host}]' if ':' in host else host}:{port}"
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([door],), name="kbsync-server", daemon=True)
        thread.start()
        _wait_until_started(server, thread)
        _announce(ledger, address)
        try:
            yield address
        finally:
            server.should_exit = True
            thread.join(2 * PATIENCE)


def _wait_until_started(server: uvicorn.Server, thread: threading.Thread) -> None:
    end = time.monotonic() + PATIENCE
    while not server.started:
        if not thread.is_alive() or time.monotonic() > end:
            raise KbsyncError("the HTTP server did not start", hint="the log says why")
        time.sleep(0.01)


def _announce(ledger: Ledger, address: str) -> None:
    log.info("server_started", address=address)
    with suppress(KbsyncError), ledger.write() as db:
        db.beat("server", os.getpid(), {"address": address})


@contextmanager
def _listening(workspace: Workspace, settings: Server) -> Iterator[_Door]:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        door = _Door(socket.create_server((settings.host, settings.port), family=family))
    except OSError as error:
        problem = f"cannot listen on {settings.host} port {settings.port}: {os.strerror(error.errno or 0)}"
        raise ConfigError(
            problem, file=workspace.root / CONFIG, key="server", hint="give another `port`; 0: any that is free"
        ) from error
    with door:
        yield door


def _tls(workspace: Workspace, settings: Server) -> dict[str, Any]:
    """uvicorn's options for TLS. Raises ConfigError for files that are not there or do not belong together."""
    if settings.tls is None:
        return {}
    certificate, key = workspace.root / settings.tls.certificate, workspace.root / settings.tls.key
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: b"")
    except OSError as error:  # ssl.SSLError is one
        problem = f"{certificate.name} and {key.name} cannot be used: {error.strerror or error}"
        raise ConfigError(problem, file=workspace.root / CONFIG, key="server.tls") from error
    return {"ssl_certfile": certificate, "ssl_keyfile": key}
