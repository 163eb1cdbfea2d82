"""A connection to SQLite that makes one trip to its thread for each statement.

The driver makes one to get a cursor, one to execute, one to fetch and one to close, and SQLAlchemy
one more to roll back what never began: with short statements, trips are most of what they cost.
"""

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial
from typing import Any, Self, TypeVar, cast

import aiosqlite

T = TypeVar("T")


class Cursor:
    """What SQLAlchemy uses of a cursor, but for streamed results: when `execute` returns,
    everything was read."""

    arraysize = 1
    description: Any = None
    rowcount = -1
    lastrowid: int | None = None

    def __init__(self, connection: "Connection") -> None:
        self._connection = connection
        self._rows: Sequence[Any] = ()

    async def __aenter__(self) -> Self:
        return self

    async def execute(self, sql: str, parameters: Iterable[Any] = ()) -> None:
        await self._run(sqlite3.Cursor.execute, sql, parameters)

    async def executemany(self, sql: str, parameters: Iterable[Iterable[Any]]) -> None:
        await self._run(sqlite3.Cursor.executemany, sql, parameters)

    async def _run(self, how: Callable[..., Any], sql: str, parameters: Any) -> None:
        await self._connection.use(partial(self._execute, how, sql, parameters))

    def _execute(
        self, how: Callable[..., Any], sql: str, parameters: Any, connection: sqlite3.Connection
    ) -> None:
        with closing(connection.cursor()) as cursor:
            how(cursor, sql, parameters)
            self.description = cursor.description
            self._rows = cursor.fetchall() if cursor.description else ()
            self.rowcount = cursor.rowcount
            self.lastrowid = cursor.lastrowid

    async def fetchall(self) -> Sequence[Any]:
        return self._rows

    async def close(self) -> None:
        """There is nothing left to close."""


class Connection(aiosqlite.Connection):
    """Takes what `sqlite3.connect` takes."""

    def __init__(self, database: str, **options: Any) -> None:
        super().__init__(partial(sqlite3.connect, database, **options), iter_chunk_size=64)
        self._thread.daemon = True

    def cursor(self) -> Cursor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Cursor(self)

    async def use(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Calls `work` in the connection's thread."""
        return await cast(Any, self)._execute(work, self._conn)

    async def rollback(self) -> None:
        """SQLAlchemy throws a connection away whose statement was cancelled: nothing is under way
        here."""
        if self.in_transaction:
            await super().rollback()
