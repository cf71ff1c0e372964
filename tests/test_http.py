"""Requests to sources, against a server that behaves as badly as real ones do."""

from __future__ import annotations

import gzip
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpcore
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ByteSize

from kbsync.connectors.coding import PIECE_BYTES, BadCoding, decoded
from kbsync.connectors.http import Budget, HttpOptions, Reply, check_url, retry_after, send
from kbsync.connectors.network import is_allowed
from kbsync.errors import SourceBlocked, SourceError, SourceInvalid, SourceUnavailable
from tests.faultserver import FaultServer, answer, big, cut, drip, drip_headers, endless, hang, redirect, reset

ROWS = b"name\nVega\n" * 20_000
NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


PRIVATE = "10.9.8.7"


@pytest.fixture
def private_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections to PRIVATE come to this machine, which a name may not lead to."""
    plain = httpcore.SyncBackend.connect_tcp

    def connect(self: httpcore.SyncBackend, host: str, *args: Any, **kwargs: Any) -> httpcore.NetworkStream:
        return plain(self, "127.0.0.1" if host == PRIVATE else host, *args, **kwargs)

    monkeypatch.setattr(httpcore.SyncBackend, "connect_tcp", connect)


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with FaultServer() as running:
        yield running


def get(url: str, **options: Any) -> Reply:
    return send("stars", httpx.Request("GET", url), HttpOptions.model_validate(options))


def test_a_good_answer_comes_whole(server: FaultServer) -> None:
    """Status, headers and body are the server's; the media type is without its parameters."""
    reply = get(server.on("/good", answer(b"name\nVega\n", headers={"ETag": '"1"'})))
    assert (reply.status, reply.body, reply.content_type, reply.headers["etag"]) == (
        200,
        b"name\nVega\n",
        "text/csv",
        '"1"',
    )
    assert len(reply.sha256) == 64


def test_the_user_agent_is_sent_as_declared(server: FaultServer) -> None:
    """A contact in the user agent reaches the server unchanged; without one the program names itself."""
    url = server.on("/agent", answer(b"x"))
    get(url, user_agent="kbsync/1.0 (mailto:ops@example.org)")
    assert server.requests[-1].headers["user-agent"] == "kbsync/1.0 (mailto:ops@example.org)"
    get(url)
    assert server.requests[-1].headers["user-agent"].startswith("kbsync/")


