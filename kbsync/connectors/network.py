"""The wire under `http.send`: an httpx transport that connects only to addresses that a source may have, by a deadline.

Resolution, check and connection use one list of addresses, so a name cannot resolve to something else in between; TLS
still checks the certificate against the name. Each read gets at most the time that is left, so a server that drips
bytes fails at the deadline.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self

import httpcore
import httpx

__all__ = ["Transport", "is_allowed", "is_this_machine"]

CONNECT_SECONDS = 10.0
READ_SECONDS = 65.0
"""Longest silence: the Wikidata Query Service thinks for up to 60 s before its first byte."""

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_METADATA = frozenset(map(ipaddress.ip_address, ("168.63.129.16", "100.100.100.200", "fd00:ec2::254", "192.0.0.192")))
"""Azure, Alibaba, AWS over IPv6, Oracle; the others are link-local."""


def is_this_machine(host: str) -> bool:
    """Whether a URL's host names the loopback interface as such (not: resolves to it)."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_allowed(address: str, *, private_network: bool) -> bool:
    """Whether another machine may be a source at this address: private by option; link-local, this machine and the
    metadata services of clouds never, however the address is wrapped."""
    ip = _unwrapped(ipaddress.ip_address(address.partition("%")[0]))
    if ip in _METADATA or ip.is_loopback or ip.is_link_local or ip.is_multicast or ip.is_unspecified or ip.is_reserved:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and ip.is_site_local:
        return False
    return ip.is_global or private_network


def _unwrapped(ip: _Address) -> _Address:
    """The IPv4 address that an IPv6 address leads to: mapped, 6to4 (RFC 3056), Teredo (RFC 4380), NAT64 (RFC 6052)."""
    if isinstance(ip, ipaddress.IPv4Address):
        return ip
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)
    return ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else ip)


class Transport(httpx.BaseTransport):
    """An httpx transport for one request. `deadline` is in `time.monotonic` seconds; `secure`: the URL is https.

    `handle_request` raises httpcore's errors (TimeoutException, NetworkError, ProtocolError), and what `refuse`
    returns for a host whose address is not allowed.
    """

    def __init__(
        self, *, deadline: float, secure: bool, private_network: bool, refuse: Callable[[str], Exception]
    ) -> None:
        self._pool = httpcore.ConnectionPool(
            # Reading the certificate store takes longer than a local request.
            ssl_context=httpx.create_ssl_context() if secure else None,
            network_backend=_Backend(deadline, private_network, refuse),
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request; the response's body is read from the wire as it is iterated."""
        url = request.url
        response = self._pool.handle_request(
            httpcore.Request(
                method=request.method,
                url=httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                headers=request.headers.raw,
                content=request.read(),
                extensions={"timeout": {"connect": CONNECT_SECONDS, "read": READ_SECONDS, "write": READ_SECONDS}},
            )
        )
        return httpx.Response(response.status, headers=response.headers, stream=_Body(response))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        self._pool.close()


class _Body(httpx.SyncByteStream):
    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        return self._response.iter_stream()

    def close(self) -> None:
        self._response.close()


class _Backend(httpcore.NetworkBackend):
    """Resolves, checks, connects."""

    def __init__(self, deadline: float, private_network: bool, refuse: Callable[[str], Exception]) -> None:
        self._inner = httpcore.SyncBackend()
        self._deadline = deadline
        self._private_network = private_network
        self._refuse = refuse

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """The first of the host's addresses that answers; all of them must be allowed."""
        failure: Exception = httpcore.ConnectError(f"{host} has no address")
        for address in self._addresses(host, port):
            try:
                left = _left(self._deadline, timeout)
                return _Stream(
                    self._inner.connect_tcp(address, port, left, local_address, socket_options), self._deadline
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    def _addresses(self, host: str, port: int) -> list[str]:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"its name does not resolve: {error}") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        for address in addresses:
            if is_this_machine(host):
                allowed = ipaddress.ip_address(address).is_loopback
            else:
                allowed = is_allowed(address, private_network=self._private_network)
            if not allowed:
                raise self._refuse(address)
        return addresses


class _Stream(httpcore.NetworkStream):
    """A stream whose every operation ends by the deadline."""

    def __init__(self, inner: httpcore.NetworkStream, deadline: float) -> None:
        self._inner = inner
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, _left(self._deadline, timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, _left(self._deadline, timeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        left = _left(self._deadline, timeout)
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, left), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


def _left(deadline: float, timeout: float | None) -> float:
    """Seconds that the next operation may take. Raises httpcore.TimeoutException where none are left."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout("the deadline has passed")
    return left if timeout is None else min(timeout, left)
