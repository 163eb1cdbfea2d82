"""Gives each request an id, the client's own or a new one, and notes what became of it."""

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.core import metrics
from app.core.logs import afresh

HEADER = "X-Request-Id"
SAFE = re.compile(r"[A-Za-z0-9._-]{1,64}")  # in a log, in a header, in an error body
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
GONE = 499  # as nginx calls it: the client left before there was an answer
PROBES = frozenset(("/health", "/health/ready", "/metrics"))  # asked again and again

logger = logging.getLogger("app.access")


class RequestIds:
    """Puts the id into `request.state.request_id`, onto the response and into the log's lines."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if SAFE.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        afresh(request_id=request_id)
        begun, status = time.perf_counter(), GONE

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            if status == GONE:
                status = 500  # which is answered further out
            raise
        finally:
            _note(scope, status, time.perf_counter() - begun)


def _note(scope: Scope, status: int, seconds: float) -> None:
    """By the route's own path: what a client made of it may be anything."""
    method = scope.get("method", "")
    if method not in METHODS:
        method = "other"
    route = getattr(scope.get("route"), "path", "unknown")
    metrics.requests.add(method, route, str(status))
    metrics.request_seconds.add(seconds, route)
    level = logging.DEBUG if route in PROBES and status < 400 else logging.INFO
    if logger.isEnabledFor(level):
        fields = {"status": status, "seconds": round(seconds, 4)}
        logger.log(level, "%s %s", method, route, extra={"fields": fields})
