"""Where requests for agents' answers wait, unread, while a crowd of them begins."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

PATHS = frozenset(("/v1/chat/completions", "/v1/responses", "/api/chat"))
BELOW = "/ag-ui/"  # the agent's name follows


class Entrance:
    """Lets in as many as `Admission` has room for."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _asks(scope):
            await self._app(scope, receive, send)
            return
        async with scope["app"].state.admission.entrance() as leave:

            async def answer(message: Message) -> None:
                leave()  # whatever it came for has been accepted, or refused
                await send(message)

            await self._app(scope, receive, answer)


def _asks(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    path: str = scope["path"]
    return path in PATHS or path.startswith(BELOW)
