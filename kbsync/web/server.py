"""The HTTP server inside the daemon: uvicorn in a thread of its own, without signal handlers.

with serving(workspace, ledger, pulse) as address:     # http://127.0.0.1:8765, or None where `server:` is absent
    ...
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import h11
import structlog
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

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
"""Seconds that a connection may take for the head of a request, and in which the server has to start and stop."""
MOST_CONNECTIONS = 32

log = structlog.get_logger()


class _Impatient(H11Protocol):
    """Ends a connection that has not sent the whole head of its request in time; uvicorn itself would wait for ever.
    One request per connection: no second one can be slow."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._hurry = self.loop.call_later(PATIENCE, self._end_if_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        self._hurry.cancel()
        super().connection_lost(exc)

    def _end_if_silent(self) -> None:
        if self.conn.their_state is h11.IDLE:
            self.transport.close()


@contextmanager
def serving(workspace: Workspace, ledger: Ledger, pulse: Pulse) -> Iterator[str | None]:
    """Answer HTTP for the time of the block; its address, which is also in the log and the ledger's `heartbeat`.

    Raises ConfigError where the token, the certificate or the address cannot be used.
    """
    settings = workspace.settings.server
    if settings is None:
        yield None
        return

    async def beat() -> None:
        pulse.beat("server")

    health = Health(workspace, ledger, pulse)
    exposition = Exposition(workspace, ledger, checks=lambda: {check.name: check.ok for check in health.ready()})
    app = make_app(settings, read_token(workspace), health, exposition)
    config = uvicorn.Config(
        app,
        http=_Impatient,
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
        limit_concurrency=MOST_CONNECTIONS,
        h11_max_incomplete_event_size=HEAD_BYTES,
        timeout_graceful_shutdown=int(PATIENCE),
        **_tls(workspace, settings),
    )
    with _listening(workspace, settings) as listener:
        host, port = listener.getsockname()[:2]
        address = f"{'http' if settings.tls is None else 'https'}://{f'[{host}]' if ':' in host else host}:{port}"
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), name="kbsync-server", daemon=True)
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
def _listening(workspace: Workspace, settings: Server) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        problem = f"cannot listen on {settings.host} port {settings.port}: {os.strerror(error.errno or 0)}"
        raise ConfigError(
            problem, file=workspace.root / CONFIG, key="server", hint="give another `port`; 0: any that is free"
        ) from error
    with listener:
        yield listener


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
