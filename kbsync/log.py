"""Logging: one structured event per thing that happened, for a person on a terminal, as JSON lines otherwise.

    configure()
    structlog.get_logger().info("run_finished", run=3, status="done")

What libraries log through the standard module takes the same way, so that one stream tells the whole story on stderr.
Credentials in URLs and values of secret-looking keys never reach it.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO

import structlog

__all__ = ["configure", "redact"]

HIDDEN = "[hidden]"
_SECRET_KEY = re.compile(r"password|passwd|secret|token|api_?key|authorization|credential", re.IGNORECASE)
_URL_CREDENTIALS = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)[^/\s:@]+:[^/\s]*@", re.IGNORECASE)
_BEARER = re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]+", re.IGNORECASE)

Event = MutableMapping[str, Any]


def configure(*, level: str = "info", stream: TextIO | None = None, as_json: bool | None = None) -> None:
    """Send structlog's and the standard library's events to `stream` (default: stderr), from `level` on.

    `as_json`: JSON lines; default: where `stream` is no terminal. May be called again. Raises ValueError for a level
    that there is not.
    """
    target = stream or sys.stderr
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"no log level {level!r}: debug, info, warning or error")
    plain = not target.isatty() if as_json is None else as_json
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    render: list[Any] = (
        [structlog.processors.format_exc_info, redact, structlog.processors.JSONRenderer(sort_keys=True)]
        if plain
        else [redact, structlog.dev.ConsoleRenderer(colors=True)]
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render]
    )
    handler = logging.StreamHandler(target)
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=number, force=True)
    for noisy in ("apscheduler", "httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(max(number, logging.WARNING))
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def redact(_logger: object, _method: str, event: Event) -> Event:
    """A structlog processor: hide the values of secret-looking keys and credentials inside texts, at any depth."""
    for key, value in event.items():
        event[key] = HIDDEN if _SECRET_KEY.search(key) else _redacted(value)
    return event


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return _BEARER.sub(rf"\1 {HIDDEN}", _URL_CREDENTIALS.sub(rf"\g<scheme>{HIDDEN}@", value))
    if isinstance(value, dict):
        return {key: HIDDEN if _SECRET_KEY.search(str(key)) else _redacted(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(inner) for inner in value]
    return value
