"""What a connection leaves behind for whoever gets it next."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.config import Settings
from app.db.session import make_engine, reading, writing
from app.models import User

LONG = text(
    "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 3000000) "
    "SELECT count(*) FROM numbers"
)
ADA = {"email": "ada@example.com", "name": "Ada", "hashed_password": "x"}
CONNECTIONS = 15  # that may be open at a time


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    engine = make_engine(Settings(database_url=database_url))
    yield engine
    await engine.dispose()


async def emails(engine: AsyncEngine) -> list[str]:
    async with reading(engine).connect() as connection:
        return list(await connection.scalars(select(User.email)))


async def test_a_transaction_that_is_cancelled_is_undone_and_in_nobodys_way(
    engine: AsyncEngine,
) -> None:
    begun = asyncio.Event()

    async def write() -> None:
        async with writing(engine).begin() as connection:
            await connection.execute(insert(User), ADA)
            begun.set()
            await connection.execute(LONG)

    writer = asyncio.create_task(write())
    await begun.wait()
    writer.cancel()
    await asyncio.wait([writer])
    assert writer.cancelled()

    async def write_too(number: int) -> None:
        async with writing(engine).begin() as connection:
            other = {**ADA, "email": f"{number}@example.com"}
            await connection.execute(insert(User), other)

    await asyncio.gather(*(write_too(number) for number in range(CONNECTIONS + 1)))
    assert ADA["email"] not in (found := await emails(engine))
    assert len(found) == CONNECTIONS + 1


async def test_a_transaction_that_fails_is_undone(engine: AsyncEngine) -> None:
    with pytest.raises(IntegrityError):
        async with writing(engine).begin() as connection:
            await connection.execute(insert(User), ADA)
            await connection.execute(insert(User), ADA)
    assert await emails(engine) == []


async def test_a_statement_that_fails_says_so_and_the_next_one_works(engine: AsyncEngine) -> None:
    async with reading(engine).connect() as connection:
        with pytest.raises(DBAPIError, match="nowhere"):
            await connection.execute(text("SELECT * FROM nowhere"))
    async with reading(engine).connect() as connection:
        assert await connection.scalar(select(1)) == 1


async def test_a_result_has_its_columns_and_a_change_its_count(engine: AsyncEngine) -> None:
    async with writing(engine).begin() as connection:
        many = [{**ADA, "email": f"{number}@example.com"} for number in range(3)]
        await connection.execute(insert(User), many)
        changed = await connection.execute(text("UPDATE users SET name = 'Eve'"))
        assert changed.rowcount == 3
        result = await connection.execute(text("SELECT name, email FROM users ORDER BY email"))
        assert list(result.keys()) == ["name", "email"]
        assert result.mappings().first() == {"name": "Eve", "email": "0@example.com"}
