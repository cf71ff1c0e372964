"""A real SPARQL server (oxigraph, from PyPI) on a free port of the loopback interface, for as long as a test needs it.

with Oxigraph(timeout_s=2) as server:
    server.load(turtle)
    server.endpoint
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

__all__ = ["Oxigraph"]


class Oxigraph:
    """Starts empty, in memory. `timeout_s`: how long a query may run before the server cuts its answer."""

    def __init__(self, *, timeout_s: int | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._address = f"127.0.0.1:{free.getsockname()[1]}"
        self._options = [] if timeout_s is None else ["--timeout-s", str(timeout_s)]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """Where queries go."""
        return f"http://{self._address}/query"

    def load(self, data: bytes, *, kind: str = "text/turtle") -> None:
        """Let the store hold exactly these triples."""
        url = f"http://{self._address}/store?default"
        httpx.put(url, content=data, headers={"Content-Type": kind}, timeout=60).raise_for_status()

    def start(self) -> None:
        """Start on the same port, with an empty store, and wait until it listens."""
        command = [Path(sys.executable).with_name("oxigraph"), "serve", "--bind", self._address, *self._options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            try:
                httpx.get(f"http://{self._address}/store?default")
            except httpx.ConnectError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise
                time.sleep(0.02)
            else:
                return

    def stop(self) -> None:
        """Stop at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
