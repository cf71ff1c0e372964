"""One HTTP request to a source, guarded: where it may go, how long it may take, how much it may bring.

- The connection goes to the address that was checked, and redirects stay on the host
  (https://cheatsheetseries.owasp.org/cheatsheets/Server_Side_Request_Forgery_Prevention_Cheat_Sheet.html).
- A wall-clock deadline covers connecting, the headers and every byte of the body; the size cap counts decoded bytes.
- At most one request of this machine is in flight per host (see `turns`).
- A fetch of several requests has one `Budget`: its deadline and its size cap hold over all of them.

    reply = send("stars", httpx.Request("GET", "https://example.org/stars.csv"), HttpOptions())

Proxies of the environment are not used: behind one, the check of the address would be the proxy's business.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from typing import Annotated, NoReturn

import httpcore
import httpx
from pydantic import ByteSize, Field

from kbsync.connectors import Options
from kbsync.connectors.coding import ACCEPTED, BadCoding, decoded, is_packed
from kbsync.connectors.network import Transport, is_this_machine
from kbsync.connectors.text import printable
from kbsync.connectors.turns import turn
from kbsync.errors import SourceBlocked, SourceError, SourceInvalid, SourceUnavailable
from kbsync.policy import Seconds

__all__ = ["Budget", "HttpOptions", "Reply", "check_url", "is_wikimedia", "retry_after", "send"]

MAX_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
FLOOR_SECONDS = 5.0
"""Shortest wait after 429 or 503: servers are known to say `Retry-After: 0` while they are overloaded."""
DEFAULT_SECONDS = 60.0
"""The wait that Wikimedia asks for where 429 or 503 comes without a readable Retry-After."""
LONGEST_SECONDS = 86_400.0
"""Retry-After counts up to one day: one header must not silence a source for a year."""
EXCERPT_BYTES = 2_000
"""How much of an error's body is read for the message."""

_WIKIMEDIA = re.compile(r"(^|\.)(wikidata|wikimedia|wikipedia)\.org$")
_CONTACT = re.compile(r"[^\s@()<>:]+@[^\s@()<>]+\.[^\s@()<>]+|https?://[^\s()]+")


class HttpOptions(Options):
    """Keys that every source behind a URL may have."""

    deadline: Annotated[Seconds, Field(gt=0)] = 300.0
    """For a whole fetch, from the wait for the host's turn to the last byte of the last request: `90s`, `5m`."""
    max_bytes: Annotated[ByteSize, Field(gt=0)] = ByteSize(256_000_000)
    """Largest body, or all bodies of a fetch together, after decompression: `256MB`."""
    private_network: bool = False
    """Whether the host may lie in a private network. Link-local addresses (cloud metadata) are refused even then."""
    insecure_http: bool = False
    """Whether plain http is allowed to a host other than this machine."""
    user_agent: Annotated[str, Field(pattern=r"^[ -~]{1,200}$")] = f"kbsync/{version('kbsync')}"
    """Who asks: `kbsync/1.0 (mailto:ops@example.org)`."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer: status 200, or 304 to a conditional request. `body` is decoded. `framed`: where it ends is told
    by a length, by chunks or by its compression; else the connection just closed, which proves nothing."""

    url: str
    status: int
    headers: httpx.Headers
    body: bytes
    framed: bool = True

    @property
    def content_type(self) -> str:
        """The media type without parameters, in lower case; empty where the server gave none."""
        return str(self.headers.get("content-type", "")).partition(";")[0].strip().lower()

    def validator(self, name: str) -> str | None:
        """The ETag or Last-Modified header, where it can be sent back; a server may have put anything there."""
        value = self.headers.get(name)
        return str(value) if value and value.isascii() and value.isprintable() else None

    @property
    def sha256(self) -> str:
        """64 hex digits over the decoded body."""
        return hashlib.sha256(self.body).hexdigest()


class Budget:
    """What a fetch may take, counted over all of its requests."""

    def __init__(self, options: HttpOptions) -> None:
        self.began = time.monotonic()
        self.deadline = self.began + options.deadline
        self.received = 0
        """Decoded bytes so far."""


def is_wikimedia(url: str) -> bool:
    """Whether the host belongs to Wikimedia, whose rules for clients are stricter than others'."""
    return _WIKIMEDIA.search(httpx.URL(url).host) is not None


