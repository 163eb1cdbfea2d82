"""A backup that is made under load, and a server that goes on from it elsewhere."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from httpx2 import AsyncClient, TransportError

from app.db.backup import find_program
from tests.conftest import NewUrl, client_of
from tests.keeping import connected, counts
from tests.server import ROOT, ServerProcess, clean_environ
from tests.upstream import Reply, Upstream

RESPONSES = "/v1/responses"


async def tool(url: str, *args: str | Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    """`just backup` and `just restore` without `just`."""
    return await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "app.db.backup", *args],
        cwd=ROOT,
        env=clean_environ() | {"DATABASE_URL": url} | environ,
        capture_output=True,
        text=True,
        timeout=120,
    )


async def done(url: str, *args: str | Path) -> None:
    result = await tool(url, *args)
    assert result.returncode == 0, result.stderr


async def refused(url: str, *args: str | Path, **environ: str) -> str:
    result = await tool(url, *args, **environ)
    assert (result.returncode, result.stdout) == (1, "")
    assert "Traceback" not in result.stderr
    return result.stderr


def asking(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "assistant", "input": text, "background": True, **more}


async def post(client: AsyncClient, name: str, text: str = "Hello") -> str:
    """The id of the run that was acknowledged."""
    headers = {"Idempotency-Key": name}
    reply = await client.post(RESPONSES, json=asking(text), headers=headers)
    assert reply.status_code == 200, reply.text
    return reply.json()["id"]


async def ended(client: AsyncClient, response_id: str) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while True:
            found = (await client.get(f"{RESPONSES}/{response_id}")).json()
            assert "status" in found, found
            if found["status"] not in ("queued", "in_progress"):
                return found
            await asyncio.sleep(0.05)


async def test_what_was_acknowledged_before_a_backup_under_load_goes_on_elsewhere(
    environ: dict[str, str],
    bearer: Callable[..., Any],
    upstream: Upstream,
    new_url: NewUrl,
    tmp_path: Path,
) -> None:
    upstream.when("slow", Reply(text="slow but sure", pace=2.0))
    known: dict[str, str] = {}
    file, elsewhere = tmp_path / "backup", new_url()
    with ServerProcess(**environ) as server:
        token = await bearer("Owner")
        async with client_of(server.url, token) as client:

            async def load(writer: int) -> None:
                for n in range(10_000):
                    try:
                        name = f"{writer}-{n}"
                        known[name] = await post(client, name)
                    except TransportError:
                        return  # the server is killed at the end

            writers = [asyncio.create_task(load(writer)) for writer in range(4)]
            in_flight = [await post(client, f"slow-{n}", "slow") for n in range(3)]
            while len(known) < 40:
                await asyncio.sleep(0.02)
            before = dict(known)
            await done(environ["DATABASE_URL"], "save", file)
            after = len(known)
            server.kill()
            await asyncio.gather(*writers)
    assert after > len(before), "nobody wrote during the backup"

    await done(elsewhere, "restore", file)

    environ = environ | {"DATABASE_URL": elsewhere, "LEASE_SECONDS": "2"}
    with ServerProcess(**environ) as server:
        async with client_of(server.url, token) as client:
            for name, response_id in before.items():
                assert await post(client, name) == response_id
            found = [await ended(client, each) for each in [*before.values(), *in_flight]]
    assert {each["status"] for each in found} == {"completed"}
    texts = [each["output"][0]["content"][0]["text"] for each in found]
    assert texts[-3:] == ["slow but sure"] * 3
    if elsewhere.startswith("sqlite"):
        with sqlite3.connect(elsewhere.partition(":///")[2]) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


async def test_nothing_is_replaced_unless_agreed_and_nothing_that_is_in_use(
    environ: dict[str, str], bearer: Callable[..., Any], new_url: NewUrl, tmp_path: Path
) -> None:
    file, target = tmp_path / "backup", new_url()
    with ServerProcess(**environ):
        await bearer("Ada")
        await done(environ["DATABASE_URL"], "save", file)
    other = environ | {"DATABASE_URL": target}
    with ServerProcess(**other):
        assert "in use" in await refused(target, "restore", file, "--yes")
    before = await counts(other)

    assert "--yes" in await refused(target, "restore", file)
    assert await counts(other) == before

    await done(target, "restore", file, "--yes")
    assert (await counts(other))["users"] == before["users"] + 1


async def test_what_is_no_backup_changes_nothing(
    environ: dict[str, str], new_url: NewUrl, tmp_path: Path
) -> None:
    file, target = tmp_path / "backup", new_url()
    with ServerProcess(**environ):
        pass
    await done(environ["DATABASE_URL"], "save", file)
    whole = file.read_bytes()
    cut, other, text = tmp_path / "cut", tmp_path / "other", tmp_path / "text"
    cut.write_bytes(whole[: len(whole) // 2])
    is_sqlite = target.startswith("sqlite")
    other.write_bytes(b"PGDMP" if is_sqlite else b"SQLite format 3\0")
    text.write_text("hello")
    before = await counts(environ)
    url = environ["DATABASE_URL"]

    for wrong in (cut, other, text, tmp_path / "missing", tmp_path):
        assert await refused(url, "restore", wrong, "--yes")
        assert await refused(target, "restore", wrong)
    assert await counts(environ) == before

    assert file.stat().st_mode & 0o077 == 0, "a backup is for its owner's eyes"
    assert "already" in await refused(url, "save", file)
    assert "no directory" in await refused(url, "save", tmp_path / "no" / "backup")
    assert file.read_bytes() == whole
    assert [each.name for each in tmp_path.iterdir() if "partial" in each.name] == []


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_a_restore_that_is_killed_half_way_has_changed_nothing(
    environ: dict[str, str], tmp_path: Path
) -> None:
    with ServerProcess(**environ):
        pass
    url, file, half = environ["DATABASE_URL"], tmp_path / "backup", tmp_path / "half"
    await done(url, "save", file)
    before = await counts(environ)
    path = shadow(
        tmp_path / "bin" / "pg_restore",  # writes the tables, and not their keys
        f'"{find_program("pg_restore")}" "$@" | sed "/ADD CONSTRAINT/Q"',
        f'case "$*" in *--list*) ;; *) touch "{half}"; sleep 60;; esac',
    )
    restoring = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "app.db.backup", "restore", file, "--yes"],
        cwd=ROOT,
        env=clean_environ() | {"DATABASE_URL": url, "PATH": path},
        start_new_session=True,
    )
    async with asyncio.timeout(30):
        while not half.exists():
            await asyncio.sleep(0.05)

    os.killpg(restoring.pid, signal.SIGKILL)
    await restoring.wait()

    async with asyncio.timeout(30):
        while "in use" in (result := await tool(url, "restore", file)).stderr:
            await asyncio.sleep(0.05)  # the server has not noticed yet
    assert "--yes" in result.stderr
    assert await counts(environ) == before
    await done(url, "restore", file, "--yes")
    assert await counts(environ) == before


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_a_restore_says_so_where_somebody_comes_meanwhile_and_does_not_leave(
    environ: dict[str, str], tmp_path: Path
) -> None:
    with ServerProcess(**environ):
        pass
    url, file, asked, held = environ["DATABASE_URL"], *map(tmp_path.joinpath, "abc")
    await done(url, "save", file)
    path = shadow(
        tmp_path / "bin" / "psql",
        f'touch "{asked}"; while [ ! -e "{held}" ]; do sleep 0.1; done',
        f'exec "{find_program("psql")}" "$@"',
    )
    limits = {"PATH": path, "DATABASE_TIMEOUT": "1"}
    restoring = asyncio.create_task(refused(url, "restore", file, "--yes", **limits))
    async with asyncio.timeout(30):
        while not asked.exists():
            await asyncio.sleep(0.05)

    async with connected(environ) as connection:
        await connection.exec_driver_sql("SELECT count(*) FROM runs")
        held.touch()
        assert "in use" in await restoring


def shadow(program: Path, *lines: str) -> str:
    """The PATH on which a script takes the program's place."""
    program.parent.mkdir()
    program.write_text("\n".join(("#!/bin/sh", *lines)))
    program.chmod(0o700)
    return f"{program.parent}:{os.environ['PATH']}"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_of_a_backup_that_finds_no_room_nothing_is_left(
    environ: dict[str, str], tmp_path: Path
) -> None:
    with ServerProcess(**environ):
        pass
    save = [sys.executable, "-m", "app.db.backup", "save", tmp_path / "backup"]

    result = subprocess.run(
        ["sh", "-c", 'ulimit -f 8; exec "$@"', "sh", *save],
        cwd=ROOT,
        env=clean_environ() | {"DATABASE_URL": environ["DATABASE_URL"]},
        capture_output=True,
        text=True,
    )

    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1 and "backup cannot be made" in result.stderr
    assert [each.name for each in tmp_path.iterdir() if "backup" in each.name] == []
