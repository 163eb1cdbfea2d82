"""A database that is gone, slow, full or locked costs time, and nothing else."""

import asyncio
import json
import resource
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import STREAMS, Site
from tests.postgres import Postgres, find_postgres
from tests.proxy import Proxy
from tests.upstream import Reply

pytestmark = pytest.mark.xdist_group("faults")  # one at a time

WORDS = " ".join(f"word{n}" for n in range(50))


@dataclass
class Trouble:
    """What happens to the database at this URL, of a site whose process has the given id."""

    url: str
    begin: Callable[[int], Any]
    end: Callable[[int], Any]


@contextmanager
def restarted(_: pytest.FixtureRequest) -> Iterator[Trouble]:
    """PostgreSQL crashes, and is started again."""
    server, why_not = find_postgres({})  # not one that others use
    if server is None:
        pytest.skip(why_not)
    with server:
        url = server.url(server.create_database())
        yield Trouble(url, lambda _: server.stop(), lambda _: server.start())


@contextmanager
def stalled(request: pytest.FixtureRequest) -> Iterator[Trouble]:
    """PostgreSQL is connected, and does not answer."""
    server: Postgres = request.getfixturevalue("postgres")
    with Proxy(server.url(name := server.create_database())) as proxy:
        yield Trouble(proxy.url, lambda _: proxy.stall(), lambda _: proxy.resume())
    server.drop_database(name)


@contextmanager
def locked(request: pytest.FixtureRequest) -> Iterator[Trouble]:
    """Another program writes to the file, and does not come to an end."""
    path = request.getfixturevalue("tmp_path") / "test.db"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    yield Trouble(
        f"sqlite+aiosqlite:///{path}",
        lambda _: other.execute("BEGIN IMMEDIATE"),
        lambda _: other.execute("ROLLBACK"),
    )
    other.close()


@contextmanager
def full(request: pytest.FixtureRequest) -> Iterator[Trouble]:
    """There is no room left on the disk, which is one of its own: only root can make that."""
    place: Path = request.getfixturevalue("tmp_path") / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", place]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a disk")
    rest = place / "rest"

    def fill(_: int) -> None:
        with pytest.raises(OSError, match="No space"), rest.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    try:
        yield Trouble(f"sqlite+aiosqlite:///{place}/test.db", fill, lambda _: rest.unlink())
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@contextmanager
def limited(request: pytest.FixtureRequest) -> Iterator[Trouble]:
    """The process may not write another byte into any file."""
    path: Path = request.getfixturevalue("tmp_path") / "test.db"

    def limit(size: int) -> Callable[[int], Any]:
        hard = resource.RLIM_INFINITY
        return lambda pid: resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))

    yield Trouble(f"sqlite+aiosqlite:///{path}", limit(0), limit(resource.RLIM_INFINITY))


@pytest.fixture(params=[restarted, stalled, locked, full, limited], ids=lambda make: make.__name__)
def trouble(request: pytest.FixtureRequest) -> Iterator[Trouble]:
    with request.param(request) as made:
        yield made


@pytest.fixture
def database_url(trouble: Trouble) -> str:
    return trouble.url


@pytest.fixture
def environ(environ: dict[str, str]) -> dict[str, str]:
    return environ | {"DATABASE_TIMEOUT": "2"}


async def seconds_until(site: Site, *statuses: int) -> float:
    """Until liveness, readiness and a post answer so. Raises AssertionError in half a minute."""
    begun = time.monotonic()
    while (found := await site.looks()) != statuses:
        assert found[0] == 200 and set(found) <= {200, 503}, found
        assert time.monotonic() < begun + 30, found
        await asyncio.sleep(0.1)
    return time.monotonic() - begun


async def test_it_says_so_and_heals_by_itself_and_every_reader_has_the_whole_log(
    site: Site, trouble: Trouble, long: bool, record_property: Callable[[str, Any], None]
) -> None:
    streams, hold = (100, 20) if long else (20, 4)
    site.upstream.when("errand", Reply(text=WORDS, pace=0.2))
    pid = site.processes[0].pid

    runs = await asyncio.gather(*(site.post("errand") for _ in range(streams)))
    async with asyncio.TaskGroup() as group:
        following = [group.create_task(site.follow(STREAMS["errand"].format(id))) for id in runs]
        await asyncio.sleep(0.5)
        await asyncio.to_thread(trouble.begin, pid)
        over = time.monotonic() + hold
        loading = group.create_task(site.load(30, posters=5))
        try:
            noticed = await seconds_until(site, 200, 503, 503)
            await asyncio.sleep(max(0, over - time.monotonic()))
        finally:
            await asyncio.to_thread(trouble.end, pid)
        healed = await seconds_until(site, 200, 200, 200)
        await loading

    assert await site.stuck() == []
    found = [task.result() for task in following]
    whole = [(await site.follow(STREAMS["errand"].format(run_id)))[0] for run_id in runs]
    record_property("streams", streams)
    record_property("seconds until noticed", round(noticed, 1))
    record_property("seconds until healed", round(healed, 1))
    record_property("refused", site.refused.total())
    record_property("taken up again", sum(again for _, again in found))
    record_property("acknowledged", len(site.accepted))
    record_property("lost", len(lost := await site.lost()))
    assert lost == []
    assert [events for events, _ in found] == whole
    for events in whole:
        said = [data for _, name, data in events if name == "response.output_text.delta"]
        assert "".join(json.loads(data)["delta"] for data in said) == WORDS
        assert [seq for seq, _, _ in events] == list(range(len(events)))
