"""Logging: one structured event per thing that happened, for a person on a terminal, as JSON lines otherwise.

    configure()
    structlog.get_logger().info("run_finished", run=3, status="done")

What libraries log through the standard module takes the same way, so that one stream tells the whole story on stderr.
Credentials in URLs, values of secret-looking keys and what the workspace's references stand for never reach it.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, TextIO

import structlog

from kbsync.references import hidden
from kbsync.terminal import tame

__all__ = ["configure", "redact"]

HIDDEN = "[hidden]"
_WORDS = r"password|passwd|secret|token\b|api_?key|authorization|credential"
"""What names a secret; `tokens` and `token_budget` are counts."""
_SECRET_KEY = re.compile(_WORDS, re.IGNORECASE)
_HIDE = (
    (re.compile(r"://[^/\s]+@"), f"://{HIDDEN}@"),
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]+", re.IGNORECASE), rf"\1 {HIDDEN}"),
    # `password=x`, `?api_key=x&`, `"token": "x"`
    (
        re.compile(rf"""((?:{_WORDS})[\w-]*(?:["']\s*:|=)\s*)("[^"]*"|'[^']*'|[^\s&;,'"]+)""", re.IGNORECASE),
        rf"\1{HIDDEN}",
    ),
)
"""Where texts carry credentials: user and password of a URL, an Authorization header, a setting."""

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
    # Tracebacks become text first, or they would pass by `redact`; without local variables, which may hold anything.
    last = (
        structlog.processors.JSONRenderer(sort_keys=True)
        if plain
        else structlog.dev.ConsoleRenderer(colors=True, exception_formatter=structlog.dev.plain_traceback)
    )
    render: list[Any] = [structlog.processors.format_exc_info, redact, last]
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
    """A structlog processor: hide the values of secret-looking keys and credentials inside texts, at any depth; write
    out what a terminal would obey.

    What is neither a number, a text nor a container becomes text.
    """
    for key, value in event.items():
        event[key] = _redacted(key, value)
    return event


def _redacted(key: object, value: Any) -> Any:
    if _SECRET_KEY.search(str(key)):
        return HIDDEN
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(inner): _redacted(inner, each) for inner, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_redacted("", each) for each in value]
    text = repr(value) if isinstance(value, BaseException) else str(value)
    for pattern, replacement in _HIDE:
        text = pattern.sub(replacement, text)
    return tame(hidden(text))
