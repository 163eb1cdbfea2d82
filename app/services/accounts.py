"""Accounts with all that they own: what is stored of one, and its end."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, suppress

from sqlalchemy import delete, or_, select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from app.core.security import CLOSED, EVERYTHING, Caller
from app.db.session import checkpoint, reading, writing
from app.models import File, Run, Schedule, User
from app.models.run import OPEN
from app.services.deletion import empty
from app.services.export import export
from app.services.user import UserNotFound, UserService
from app.services.worker import Worker

STOPPING = 5.0  # seconds that runs get to end in
POLL = 0.1
FILES = 8  # in one transaction: they may be large


class Accounts:
    """All accounts, each of concern to its owner and to administrators alone."""

    def __init__(
        self,
        engine: AsyncEngine,
        worker: Worker,
        users: Callable[[], AbstractAsyncContextManager[UserService]],
    ) -> None:
        self._engine = engine
        self._reads = reading(engine)
        self._writes = writing(engine)
        self._worker = worker
        self._users = users

    async def export(self, caller: Caller, user_id: int) -> AsyncIterator[bytes]:
        """All that is stored of the account, as JSON lines. Raises UserNotFound."""
        async with self._users() as users:
            await users.get(caller, user_id)
        return export(self._engine, user_id)

    async def erase(self, caller: Caller, user_id: int) -> None:
        """Stops all that goes on for the account, in any process, and returns when no row names
        it any more. Where this is cut short, `finish` goes on.

        Raises UserNotFound, Conflict for the local admin.
        """
        async with self._users() as users:
            await users.close(caller, user_id)
        await self._erase(user_id)

    async def finish(self) -> None:
        """Erases all accounts that are closed: a process may have died at one."""
        async with self._reads.connect() as connection:
            closed = await connection.scalars(select(User.id).where(User.hashed_password == CLOSED))
        for user_id in closed.all():
            await self._erase(user_id)

    async def _erase(self, user_id: int) -> None:
        await self._stop(user_id)
        await empty(self._writes, user_id)
        await self._delete_files(user_id)
        with suppress(UserNotFound):  # another process was at it, too
            async with self._users() as users:
                await users.delete(Caller.of(user_id, EVERYTHING), user_id)
        await checkpoint(self._engine)

    async def _stop(self, user_id: int) -> None:
        """Asks for the end of all that goes on, lets nothing begin by itself, and waits a little.
        What does not end is deleted all the same; whoever executes it finds that it is gone."""
        running = (Run.owner_id == user_id) & (Run.status == "running")
        single = (Run.owner_id == user_id) & Run.batch_id.is_(None) & Run.status.in_(OPEN)
        # Locked in the order in which the journal locks them.
        going_on = (
            select(Run.id)
            .where(or_(running, single))
            .order_by(Run.id)
            .with_for_update(key_share=True)
        )
        async with self._writes.begin() as connection:
            asked = await connection.scalars(
                update(Run).where(Run.id.in_(going_on)).values(cancelling=True).returning(Run.id)
            )
            run_ids = list(asked)
            await connection.execute(delete(Schedule).where(Schedule.owner_id == user_id))
        for run_id in run_ids:
            self._worker.cancel(run_id)
        until = time.monotonic() + STOPPING
        while run_ids and time.monotonic() < until:
            async with self._reads.connect() as connection:
                if await connection.scalar(select(Run.id).where(running).limit(1)) is None:
                    return
            await asyncio.sleep(POLL)

    async def _delete_files(self, user_id: int) -> None:
        some = select(File.id).where(File.owner_id == user_id).limit(FILES)
        while True:
            async with self._writes.begin() as connection:
                deleted = await connection.execute(delete(File).where(File.id.in_(some)))
            if not deleted.rowcount:
                return
