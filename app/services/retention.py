"""What is kept for how long: a sweep in the background, a little at a time.

Any number of processes may sweep at once: what one has deleted the others do not find any more.
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Executable,
    Row,
    and_,
    delete,
    exists,
    func,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.orm import aliased

from app.config import Settings
from app.core.errors import database_away
from app.core.tasks import end
from app.db.session import checkpoint, reading, writing
from app.models import Conversation, Event, File, Run
from app.services.accounts import Accounts
from app.services.deletion import FEW, FORGOTTEN, KEYS, discard_job, forget_conversation, prune
from app.services.jobs import ACCEPTING, DISCARDED

logger = logging.getLogger(__name__)

EVERY = 3600.0  # seconds from one sweep to the next
SPREAD = 5.0  # seconds in which processes that start at once begin
PAGE = 500  # runs that are looked at with one query
ROWS = 2000  # events in one transaction, or few more: those of a run go together
FILES = 8  # in one transaction: they may be large
PATIENCE = timedelta(hours=1)  # then nobody is accepting a job any more
REST = 0.05  # seconds between two transactions, and at least
SHARE = 4  # times as long as the last one took: others write too

_place = tuple_(Run.finished_at, Run.id)
_BEGINNING = (datetime.fromtimestamp(0, UTC), "")


class Retention:
    """Deletes what is to be kept no longer. `start` and `close` it, or call `sweep`."""

    def __init__(self, settings: Settings, engine: AsyncEngine, accounts: Accounts) -> None:
        self._settings = settings
        self._accounts = accounts
        self._engine = engine
        self._reads = reading(engine)
        self._writes = writing(engine)
        self._mark = _BEGINNING  # up to where the ended runs have no events any more
        self._last = _BEGINNING  # up to where nothing is left that was deleted and is not needed
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._work(), name="retention")

    async def close(self) -> None:
        if self._task:
            await end(self._task)

    async def _work(self) -> None:
        await asyncio.sleep(random.uniform(0, SPREAD))
        while True:
            try:
                await self.sweep()
            except Exception as error:
                if database_away(error):
                    logger.warning("sweep: the database did not answer: %s", type(error).__name__)
                else:
                    logger.exception("sweep: a bug; the next one tries again")
            await asyncio.sleep(EVERY)

    async def sweep(self) -> None:
        """Deletes all that is due now."""
        await self._accounts.finish()
        await self._events()
        await self._forgotten()
        await self._unseen_jobs()
        await self._files()
        if self._settings.keep_runs is not None:
            before = datetime.now(UTC) - self._settings.keep_runs
            await self._jobs(before)
            await self._conversations(before)
            await self._runs(before)
        await checkpoint(self._engine)

    async def _events(self) -> None:
        """Deletes the logs of runs that ended long ago, each as a whole: their messages stay."""
        before = datetime.now(UTC) - self._settings.keep_events
        events = select(func.count()).where(Event.run_id == Run.id).scalar_subquery()
        while page := await self._read(
            select(Run.id, Run.finished_at, events.label("events"))
            .where(_place > self._mark, Run.finished_at < before)
            .order_by(*_place)
            .limit(PAGE)
        ):
            for logs in _batches(page):
                async with self._turn() as connection:
                    # Locked in one order, so that two that sweep do not wait for each other; and
                    # looked at again: one that is just tried again has a new log.
                    ended = await connection.scalars(
                        select(Run.id)
                        .where(Run.id.in_(logs), Run.finished_at < before)
                        .order_by(Run.id)
                        .with_for_update(key_share=True)
                    )
                    await connection.execute(delete(Event).where(Event.run_id.in_(ended.all())))
            self._mark = page[-1].finished_at, page[-1].id

    async def _forgotten(self) -> None:
        """Deletes runs that are deleted already, once nothing needs them nor their keys."""
        before = datetime.now(UTC) - KEYS
        while page := await self._read(
            select(Run.id, Run.finished_at)
            .where(FORGOTTEN, Run.kind != "job", _place > self._last, Run.finished_at < before)
            .order_by(*_place)
            .limit(FEW)
        ):
            async with self._turn() as connection:
                await prune(connection, [row.id for row in page])
            self._last = page[-1].finished_at, page[-1].id

    async def _unseen_jobs(self) -> None:
        """Deletes what dead processes left half accepted or half deleted."""
        given_up = and_(Run.status == ACCEPTING, Run.created_at < datetime.now(UTC) - PATIENCE)
        left = or_(given_up, Run.status == DISCARDED)
        for row in await self._read(select(Run.id).where(left, Run.kind == "job")):
            await discard_job(self._writes, row.id)

    async def _files(self) -> None:
        now = datetime.now(UTC)
        due = File.expires_at <= now
        if self._settings.keep_files is not None:
            due = or_(due, File.created_at < now - self._settings.keep_files)
        ids = [row.id for row in await self._read(select(File.id).where(due))]
        for start in range(0, len(ids), FILES):
            async with self._turn() as connection:
                await connection.execute(delete(File).where(File.id.in_(ids[start:][:FILES])))

    async def _jobs(self, before: datetime) -> None:
        """Deletes jobs that ended before then, also where they were retried, with their items."""
        again = aliased(Run)
        old = and_(
            Run.kind == "job",
            Run.parent_id.is_(None),
            Run.finished_at < before,
            ~exists().where(again.parent_id == Run.id, _stays(again, before)),
        )
        for row in await self._read(select(Run.id).where(old)):
            async with self._turn() as connection:
                # Locked first: one that is just tried again is seen, or sees it gone.
                one = Run.id == row.id
                await connection.execute(select(Run.id).where(one).with_for_update())
                hidden = {"status": DISCARDED, "deleted_at": datetime.now(UTC)}
                hiding = await connection.execute(update(Run).where(one, old).values(hidden))
            if hiding.rowcount:
                await discard_job(self._writes, row.id)

    async def _conversations(self, before: datetime) -> None:
        """Deletes conversations in which nothing has happened since then, and from which nothing
        outside of them goes on."""
        child = aliased(Run)
        inside = Run.conversation_id == Conversation.id
        old = and_(
            Conversation.created_at < before,
            ~exists().where(inside, _stays(Run, before)),
            ~exists().where(
                inside,
                child.parent_id == Run.id,
                child.conversation_id.is_distinct_from(Conversation.id),
            ),
        )
        after = ""
        while page := await self._read(
            select(Conversation.id)
            .where(old, Conversation.id > after)
            .order_by(Conversation.id)
            .limit(PAGE)
        ):
            for row in page:
                async with self._turn() as connection:
                    # Locked first: a message that just comes is seen, or sees it gone.
                    one = Conversation.id == row.id
                    await connection.execute(select(Conversation.id).where(one).with_for_update())
                    if await connection.scalar(select(Conversation.id).where(one, old)):
                        await forget_conversation(connection, row.id)
            after = page[-1].id

    async def _runs(self, before: datetime) -> None:
        """Deletes runs without a conversation that ended before then, from the last of each
        chain up to the one that something newer goes on from."""
        child = aliased(Run)
        old = and_(
            Run.finished_at < before,
            or_(FORGOTTEN, Run.conversation_id.is_(None)),
            Run.batch_id.is_(None),
            Run.kind != "job",
        )
        mark = _BEGINNING
        while page := await self._read(
            select(Run.id, Run.finished_at)
            .where(old, _place > mark, ~exists().where(child.parent_id == Run.id))
            .order_by(*_place)
            .limit(FEW)
        ):
            async with self._turn() as connection:
                await prune(connection, [row.id for row in page], old)
            mark = page[-1].finished_at, page[-1].id

    async def _read(self, query: Executable) -> Sequence[Row[Any]]:
        async with self._reads.connect() as connection:
            return (await connection.execute(query)).all()

    @asynccontextmanager
    async def _turn(self) -> AsyncGenerator[AsyncConnection]:
        """One transaction, and then a rest, in which others write."""
        begun = time.monotonic()
        async with self._writes.begin() as connection:
            yield connection
        await asyncio.sleep(max(REST, SHARE * (time.monotonic() - begun)))


def _stays(run: Any, before: datetime) -> ColumnElement[bool]:
    return or_(run.finished_at.is_(None), run.finished_at >= before)


def _batches(runs: Sequence[Row[Any]]) -> Iterator[list[str]]:
    """The ids of those that have events, as many at a time as have about `ROWS` of them."""
    batch: list[str] = []
    size = 0
    for run in runs:
        if run.events:
            batch.append(run.id)
            size += run.events
        if size >= ROWS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
