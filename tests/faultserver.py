"""A real HTTP server in a thread that answers wrongly on purpose: what real servers do on bad days.

with FaultServer() as server:
    server.on("/feed.csv", answer(b"a,b\n", status=429, headers={"Retry-After": "7"}))
    server.requests[-1].headers["user-agent"]
"""

from __future__ import annotations

import gzip
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

__all__ = [
    "CSV",
    "SPARQL_JSON",
    "Behaviour",
    "FaultServer",
    "Recorded",
    "answer",
    "big",
    "cut",
    "drip",
    "drip_headers",
    "endless",
    "hang",
    "redirect",
    "reset",
]

CSV = "text/csv; charset=utf-8"
SPARQL_JSON = "application/sparql-results+json"

Behaviour = Callable[[BaseHTTPRequestHandler], None]


@dataclass(frozen=True)
class Recorded:
    """A request as it came in; header names in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


def answer(
    body: bytes = b"",
    *,
    status: int = 200,
    kind: str = CSV,
    headers: Mapping[str, str] | None = None,
    zipped: bool = False,
) -> Behaviour:
    """A plain answer; `zipped` compresses the body and says so."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        data = gzip.compress(body) if zipped else body
        extra = {"Content-Encoding": "gzip"} if zipped else {}
        _head(handler, status, {"Content-Type": kind, "Content-Length": str(len(data)), **extra, **(headers or {})})
        handler.wfile.write(data)

    return send


def cut(body: bytes, *, promised: int, kind: str = CSV) -> Behaviour:
    """Promises more bytes than it sends, and closes."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        _head(handler, 200, {"Content-Type": kind, "Content-Length": str(promised)})
        handler.wfile.write(body)

    return send


def endless(body: bytes, *, kind: str = CSV, headers: Mapping[str, str] | None = None) -> Behaviour:
    """Says nowhere how long the body is: it ends when the connection does."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        _head(handler, 200, {"Content-Type": kind, **(headers or {})})
        handler.wfile.write(body)

    return send


def drip(pause: float, *, kind: str = CSV) -> Behaviour:
    """One byte of the body every `pause` seconds, for as long as someone listens."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        _head(handler, 200, {"Content-Type": kind, "Content-Length": "1000000"})
        while True:
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(pause)

    return send


def drip_headers(pause: float) -> Behaviour:
    """The headers never end: one byte every `pause` seconds."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while True:
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(pause)

    return send


def hang(seconds: float) -> Behaviour:
    """Nothing at all for `seconds`, then the connection closes."""

    def send(_: BaseHTTPRequestHandler) -> None:
        time.sleep(seconds)

    return send


def reset() -> Behaviour:
    """Closes the connection without a byte."""
    return hang(0)


def big(total: int, *, kind: str = CSV) -> Behaviour:
    """`total` bytes in chunks, without saying how many."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        _head(handler, 200, {"Content-Type": kind})
        for _ in range(0, total, 65_536):
            handler.wfile.write(b"x" * 65_536)

    return send


def redirect(to: str, *, status: int = 302) -> Behaviour:
    """Points elsewhere."""
    return answer(status=status, headers={"Location": to})


def _head(handler: BaseHTTPRequestHandler, status: int, headers: Mapping[str, str]) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()


class FaultServer:
    """Listens on a free port of the loopback interface; paths without a behaviour give 404."""

    def __init__(self) -> None:
        self.requests: list[Recorded] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self._behaviours: dict[str, Behaviour] = {}
        self._guard = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def port(self) -> int:
        """The port that was free."""
        return int(self._server.server_address[1])

    def url(self, path: str) -> str:
        """The whole address of `path`."""
        return f"http://127.0.0.1:{self.port}{path}"

    def on(self, path: str, behaviour: Behaviour) -> str:
        """Let `path` behave so from now on; gives its whole address."""
        self._behaviours[path] = behaviour
        return self.url(path)

    def secure(self, context: ssl.SSLContext) -> None:
        """Speak TLS from now on."""
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server._serve(self)

            def do_POST(self) -> None:
                server._serve(self)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
                """Tests say what they need to know."""

        return Handler

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in handler.headers.items()}
        path = handler.path.partition("?")[0]
        with self._guard:
            self.requests.append(Recorded(handler.command, handler.path, headers, body))
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        left = self._counted_until_it_is_answered(handler)
        try:
            self._behaviours.get(path, answer(b"not here", status=404, kind="text/plain"))(handler)
        except OSError:
            pass  # the client hung up, as it should on a deadline
        finally:
            left()

    def _counted_until_it_is_answered(self, handler: BaseHTTPRequestHandler) -> Callable[[], None]:
        """What ends a request's time in flight: the beginning of its answer does, too. A client that has read the whole
        answer may ask again before this thread goes on."""
        counted, begin = True, handler.send_response

        def left() -> None:
            nonlocal counted
            with self._guard:
                self.in_flight -= counted
                counted = False

        def send_response(code: int, message: str | None = None) -> None:
            left()
            begin(code, message)

        handler.send_response = send_response  # type: ignore[method-assign]
        return left
