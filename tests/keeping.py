"""Sweeps as they come when time has passed, and what a database holds."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.db.base import Base
from app.db.session import make_engine
from app.models import Conversation, Run
from app.services.retention import Retention
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
    await Retention(settings, engine).sweep()
    await engine.dispose()


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
