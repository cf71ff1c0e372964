"""Mail against a real SMTP server: encrypted, checked, logged in, and nothing but one mail."""

from __future__ import annotations

import email
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from email.policy import SMTP
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, Envelope
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import SecretStr

from kbsync.notify import mail
from kbsync.notify.mail import mail_of, send
from kbsync.notify.message import Undelivered
from kbsync.notify.settings import Email
from tests.test_webhook import NOTICE

PASSWORD = "canary-password"


class Postbox:
    """What a server was given; `answer` is what it says to each mail."""

    def __init__(self) -> None:
        self.envelopes: list[Envelope] = []
        self.logins: list[tuple[bytes, bytes]] = []
        self.answer = "250 OK"
        self.unknown: dict[str, str] = {}
        """What it says to recipients that it does not take."""

    async def handle_RCPT(  # noqa: N802 (aiosmtpd's name)
        self, _server: Any, _session: Any, envelope: Envelope, address: str, _options: Any
    ) -> str:
        """A recipient is named."""
        if address not in self.unknown:
            envelope.rcpt_tos.append(address)
        return self.unknown.get(address, "250 OK")

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Envelope) -> str:  # noqa: N802 (aiosmtpd's name)
        """A mail has come."""
        self.envelopes.append(envelope)
        return self.answer

    def check(self, _server: Any, _session: Any, _envelope: Any, _mechanism: str, login: Any) -> AuthResult:
        """Somebody logs in."""
        self.logins.append((login.login, login.password))
        return AuthResult(success=login.password == PASSWORD.encode(), handled=False)

    def mail(self) -> EmailMessage:
        """The only mail."""
        [envelope] = self.envelopes
        assert isinstance(envelope.content, bytes)
        found = email.message_from_bytes(envelope.content, policy=SMTP)
        assert isinstance(found, EmailMessage)
        return found


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A certificate of 127.0.0.1 with its key, trusted on this machine for the time of the test."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "postbox")]), datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path / "certificate.pem"
    plain, form = serialization.NoEncryption(), serialization.PrivateFormat.PKCS8
    pem = serialization.Encoding.PEM
    file.write_bytes(made.public_bytes(pem) + key.private_bytes(pem, form, plain))
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    return file


