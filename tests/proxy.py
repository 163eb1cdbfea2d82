"""A TCP proxy that can be cut off or go silent: to its clients, the server is gone, or hangs."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Self

from sqlalchemy.engine import make_url


class Proxy:
    """`with Proxy(url) as proxy:` passes connections to `proxy.url` on, from a thread.

    `cut()` ends them all and refuses new ones, until `restore()`. `stall()` passes nothing on,
    `stall(asks=True)` no answers, until `resume()`. `doom(known_by, asking)` loses one connection,
    on which `known_by` was once said, between what it asks next and the answer.
    """

    def __init__(self, url: str) -> None:
        self._target = make_url(url)
        self._port = 0
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._asks, self._answers = asyncio.Event(), asyncio.Event()
        self._asks.set()
        self._answers.set()
        self._doom: tuple[bytes, bytes] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def url(self) -> str:
        there = self._target.set(host="127.0.0.1", port=self._port)
        return there.render_as_string(hide_password=False)

    def cut(self) -> None:
        self._do(self._cut())

    def restore(self) -> None:
        self._do(self._restore())

    def stall(self, *, asks: bool = False) -> None:
        self._loop.call_soon_threadsafe(self._answers.clear)
        if not asks:
            self._loop.call_soon_threadsafe(self._asks.clear)

    def resume(self) -> None:
        self._loop.call_soon_threadsafe(self._answers.set)
        self._loop.call_soon_threadsafe(self._asks.set)

    def doom(self, known_by: bytes, asking: bytes) -> None:
        self._doom = (known_by, asking)

    @property
    def is_doom_done(self) -> bool:
        return self._doom is None

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _cut(self) -> None:
        if self._server:
            self._server.close()
        for writer in self._open:
            writer.transport.abort()
        while self._open:
            await asyncio.sleep(0)

    async def _restore(self) -> None:
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_connection(self._target.host, self._target.port)
        except OSError:
            writer.close()
            return
        self._open |= {writer, there[1]}
        said = b""
        is_doomed = False

        def ask(data: bytes) -> bool:
            nonlocal said, is_doomed
            said += data
            if self._doom and self._doom[0] in said and self._doom[1] in data:
                self._doom, is_doomed = None, True
            return True

        await asyncio.gather(
            _pump(reader, there[1], self._asks, ask),
            _pump(there[0], writer, self._answers, lambda _: not is_doomed),
        )
        self._open -= {writer, there[1]}

    def __enter__(self) -> Self:
        self._thread.start()
        self.restore()
        return self

    def __exit__(self, *_: object) -> None:
        self.resume()
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


async def _pump(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    going: asyncio.Event,
    may_pass: Callable[[bytes], bool],
) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            await going.wait()
            if not may_pass(data):
                break
            writer.write(data)
            await writer.drain()
    writer.close()
