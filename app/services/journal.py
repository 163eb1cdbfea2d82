"""The one writer of the run log: group commit; store, then send.

Every change of a run goes through here. Whatever is pending when a commit is due goes into the
same transaction, so a thousand streams cost the same few transactions a second as one. Readers
see committed entries only: a number means the same to every reader, live or later.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from sqlite3 import SQLITE_FULL
from typing import Any

from pydantic_ai.messages import AgentStreamEvent
from sqlalchemy import (
    Connection,
    Executable,
    Text,
    bindparam,
    cast,
    func,
    literal_column,
    select,
    text,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.core import metrics
from app.core.errors import database_away
from app.core.tasks import end
from app.db.session import direct, writing
from app.models import Run
from app.services.allowances import LimitReached, Move, move
from app.services.changes import INSERT_EVENT, ORDER, Rows
from app.services.run_log import RunLog, entry

logger = logging.getLogger(__name__)

TICK = 0.02  # seconds that text waits at most, to be stored and sent with what follows it
REST = TICK / 2  # seconds at most that the writer rests after a transaction for several
RETRY = 0.2  # seconds between attempts to store text while the database is away
SETTLE = 1.0  # seconds that `close` gives to what is pending
CLOSED = "The journal is closed."
TROUBLED = 5.0  # seconds for which a failure to write counts, if nothing is written since

# All runs that a transaction changes, in one order for all processes.
FENCE = (
    select(Run.id, Run.token, Run.status)
    .where(Run.id.in_(bindparam("ids", expanding=True)))
    .order_by(Run.id)
    .with_for_update(key_share=True)
)
# Something that has to reach the disk, and changes nothing.
TOUCH: dict[str, Executable] = {
    "postgresql": select(func.pg_logical_emit_message(True, "journal", "")),
    "sqlite": text("PRAGMA user_version = 0"),
}
# By which a transaction is known after its connection is lost.
WHICH = select(cast(func.pg_current_xact_id(), Text), func.pg_backend_pid())

Unwritten = tuple[set[str], dict[int, LimitReached]]
"""Of `write`: the ids of runs whose token does not hold, and the places of refused moves."""


class LeaseLost(Exception):
    """Another worker owns the run now; this one may write nothing more."""


@dataclass(slots=True)
class _Change:
    rows: Rows
    log: RunLog | None
    move: Move | None
    last: AgentStreamEvent | None
    done: asyncio.Future[None]


class Journal:
    """Owns the one connection that writes. Start with `run()` in a task; stop with `close()`."""

    def __init__(self, engine: AsyncEngine, patience: float = 10.0) -> None:
        self._engine = writing(engine)
        self._dialect = engine.dialect.name
        self._patience = patience  # seconds that somebody waits who has no run yet
        self._connection: AsyncConnection | None = None
        # SQLite has no network to wait for: a whole transaction in one go through a thread costs
        # a fraction of one trip for each statement.
        self._direct = direct(engine, patience)
        self._file: Connection | None = None
        self._thread = ThreadPoolExecutor(1, "journal") if self._direct else None
        self._changes: list[_Change] = []
        self._dirty: dict[str, RunLog] = {}
        self._due = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._last = 0.0
        self._closing = False
        self._stuck = False  # text waits for the database to come back
        self._failed = -math.inf  # when something could not be written, and nothing was since
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._write(), name="journal")

    async def close(self) -> None:
        """Stores what is pending, as far as the database lets it, and stops."""
        self._closing = True
        self._due.set()
        if self._task:
            await asyncio.wait([self._task], timeout=SETTLE)
            await end(self._task)
        for change in self._changes:
            _fail(change.done, ConnectionError(CLOSED))
        await self._disconnect()
        if self._thread:
            self._thread.shutdown(wait=False)

    def append(self, log: RunLog, event: AgentStreamEvent) -> None:
        """Stores the event within a tick, or with the next commit of anybody."""
        log.put(event)
        self._dirty[log.run_id] = log
        if self._timer is None and not self._due.is_set():
            loop = asyncio.get_running_loop()
            wait = max(0.0, self._last + TICK - loop.time())
            self._timer = loop.call_later(wait, self._due.set)

    async def commit(
        self,
        rows: Rows = (),
        log: RunLog | None = None,
        move: Move | None = None,
        last: AgentStreamEvent | None = None,
    ) -> None:
        """Stores the rows, and what the log has pending, now and all or nothing. The `last` event
        of the log is stored with these rows, never without them.

        A run waits for a database that is away; who has no run yet is told in time. Raises
        LeaseLost where the log's fence no longer holds, LimitReached where the move goes too far
        (then no row is stored, but what the log has pending is), and the database's own errors.
        """
        while True:
            try:
                return await self._commit(rows, log, move, last)
            except Exception as error:
                if log is None or self._closing or not database_away(error):
                    raise
            await asyncio.sleep(RETRY)

    async def _commit(
        self, rows: Rows, log: RunLog | None, move: Move | None, last: AgentStreamEvent | None
    ) -> None:
        if self._task and self._task.done():
            raise ConnectionError(CLOSED)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        change = _Change(rows, log, move, last, done)
        self._changes.append(change)
        if log and log.dirty:
            self._dirty[log.run_id] = log
        self._due.set()
        if log:
            await done
            return
        try:
            async with asyncio.timeout(self._patience):
                await done
        finally:
            if change in self._changes:  # nobody will know of it
                self._changes.remove(change)

    async def check(self) -> None:
        """Raises where nothing can be written."""
        if asyncio.get_running_loop().time() < self._failed + TROUBLED:
            raise ConnectionError("What was to be written could not be.")
        await self.commit([(TOUCH[self._dialect], {})])

    async def _write(self) -> None:
        """After a transaction for several it rests for as long as that took, so that more gathers
        for the next: in each, SQLite's thread and the event loop fight for the interpreter."""
        loop = asyncio.get_running_loop()
        while True:
            await self._due.wait()
            self._due.clear()
            if self._timer:
                self._timer.cancel()
                self._timer = None
            changes, self._changes = self._changes, []
            dirty, self._dirty = self._dirty, {}
            if changes or dirty:
                begun = loop.time()
                await self._flush(changes, dirty)
                self._last = loop.time()
                if self._stuck:
                    await asyncio.sleep(RETRY)
                    self._stuck = False
                    self._due.set()
                elif max(len(changes), len(dirty)) > 1:
                    await asyncio.sleep(min(self._last - begun, REST))
            if self._closing and not self._changes and not self._dirty:
                return

    async def _flush(self, changes: list[_Change], dirty: dict[str, RunLog]) -> None:
        """One transaction for all; if that fails, one for each, so that only the guilty fail."""
        logs = list(dirty.values())
        try:
            lost, refused = await self._store(changes, logs)
        except asyncio.CancelledError:
            for change in changes:
                _fail(change.done, ConnectionError(CLOSED))
            raise
        except Exception as error:
            await self._disconnect()
            rest, spares = dict(dirty), not _spares_nobody(error)
            alone = [([change], _just(change.log, rest)) for change in changes]
            alone += [([], {run_id: log}) for run_id, log in rest.items()]
            if spares and len(alone) > 1:
                for one in alone:
                    await self._flush(*one)
                return
            self._warn(error)
            for change in changes:
                _fail(change.done, error)
            if not (spares and changes):
                self._dirty = dirty | self._dirty
                self._stuck = True
            return
        if logs or any(change.log for change in changes):
            self._failed = -math.inf
        for at, change in enumerate(changes):
            if change.log and change.log in lost:
                _fail(change.done, LeaseLost(change.log.run_id))
            elif at in refused:
                _fail(change.done, refused[at])
            elif not change.done.done():
                change.done.set_result(None)

    def _warn(self, error: Exception) -> None:
        """Once for each time that the database is away, however often it is tried again."""
        now, failed = asyncio.get_running_loop().time(), self._failed
        if database_away(error):
            self._failed = now
        told = isinstance(error, IntegrityError)  # whoever committed it is: somebody was faster
        if not told and (now > failed + TROUBLED or not database_away(error)):
            logger.warning("could not be written: %s", type(error).__name__)

    async def _store(
        self, changes: list[_Change], logs: list[RunLog]
    ) -> tuple[set[RunLog], dict[int, LimitReached]]:
        """The logs whose fence no longer holds: nothing of theirs was written. And the places of
        the changes that were refused."""
        fenced = {log.run_id: log for log in logs}
        fenced |= {change.log.run_id: change.log for change in changes if change.log}
        taken = {log: log.take() for log in logs}
        ends = {change.log: change.last for change in changes if change.log and change.last}
        for log, last in ends.items():
            entries = taken.setdefault(log, [])
            entries.append(entry(len(log.entries) + len(entries) + 1, last))
        parts: list[tuple[str | None, Rows]] = [
            (change.log and change.log.run_id, change.rows) for change in changes
        ]
        for log, entries in taken.items():
            row = {"run_id": log.run_id}
            parts.append((log.run_id, [(INSERT_EVENT, row | entry.columns) for entry in entries]))
        moves = [change.move for change in changes]
        tokens = {run_id: log.token for run_id, log in fenced.items()}
        begun = time.perf_counter()
        try:
            gone, refused = await self._transact(partial(write, tokens, parts, moves))
        except BaseException:
            for log, entries in taken.items():
                log.put_back(entries[:-1] if log in ends else entries)
            metrics.commit_failures.add()
            raise
        lost = {fenced[run_id] for run_id in gone}
        metrics.commits.add(time.perf_counter() - begun)
        metrics.entries.add(by=sum(map(len, taken.values())))
        for log, entries in taken.items():
            if log not in lost:
                log.committed(entries)
        for log in lost:
            log.lost = True
            log.close()
        return lost, refused

    async def _transact(self, work: Callable[[Connection], Unwritten]) -> Unwritten:
        if self._thread:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, self._transact_in_thread, work)
        if self._connection is None:
            self._connection = await self._engine.connect()
        # Whatever fails below, the connection is thrown away, and with it the transaction.
        transaction = await self._connection.begin()
        lost = await self._connection.run_sync(work)
        if self._dialect != "postgresql":
            await transaction.commit()
            return lost
        number, process = (await self._connection.execute(WHICH)).one()
        try:
            await transaction.commit()
        except Exception as error:
            if not database_away(error) or not await self._was_committed(number, process):
                raise
        return lost

    async def _was_committed(self, number: str, process: int) -> bool:
        """Whether the transaction took place whose commit nobody confirmed.

        Nothing else is written before that is known. Where the database has not noticed that the
        connection is lost, it is told, so that no commit arrives later.
        """
        status = select(func.pg_xact_status(literal_column(f"'{number}'::xid8")))
        while True:
            await self._disconnect()
            try:
                self._connection = await self._engine.connect()
                async with self._connection.begin():
                    if (now := await self._connection.scalar(status)) != "in progress":
                        return now == "committed"
                    await self._connection.execute(select(func.pg_terminate_backend(process)))
            except Exception as error:
                if self._closing or not database_away(error):
                    raise
                self._failed = asyncio.get_running_loop().time()
            await asyncio.sleep(RETRY)

    def _transact_in_thread(self, work: Callable[[Connection], Unwritten]) -> Unwritten:
        assert self._direct
        if self._file is None:
            self._file = self._direct.connect()
        with self._file.begin():
            return work(self._file)

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        file, self._file = self._file, None
        with contextlib.suppress(Exception):  # it is being thrown away, broken or not
            if connection:
                await connection.close()
            if file and self._thread:
                await asyncio.get_running_loop().run_in_executor(self._thread, file.close)


