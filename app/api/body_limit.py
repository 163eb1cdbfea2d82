"""The largest request body, and a refusal that reads as all others do."""

from collections.abc import Awaitable

from starlette.datastructures import Headers
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.core.errors import Invalid, answer


class BodyLimit:
    """Starlette's limit, which routes may raise for themselves, and which answers in plain text."""

    def __init__(self, app: ASGIApp, max_body_size: int) -> None:
        self._limited = RequestBodyLimitMiddleware(app, max_body_size)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        refused = False

        async def tell(message: Message) -> None:
            nonlocal refused
            if _is_plain_refusal(message):
                refused = True
                error = Invalid(
                    "The body is larger than is taken here.", code="too_large", status=413
                )
                await answer(error, scope)(scope, receive, send)
            elif not refused:
                await send(message)

        return self._limited(scope, receive, tell)


def _is_plain_refusal(message: Message) -> bool:
    if message["type"] != "http.response.start" or message["status"] != 413:
        return False
    return Headers(raw=message["headers"]).get("content-type", "").startswith("text/plain")
