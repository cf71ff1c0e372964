"""A notice by mail: one plain text message over SMTP (RFC 5321), with TLS that checks the server's certificate."""

from __future__ import annotations

import json
import smtplib
import socket
import ssl
import threading
import time
from contextlib import suppress
from email.message import EmailMessage
from email.utils import format_datetime
from typing import Any

from kbsync.errors import place_of
from kbsync.notify.message import Message, Undelivered
from kbsync.notify.settings import Email

__all__ = ["mail_of", "send"]

SECONDS = 15.0
"""For each step of the conversation."""
DEADLINE = 45.0
"""Seconds for the whole of it: a server that says one letter now and then keeps every step short."""
PORTS = {"starttls": 587, "tls": 465, "none": 25}
SUBJECT = 150
"""Characters of the message that are its subject, too."""


def mail_of(channel: Email, message: Message) -> EmailMessage:
    """The mail. Line breaks in a subject would begin another header (CWE-93): they become blanks."""
    mail = EmailMessage()
    mail["From"] = channel.sender
    mail["To"] = ", ".join(channel.to)
    mail["Subject"] = " ".join(f"[kbsync {message.workspace}] {message.kind}: {message.message}".split())[:SUBJECT]
    mail["Date"] = format_datetime(message.at)
    mail["Message-ID"] = f"<{message.id}@kbsync.invalid>"
    mail["Auto-Submitted"] = "auto-generated"
    parts = [message.message]
    if message.hint:
        parts.append(f"More: {message.hint}")
    run = "" if message.run is None else f", run {message.run}"
    parts.append(f"Workspace {message.workspace}, {message.thread}{run}, {message.at:%Y-%m-%d %H:%M} UTC")
    if message.detail:
        parts.append(json.dumps(message.detail, indent=2, sort_keys=True, ensure_ascii=False))
    mail.set_content("\n\n".join(parts) + "\n")
    return mail


def send(channel: Email, password: str | None, message: Message) -> str:
    """Hand the mail to the channel's server; which recipients it refused, where it took others, or nothing. Raises
    Undelivered where no recipient gets it."""
    mail, late = mail_of(channel, message), time.monotonic() + DEADLINE
    try:
        server = _connected(channel)
        try:
            if channel.user is not None and password is not None:
                server.login(channel.user, password)
            refused = server.send_message(mail)
            with suppress(OSError):  # it has the mail, however it says goodbye
                server.quit()
        finally:
            server.close()
    except OSError as error:  # all that smtplib raises, too
        over = time.monotonic() >= late
        why = f"did not take the mail within {DEADLINE:g} s" if over else _why(error)
        raise Undelivered(f"{channel.host}: {why}") from None
    except ValueError as error:
        raise Undelivered(f"{channel.host}: the mail cannot be written ({place_of(error)})") from None
    return f"{channel.host}: refused {_named(refused)}" if refused else ""


def _why(error: OSError) -> str:
    """What went wrong, without what the server said: that may repeat what was sent."""
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        return f"refused {_named(error.recipients)}"
    if isinstance(error, smtplib.SMTPResponseException):
        return f"SMTP status {error.smtp_code}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid ({error.verify_message})"
    return f"cannot be reached ({error.strerror or type(error).__name__})"


def _named(refused: dict[str, tuple[int, bytes]]) -> str:
    return ", ".join(f"{address} ({status})" for address, (status, _) in sorted(refused.items()))


class _Limited(smtplib.SMTP):
    """A conversation of at most DEADLINE seconds: then its socket is shut, and whatever waits for it fails."""

    def connect(self, *args: Any, **options: Any) -> tuple[int, bytes]:
        """Connect, and watch the time from now."""
        self._over = threading.Event()
        threading.Thread(target=self._watch, args=(self._over,), name="mail deadline", daemon=True).start()
        try:
            return super().connect(*args, **options)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Hang up."""
        self._over.set()
        super().close()

    def _watch(self, over: threading.Event) -> None:
        # Again and again: it may be connecting, or exchanging this socket for one with TLS.
        wait = DEADLINE
        while not over.wait(wait):
            wait = 0.1
            if self.sock is not None:
                with suppress(OSError):
                    socket.socket.shutdown(self.sock, socket.SHUT_RDWR)


class _LimitedTLS(_Limited, smtplib.SMTP_SSL):
    """The same with TLS from the first byte."""


def _connected(channel: Email) -> smtplib.SMTP:
    port, context = channel.port or PORTS[channel.security], ssl.create_default_context()
    if channel.security == "tls":
        return _LimitedTLS(channel.host, port, timeout=SECONDS, context=context)
    server = _Limited(channel.host, port, timeout=SECONDS)
    try:
        if channel.security == "starttls":
            server.starttls(context=context)
    except BaseException:
        server.close()
        raise
    return server
