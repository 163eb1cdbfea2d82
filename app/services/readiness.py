"""Whether this process can do its work: the database answers, and takes what is written."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from app.db.session import reading
from app.services.journal import Journal

logger = logging.getLogger(__name__)

PATIENCE = 1.5  # seconds; who asks rarely waits longer


class Readiness:
    """Asks for real, the way that requests go, and says so in time, whatever the database does."""

    def __init__(self, engine: AsyncEngine, journal: Journal) -> None:
        self._reads = reading(engine)
        self._journal = journal
        self._asking: dict[str, asyncio.Task[Any]] = {}

    async def trouble(self) -> str | None:
        """What is wrong, or None."""
        self._ask("The database does not answer.", self._read)
        self._ask("The database takes nothing that is to be written.", self._journal.check)
        asked = dict(self._asking)
        await asyncio.wait(asked.values(), timeout=PATIENCE)
        for said, asking in asked.items():
            error = asking.exception() if asking.done() else TimeoutError()
            if error:
                logger.warning("not ready: %s (%s)", said, type(error).__name__)
                return said
        return None

    def _ask(self, said: str, question: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """One at a time: what nobody answers is not asked by everybody."""
        if said not in self._asking:
            self._asking[said] = asking = asyncio.create_task(question())
            asking.add_done_callback(lambda _: self._asking.pop(said))

    async def _read(self) -> None:
        async with self._reads.connect() as connection:
            await connection.execute(select(1))
