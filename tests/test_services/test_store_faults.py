"""A database that hangs, is full, or takes nobody more: refused in time, and healed by itself."""

import asyncio
import os
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from httpx2 import AsyncClient, Response
from sqlalchemy.engine import make_url

from tests.conftest import client_of, settings_of
from tests.postgres import Postgres
from tests.proxy import Proxy
from tests.server import ThreadedServer
from tests.upstream import Reply, Upstream

URL = "/v1/responses"
HELLO = {"model": "assistant", "input": "hello"}

only_postgres = pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
only_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def assert_later(reply: Response) -> None:
    assert reply.status_code == 503, reply.text
    assert reply.json()["error"]["code"] == "unavailable"
    assert int(reply.headers["Retry-After"]) >= 1


async def assert_in_trouble(client: AsyncClient) -> None:
    """Alive, not ready, and quick to say both."""
    begun = time.monotonic()
    assert (await client.get("/health")).status_code == 200
    ready = await client.get("/health/ready")
    assert_later(ready)
    assert "database" in ready.json()["error"]["message"]
    assert time.monotonic() - begun < 3


async def until_ready(client: AsyncClient, timeout: float = 20) -> None:
    async with asyncio.timeout(timeout):
        while (await client.get("/health/ready")).status_code != 200:
            await asyncio.sleep(0.1)


async def assert_works(client: AsyncClient) -> None:
    await until_ready(client)
    reply = await client.post(URL, json=HELLO)
    assert reply.status_code == 200, reply.text
    assert reply.json()["status"] == "completed"


@only_postgres
async def test_a_database_that_hangs_is_waited_for_in_bounds_and_loses_nothing(
    environ: dict[str, str], bearer: Callable[..., Any], upstream: Upstream
) -> None:
    upstream.when("hello", Reply(text="hello to you"))
    upstream.when("count", Reply(text="one two three four", pace=0.1))
    with (
        Proxy(environ["DATABASE_URL"]) as proxy,
        ThreadedServer(settings_of(environ, database_url=proxy.url, database_timeout=1)) as server,
    ):
        async with client_of(server.url, await bearer("Alice")) as alice:
            await assert_works(alice)
            body = {"model": "assistant", "input": "count", "background": True}
            begun = (await alice.post(URL, json=body)).json()
            await upstream.wait_for_async(2)
            proxy.stall()
            asked = time.monotonic()
            replies = await asyncio.gather(*(alice.post(URL, json=HELLO) for _ in range(40)))
            took = time.monotonic() - asked
            await assert_in_trouble(alice)
            proxy.resume()
            await assert_works(alice)
            reply = await alice.get(f"{URL}/{begun['id']}?stream=true")

    for each in replies:
        assert_later(each)
    assert took < 10
    assert "response.completed" in reply.text


@only_postgres
async def test_without_a_free_connection_requests_are_put_off(
    environ: dict[str, str], postgres: Postgres, bearer: Callable[..., Any], upstream: Upstream
) -> None:
    upstream.when("hello", Reply(text="hello to you"))
    url = make_url(environ["DATABASE_URL"])
    role = f"few_{url.database}"
    postgres.execute(f"CREATE ROLE {role} LOGIN SUPERUSER PASSWORD 'few'")
    few = url.set(username=role, password="few").render_as_string(hide_password=False)
    with ThreadedServer(settings_of(environ, database_url=few, database_timeout=1)) as server:
        async with client_of(server.url, await bearer("Alice")) as alice:
            await assert_works(alice)
            # None is left, and those that there are go.
            postgres.execute(f"ALTER ROLE {role} NOSUPERUSER CONNECTION LIMIT 0")
            postgres.execute(
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{role}'"
            )
            assert_later(await alice.post(URL, json=HELLO))
            await assert_in_trouble(alice)
            postgres.execute(f"ALTER ROLE {role} SUPERUSER CONNECTION LIMIT -1")
            await assert_works(alice)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with room for 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root mounts a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@only_sqlite
async def test_a_full_disk_puts_off_what_is_to_be_written(
    environ: dict[str, str], small_disk: Path, bearer: Callable[..., Any], upstream: Upstream
) -> None:
    upstream.when("hello", Reply(text="hello to you"))
    path, filler = small_disk / "app.db", small_disk / "filler"
    environ["DATABASE_URL"] = f"sqlite:///{path}"
    with ThreadedServer(settings_of(environ)) as server:
        async with client_of(server.url, await bearer("Alice")) as alice:
            await assert_works(alice)
            fill(filler)
            assert_later(await alice.post(URL, json=HELLO | {"input": "hello" * 20_000}))
            await assert_in_trouble(alice)
            filler.unlink()
            await assert_works(alice)

    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while file.write(b"\0" * size):
                    pass
            except OSError:
                continue


@only_sqlite
async def test_while_another_program_writes_requests_are_put_off_in_time(
    environ: dict[str, str], bearer: Callable[..., Any], upstream: Upstream
) -> None:
    upstream.when("hello", Reply(text="hello to you"))
    path = environ["DATABASE_URL"].removeprefix("sqlite+aiosqlite:///")
    with ThreadedServer(settings_of(environ, database_timeout=1)) as server:
        async with client_of(server.url, await bearer("Alice")) as alice:
            await assert_works(alice)
            other = sqlite3.connect(path, isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            asked = time.monotonic()
            replies = await asyncio.gather(*(alice.post(URL, json=HELLO) for _ in range(20)))
            took = time.monotonic() - asked
            await assert_in_trouble(alice)
            other.close()
            await assert_works(alice)

    for each in replies:
        assert_later(each)
    assert took < 10
