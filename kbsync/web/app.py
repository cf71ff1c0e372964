"""The routes: /livez, /readyz, /metrics. All of them only read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

import structlog
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp

from kbsync.errors import KbsyncError, place_of
from kbsync.web.access import Access
from kbsync.web.health import Check, Health
from kbsync.web.settings import Server

__all__ = ["make_app"]

PROBES = frozenset({"/livez", "/readyz"})
"""They need no token: what asks them (an orchestrator's probe) has no safe place for one. Without it they say which
checks failed, not why."""

log = structlog.get_logger()


def make_app(settings: Server, token: str, health: Health, exposition: Callable[[], bytes]) -> ASGIApp:
    """The application, behind its access check. `exposition`: the text of /metrics; what it raises is a 503."""
    api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    # No annotations on the routes' results: FastAPI would make response models of them.
    @api.get("/livez")
    def livez(request: Request) -> Response:
        return _checks(health.live(), trusted=request.state.trusted)

    @api.get("/readyz")
    def readyz(request: Request) -> Response:
        return _checks(health.ready(), trusted=request.state.trusted)

    @api.get("/metrics")
    def metrics() -> Response:
        return Response(exposition(), media_type=CONTENT_TYPE_LATEST)

    @api.exception_handler(KbsyncError)
    def unavailable(_request: Request, error: KbsyncError) -> Response:
        log.warning("request_unanswered", problem=error.message)
        return JSONResponse({"problem": error.message, "hint": error.hint}, status_code=503)

    @api.exception_handler(Exception)
    def mistake(request: Request, error: Exception) -> Response:
        log.error("request_failed", path=request.url.path, problem=place_of(error))
        return JSONResponse({"problem": "this is a mistake in kbsync; its log says where"}, status_code=500)

    open_paths = PROBES | ({"/metrics"} if settings.metrics == "open" else set())
    return Access(api, token=token, hosts=settings.names, open_paths=open_paths)


def _checks(checks: Sequence[Check], *, trusted: bool) -> Response:
    ok = all(check.ok for check in checks)
    shown = [asdict(check) if trusted else {"name": check.name, "ok": check.ok} for check in checks]
    return JSONResponse({"ok": ok, "checks": shown}, status_code=200 if ok else 503)