def context_of(certificate: Path) -> ssl.SSLContext:
    """A server's side of TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


class _Anywhere(Controller):
    """A controller that takes the port that is free."""

    def _trigger_server(self) -> None:
        assert self.server is not None
        self.port = self.server.sockets[0].getsockname()[1]
        super()._trigger_server()


@contextmanager
def serving(box: Postbox, **options: Any) -> Iterator[int]:
    """A server on this machine that gives its mail to the box; its port."""
    controller = _Anywhere(box, hostname="127.0.0.1", port=0, **options)
    controller.start()
    try:
        yield controller.port
    finally:
        controller.stop()


def channel(port: int, **options: Any) -> Email:
    """A channel to a server on this machine."""
    values = {"name": "mail", "type": "email", "host": "127.0.0.1", "port": port, "security": "none"}
    return Email(**(values | {"from": "kbsync@example.org", "to": ("ada@example.org", "bob@example.org")} | options))


def login(port: int, **options: Any) -> Email:
    """The same with a user and a password."""
    return channel(port, user="kbsync", password=SecretStr("${PASSWORD}"), **options)


def test_a_notice_is_one_plain_text_mail_to_all_recipients() -> None:
    box = Postbox()
    with serving(box) as port:
        send(channel(port), None, NOTICE)
    found = box.mail()
    assert box.envelopes[0].rcpt_tos == ["ada@example.org", "bob@example.org"]
    assert (found["From"], found["To"]) == ("kbsync@example.org", "ada@example.org, bob@example.org")
    assert found["Subject"] == "[kbsync astronomy] stale: Vega → Lyra is late"
    assert found["Message-ID"] == "<msg_1@kbsync.invalid>"
    assert found.get_content_type() == "text/plain"
    text = found.get_content()
    assert "Vega → Lyra is late" in text
    assert "More: kbsync freshness" in text
    assert '"waiting": 3' in text


def test_a_mail_goes_over_starttls_after_the_certificate_was_checked_and_then_logs_in(certificate: Path) -> None:
    box = Postbox()
    with serving(box, tls_context=context_of(certificate), require_starttls=True, authenticator=box.check) as port:
        send(login(port, security="starttls"), PASSWORD, NOTICE)
    assert box.logins == [(b"kbsync", PASSWORD.encode())]
    assert box.mail()["Message-ID"] == "<msg_1@kbsync.invalid>"


def test_a_mail_goes_over_tls_from_the_first_byte(certificate: Path) -> None:
    box = Postbox()
    with serving(box, ssl_context=context_of(certificate)) as port:
        send(channel(port, security="tls"), None, NOTICE)
    assert len(box.envelopes) == 1


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_a_certificate_that_nobody_vouches_for_gets_no_mail_and_no_password(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, security: str
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    box, context = Postbox(), context_of(certificate)
    options = {"tls_context": context} if security == "starttls" else {"ssl_context": context}
    with serving(box, authenticator=box.check, **options) as port, pytest.raises(Undelivered) as caught:
        send(login(port, security=security), PASSWORD, NOTICE)
    assert "its certificate is not valid" in caught.value.problem
    assert (box.envelopes, box.logins) == ([], [])


def test_a_server_without_starttls_gets_no_mail_and_no_password() -> None:
    """Somebody between may have taken the offer out of its answer."""
    box = Postbox()
    with serving(box, authenticator=box.check, auth_require_tls=False) as port, pytest.raises(Undelivered):
        send(login(port, security="starttls"), PASSWORD, NOTICE)
    assert (box.envelopes, box.logins) == ([], [])


def test_a_wrong_password_is_a_failure_that_does_not_repeat_it(certificate: Path) -> None:
    box = Postbox()
    context = context_of(certificate)
    with serving(box, tls_context=context, authenticator=box.check) as port, pytest.raises(Undelivered) as caught:
        send(login(port, security="starttls"), "canary-other", NOTICE)
    assert caught.value.problem == "127.0.0.1: SMTP status 535"


def test_a_server_that_refuses_a_mail_or_is_not_there_is_a_failure() -> None:
    box = Postbox()
    box.answer = "451 canary, later"
    with serving(box) as port, pytest.raises(Undelivered) as refused:
        send(channel(port), None, NOTICE)
    assert refused.value.problem == "127.0.0.1: SMTP status 451"
    with pytest.raises(Undelivered, match="cannot be reached"):
        send(channel(port), None, NOTICE)


def test_a_mail_that_one_recipient_gets_is_sent_and_those_that_were_refused_are_named() -> None:
    box = Postbox()
    box.unknown = {"bob@example.org": "550 canary, nobody of this name"}
    with serving(box) as port:
        assert send(channel(port), None, NOTICE) == "127.0.0.1: refused bob@example.org (550)"
        assert box.envelopes[0].rcpt_tos == ["ada@example.org"]
        box.unknown["ada@example.org"] = "450 canary, later"
        with pytest.raises(Undelivered) as caught:
            send(channel(port), None, NOTICE)
    assert caught.value.problem == "127.0.0.1: refused ada@example.org (450), bob@example.org (550)"


@contextmanager
def speaking(talk: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server that says what `talk` does to whoever comes; its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with suppress(OSError), server.accept()[0] as wire:
                talk(wire)

        thread = threading.Thread(target=accept)
        thread.start()
        yield server.getsockname()[1]
        thread.join()


RECORD = b"\x16\x03\x03\x40\x00"
"""Of TLS: a handshake of 16 KiB comes."""


@pytest.mark.parametrize(
    ("security", "replies", "drop"),
    [
        ("none", [], b"2"),
        ("none", [b"220 x\r\n"], b"250-x\r\n"),
        ("starttls", [b"220 x\r\n", b"250-x\r\n250 STARTTLS\r\n", b"220 go\r\n"], RECORD),
        ("tls", [], RECORD),
    ],
)
def test_a_server_that_drips_is_left_when_the_time_of_the_whole_conversation_is_over(
    monkeypatch: pytest.MonkeyPatch, security: str, replies: list[bytes], drop: bytes
) -> None:
    """Every read gets something in time: of the greeting, of an answer, of the handshake."""
    monkeypatch.setattr(mail, "SECONDS", 1.0)
    monkeypatch.setattr(mail, "DEADLINE", 0.5)

    def drip(wire: socket.socket) -> None:
        for reply in replies:
            wire.sendall(reply)
            wire.recv(1000)
        while True:
            wire.sendall(drop)
            time.sleep(0.1)

    began = time.monotonic()
    with speaking(drip) as port, pytest.raises(Undelivered) as caught:
        send(channel(port, security=security), None, NOTICE)
    assert time.monotonic() - began < 5
    assert caught.value.problem == "127.0.0.1: did not take the mail within 0.5 s"


def test_a_mail_that_was_taken_is_sent_however_the_server_says_goodbye() -> None:
    def talk(wire: socket.socket) -> None:
        with wire.makefile("rwb", buffering=0) as file:
            file.write(b"220 x\r\n")
            text = False
            while line := file.readline():
                if text and line != b".\r\n":
                    continue
                text = line.upper() == b"DATA\r\n"
                file.write(b"354 go\r\n" if text else b"421 bye\r\n" if line == b"QUIT\r\n" else b"250 x\r\n")

    with speaking(talk) as port:
        assert send(channel(port), None, NOTICE) == ""


@pytest.mark.parametrize(
    "text", ["late\r\nBcc: eve@example.org", "late\n\nAll is well", "late\u2028\x85Bcc: eve@x.y", "\0"]
)
def test_what_a_source_wrote_can_add_no_header_and_no_recipient(text: str) -> None:
    message = NOTICE.model_copy(update={"message": text})
    box = Postbox()
    with serving(box) as port:
        send(channel(port), None, message)
    found = box.mail()
    assert found["Bcc"] is None
    assert box.envelopes[0].rcpt_tos == ["ada@example.org", "bob@example.org"]
    assert found.keys() == mail_of(channel(port), NOTICE).keys()


def test_a_long_message_has_a_short_subject_and_stands_whole_in_the_text() -> None:
    found = mail_of(channel(25), NOTICE.model_copy(update={"message": "late " * 500}))
    assert len(found["Subject"]) <= mail.SUBJECT
    assert found.get_content().count("late ") >= 499
