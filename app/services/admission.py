"""Lets runs begin one after the other where many want to at once.

A run that begins makes thousands of objects, most of them for a moment. Where hundreds begin
together, they keep each other's alive and wait for each other's: that costs a fifth more, and the
first has its first token as late as the last.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

CROWD = 32  # runs that may begin together
LOOK = 0.05  # seconds between looks whether it is this process that those who wait wait for
BUSY = 0.5  # the share of the time that it then works
LONGEST = 2.0  # seconds that one who begins keeps the others waiting


class Admission:
    """The runs of this process that begin, up to their first request to a model."""

    def __init__(self) -> None:
        self._beginning = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._moved = 0.0  # when somebody was let in
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_crowded(self) -> bool:
        """Whether somebody waits for a turn."""
        return bool(self._waiting)

    @asynccontextmanager
    async def turn(self) -> AsyncGenerator[Callable[[], None]]:
        """Begins when it is the caller's turn, and gives what ends the turn.

        After a crowd, those who wait come one by one until nobody waits any more. They do not wait
        for turns that take long while the process has little to do: whoever waits for a tool's
        server keeps nobody else from waiting for one.
        """
        if self._waiting or self._beginning >= CROWD:
            await self._wait()
        else:
            self._beginning += 1
        is_over = False

        def end() -> None:
            nonlocal is_over
            if not is_over:
                is_over = True
                self._leave()

        try:
            yield end
        finally:
            end()

    async def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        called: asyncio.Future[None] = loop.create_future()
        if not self._waiting:
            self._moved = loop.time()
        self._waiting.append(called)
        if self._timer is None:
            self._look_later()
        try:
            await called
        except asyncio.CancelledError:
            if not called.cancelled():  # it was its turn already
                self._leave()
            raise

    def _leave(self) -> None:
        self._beginning -= 1
        self._let_in(1)

    def _let_in(self, room: int) -> None:
        while self._waiting and self._beginning < room:
            called = self._waiting.popleft()
            if not called.cancelled():
                called.set_result(None)
                self._beginning += 1
                self._moved = called.get_loop().time()

    def _look_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(LOOK, self._look, loop.time(), time.thread_time())

    def _look(self, before: float, worked: float) -> None:
        self._timer = None
        if not self._waiting:
            return
        now = asyncio.get_running_loop().time()
        is_idle = time.thread_time() - worked < (now - before) * BUSY
        if is_idle or now - self._moved > LONGEST:
            self._let_in(self._beginning + CROWD)
        self._look_later()
