"""A notice by mail: one plain text message over SMTP (RFC 5321), with TLS that checks the server's certificate."""

from __future__ import annotations

import json
import smtplib
import ssl
from email.message import EmailMessage
from email.utils import format_datetime

from kbsync.errors import place_of
from kbsync.notify.message import Message, Undelivered
from kbsync.notify.settings import Email

__all__ = ["mail_of", "send"]

SECONDS = 15.0
"""For each step of the conversation."""
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


def send(channel: Email, password: str | None, message: Message) -> None:
    """Hand the mail to the channel's server. Raises Undelivered."""
    mail = mail_of(channel, message)
    try:
        with _connected(channel) as server:
            if channel.user is not None and password is not None:
                server.login(channel.user, password)
            refused = server.send_message(mail)
    except smtplib.SMTPResponseException as error:  # its text may repeat what was sent
        raise Undelivered(f"{channel.host}: SMTP status {error.smtp_code}") from None
    except ssl.SSLCertVerificationError as error:
        raise Undelivered(f"{channel.host}: its certificate is not valid ({error.verify_message})") from None
    except (OSError, smtplib.SMTPException) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise Undelivered(f"{channel.host}: cannot be reached ({said})") from None
    except ValueError as error:
        raise Undelivered(f"{channel.host}: the mail cannot be written ({place_of(error)})") from None
    if refused:
        raise Undelivered(f"{channel.host}: refused {len(refused)} of {len(channel.to)} recipients")


def _connected(channel: Email) -> smtplib.SMTP:
    port, context = channel.port or PORTS[channel.security], ssl.create_default_context()
    if channel.security == "tls":
        return smtplib.SMTP_SSL(channel.host, port, timeout=SECONDS, context=context)
    server = smtplib.SMTP(channel.host, port, timeout=SECONDS)
    try:
        if channel.security == "starttls":
            server.starttls(context=context)
    except BaseException:
        server.close()
        raise
    return server
