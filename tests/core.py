"""One process below its routes, with an executor that a test writes."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.config import Settings
from app.core.security import EVERYTHING, Caller
from app.db.migrate import migrate
from app.db.session import make_engine, make_sessions
from app.models import Event, Run, User
from app.services.attachments import Attachments
from app.services.execution import Job, Outcome
from app.services.journal import Journal
from app.services.new_run import NewRun
from app.services.outbound import Allowed, make_http
from app.services.run_log import Entry, parse
from app.services.runs import Runs
from app.services.worker import Worker

Execute = Callable[[Journal, Job], Awaitable[Outcome]]

DONE = Outcome("completed", finish_reason="stop", text="done")


@dataclass
class Core:
    """A process's connection to the database, its journal, its worker, and the entrance."""

    engine: AsyncEngine
    journal: Journal
    worker: Worker
    runs: Runs
    caller: Caller

    async def accept(self, **fields: Any) -> Run:
        return await self.runs.accept(
            self.caller, NewRun(**{"program": "assistant", "prompt": "go", **fields})
        )

    async def sql(self, statement: str, **values: Any) -> list[Row[Any]]:
        """Runs it in a transaction of its own; the rows, if it brings any."""
        async with self.engine.execution_options(write=True).begin() as connection:
            result = await connection.execute(text(statement), values)
            return list(result) if result.returns_rows else []

    async def row(self, run: Run) -> Row[Any]:
        [row] = await self.sql("SELECT * FROM runs WHERE id = :id", id=run.id)
        return row

    async def stored(self, run: Run) -> list[Entry]:
        """What a process that knows nothing of the run reads."""
        async with self.engine.connect() as connection:
            rows = await connection.execute(
                select(Event.seq, Event.body).where(Event.run_id == run.id).order_by(Event.seq)
            )
            return [parse(row.seq, row.body) for row in rows]


@asynccontextmanager
async def open_core(
    settings: Settings, execute: Execute, *, name: str | None = None, beats: bool = True
) -> AsyncGenerator[Core]:
    """A running process. With a `name` it takes itself for one on another machine; one that does
    not beat renews no lease and claims nothing, as if it were dead."""
    engine = make_engine(settings)
    await migrate(engine)
    async with make_sessions(engine)() as db:
        user = await db.scalar(select(User).where(User.email == "owner@example.com"))
        if user is None:
            user = User(email="owner@example.com", name="Owner", hashed_password="!")
            db.add(user)
            await db.commit()
    journal = Journal(engine)

    async def executor(job: Job) -> Outcome:
        return await execute(journal, job)

    worker = Worker(settings, engine, journal, {"agent": executor, "extraction": executor})
    if name:
        worker.name = name
    journal.start()
    if beats:
        worker.begin()
    http = make_http(settings, Allowed.of_users(settings))
    runs = Runs(engine, journal, worker, Attachments(engine, http, settings))
    core = Core(engine, journal, worker, runs, Caller.of(user.id, EVERYTHING))
    try:
        yield core
    finally:
        await http.aclose()
        await worker.close()
        await journal.close()
        await engine.dispose()
