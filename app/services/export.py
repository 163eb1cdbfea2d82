"""All that is stored of an account, for its owner to take along."""

import base64
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic_core import to_json
from sqlalchemy import ColumnElement, RowMapping, Select, select, tuple_
from sqlalchemy.ext.asyncio import AsyncEngine

from app.db.base import Base
from app.db.session import reading
from app.models import (
    Allowance,
    ApiKey,
    Conversation,
    File,
    Message,
    Run,
    Schedule,
    SchemaVersion,
    ToolCall,
    Usage,
    User,
)

PAGE = 100  # rows that are read with one query, where they are small

# How passwords, keys and equal requests are known again, and who executes a run: nobody's data.
INTERNAL = {
    *("hashed_password", "digest", "idempotency_key", "fingerprint", "cache_key", "transcript"),
    *("worker", "token", "lease_until", "crashes", "cancelling", "held_tokens", "held_cost"),
}
# Columns that are JSON already, and stand in the line as they are: numbers keep their digits.
JSON = {"options", "output", "error", "usage", "labels", "request", "body"}


async def export(engine: AsyncEngine, user_id: int) -> AsyncIterator[bytes]:
    """JSON lines, each with a `type`: the account, what it has, then its runs, each before its
    messages and tool calls. No connection is held in between, and little memory: the largest file
    or the messages of a run at most."""
    rows = _Rows(reading(engine))
    tables: tuple[tuple[str, type[Base], ColumnElement[bool]], ...] = (
        ("account", User, User.id == user_id),
        ("api_key", ApiKey, ApiKey.user_id == user_id),
        ("allowance", Allowance, Allowance.owner_id == user_id),
        ("usage", Usage, Usage.owner_id == user_id),
        ("schema", SchemaVersion, SchemaVersion.owner_id == user_id),
        ("schedule", Schedule, Schedule.owner_id == user_id),
        ("conversation", Conversation, Conversation.owner_id == user_id),
    )
    for kind, table, which in tables:
        async for line in rows.lines(kind, table, which):
            yield line
    async for file_id in rows.ids(File, user_id):
        async for line in rows.lines("file", File, File.id == file_id):
            yield line
    async for run_id in rows.ids(Run, user_id):
        async for line in rows.lines("run", Run, Run.id == run_id):
            yield line
        async for line in rows.lines("message", Message, Message.run_id == run_id):
            yield line
        async for line in rows.lines("tool_call", ToolCall, ToolCall.run_id == run_id):
            yield line


@dataclass(frozen=True, slots=True)
class _Rows:
    reads: AsyncEngine

    async def lines(
        self, kind: str, table: type[Base], which: ColumnElement[bool]
    ) -> AsyncIterator[bytes]:
        """Of each row, in the order of their keys."""
        shown = [column for column in table.__table__.c if column.name not in INTERNAL]
        key = [column for column in table.__table__.c if column.primary_key]
        async for page in self._pages(select(*shown).where(which), key):
            for row in page:
                yield _line(kind, row)

    async def ids(self, table: type[File | Run], owner_id: int) -> AsyncIterator[str]:
        """By age, alone: the rows may be large."""
        query = select(table.id, table.created_at).where(table.owner_id == owner_id)
        columns = table.__table__.c
        async for page in self._pages(query, [columns.created_at, columns.id]):
            for row in page:
                yield row["id"]

    async def _pages(
        self, query: Select[*tuple[Any, ...]], key: Sequence[Any]
    ) -> AsyncIterator[Sequence[RowMapping]]:
        page: Sequence[RowMapping] = ()
        while True:
            rest = query.order_by(*key).limit(PAGE)
            if page:
                last = [page[-1][column.name] for column in key]
                rest = rest.where(tuple_(*key) > tuple_(*last, types=[c.type for c in key]))
            async with self.reads.connect() as connection:
                page = (await connection.execute(rest)).mappings().all()
            if not page:
                return
            yield page


def _line(kind: str, row: RowMapping) -> bytes:
    fields = [b'"type":' + to_json(kind)]
    for name, value in row.items():
        fields.append(to_json(str(name)) + b":" + _value(str(name), value))
    return b"{" + b",".join(fields) + b"}\n"


def _value(name: str, value: Any) -> bytes:
    match value:
        case str() if name in JSON:
            return value.replace("\n", " ").encode()  # within a string there is none
        case bytes():
            return to_json(base64.b64encode(value).decode())
        case datetime():
            return to_json(value.isoformat())
        case _:
            return to_json(value)