def write(
    tokens: dict[str, int],
    parts: Sequence[tuple[str | None, Rows]],
    moves: Sequence[Move | None],
    connection: Connection,
) -> Unwritten:
    """Writes the rows of all runs whose token still holds, where the move that stands in the same
    place is not refused; the others come back.

    Rows of the same statement go out together.
    """
    lost: set[str] = set()
    changed = {row["of_run"] for _, rows in parts for _, row in rows if "of_run" in row}
    if ids := sorted(changed.union(tokens)):
        found = connection.execute(FENCE, {"ids": ids})
        held = {row.id: row.token for row in found if row.status == "running"}
        lost = {run_id for run_id, token in tokens.items() if held.get(run_id) != token}
    made = {at: each for at, each in enumerate(moves) if each and parts[at][0] not in lost}
    refused = move(connection, made) if made else {}
    batch: dict[Executable, list[dict[str, Any]]] = {}
    for at, (run_id, rows) in enumerate(parts):
        if run_id not in lost and at not in refused:
            for statement, row in rows:
                batch.setdefault(statement, []).append(row)
    for statement in (*ORDER, *TOUCH.values()):
        if rows := batch.get(statement):
            connection.execute(statement, rows if any(rows) else None)
    return lost, refused


def _just(log: RunLog | None, dirty: dict[str, RunLog]) -> dict[str, RunLog]:
    if log and dirty.pop(log.run_id, None):
        return {log.run_id: log}
    return {}


def _spares_nobody(error: Exception) -> bool:
    """Whether each transaction would fail the same way, after as long a time: the connection is
    lost, or somebody else writes. Where the disk is full, or two waited for each other, the next
    one may fare better."""
    orig = getattr(error, "orig", None)
    code, state = getattr(orig, "sqlite_errorcode", 0), str(getattr(orig, "sqlstate", ""))
    return database_away(error) and code != SQLITE_FULL and state[:2] != "40" and state != "53100"


def _fail(done: asyncio.Future[None], error: Exception) -> None:
    if not done.done():
        done.set_exception(error)
