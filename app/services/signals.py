"""What the processes at one PostgreSQL database tell each other, so that nobody has to look often.

Nothing depends on it: whoever hears nothing finds out by looking, a little later. What a signal
says is a hint, and the database the truth. On SQLite nobody is told anything.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Literal, TypeVar, cast, get_args
from weakref import WeakValueDictionary

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.core.tasks import end
from app.db.session import reading

logger = logging.getLogger(__name__)

T = TypeVar("T")

CHANNEL = "runs"
AGAIN = 1.0  # seconds between attempts to connect
QUIET = 5.0  # seconds without anything to tell, after which the connection is tried
SOON, LATER = 0.25, 1.0  # seconds between looks: where nobody tells anything, and where they do

Verb = Literal["queued", "cancel", "follow", "moved", "awaited"]
"""There is work; look at this run: it is to stop; its log is read elsewhere; that has grown or
ended; another run is queued behind it."""

Hear = Callable[[Verb, str], None]

NOTIFY = text(f"SELECT pg_notify('{CHANNEL}', said) FROM unnest(CAST(:said AS text[])) AS said")


class Following:
    """A run's log that is followed here, but written elsewhere. All who follow it share one."""

    def __init__(self) -> None:
        self.moves = 0
        self._moved = asyncio.Event()
        self._reads: dict[tuple[int, int], asyncio.Future[Any]] = {}

    async def once(self, after: int, read: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What is read above `after`, by one for all who want the same now."""
        key = (after, self.moves)
        if key not in self._reads:
            self._reads[key] = reading = asyncio.create_task(read())
            reading.add_done_callback(lambda _: self._reads.pop(key))
        return await asyncio.shield(self._reads[key])

    def move(self) -> None:
        self.moves += 1
        self._moved.set()
        self._moved = asyncio.Event()

    async def moved(self, since: int, timeout: float) -> None:
        """Returns when it has moved since then, or in so many seconds."""
        if self.moves == since:
            with contextlib.suppress(TimeoutError):  # `wait_for` may lose a cancellation
                async with asyncio.timeout(timeout):
                    await self._moved.wait()


class Signals:
    """Tells and hears. Start with `start()`; stop with `close()`."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.is_shared = engine.dialect.name == "postgresql"
        self.look = LATER if self.is_shared else SOON
        self._engine = reading(engine)
        self._followings: WeakValueDictionary[str, Following] = WeakValueDictionary()
        self._hear: Hear = lambda verb, run_id: None
        self._said: dict[str, None] = {}  # in order, each once
        self._due = asyncio.Event()
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    def start(self, hear: Hear) -> None:
        self._hear = hear
        if self.is_shared:
            self._task = asyncio.create_task(self._talk(), name="signals")

    async def close(self) -> None:
        """Says what is still to be said, if that can be done at once."""
        if self._task:
            self._closing = True
            self._due.set()
            await asyncio.wait([self._task], timeout=AGAIN / 2)
            await end(self._task)

    def tell(self, verb: Verb, run_id: str = "") -> None:
        """Tells all other processes. Costs the caller nothing."""
        if self._task:
            self._said[f"{verb} {run_id}"] = None
            self._due.set()

    def following(self, run_id: str) -> Following:
        """Kept for as long as somebody holds it."""
        following = self._followings.get(run_id)
        if following is None:
            following = self._followings[run_id] = Following()
        return following

    def move(self, run_id: str | None = None) -> None:
        """The run's log, or every one, is to be looked at by those here who follow it."""
        followings = (
            list(self._followings.values()) if run_id is None else [self._followings.get(run_id)]
        )
        for following in filter(None, followings):
            following.move()

    async def _talk(self) -> None:
        while not self._closing:
            try:
                await self._talk_on()
            except Exception as error:
                logger.warning("signals: not connected: %s", type(error).__name__)
                self._said.clear()
                await asyncio.sleep(AGAIN)

    async def _talk_on(self) -> None:
        """Over one connection, for as long as it lasts."""
        async with self._engine.connect() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            try:
                driver.add_termination_listener(self._lost)
                await driver.add_listener(CHANNEL, self._heard)
                self.move()  # what was said before was not heard
                self._hear("queued", "")
                while not self._closing or self._said:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._due.wait(), QUIET)
                    self._due.clear()
                    said, self._said = self._said, {}
                    await connection.execute(NOTIFY, {"said": list(said)})
            finally:
                driver.terminate()  # it is not to go back to the pool, still listening

    def _heard(self, connection: Any, sender: int, _channel: str, said: str) -> None:
        if sender == connection.get_server_pid():
            return
        verb, _, run_id = said.partition(" ")
        if verb == "moved":
            self.move(run_id)
        elif verb in get_args(Verb):
            self._hear(cast(Verb, verb), run_id)

    def _lost(self, _connection: Any) -> None:
        self._due.set()
