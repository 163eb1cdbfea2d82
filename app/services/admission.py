"""Lets runs begin one after the other where many want to at once.

A run that begins makes thousands of objects, most of them for a moment. Where hundreds begin
together, they keep each other's alive and wait for each other: that costs a sixth more, and the
first has its first token as late as the last. And a run that waits to begin takes several times
the memory of a request that nobody has looked at.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from functools import partial

CROWD = 32  # runs that may begin together, and as many requests that may be about to
LOOK = 0.05  # seconds between looks at whether those who begin wait for this process
BUSY = 0.5  # the share of the time in which it then works
LONGEST = 2.0  # seconds for which others wait at most for one turn, or for one place


def nothing() -> None:
    """What a task calls that no request is behind."""


give_up_place: ContextVar[Callable[[], None]] = ContextVar("give_up_place", default=nothing)
"""Gives up the place of the request that a task belongs to; where it has none, it does nothing."""


class Admission:
    """The runs of this process that begin: from the request for one, which enters first, up to
    the run's first request to a model, which ends its turn.

    `worked` tells the seconds for which this thread had the processor.
    """

    def __init__(self, worked: Callable[[], float] = time.thread_time) -> None:
        self._worked = worked
        self._outside: deque[asyncio.Future[None]] = deque()
        self._entered: dict[object, float] = {}  # since when; whose run has not asked for a turn
        self._asked: deque[asyncio.Future[None]] = deque()  # runs whose requests wait for them
        self._queued: deque[asyncio.Future[None]] = deque()  # all others that wait for a turn
        self._asked_last = False  # whether the last turn was given to one of the former
        self._beginning: set[object] = set()  # whose turn it is
        self._moved = 0.0  # when somebody had a turn last, or began to wait for one
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_crowded(self) -> bool:
        """Whether somebody waits for a turn."""
        return bool(self._asked or self._queued)

    @property
    def has_room(self) -> bool:
        """Whether a request may enter at once."""
        return not self._outside and not self._is_full

    @asynccontextmanager
    async def entrance(self) -> AsyncGenerator[Callable[[], None]]:
        """Begins when there is room for a request that may lead to a run, and gives what gives its
        place up: for when it waits for something else than its run's turn.

        A place is held for LONGEST at most, and where this thread works less than half of the time
        it is not waited for.
        """
        if self.has_room:
            self._entered[place := object()] = asyncio.get_running_loop().time()
        else:
            place = await self._line_up(self._outside)
        leave = partial(self._leave, place)
        token = give_up_place.set(leave)
        try:
            yield leave
        finally:
            give_up_place.reset(token)
            leave()

    @asynccontextmanager
    async def turn(self) -> AsyncGenerator[Callable[[], None]]:
        """Begins when it is the caller's turn, and gives what ends the turn.

        After a crowd, those who wait come one by one until nobody waits any more, by turns those
        whose requests wait and those that were queued. Turns in which this thread works less than
        half of the time, or that take too long, are not waited for: who waits for a tool's server
        keeps nobody else from waiting for one.
        """
        if self.is_crowded or len(self._beginning) >= CROWD:
            is_asked = give_up_place.get() is not nothing
            turn = await self._line_up(self._asked if is_asked else self._queued)
        else:
            self._beginning.add(turn := object())
            give_up_place.get()()
        try:
            yield partial(self._leave, turn)
        finally:
            self._leave(turn)

    async def _line_up(self, line: deque[asyncio.Future[None]]) -> object:
        loop = asyncio.get_running_loop()
        place: asyncio.Future[None] = loop.create_future()
        if not self.is_crowded:
            self._moved = loop.time()
        line.append(place)
        if line is not self._outside:
            give_up_place.get()()
        if self._timer is None:
            self._look_later()
        try:
            await place
        except asyncio.CancelledError:
            if place in line:
                line.remove(place)
                self._let_enter()
            self._leave(place)  # it may have been called, and not have heard of it yet
            raise
        return place

    @property
    def _is_full(self) -> bool:
        return len(self._entered) + len(self._asked) >= CROWD

    def _leave(self, place: object) -> None:
        if place in self._beginning:
            self._beginning.remove(place)
            self._let_begin(1)
        elif place in self._entered:
            del self._entered[place]
            self._let_enter()

    def _let_begin(self, most: int) -> None:
        while self.is_crowded and len(self._beginning) < most:
            self._asked_last = bool(self._asked) and not (self._asked_last and self._queued)
            place = (self._asked if self._asked_last else self._queued).popleft()
            if not place.cancelled():
                place.set_result(None)
                self._beginning.add(place)
                self._moved = place.get_loop().time()
        self._let_enter()

    def _let_enter(self) -> None:
        while self._outside and not self._is_full:
            place = self._outside.popleft()
            if not place.cancelled():
                place.set_result(None)
                self._entered[place] = place.get_loop().time()

    def _look_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(LOOK, self._look, loop.time(), self._worked())

    def _look(self, before: float, worked: float) -> None:
        self._timer = None
        if not self._outside and not self.is_crowded:
            return
        now = asyncio.get_running_loop().time()
        is_idle = self._worked() - worked < (now - before) * BUSY
        long_ago = now if is_idle else now - LONGEST
        self._entered = {place: at for place, at in self._entered.items() if at > long_ago}
        if self.is_crowded and self._moved <= long_ago:
            self._beginning.clear()
            self._let_begin(CROWD)
        self._let_enter()
        self._look_later()
