"""Server-sent events that outlive idle proxies, and notice when their reader leaves."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send
from typing_extensions import override

from app.core import metrics
from app.core.errors import AppError, Unavailable, answer, error_body, request_id_of

T = TypeVar("T")

# Lines that are no events end without a blank one: OpenAI's clients take that for an empty event.
COMMENT = b":\n"
RETRY = b"retry: 1000\n"  # milliseconds

HEADERS = {
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}


def failed_frame(error: AppError) -> bytes:
    """How OpenAI's chat streams say it."""
    return b"data: " + to_json({"error": error_body(error)}) + b"\n\n"


class EventStream(Response):
    """Sends frames as they come. Until the first, an AppError still becomes a plain error.

    `leave` is called when the client goes away before the end. Without it the stream can be
    taken up again, so a client is told to come back where this process cannot go on. What else
    it ends with where it breaks off, `failed` writes.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncIterator[bytes],
        *,
        leave: Callable[[], Awaitable[Any]] | None = None,
        failed: Callable[[AppError], bytes] = failed_frame,
    ) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._frames = frames
        self._leave = leave
        self._failed = failed
        self._started = False
        self._sent = 0

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.create_task(self._write(scope, receive, send))
        keep_alive: timedelta = scope["app"].state.settings.keep_alive
        pinging = asyncio.create_task(self._ping(send, keep_alive.total_seconds()))
        leaving = asyncio.create_task(until_gone(receive))
        metrics.streams.add()
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            left = not writing.done()
        except asyncio.CancelledError:
            left = True
            raise
        finally:
            metrics.streams.add(by=-1)
            for task in (writing, pinging, leaving):
                task.cancel()
            await asyncio.gather(writing, pinging, leaving, return_exceptions=True)
        if left and self._leave:
            await self._leave()
        elif not left:
            writing.result()

    async def _start(self, send: Send) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async for frame in self._frames:
                await self._start(send)
                self._sent += 1
                await send({"type": "http.response.body", "body": frame, "more_body": True})
        except AppError as error:
            if not self._started:
                self._started = True
                await answer(error, scope["path"], request_id_of(scope))(scope, receive, send)
                return
            # Where the stream goes on elsewhere, the client comes back with its last event's id.
            again = isinstance(error, Unavailable) and self._leave is None
            frame = RETRY if again else self._failed(error)
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        await self._start(send)
        with contextlib.suppress(OSError):
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _ping(self, send: Send, every: float) -> None:
        while True:
            sent = self._sent
            await asyncio.sleep(every)
            if sent == self._sent:
                await self._start(send)
                await send({"type": "http.response.body", "body": COMMENT, "more_body": True})


async def until_gone(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """What the work brings, or None where the client left first; the work is then cancelled."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(until_gone(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
