"""What a request's body may be, before anybody parses it."""

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_VALUES = 200_000


class FewValues:
    """Refuses text with more than MAX_VALUES of what JSON puts before its values.

    A picture of ten megabytes is one string and read at once; as many brackets take seconds, in
    which nobody else is answered. Inside of strings they count too: a text that has so many is
    longer than any model reads.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_binary(scope):
            receive = _counting(receive)
        await self._app(scope, receive, send)


def _is_binary(scope: Scope) -> bool:
    return Headers(scope=scope).get("content-type", "").lower().startswith("multipart/")


def _counting(receive: Receive) -> Receive:
    left = MAX_VALUES

    async def counted() -> Message:
        nonlocal left
        message = await receive()
        body: bytes = message.get("body", b"")
        left -= body.count(b",") + body.count(b"[") + body.count(b"{")
        if left < 0:
            raise HTTPException(413, f"The body has more than {MAX_VALUES} values; send less.")
        return message

    return counted
