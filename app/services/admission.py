"""Lets runs begin one after the other where many want to at once.

A run that begins makes thousands of objects, most of them for a moment. Where hundreds begin
together, they keep each other's alive and wait for each other: that costs a sixth more, and the
first has its first token as late as the last.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial

CROWD = 32  # runs that may begin together
LOOK = 0.05  # seconds between looks at whether those who begin wait for this process
BUSY = 0.5  # the share of the time in which it then works
LONGEST = 2.0  # seconds for which others wait at most until somebody is let in


class Admission:
    """The runs of this process that begin, up to their first request to a model.

    `worked` tells the seconds for which this thread had the processor.
    """

    def __init__(self, worked: Callable[[], float] = time.thread_time) -> None:
        self._worked = worked
        self._beginning: set[object] = set()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._moved = 0.0  # when somebody was let in last, or began to wait
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_crowded(self) -> bool:
        """Whether somebody waits for a turn."""
        return bool(self._waiting)

    @asynccontextmanager
    async def turn(self) -> AsyncGenerator[Callable[[], None]]:
        """Begins when it is the caller's turn, and gives what ends the turn.

        After a crowd, those who wait come one by one until nobody waits any more. Turns in which
        this thread works less than half of the time, or that take too long, are not waited for:
        who waits for a tool's server keeps nobody else from waiting for one.
        """
        if self._waiting or len(self._beginning) >= CROWD:
            turn = await self._wait()
        else:
            self._beginning.add(turn := object())
        try:
            yield partial(self._end, turn)
        finally:
            self._end(turn)

    async def _wait(self) -> object:
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        if not self._waiting:
            self._moved = loop.time()
        self._waiting.append(turn)
        if self._timer is None:
            self._look_later()
        try:
            await turn
        except asyncio.CancelledError:
            if turn in self._waiting:
                self._waiting.remove(turn)
            self._end(turn)  # it may have been called, and not have heard of it yet
            raise
        return turn

    def _end(self, turn: object) -> None:
        if turn in self._beginning:
            self._beginning.remove(turn)
            self._let_in(1)

    def _let_in(self, room: int) -> None:
        while self._waiting and len(self._beginning) < room:
            turn = self._waiting.popleft()
            if not turn.cancelled():
                turn.set_result(None)
                self._beginning.add(turn)
                self._moved = turn.get_loop().time()

    def _look_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(LOOK, self._look, loop.time(), self._worked())

    def _look(self, before: float, worked: float) -> None:
        self._timer = None
        if not self._waiting:
            return
        now = asyncio.get_running_loop().time()
        is_idle = self._worked() - worked < (now - before) * BUSY
        if is_idle or now - self._moved > LONGEST:
            self._beginning.clear()
            self._let_in(CROWD)
        self._look_later()
