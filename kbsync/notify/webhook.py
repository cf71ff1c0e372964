"""A notice by webhook: POST of JSON, signed as Standard Webhooks says
(https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md).

The same rules as for sources: an allowed address, verified TLS, one deadline, but no redirect. The answer's body is not
read.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import time
from datetime import UTC, datetime
from importlib.metadata import version

import httpcore
import httpx

from kbsync.connectors.http import check_url, retry_after
from kbsync.connectors.network import Transport
from kbsync.notify.message import Message, Undelivered
from kbsync.notify.settings import Webhook

__all__ = ["post", "signature", "signing_key"]

DEADLINE = 15.0
"""Seconds for a whole request: the upper end of what the specification recommends."""
PREFIX = "whsec_"
AGENT = f"kbsync/{version('kbsync')}"


def signing_key(secret: str) -> bytes:
    """The key that a secret stands for: base64 of 24 to 64 bytes, with or without `whsec_`. Raises ValueError."""
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not 24 <= len(key) <= 64:
        raise ValueError("is no webhook secret: whsec_ and the base64 of 24 to 64 bytes")
    return key


def signature(key: bytes, id_: str, timestamp: int, body: bytes) -> str:
    """The header `webhook-signature` for a request at that time (seconds since 1970)."""
    signed = hmac.digest(key, f"{id_}.{timestamp}.".encode() + body, hashlib.sha256)
    return f"v1,{base64.b64encode(signed).decode()}"


def post(channel: Webhook, url: str, secret: str, message: Message) -> None:
    """Send a message to `url`, signed with `secret`. Raises Undelivered."""
    options = channel.model_dump(include={"private_network", "insecure_http"})
    try:
        check_url(url, options | {"user_agent": AGENT})
        key = signing_key(secret)
    except ValueError as error:
        raise Undelivered(f"channel {channel.name}: url or secret {error}") from None
    body, now = message.body(), int(time.time())
    headers = {
        "Content-Type": "application/json",
        "User-Agent": AGENT,
        "webhook-id": message.id,
        "webhook-timestamp": str(now),
        "webhook-signature": signature(key, message.id, now, body),
    }
    status, wait = _exchange(channel, httpx.Request("POST", url, headers=headers, content=body))
    if not 200 <= status < 300:
        raise Undelivered(f"{httpx.URL(url).host}: status {status}", retry_after=wait, gone=status == 410)


def _exchange(channel: Webhook, request: httpx.Request) -> tuple[int, float | None]:
    """Status, and the Retry-After in seconds."""
    host, deadline = request.url.host, time.monotonic() + DEADLINE

    def refuse(address: str) -> Exception:
        return Undelivered(f"{host}: its address {address} is not on the public network (private_network: true)")

    secure = request.url.scheme == "https"
    private = channel.private_network
    try:
        with Transport(deadline=deadline, secure=secure, private_network=private, refuse=refuse) as wire:
            response = wire.handle_request(request)
            return response.status_code, retry_after(response.headers.get("retry-after"), now=datetime.now(UTC))
    except httpcore.TimeoutException:
        raise Undelivered(f"{host}: no answer in {DEADLINE:g} s") from None
    except (httpcore.NetworkError, httpcore.ProtocolError) as error:
        raise Undelivered(f"{host}: cannot be reached ({error})") from None
