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
from app.core.errors import AppError, Unavailable, answer, error_body

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
    """Sends frames as they come, but for empty ones. Until the first, an AppError still becomes a
    plain error.

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
        self._timer: asyncio.TimerHandle
        self._pinging: asyncio.Task[None] | None = None

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Most streams are idle most of the time, so what each of them keeps is little: one task
        beside the server's own, and a timer."""
        writing = asyncio.current_task()
        assert writing
        left = written = False

        def leave(_: "asyncio.Task[None]") -> None:
            nonlocal left
            if not written and not writing.cancelling():
                left = True
                writing.cancel()

        leaving = asyncio.create_task(until_gone(receive))
        leaving.add_done_callback(leave)
        keep_alive: timedelta = scope["app"].state.settings.keep_alive
        self._rearm(send, keep_alive.total_seconds())
        metrics.streams.add()
        try:
            await self._write(scope, receive, send)
        except (asyncio.CancelledError, Exception):  # some take a cancellation for a failure
            if not left:
                raise
        finally:
            written = True
            metrics.streams.add(by=-1)
            self._timer.cancel()
            tasks = [leaving, self._pinging] if self._pinging else [leaving]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if left:
            if writing.uncancel():  # by somebody else too
                raise asyncio.CancelledError
            if self._leave:
                await self._leave()

    async def _start(self, send: Send) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async for frame in self._frames:
                if frame:
                    await self._start(send)
                    self._sent += 1
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
                    frame = b""  # not kept until the next one
        except AppError as error:
            if not self._started:
                self._started = True
                await answer(error, scope)(scope, receive, send)
                return
            # Where the stream goes on elsewhere, the client comes back with its last event's id.
            again = isinstance(error, Unavailable) and self._leave is None
            frame = RETRY if again else self._failed(error)
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        await self._start(send)
        with contextlib.suppress(OSError):
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _rearm(self, send: Send, every: float) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(every, self._ping_if_silent, send, every, self._sent)

    def _ping_if_silent(self, send: Send, every: float, sent: int) -> None:
        if sent == self._sent and (self._pinging is None or self._pinging.done()):
            self._pinging = asyncio.create_task(self._ping(send))
        self._rearm(send, every)

    async def _ping(self, send: Send) -> None:
        with contextlib.suppress(OSError):
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
