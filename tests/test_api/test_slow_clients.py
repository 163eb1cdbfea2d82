"""Slow and silent clients cost a connection to them, and nothing else."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from httpx2 import AsyncClient, Limits
from sqlalchemy import text

from app.db.session import make_engine
from tests.conftest import client_of, settings_of
from tests.server import ServerProcess
from tests.upstream import Reply, Upstream

STREAMS = 300


@pytest.fixture
def process(environ: dict[str, str]) -> Iterator[ServerProcess]:
    with ServerProcess(**environ) as running:
        yield running


@pytest.fixture
async def owner(process: ServerProcess, bearer: Callable[..., Any]) -> AsyncIterator[AsyncClient]:
    token = await bearer("Owner")
    headers = {"Authorization": f"Bearer {token}"}
    limits = Limits(max_connections=None, max_keepalive_connections=0)
    async with AsyncClient(
        base_url=process.url, headers=headers, timeout=60, limits=limits
    ) as client:
        yield client


def open_files(process: ServerProcess, ending: str = "") -> int:
    """How many the server has open whose name ends so."""
    assert process.process
    found = 0
    for link in Path(f"/proc/{process.process.pid}/fd").iterdir():
        try:
            found += str(link.readlink()).endswith(ending)
        except FileNotFoundError:
            continue  # closed meanwhile
    return found


async def database_connections(environ: dict[str, str], process: ServerProcess) -> int:
    if environ["DATABASE_URL"].startswith("sqlite"):
        return open_files(process, ".db")
    engine = make_engine(settings_of(environ))
    try:
        async with engine.connect() as connection:
            query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            return (await connection.scalar(text(query))) - 1
    finally:
        await engine.dispose()


async def test_streams_hold_no_database_connection_and_leave_nothing_behind(
    process: ServerProcess,
    owner: AsyncClient,
    environ: dict[str, str],
    bearer: Callable[..., Any],
    upstream: Upstream,
) -> None:
    upstream.when("slowly", Reply(text="one two three", pace=60))
    async with client_of(process.url, await bearer("Other")) as other:
        assert (await other.get("/v1/models")).status_code == 200
        connections = await database_connections(environ, process)
        files = open_files(process)
        async with AsyncExitStack() as stack:
            body = {"model": "assistant", "input": "slowly", "stream": True}
            for _ in range(STREAMS // 20):
                replies = await asyncio.gather(
                    *(
                        stack.enter_async_context(owner.stream("POST", "/v1/responses", json=body))
                        for _ in range(20)
                    )
                )
                for reply in replies:
                    assert reply.status_code == 200
                    assert (await anext(reply.aiter_lines())).startswith("id: 0")

            assert open_files(process) >= files + STREAMS
            assert await database_connections(environ, process) < connections + STREAMS / 5
            assert (await other.get("/v1/models")).status_code == 200

        async with asyncio.timeout(20):  # the runs go on, each with its model: readers are gone
            while open_files(process) > files + STREAMS + 20:
                await asyncio.sleep(0.05)
        assert await database_connections(environ, process) < connections + STREAMS / 5
