"""The database connection: embedded SQLite by default, PostgreSQL by `DATABASE_URL`."""

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import ExceptionContext, make_url
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from app.config import Settings, settings
from app.db import sqlite

# A transaction that writes says so first: on SQLite it then waits for its turn at once, instead
# of failing when another writer came between its reading and its writing.
WRITE = {"write": True}


def make_engine(settings: Settings) -> AsyncEngine:
    """An engine for these settings. SQLite survives power loss (`synchronous=FULL`).

    What users wrote stays out of logs and errors, also when debugging (`hide_parameters`).
    """
    url = make_url(settings.database_url)
    timeout = settings.database_timeout.total_seconds()
    # Whoever hangs in the middle of a transaction keeps its rows from the others, but not until
    # they have lost their own leases for it.
    idle = min(timeout, settings.lease_seconds / 3)
    if not settings.is_sqlite:
        engine = create_async_engine(
            url,
            hide_parameters=True,
            pool_pre_ping=True,
            pool_size=20,
            max_overflow=10,
            pool_timeout=timeout,
            connect_args={
                "timeout": timeout,
                "command_timeout": timeout,
                "server_settings": {
                    "idle_in_transaction_session_timeout": str(round(idle * 1000)),
                    "jit": "off",  # it takes a hundred times as long as these statements
                },
            },
        )
        _give_up(engine.sync_engine)
        return engine
    if not settings.in_memory and url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    # Most of what is opened stays open: each connection is a thread, and dear to begin.
    pool = {"pool_size": 10, "max_overflow": 5, "pool_timeout": timeout, "pool_use_lifo": True}
    engine = create_async_engine(
        url,
        hide_parameters=True,
        connect_args={"async_creator_fn": sqlite.Connection},
        **_OURS,
        **({} if settings.in_memory else pool),
    )
    _configure(engine.sync_engine, timeout)
    return engine


def _give_up(engine: Engine) -> None:
    """Throws away a connection on which an answer did not come in time: nothing, and no rollback,
    is to wait for it once more."""

    @event.listens_for(engine, "handle_error")
    def judge(context: ExceptionContext) -> None:  # pyright: ignore[reportUnusedFunction]
        if isinstance(context.original_exception, TimeoutError):
            context.is_disconnect = True
            context.invalidate_pool_on_disconnect = False


# The driver begins no transaction of its own: the hook below does.
_OURS: dict[str, Any] = {"isolation_level": "AUTOCOMMIT"}


def _configure(engine: Engine, timeout: float) -> None:
    """Makes an engine for SQLite behave. `timeout` in seconds, for a turn to write."""

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: object) -> None:  # pyright: ignore[reportUnusedFunction]
        cursor = connection.cursor()
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            f"busy_timeout={round(timeout * 1000)}",
            "secure_delete=ON",  # what is deleted is overwritten, not just marked as free
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:  # pyright: ignore[reportUnusedFunction]
        options = connection.get_execution_options()
        if not options.get("read"):
            connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("write") else "BEGIN")


def direct(engine: AsyncEngine, timeout: float) -> Engine | None:
    """A synchronous engine that writes to the same SQLite file; None for any other database."""
    if engine.dialect.name != "sqlite" or engine.url.database in (None, "", ":memory:"):
        return None
    url = engine.url.set(drivername="sqlite")
    twin = create_engine(url, hide_parameters=True, execution_options=WRITE, **_OURS)
    _configure(twin, timeout)
    return twin


def reading(engine: AsyncEngine) -> AsyncEngine:
    """The same engine for single statements that read: no transaction is begun for them."""
    if engine.dialect.name == "sqlite":
        return engine.execution_options(read=True)
    return engine.execution_options(isolation_level="AUTOCOMMIT")


def writing(engine: AsyncEngine) -> AsyncEngine:
    """The same engine for transactions that write."""
    return engine.execution_options(**WRITE)


async def checkpoint(engine: AsyncEngine) -> None:
    """Empties SQLite's write-ahead log, in which what was deleted would stay for a while.

    Others write meanwhile, so where somebody reads an older state for long it is left as it is.
    """
    if engine.dialect.name != "sqlite":
        return
    async with reading(engine).connect() as connection:
        patience = (await connection.exec_driver_sql("PRAGMA busy_timeout")).scalar_one()
        await connection.exec_driver_sql("PRAGMA busy_timeout=200")
        try:
            await connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            await connection.exec_driver_sql(f"PRAGMA busy_timeout={patience}")


def make_sessions(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(engine, class_=AsyncSession, expire_on_commit=False)


engine = make_engine(settings)

async_session = make_sessions(engine)


async def get_db() -> AsyncGenerator[AsyncSession, None]:
    """Dependency for database session."""
    async with async_session() as session:
        try:
            yield session
        finally:
            await session.close()
