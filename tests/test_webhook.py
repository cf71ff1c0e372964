"""Webhooks against a real server: signed as the standard says, and nowhere that they may not go."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from pydantic import SecretStr
from standardwebhooks import Webhook as Verifier
from standardwebhooks import WebhookVerificationError

from kbsync.notify import webhook
from kbsync.notify.message import Message, Undelivered
from kbsync.notify.settings import Webhook
from kbsync.notify.webhook import post, signing_key
from tests.faultserver import FaultServer, answer, hang, redirect, reset

SECRET = "whsec_" + base64.b64encode(b"canary-key-of-32-bytes-in-total!").decode()
NOTICE = Message(
    id="msg_1",
    kind="stale",
    thread="stale sky stars constellation",
    workspace="astronomy",
    policy="sky",
    run=None,
    message="Vega → Lyra is late",
    hint="kbsync freshness",
    at=datetime(2026, 7, 1, tzinfo=UTC),
    detail={"waiting": 3},
)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    """A receiver."""
    with FaultServer() as running:
        yield running


def channel(**options: bool) -> Webhook:
    """A channel named ops."""
    return Webhook(name="ops", type="webhook", url=SecretStr("${URL}"), secret=SecretStr("${SECRET}"), **options)


def failure(url: str, secret: str = SECRET) -> Undelivered:
    """What goes wrong."""
    with pytest.raises(Undelivered) as caught:
        post(channel(), url, secret, NOTICE)
    return caught.value


def test_a_message_is_json_and_another_implementation_of_the_standard_verifies_its_signature(
    server: FaultServer,
) -> None:
    post(channel(), server.on("/hook", answer(status=204)), SECRET, NOTICE)
    [request] = server.requests
    verified = Verifier(SECRET).verify(request.body, dict(request.headers))
    assert verified == json.loads(NOTICE.model_dump_json())
    assert (request.method, request.headers["content-type"]) == ("POST", "application/json")
    assert request.headers["webhook-id"] == "msg_1"


def test_a_body_that_was_changed_on_the_way_is_not_verified(server: FaultServer) -> None:
    post(channel(), server.on("/hook", answer()), SECRET, NOTICE)
    [request] = server.requests
    with pytest.raises(WebhookVerificationError):
        Verifier(SECRET).verify(request.body.replace(b"Vega", b"Deneb"), dict(request.headers))


def test_every_attempt_has_the_same_id_and_body(server: FaultServer) -> None:
    url = server.on("/hook", answer())
    post(channel(), url, SECRET, NOTICE)
    post(channel(), url, SECRET, NOTICE)
    first, second = server.requests
    assert (first.body, first.headers["webhook-id"]) == (second.body, second.headers["webhook-id"])


@pytest.mark.parametrize(("status", "gone"), [(400, False), (404, False), (429, False), (503, False), (410, True)])
def test_any_status_but_2xx_is_a_failure_and_410_means_never_again(
    server: FaultServer, status: int, gone: bool
) -> None:
    url = server.on("/hook", answer(b"canary body", status=status, headers={"Retry-After": "7"}))
    found = failure(url)
    assert (found.problem, found.gone, found.retry_after) == (f"127.0.0.1: status {status}", gone, 7.0)


def test_redirects_are_not_followed(server: FaultServer) -> None:
    server.on("/other", answer())
    assert failure(server.on("/hook", redirect("/other", status=307))).problem == "127.0.0.1: status 307"
    assert [request.path for request in server.requests] == ["/hook"]


def test_a_server_that_hangs_or_hangs_up_is_a_failure(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "DEADLINE", 0.2)
    assert "no answer in 0.2 s" in failure(server.on("/hook", hang(1.0))).problem
    monkeypatch.undo()
    assert "cannot be reached" in failure(server.on("/hook", reset())).problem


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://hooks.example.org/x", "is plain http"),
        ("ftp://127.0.0.1/x", "must be an https URL"),
        ("https://user:canary@hooks.example.org/x", "must not carry a user"),
        ("https://169.254.169.254/latest", "is not on the public network"),
        ("https://10.0.0.1/x", "is not on the public network"),
    ],
)
def test_a_webhook_goes_over_https_to_a_public_address_or_to_this_machine(url: str, problem: str) -> None:
    found = failure(url).problem
    assert problem in found
    assert "canary" not in found


def test_link_local_addresses_are_refused_where_private_networks_are_allowed_too() -> None:
    with pytest.raises(Undelivered, match="is not on the public network"):
        post(channel(private_network=True), "https://169.254.169.254/latest", SECRET, NOTICE)


@pytest.mark.parametrize("secret", ["canary", "whsec_", "whsec_" + base64.b64encode(b"short").decode(), "whsec_é"])
def test_a_secret_that_is_none_is_refused_without_repeating_it(server: FaultServer, secret: str) -> None:
    found = failure(server.on("/hook", answer()), secret).problem
    assert "is no webhook secret" in found
    assert "canary" not in found
    assert server.requests == []


def test_the_prefix_of_a_secret_may_be_missing() -> None:
    assert signing_key(SECRET) == signing_key(SECRET.removeprefix("whsec_"))
