"""What the log says, and what it never says."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from kbsync.log import configure, redact


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What was logged, as JSON lines; logging is as before afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    target = io.StringIO()
    configure(stream=target)
    yield target
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


def events(stream: io.StringIO) -> list[dict[str, object]]:
    """The lines as values."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_an_event_is_one_json_line_with_level_and_utc_time(stream: io.StringIO) -> None:
    structlog.get_logger().info("run_finished", run=3, status="done")
    [event] = events(stream)
    assert event | {"timestamp": ""} == {
        "event": "run_finished",
        "run": 3,
        "status": "done",
        "level": "info",
        "timestamp": "",
    }
    assert str(event["timestamp"]).endswith("Z")


def test_the_standard_modules_events_take_the_same_way(stream: io.StringIO) -> None:
    logging.getLogger("somebody").warning("told %s", "so")
    [event] = events(stream)
    assert (event["event"], event["level"]) == ("told so", "warning")


def test_below_the_level_nothing_is_said(stream: io.StringIO) -> None:
    structlog.get_logger().debug("detail")
    assert events(stream) == []


def test_an_exception_is_in_its_event(stream: io.StringIO) -> None:
    try:
        raise ZeroDivisionError("by zero")
    except ZeroDivisionError:
        structlog.get_logger().exception("failed")
    [event] = events(stream)
    assert "ZeroDivisionError: by zero" in str(event["exception"])


@pytest.mark.parametrize(
    "event",
    [
        {"event": "x", "password": "canary"},
        {"event": "x", "api_key": "canary"},
        {"event": "connecting to postgresql://user:canary@host/db"},
        {"event": "connecting to redis://:canary@host"},
        {"event": "cloning https://canary@host/repository"},
        {"event": "a password with an at sign: https://user:can@ary:canary@host/"},
        {"event": "host=h password=canary dbname=d"},
        {"event": "GET https://host/feed?api_key=canary&page=1"},
        {"event": 'the body was {"token": "canary and more"}'},
        {"event": "x", "detail": {"headers": {"Authorization": "Bearer canary"}}},
        {"event": "x", "lines": ["sent Authorization: Bearer canary"]},
        {"event": "x", "error": ValueError("https://user:canary@host")},
        {"event": "x", "seen": {("https://user:canary@host",)}},
    ],
)
def test_secrets_never_reach_the_log(event: dict[str, object]) -> None:
    assert "canary" not in str(redact(None, "", event))


@pytest.mark.parametrize("terminal", [False, True])
def test_a_traceback_on_either_way_shows_no_secret_and_no_local_variable(stream: io.StringIO, terminal: bool) -> None:
    configure(stream=stream, as_json=not terminal)
    problem = "cannot reach postgresql://user:canary@host/db"
    for log in (structlog.get_logger(), logging.getLogger("somebody")):
        try:
            raise ValueError(problem)
        except ValueError:
            log.exception("failed")
    assert stream.getvalue().count("cannot reach postgresql://[hidden]@host/db") == 2
    assert "canary" not in stream.getvalue()


def test_what_is_no_secret_stays() -> None:
    event = {
        "event": "sampled with max_tokens=20 at https://host:8080/a@b",
        "tokens": 9,
        "token_budget": 9,
        "path": Path("/data/x"),
    }
    assert redact(None, "", dict(event)) == event | {"path": "/data/x"}


def test_on_a_terminal_an_event_is_a_line_for_people() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    target = Terminal()
    configure(stream=target)
    structlog.get_logger().info("run_finished", run=3)
    assert "run_finished" in target.getvalue()
    assert not target.getvalue().startswith("{")


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="no log level 'loud'"):
        configure(level="loud")