def test_a_compressed_answer_is_decoded(server: FaultServer) -> None:
    """gzip, whether asked for or not, is unpacked."""
    assert get(server.on("/gzip", answer(b"name\nVega\n", zipped=True))).body == b"name\nVega\n"


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (204, SourceInvalid),
        (206, SourceInvalid),
        (304, SourceInvalid),
        (400, SourceInvalid),
        (401, SourceInvalid),
        (403, SourceBlocked),
        (404, SourceInvalid),
        (408, SourceUnavailable),
        (410, SourceInvalid),
        (414, SourceInvalid),
        (429, SourceUnavailable),
        (500, SourceUnavailable),
        (502, SourceUnavailable),
        (503, SourceUnavailable),
        (504, SourceUnavailable),
    ],
)
def test_each_status_has_its_error(server: FaultServer, status: int, error: type[SourceError]) -> None:
    """Anything but a whole 200 fails the fetch, with the class that says whether asking again can help."""
    with pytest.raises(SourceError) as caught:
        get(server.on("/status", answer(b"out of order\nmore", status=status, kind="text/plain")))
    assert type(caught.value) is error
    assert f"status {status}" in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [("0", 5, 5), ("7", 7, 7), ("99999999999", 86_400, 86_400), ("soon", 60, 60), (None, 60, 60)],
)
@pytest.mark.parametrize("status", [429, 503])
def test_a_refusal_says_how_long_to_wait(
    server: FaultServer, status: int, header: str | None, least: float, most: float
) -> None:
    """Retry-After counts from 5 s up to a day; absent or unreadable it is a minute."""
    headers = {} if header is None else {"Retry-After": header}
    with pytest.raises(SourceUnavailable) as caught:
        get(server.on("/wait", answer(status=status, headers=headers)))
    assert caught.value.retry_after is not None
    assert least <= caught.value.retry_after <= most


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("Thu, 01 Jan 2026 12:01:30 GMT", 90.0),
        ("Thu, 01 Jan 2026 12:01:30 -0000", 90.0),
        ("Thu, 01 Jan 2026 11:00:00 GMT", 0.0),
        ("Thu, 01 Jan 2099 11:00:00 GMT", 86_400.0),
        (" 12 ", 12.0),
        ("-3", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(header: str | None, seconds: float | None) -> None:
    """Both forms of RFC 9110 are read; a date that has passed is no wait."""
    assert retry_after(header, now=NOW) == seconds


@given(st.text(max_size=60))
def test_any_retry_after_is_a_bounded_wait_or_none(header: str) -> None:
    """No header can raise or ask for more than a day."""
    wait = retry_after(header, now=NOW)
    assert wait is None or 0 <= wait <= 86_400


def test_a_dripping_body_ends_at_the_deadline(server: FaultServer) -> None:
    """The deadline is wall-clock time: bytes that keep coming do not extend it."""
    began = time.monotonic()
    with pytest.raises(SourceUnavailable, match="no whole answer"):
        get(server.on("/drip", drip(0.05)), deadline=0.4)
    assert 0.3 < time.monotonic() - began < 1.5


def test_dripping_headers_end_at_the_deadline(server: FaultServer) -> None:
    """The deadline covers the headers, too."""
    began = time.monotonic()
    with pytest.raises(SourceUnavailable, match="no whole answer"):
        get(server.on("/headers", drip_headers(0.05)), deadline=0.4)
    assert time.monotonic() - began < 1.5


def test_a_silent_server_ends_at_the_deadline(server: FaultServer) -> None:
    """No byte at all is a timeout at the deadline."""
    with pytest.raises(SourceUnavailable, match="no whole answer"):
        get(server.on("/silent", hang(0.8)), deadline=0.3)


def test_a_body_shorter_than_promised_is_invalid(server: FaultServer) -> None:
    """A connection that closes before Content-Length is reached gives no snapshot."""
    with pytest.raises(SourceInvalid, match="cut"):
        get(server.on("/cut", cut(b"name\nVega\n", promised=500)))


def test_a_reset_is_unavailable(server: FaultServer) -> None:
    """A connection that closes without an answer may work later."""
    with pytest.raises(SourceUnavailable, match="cannot be reached"):
        get(server.on("/reset", reset()))


def test_a_refused_connection_is_unavailable() -> None:
    """Nobody listens: may work later."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(SourceUnavailable, match="cannot be reached"):
        get(f"http://127.0.0.1:{port}/")


def test_a_name_that_does_not_resolve_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure of DNS may pass."""

    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(SourceUnavailable, match="does not resolve"):
        get("https://feed.example/")


def test_a_big_body_is_refused_without_reading_it_all(server: FaultServer) -> None:
    """The cap holds while the body comes in."""
    with pytest.raises(SourceInvalid, match="larger than 100") as caught:
        get(server.on("/big", big(50_000_000)), max_bytes="100KB")
    assert "max_bytes" in caught.value.hint


def test_a_compression_bomb_is_refused(server: FaultServer) -> None:
    """The cap counts what comes out of the decompression."""
    with pytest.raises(SourceInvalid, match="larger than"):
        get(server.on("/bomb", answer(b"0" * 5_000_000, zipped=True)), max_bytes=ByteSize(100_000))


def test_a_broken_compression_is_invalid(server: FaultServer) -> None:
    """A body that is not what Content-Encoding says is no answer."""
    with pytest.raises(SourceInvalid, match="not compressed"):
        get(server.on("/notgzip", answer(b"plain", headers={"Content-Encoding": "gzip"})))
    whole = gzip.compress(b"name\nVega\n" * 100)
    with pytest.raises(SourceInvalid):
        get(server.on("/badgzip", answer(whole[:10] + b"\0" * 20, headers={"Content-Encoding": "gzip"})))


def packings() -> dict[str, tuple[str, bytes]]:
    """The ways to pack a body that are undone, each with its header."""
    raw = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return {
        "gzip": ("gzip", gzip.compress(ROWS)),
        "x-gzip": ("X-GZIP", gzip.compress(ROWS)),
        "deflate": ("deflate", zlib.compress(ROWS)),
        "raw deflate": ("deflate", raw.compress(ROWS) + raw.flush()),
        "identity": ("identity", ROWS),
    }


@pytest.mark.parametrize("packing", packings())
def test_a_body_that_is_packed_once_is_unpacked(server: FaultServer, packing: str) -> None:
    """gzip and both kinds of deflate, in pieces that are small however much comes out."""
    coding, body = packings()[packing]
    assert get(server.on("/packed", answer(body, headers={"Content-Encoding": coding}))).body == ROWS
    pieces = list(decoded([body[:1], b"", body[1:]], coding))
    assert b"".join(pieces) == ROWS
    assert max(map(len, pieces)) <= PIECE_BYTES or coding == "identity"


@pytest.mark.parametrize("packing", ["gzip", "x-gzip", "deflate", "raw deflate"])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_packed_body_without_its_end_is_no_body(packing: str, data: st.DataObject) -> None:
    """Wherever it is cut, and also where something follows."""
    coding, body = packings()[packing]
    cut_at = data.draw(st.integers(0, len(body) - 1))
    with pytest.raises(BadCoding):
        list(decoded([body[:cut_at]], coding))
    with pytest.raises(BadCoding, match="after its end"):
        list(decoded([body + b"x"], coding))


def test_a_cut_packed_answer_is_refused_though_its_length_is_right(server: FaultServer) -> None:
    """A server or a cache that stored half of an answer sends it with its own length."""
    body = gzip.compress(ROWS)[:-9]
    with pytest.raises(SourceInvalid, match="its end is missing"):
        get(server.on("/half", answer(body, headers={"Content-Encoding": "gzip"})))


@pytest.mark.parametrize("coding", ["gzip, gzip", "br", "zstd", "deflate, gzip", "\x1b[2J"])
@pytest.mark.parametrize("status", [200, 500])
def test_what_is_packed_otherwise_is_not_unpacked(server: FaultServer, coding: str, status: int) -> None:
    """Twice, or as nobody asked for: it is refused, and of an error only the status is told."""
    body = gzip.compress(gzip.compress(ROWS))
    with pytest.raises(SourceError) as caught:
        get(server.on("/twice", answer(body, status=status, headers={"Content-Encoding": coding})))
    told = caught.value.message
    assert ("which was not asked for" in told) if status == 200 else told.endswith("Internal Server Error")
    assert "\x1b" not in told


def test_an_answer_says_whether_its_end_is_known(server: FaultServer) -> None:
    """A length or a compression tells it; a connection that closes does not."""
    assert get(server.on("/framed", answer(ROWS))).framed
    assert get(server.on("/packed", endless(gzip.compress(ROWS), headers={"Content-Encoding": "gzip"}))).framed
    assert not get(server.on("/endless", endless(ROWS))).framed


def test_redirects_on_the_host_are_followed(server: FaultServer) -> None:
    """Up to three, and no more."""
    server.on("/end", answer(b"here"))
    server.on("/two", redirect("/end", status=307))
    server.on("/one", redirect(server.url("/two")))
    assert get(server.on("/start", redirect("/one", status=301))).body == b"here"
    with pytest.raises(SourceInvalid, match="more than 3 redirects"):
        get(server.on("/loop", redirect("/loop")))


@pytest.mark.parametrize(
    "to",
    [
        "http://localhost:{port}/end",
        "http://127.0.0.1:1/admin",
        "https://127.0.0.1:{port}/",
        "https://example.org/",
        "ftp://127.0.0.1/",
        "file:///etc/passwd",
        "http://u:p@127.0.0.1/",
    ],
)
def test_redirects_elsewhere_are_refused(server: FaultServer, to: str) -> None:
    """Another host, another protocol, or credentials in the URL were not declared."""
    with pytest.raises(SourceInvalid, match="redirects to") as caught:
        get(server.on("/away", redirect(to.format(port=server.port))))
    assert "sources/stars.yaml" in caught.value.hint
    with pytest.raises(SourceInvalid, match="redirects to no URL"):
        get(server.on("/away", redirect("http://127.0.0.1:port/")))


def test_a_post_is_not_turned_into_a_get(server: FaultServer) -> None:
    """302 would repeat a POST as a GET; 307 repeats it as it is."""
    server.on("/target", answer(b"ok"))
    request = httpx.Request("POST", server.on("/post", redirect("/target")), content=b"query")
    with pytest.raises(SourceInvalid, match="redirects a POST"):
        send("stars", request, HttpOptions())
    request = httpx.Request("POST", server.on("/post", redirect("/target", status=307)), content=b"query")
    assert send("stars", request, HttpOptions()).body == b"ok"
    assert (server.requests[-1].method, server.requests[-1].body) == ("POST", b"query")


def test_a_conditional_request_may_be_answered_304(server: FaultServer) -> None:
    """304 has no body, and counts only where a validator was sent."""
    request = httpx.Request("GET", server.on("/same", answer(status=304)), headers={"If-None-Match": '"1"'})
    assert (send("stars", request, HttpOptions()).status, send("stars", request, HttpOptions()).body) == (304, b"")


def test_one_request_at_a_time_per_host() -> None:
    """Sources of one host wait for each other, over all threads."""

    def ask(url: str) -> None:
        with pytest.raises(SourceUnavailable):
            get(url)

    with FaultServer() as server:
        url = server.on("/slow", hang(0.05))
        threads = [threading.Thread(target=ask, args=(url,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(server.requests), server.most_in_flight) == (4, 1)


def test_one_request_at_a_time_per_host_over_processes(tmp_path: Path) -> None:
    """Two processes of one user wait for each other as threads do; hosts do not wait for other hosts."""
    code = (
        "import sys, httpx; from kbsync.connectors.http import HttpOptions, send\n"
        "for _ in range(3): send('stars', httpx.Request('GET', sys.argv[1]), HttpOptions())"
    )

    def slow(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.05)
        answer(b"ok")(handler)

    environment = {**os.environ, "KBSYNC_CACHE": str(tmp_path)}
    with FaultServer() as server:
        command = [sys.executable, "-c", code, server.on("/slow", slow)]
        asking = [subprocess.Popen(command, env=environment) for _ in range(2)]
        assert [process.wait(60) for process in asking] == [0, 0]
        assert (len(server.requests), server.most_in_flight) == (6, 1)
    assert [path.name for path in (tmp_path / "hosts").iterdir()] == ["127.0.0.1"]


def test_the_wait_for_a_turn_counts_towards_the_deadline(
    server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another process asks the host all the time, the source is unavailable and nothing is sent to it."""
    monkeypatch.setenv("KBSYNC_CACHE", str(tmp_path))
    url = server.on("/free", answer(b"ok"))
    holder = (
        "import sys, time; from kbsync.connectors.turns import turn\n"
        "with turn(sys.argv[1], time.monotonic() + 9): print('mine', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", holder, "127.0.0.1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == b"mine\n"
        before = len(server.requests)
        with pytest.raises(SourceUnavailable, match="another request of this machine"):
            get(url, deadline=0.2)
        assert len(server.requests) == before
        other.stdin.close()
    assert get(url, deadline=5).body == b"ok"


def test_without_a_cache_only_this_process_takes_turns(
    server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that cannot be written is no reason not to ask."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KBSYNC_CACHE", str(tmp_path / "file"))
    assert get(server.on("/free", answer(b"ok"))).body == b"ok"


def test_a_budget_holds_over_several_requests(server: FaultServer) -> None:
    """The bytes of a second answer add to those of the first."""
    options = HttpOptions(max_bytes=ByteSize(150))
    url, budget = server.on("/hundred", answer(b"x" * 100)), Budget(options)
    assert len(send("stars", httpx.Request("GET", url), options, budget).body) == 100
    with pytest.raises(SourceInvalid, match="larger than"):
        send("stars", httpx.Request("GET", url), options, budget)


@pytest.mark.parametrize(
    ("address", "public", "private"),
    [
        ("93.184.215.14", True, True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True, True),
        ("10.0.0.1", False, True),
        ("192.168.1.1", False, True),
        ("100.64.0.1", False, True),
        ("127.0.0.1", False, False),
        ("::1", False, False),
        ("2002:0a00:0001::1", False, True),
        ("2002:a9fe:a9fe::1", False, False),
        ("2002:5db8:d70e::1", True, True),
        ("2001:0:4136:e378:8000:63bf:5601:5601", False, False),
        ("64:ff9b::a00:1", False, True),
        ("64:ff9b::a9fe:a9fe", False, False),
        ("64:ff9b::5db8:d70e", True, True),
        ("fec0::1", False, False),
        ("168.63.129.16", False, False),
        ("100.100.100.200", False, False),
        ("fd00:ec2::254", False, False),
        ("192.0.0.192", False, False),
        ("fd00::1", False, True),
        ("::ffff:10.0.0.1", False, True),
        ("169.254.169.254", False, False),
        ("::ffff:169.254.169.254", False, False),
        ("fe80::1%eth0", False, False),
        ("224.0.0.1", False, False),
        ("0.0.0.0", False, False),
        ("255.255.255.255", False, False),
        ("::", False, False),
    ],
)
def test_which_addresses_a_source_may_have(address: str, public: bool, private: bool) -> None:
    """Private networks by option only; link-local (cloud metadata), multicast and reserved addresses never."""
    assert is_allowed(address, private_network=False) is public
    assert is_allowed(address, private_network=True) is private


@pytest.mark.parametrize("address", ["127.0.0.1", "10.1.2.3", "169.254.169.254"])
def test_a_public_name_with_a_private_address_is_refused(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """What a name resolves to is checked before anything is sent, and one bad address is enough."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80)) for ip in ("93.184.215.14", address)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(SourceInvalid, match=f"its address {address} is not on the public network"):
        get("http://feed.example/", insecure_http=True)


@pytest.mark.usefixtures("private_wire")
def test_the_connection_goes_to_the_address_that_was_checked(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is resolved once: a second answer of DNS cannot change where the request goes."""
    answers = iter([[(socket.AF_INET, socket.SOCK_STREAM, 6, "", (PRIVATE, server.port))]])
    plain = socket.getaddrinfo

    def resolve(host: str, *args: Any, **kwargs: Any) -> Any:
        return next(answers) if host == "feed.example" else plain(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    server.on("/pinned", answer(b"ok"))
    reply = get(f"http://feed.example:{server.port}/pinned", insecure_http=True, private_network=True)
    assert reply.body == b"ok"
    assert server.requests[-1].headers["host"] == f"feed.example:{server.port}"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate; ends where there is one")
@pytest.mark.usefixtures("private_wire")
def test_a_certificate_is_checked_against_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """https connects to the checked address and verifies the name; an unknown certificate is refused."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", "/CN=feed.example", "-addext", "subjectAltName=DNS:feed.example"),
            *("-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    plain = socket.getaddrinfo
    local = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (PRIVATE, 0))]
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **k: local if str(host).endswith(".example") else plain(host, *a, **k)
    )
    with FaultServer() as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.secure(context)
        server.on("/", answer(b"ok"))
        url = f"https://feed.example:{server.port}/"
        with pytest.raises(SourceUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
            get(url, private_network=True)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert get(url, private_network=True).body == b"ok"
        with pytest.raises(SourceUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
            get(url.replace("feed", "other"), private_network=True)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("https://example.org/a.csv", ""),
        ("http://127.0.0.1:8000/a.csv", ""),
        ("http://localhost/a.csv", ""),
        ("http://[::1]/a.csv", ""),
        ("http://example.org/a.csv", "plain http"),
        ("ftp://example.org/a.csv", "must be an https URL"),
        ("file:///etc/passwd", "must be an https URL"),
        ("https:///a.csv", "must be an https URL"),
        ("https://user:secret@example.org/", "password"),
        ("https://exa mple.org/", "must be an https URL"),
        ("https://example.org:port/", "is no URL"),
        ("https://query.wikidata.org/sparql", "contact"),
        ("https://wikidata.org.example.org/sparql", ""),
    ],
)
def test_which_urls_a_source_may_have(url: str, problem: str) -> None:
    """https, or plain http to this machine; no credentials; Wikimedia only with a contact."""
    declared = {"user_agent": "kbsync/0.1.0", "insecure_http": False}
    if not problem:
        assert check_url(url, declared) == url
    else:
        with pytest.raises(ValueError, match=problem) as caught:
            check_url(url, declared)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("contact", ["mailto:ops@example.org", "ops@example.org", "https://example.org/bot"])
def test_wikimedia_takes_a_mail_address_or_a_url_as_contact(contact: str) -> None:
    """Either form of the User-Agent policy counts."""
    declared = {"user_agent": f"kbsync/1.0 ({contact})"}
    assert check_url("https://query.wikidata.org/sparql", declared)


@pytest.mark.parametrize("agent", ["", "kbsync\r\nX-Injected: 1", "kbsync/1.0 (Zoë)"])
def test_a_user_agent_is_one_line_of_ascii(agent: str) -> None:
    """Nothing can be smuggled into the headers."""
    with pytest.raises(ValueError, match="user_agent"):
        HttpOptions(user_agent=agent)