def check_url(url: str, declared: Mapping[str, object]) -> str:
    """`url`, if a source may be read from it under the options `declared` beside it.

    Raises ValueError naming what is wrong; for Wikimedia also where `user_agent` has no contact
    (https://foundation.wikimedia.org/wiki/Policy:Wikimedia_Foundation_User-Agent_Policy).
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"is no URL: {error}") from error
    if parsed.scheme not in ("https", "http") or not parsed.host or "%" in parsed.host:
        raise ValueError("must be an https URL")
    if parsed.userinfo:
        raise ValueError("must not carry a user or a password")
    if parsed.scheme == "http" and not (is_this_machine(parsed.host) or declared.get("insecure_http")):
        raise ValueError("is plain http: use https, or say `insecure_http: true`")
    if is_wikimedia(url) and not _CONTACT.search(str(declared.get("user_agent", ""))):
        raise ValueError("Wikimedia refuses clients without a contact: put a mail address or URL into `user_agent`")
    return url


def send(source: str, request: httpx.Request, options: HttpOptions, budget: Budget | None = None) -> Reply:
    """Send `request` and read the whole answer, following up to 3 redirects on the same host.

    Raises SourceUnavailable (no connection, timeout, 408, 425, 429, 5xx), SourceBlocked (403) and SourceInvalid (cut
    or too big, an address or a redirect that was not declared, any other status).
    """
    request.headers["User-Agent"] = options.user_agent
    request.headers["Accept-Encoding"] = ACCEPTED
    exchange = _Exchange(source, options, budget or Budget(options))
    with exchange.turn(request.url):
        for _ in range(MAX_REDIRECTS + 1):
            reply = exchange.once(request)
            if reply.status not in REDIRECTS:
                return reply
            request = exchange.redirected(request, reply)
    raise SourceInvalid(source, f"{request.url.host}: more than {MAX_REDIRECTS} redirects")


def retry_after(header: str | None, *, now: datetime) -> float | None:
    """Seconds that a Retry-After header asks for (RFC 9110, 10.2.3: seconds or a date); None where it is unreadable."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return min(float(header), LONGEST_SECONDS)
    try:
        when = parsedate_to_datetime(header)
    except ValueError:
        return None
    wait = (when if when.tzinfo else when.replace(tzinfo=UTC)) - now
    return min(max(wait.total_seconds(), 0.0), LONGEST_SECONDS)


