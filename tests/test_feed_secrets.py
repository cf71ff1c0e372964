"""What a feed is fetched with may be secret: it stands in the source file as a reference, and is shown nowhere."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from kbsync.errors import SourceError, SourceInvalid
from kbsync.references import holds_password, open_to_others, redacted
from tests.faultserver import FaultServer, answer
from tests.feeds import CSV, connector, pairs

CANARY = "canary-5e1d"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    monkeypatch.setenv("FEED_TOKEN", CANARY)
    with FaultServer() as running:
        yield running


def everything_said(found: Any, error: SourceError) -> str:
    chain = [error, error.__cause__, None if error.__suppress_context__ else error.__context__]
    return "\n".join([*found.warnings, error.message, error.hint, repr(vars(found)), *map(repr, chain)])


def test_a_secret_of_a_url_reaches_the_server_alone(
    server: FaultServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In its path and its query; the provenance and the log have neither, and the checksum file is asked for, too."""
    caplog.set_level(logging.DEBUG)
    server.on(f"/{CANARY}/stars.csv", answer(CSV.encode()))
    location = server.url("/${FEED_TOKEN}/stars.csv") + "?key=${FEED_TOKEN}"
    found = connector(tmp_path, location=location)
    snapshot = found.fetch(None)
    assert pairs(snapshot) == {"Vega": "Lyr", "Deneb": "Cyg"}
    assert server.requests[-1].path == f"/{CANARY}/stars.csv?key={CANARY}"
    assert snapshot.provenance.location.endswith("/${FEED_TOKEN}/stars.csv?…")
    assert found.warnings == ()
    assert CANARY not in caplog.text + repr(snapshot.provenance) + repr(vars(found))


def test_headers_go_to_the_server_of_the_feed_alone(server: FaultServer, tmp_path: Path) -> None:
    """A checksum that lies on another server is asked for without them."""
    (tmp_path / "token.txt").write_text(f"{CANARY}\n")
    headers = {"Authorization": "Bearer ${FEED_TOKEN}", "X-Api-Key": "file:token.txt"}
    url = server.url("/stars.csv")
    server.on("/stars.csv", answer(CSV.encode()))
    with FaultServer() as other:
        found = connector(tmp_path, location=url, headers=headers, sha256=other.url("/sums"))
        with pytest.raises(SourceError) as caught:
            found.fetch(None)
        sent = [request.headers for request in (*server.requests, *other.requests)]
    assert [(one.get("authorization"), one.get("x-api-key")) for one in sent] == [
        (f"Bearer {CANARY}", CANARY),
        (None, None),
    ]
    assert CANARY not in everything_said(found, caught.value)


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer ${FEED_TOKEN}"}])
def test_a_server_that_repeats_a_secret_does_not_show_it(
    server: FaultServer, tmp_path: Path, headers: dict[str, str]
) -> None:
    """Its error is shown without."""
    server.on("/stars.csv", answer(f"no such token: {CANARY}".encode(), status=401, kind="text/plain"))
    location = server.url("/stars.csv") + ("" if headers else "?token=${FEED_TOKEN}")
    found = connector(tmp_path, location=location, headers=headers)
    with pytest.raises(SourceInvalid, match=r"no such token: \*\*\*") as caught:
        found.fetch(None)
    assert CANARY not in everything_said(found, caught.value)


def test_a_secret_that_is_not_there_or_no_header_is_said(server: FaultServer, tmp_path: Path) -> None:
    """By the name of its variable or header; a header that frames the request cannot be declared."""
    found = connector(tmp_path, location=server.url("/stars.csv"), headers={"X-Api-Key": "${NO_SUCH_TOKEN}"})
    with pytest.raises(SourceInvalid, match="NO_SUCH_TOKEN is not set"):
        found.fetch(None)
    (tmp_path / "token.txt").write_text(f"{CANARY}\nHost: evil")
    found = connector(tmp_path, location=server.url("/stars.csv"), headers={"X-Api-Key": "file:token.txt"})
    with pytest.raises(SourceInvalid, match="the header X-Api-Key is empty, or has characters") as caught:
        found.fetch(None)
    assert CANARY not in everything_said(found, caught.value)
    with pytest.raises(ValidationError, match="headers"):
        connector(tmp_path, location=server.url("/stars.csv"), headers={"host": "evil"})


@pytest.mark.parametrize(
    ("url", "held"),
    [
        ("https://example.org/stars.csv?token=abc", True),
        ("https://example.org/stars.csv?a=1&X-Amz-Signature=abc", True),
        ("https://example.org/stars.csv?api_key=abc", True),
        ("postgresql://h/d?user=u&password=abc", True),
        ("postgresql://u:abc@h/d", True),
        ("https://example.org/stars.csv?token=${TOKEN}", False),
        ("postgresql://u:${P}@h/d?sslmode=require&sslkey=client.key", False),
        ("https://example.org/stars.csv?keyword=abc#token=1", False),
    ],
)
def test_a_secret_that_is_written_out_is_seen(tmp_path: Path, url: str, held: bool) -> None:
    """Wherever a URL has it; `check` says so, and that others can read the file."""
    assert holds_password(url) is held
    assert "abc" not in redacted(url) or not url.startswith("https")
    if url.startswith("https"):
        warnings = connector(tmp_path, location=url).warnings
        assert warnings == (("location: holds a secret; write ${NAME} or file:PATH instead",) if held else ())
    file = tmp_path / "stars.yaml"
    file.touch(0o644)
    file.chmod(0o644)
    assert (open_to_others(file, {"deep": [{"location": url}]}) is not None) is held
    file.chmod(0o600)
    assert open_to_others(file, {"location": url}) is None


def test_a_header_that_is_written_out_is_seen(tmp_path: Path) -> None:
    """Where its name says that it is a secret."""
    headers = {"Authorization": f"Bearer {CANARY}", "Accept-Language": "de", "X-Api-Key": "${KEY}"}
    found = connector(tmp_path, location="https://example.org/stars.csv", headers=headers)
    assert found.warnings == ("headers.Authorization: holds a secret; write ${NAME} or file:PATH instead",)
