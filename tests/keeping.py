"""Sweeps as they come when time has passed, and what a database holds."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from httpx2 import AsyncClient, Response
from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_sessionmaker

from app.db.base import Base
from app.db.session import make_engine, make_sessions
from app.models import Conversation, Run
from app.services.accounts import Accounts
from app.services.journal import Journal
from app.services.retention import Retention
from app.services.user import UserService
from app.services.worker import Worker
from tests.conftest import settings_of

AT_ONCE = timedelta(0)


@asynccontextmanager
async def connected(environ: dict[str, str]) -> AsyncGenerator[AsyncConnection]:
    """To the server's database, in a transaction that is committed."""
    engine = make_engine(settings_of(environ))
    async with engine.execution_options(write=True).begin() as connection:
        yield connection
    await engine.dispose()


async def sweep(environ: dict[str, str], **keep: timedelta) -> None:
    """What another process with these settings deletes, be they shorter than it would take."""
    settings = settings_of(environ).model_copy(update=keep)
    engine = make_engine(settings)
    worker = Worker(settings, engine, Journal(engine), {})
    accounts = Accounts(engine, worker, partial(users_of, make_sessions(engine)))
    await Retention(settings, engine, accounts).sweep()
    await engine.dispose()


@asynccontextmanager
async def users_of(sessions: async_sessionmaker[AsyncSession]) -> AsyncGenerator[UserService]:
    async with sessions() as db:
        yield UserService(db)


async def age(environ: dict[str, str], *run_ids: str, days: int = 100) -> None:
    """Makes these runs, and all conversations, so old."""
    then = datetime.now(UTC) - timedelta(days=days)
    async with connected(environ) as connection:
        runs = update(Run).where(Run.id.in_(run_ids))
        await connection.execute(runs.values(created_at=then, finished_at=then))
        await connection.execute(update(Conversation).values(created_at=then))


async def counts(environ: dict[str, str]) -> Mapping[str, int]:
    """How many rows each table has."""
    async with connected(environ) as connection:
        return {
            table.name: await connection.scalar(select(func.count()).select_from(table)) or 0
            for table in Base.metadata.sorted_tables
        }


async def everything(environ: dict[str, str]) -> str:
    """All rows of all tables, as text."""
    rows: list[Any] = []
    async with connected(environ) as connection:
        for table in Base.metadata.sorted_tables:
            rows += [tuple(row) for row in await connection.execute(select(table))]
    return "\n".join(map(repr, rows))


async def get(client: AsyncClient, path: str, **headers: str) -> Response:
    reply = await client.get(path, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply


async def in_chat(client: AsyncClient, chat: str, *said: str) -> str:
    """The run's id. The history before it may be that of another chat."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)]
    body = {"model": "assistant", "messages": messages}
    reply = await client.post("/v1/chat/completions", json=body, headers={"X-Chat-Id": chat})
    assert reply.status_code == 200, reply.text
    return reply.json()["id"].removeprefix("chatcmpl-")