class _Exchange:
    """The requests of one `send`, within one budget."""

    def __init__(self, source: str, options: HttpOptions, budget: Budget) -> None:
        self._source = source
        self._options = options
        self._budget = budget
        self._file = f"sources/{source}.yaml"

    @contextmanager
    def turn(self, url: httpx.URL) -> Iterator[None]:
        """Wait until no other request to the host is in flight; redirects stay on the host, and within the turn."""
        with ExitStack() as held:
            try:
                held.enter_context(turn(url.host, self._budget.deadline))
            except TimeoutError as error:
                problem = f"{url.host}: another request of this machine was in flight there all the time"
                raise SourceUnavailable(self._source, problem, hint="run `kbsync sync` later") from error
            yield

    def once(self, request: httpx.Request) -> Reply:
        """One request and its whole answer; a redirect and a 304 come without their body."""
        host = request.url.host
        with self._wire(request.url) as wire:
            with self._translated(host, SourceUnavailable, "cannot be reached"):
                response = wire.handle_request(request)
            status = response.status_code
            conditional = "if-none-match" in request.headers or "if-modified-since" in request.headers
            if status in REDIRECTS or (status == 304 and conditional):
                return Reply(str(request.url), status, response.headers, b"")
            if status != 200:
                self._refuse(request.url, response)
            with self._translated(host, SourceInvalid, "the answer was cut"):
                body = self._body(host, response)
        return Reply(str(request.url), status, response.headers, body, _framed(response.headers))

    def redirected(self, request: httpx.Request, reply: Reply) -> httpx.Request:
        """The request that a redirect asks for; it must stay at the host and port, and not fall back to plain http."""
        here = request.url
        try:
            target = here.join(reply.headers.get("location", ""))
        except httpx.InvalidURL as error:
            raise SourceInvalid(self._source, f"{here.host}: redirects to no URL ({error})") from error
        # An address without a port has the usual one: http may become https there, and nowhere else.
        same = (target.host, target.port) == (here.host, here.port)
        secure = target.scheme == here.scheme or (target.scheme == "https" and here.port is None)
        if not (same and secure) or target.userinfo:
            place = target.netloc.decode("ascii", "replace")
            problem = f"{here.host}: redirects to {printable(f'{target.scheme}://{place}', 100)}"
            hint = f"if that address is right, name it in {self._file}"
            raise SourceInvalid(self._source, problem, hint=hint)
        if request.method != "GET" and reply.status not in (307, 308):
            raise SourceInvalid(self._source, f"{here.host}: redirects a {request.method} with status {reply.status}")
        headers = {name: value for name, value in request.headers.items() if name not in ("host", "content-length")}
        return httpx.Request(request.method, target, headers=headers, content=request.read())

    def _wire(self, url: httpx.URL) -> Transport:
        def refused(address: str) -> SourceError:
            hint = f"if it is meant to be, say `private_network: true` in {self._file}"
            return SourceInvalid(
                self._source, f"{url.host}: its address {address} is not on the public network", hint=hint
            )

        return Transport(
            deadline=self._budget.deadline,
            secure=url.scheme == "https",
            private_network=self._options.private_network,
            refuse=refused,
        )

    @contextmanager
    def _translated(self, host: str, broken: type[SourceError], problem: str) -> Iterator[None]:
        """httpcore's errors as ours; `broken` and `problem` for a connection that ends too early."""
        try:
            yield
        except httpcore.TimeoutException as error:
            waited = f"{host}: no whole answer in {time.monotonic() - self._budget.began:.1f} s"
            late = SourceUnavailable(self._source, waited, hint=f"`deadline` in {self._file} allows more time")
            late.outcome = "timeout"
            raise late from error
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            detail = f"{host}: {problem} ({printable(error, 200)})"
            lost = broken(self._source, detail, hint="nothing was changed; run `kbsync sync` later")
            lost.outcome = "connect" if broken is SourceUnavailable else "cut"
            raise lost from error
        except BadCoding as error:
            detail = f"{host}: the body is not compressed as its header says ({printable(error, 200)})"
            raise SourceInvalid(self._source, detail) from error

    def _body(self, host: str, response: httpx.Response) -> bytes:
        body = bytearray()
        for chunk in _pieces(response):
            body += chunk
            self._budget.received += len(chunk)
            if self._budget.received > self._options.max_bytes:
                problem = f"{host}: the answer is larger than {self._options.max_bytes.human_readable(decimal=True)}"
                raise SourceInvalid(self._source, problem, hint=f"`max_bytes` in {self._file} allows more")
        return bytes(body)

    def _refuse(self, url: httpx.URL, response: httpx.Response) -> NoReturn:
        """Raise what a status other than 200 means."""
        error = self._meaning(url, response)
        error.outcome = str(response.status_code)
        raise error

    def _meaning(self, url: httpx.URL, response: httpx.Response) -> SourceError:
        status, host = response.status_code, url.host
        wait = retry_after(response.headers.get("retry-after"), now=datetime.now(UTC))
        problem = f"{host}: status {status} {response.reason_phrase}".rstrip() + _excerpt(response)
        if status in (403, 429, 503):
            return self._resting(url, status, problem, wait)
        if status in (408, 425) or status >= 500:
            return SourceUnavailable(self._source, problem, retry_after=wait, hint="run `kbsync sync` later")
        return SourceInvalid(self._source, problem, hint=f"see the address and the query in {self._file}")

    def _resting(self, url: httpx.URL, status: int, problem: str, wait: float | None) -> SourceError:
        """The error of a host that wants to be left alone."""
        error: SourceError
        if status == 403:
            hint = f"see that `user_agent` in {self._file} names a contact"
            error = SourceBlocked(self._source, problem, hint=hint)
        else:
            wait = max(FLOOR_SECONDS, DEFAULT_SECONDS if wait is None else wait)
            error = SourceUnavailable(self._source, problem, retry_after=wait, hint="kbsync status shows until when")
        error.resting = url.netloc.decode()
        return error


def _pieces(response: httpx.Response) -> Iterator[bytes]:
    return decoded(response.iter_raw(), response.headers.get("content-encoding", ""))


def _framed(headers: httpx.Headers) -> bool:
    return (
        "content-length" in headers
        or "chunked" in headers.get("transfer-encoding", "").lower()
        or is_packed(headers.get("content-encoding", ""))
    )


def _excerpt(response: httpx.Response) -> str:
    """The first line of an error's body, where it is text and can be read."""
    body = b""
    try:
        for chunk in _pieces(response):
            body += chunk
            if len(body) >= EXCERPT_BYTES:
                break
    except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError, BadCoding):
        pass  # the status says enough
    line = body.decode("utf-8", "replace").strip().partition("\n")[0]
    return f": {printable(line, 200)}" if line and "html" not in response.headers.get("content-type", "") else ""
