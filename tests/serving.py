"""ASGI apps on a real port, and responses as slow or as broken as a test asks."""

import asyncio
import itertools
import math
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, Self

import uvicorn
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

Outcome = Literal["sent", "dropped", "left"]


class _Server(uvicorn.Server):
    """Stops at once, cutting off whoever is still connected."""

    async def main_loop(self) -> None:
        while not self.should_exit:
            await asyncio.sleep(0.01)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        self.drop()
        while self.server_state.connections or self.server_state.tasks:
            await asyncio.sleep(0.001)

    def drop(self, client: tuple[str, int] | None = None) -> None:
        """Abort the connection from `client`, or all."""
        for connection in list(self.server_state.connections):
            if isinstance(connection, H11Protocol) and client in (None, connection.client):
                connection.transport.abort()


class Serving:
    """Serves `app` from a daemon thread on 127.0.0.1, from `start` to `stop`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._noticed = threading.Condition()
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        # Bound here: the port is known, and clients can connect, before the thread runs.
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._port = listener.getsockname()[1]
        self._server = _Server(
            uvicorn.Config(
                self._enter,
                interface="asgi3",
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                timeout_keep_alive=600,
            )
        )
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until(self, claim: Callable[[], bool], timeout: float = 10) -> None:
        """Return once `claim()` holds, looked at after every request and every response.

        Raises AssertionError after `timeout` seconds.
        """
        with self._noticed:
            if not self._noticed.wait_for(claim, timeout):
                raise AssertionError(f"Not so after {timeout} s.")

    async def wait_until_async(self, claim: Callable[[], bool], timeout: float = 10) -> None:
        """`wait_until` that leaves the event loop free."""
        await asyncio.to_thread(self.wait_until, claim, timeout)

    def _notice(self) -> None:
        with self._noticed:
            self._noticed.notify_all()

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["drop"] = partial(self._server.drop, scope["client"])
        await self._app(scope, receive, send)


ARRIVAL = 0.1  # seconds in which a client reads what went out: it may lose the rest with a break


class Delivery(Response):
    """A response sent piece by piece; only apps under `Serving` can send it.

    Waits `delay` seconds before the status line and `pace` seconds between pieces; with
    `endless` the last piece is sent again and again. After `hang_after` pieces it sends nothing
    more; after `drop_after` it aborts the connection. With 0 pieces the status line is not sent
    either; both act before the last piece at the latest. `ended` hears once how it went: "sent"
    (said just before the last piece goes out), "dropped" or "left" (the client went away).
    """

    def __init__(
        self,
        pieces: Sequence[bytes],
        *,
        status: int = 200,
        media_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
        delay: float = 0,
        pace: float = 0,
        hang_after: int | None = None,
        drop_after: int | None = None,
        endless: bool = False,
        ended: Callable[[Outcome], None] = lambda outcome: None,
    ) -> None:
        super().__init__(b"".join(pieces), status, headers, media_type)
        if media_type == "text/event-stream" or endless:
            del self.headers["content-length"]
        self._pieces = pieces
        self._delay = delay
        self._pace = pace
        self._hang_after = hang_after
        self._drop_after = drop_after
        self._endless = endless
        self._ended = ended
        self._outcome: Outcome | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(scope["drop"], send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            sending.cancel()
            leaving.cancel()
            self._end("left")

    async def _send(self, drop: Callable[[], None], send: Send) -> None:
        last = math.inf if self._endless else len(self._pieces) - 1
        again = itertools.repeat(self._pieces[-1]) if self._endless else ()
        await asyncio.sleep(self._delay)
        for index, piece in enumerate(itertools.chain(self._pieces, again)):
            if index:
                await asyncio.sleep(self._pace)
            if _due(self._drop_after, index, last):
                await asyncio.sleep(ARRIVAL if index else 0)
                self._end("dropped")
                drop()
            if _due(self._drop_after, index, last) or _due(self._hang_after, index, last):
                await asyncio.Event().wait()
            if index == 0:
                await send(
                    {
                        "type": "http.response.start",
                        "status": self.status_code,
                        "headers": self.raw_headers,
                    }
                )
            if index == last:
                self._end("sent")
            await send({"type": "http.response.body", "body": piece, "more_body": index < last})

    def _end(self, outcome: Outcome) -> None:
        if self._outcome is None:
            self._outcome = outcome
            self._ended(outcome)


def _due(after: int | None, index: int, last: float) -> bool:
    return after is not None and index == min(after, last)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
