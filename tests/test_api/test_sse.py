"""A stream whose client goes away: what counts is whether it was complete by then."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.types import Message

from app.api.sse import COMMENT, EventStream
from app.config import Settings


class Client:
    """Reads what it is sent, and leaves when it likes."""

    def __init__(self, keep_alive: float = 60) -> None:
        self.sent: list[Message] = []
        self.left = asyncio.Event()
        self.told = 0  # how often the server was told that it left early
        app = Starlette()
        app.state.settings = Settings(keep_alive=timedelta(seconds=keep_alive))
        self._scope = {"type": "http", "path": "/", "app": app}

    @property
    def body(self) -> list[bytes]:
        return [message.get("body", b"") for message in self.sent[1:]]

    async def read(self, frames: AsyncIterator[bytes]) -> None:
        await EventStream(frames, leave=self._leave)(self._scope, self._receive, self._send)

    async def _receive(self) -> Message:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    async def _leave(self) -> None:
        self.told += 1


async def until_cancelled(*, breaks: bool) -> AsyncIterator[bytes]:
    yield b"data: 1\n\n"
    try:
        await asyncio.Event().wait()
    finally:
        if breaks:
            raise ValueError("a clean-up that fails")


@pytest.mark.parametrize("breaks", [False, True])
async def test_who_leaves_before_the_end_is_told_of(breaks: bool) -> None:
    client = Client()
    reading = asyncio.create_task(client.read(until_cancelled(breaks=breaks)))
    while not client.body:
        await asyncio.sleep(0)

    client.left.set()
    await reading

    assert (client.body, client.told) == ([b"data: 1\n\n"], 1)


async def test_who_leaves_as_the_stream_ends_has_all_of_it() -> None:
    client, last = Client(), asyncio.Event()

    async def frames() -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        await last.wait()

    reading: asyncio.Task[Any] = asyncio.create_task(client.read(frames()))
    while not client.body:
        await asyncio.sleep(0)
    client.left.set()
    last.set()
    await reading

    assert client.body == [b"data: 1\n\n", b""]
    assert not client.sent[-1]["more_body"]
    assert (client.told, reading.cancelling()) == (0, 0)


async def test_a_server_that_stops_is_not_taken_for_a_client_that_leaves() -> None:
    client = Client()
    reading = asyncio.create_task(client.read(until_cancelled(breaks=False)))
    while not client.body:
        await asyncio.sleep(0)

    reading.cancel()
    await asyncio.wait([reading])

    assert reading.cancelled() and not client.told


async def test_where_nothing_is_said_for_long_something_is() -> None:
    client, enough = Client(keep_alive=0.01), asyncio.Event()

    async def frames() -> AsyncIterator[bytes]:
        yield b""
        await enough.wait()

    reading = asyncio.create_task(client.read(frames()))
    while len(client.body) < 3:
        await asyncio.sleep(0.01)
    enough.set()
    await reading

    assert client.body[:3] == [COMMENT] * 3
