"""Where requests for agents' answers wait, unread, while a crowd of them begins."""

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.core.errors import path_of

PATHS = frozenset(("/v1/chat/completions", "/v1/responses", "/api/chat"))
BELOW = "/ag-ui/"  # the agent's name follows


class Entrance:
    """Lets in as many as `Admission` has room for.

    A request whose body does not come in one piece is let through, so that nobody waits for a slow
    client; one whose client has left meanwhile goes no further.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _asks(scope):
            await self._app(scope, receive, send)
            return
        first: Message | None = await receive()
        is_whole = not first.get("more_body", False)

        async def read() -> Message:
            nonlocal first
            message, first = first, None
            return message or await receive()

        if not is_whole:
            await self._app(scope, read, send)
            return
        admission = scope["app"].state.admission
        has_waited = not admission.has_room
        async with admission.entrance() as leave:
            if has_waited and await Request(scope, receive).is_disconnected():
                return

            async def answer(message: Message) -> None:
                if message["type"] == "http.response.start":
                    leave()
                await send(message)

            await self._app(scope, read, answer)


def _asks(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    path = path_of(scope)
    return path in PATHS or path.startswith(BELOW)
