"""Several processes on one database, of which one dies and one hangs every few seconds."""

import asyncio
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import DATABASES
from tests.faults.harness import LEASE, Site
from tests.server import ServerProcess
from tests.upstream import Call, Reply

pytestmark = [
    pytest.mark.xdist_group("faults"),  # one at a time
    pytest.mark.parametrize("database_url", DATABASES[1:], indirect=True),
]


WORDS = " ".join(f"word{n}" for n in range(20))


async def dies(site: Site, process: ServerProcess) -> list[float]:
    """Seconds until others had its runs; then it is back."""
    taken = await site.taken_over(await site.kill(process))
    await asyncio.to_thread(process.start)
    return taken


async def hangs(site: Site, process: ServerProcess) -> list[float]:
    """Seconds until others had its runs; once its lease is over, it goes on."""
    fault = await site.pause(process)
    taken = await site.taken_over(fault)
    await asyncio.sleep(max(0, fault.at + LEASE + 1 - time.monotonic()))
    process.resume()
    return taken


async def keep_posting(site: Site, until: asyncio.Event) -> None:
    while not until.is_set():
        await site.load(30, posters=10)


def summary(seconds: list[float]) -> str:
    if not seconds:
        return "none"
    return f"median {statistics.median(seconds):.1f} s, max {max(seconds):.1f} s of {len(seconds)}"


@pytest.mark.parametrize(
    "site",
    [pytest.param(2, marks=pytest.mark.long), 3, pytest.param(4, marks=pytest.mark.long)],
    indirect=True,
)
async def test_the_others_go_on_with_what_one_had(
    site: Site, long: bool, record_property: Callable[[str, Any], None]
) -> None:
    seconds = 180 if long else 15
    site.upstream.when(
        "errand",
        Reply(calls=(Call("look"), Call("keep")), delay=0.3),
        Reply(calls=(Call("pay"),), delay=0.3),
        Reply(text=WORDS, pace=0.05),
    )
    site.upstream.when("talk", Reply(text=WORDS, pace=0.05))
    chance = random.Random(seed := random.randrange(1000))
    record_property("seed", seed)
    killed, stopped = list[float](), list[float]()
    over = asyncio.Event()
    until = time.monotonic() + seconds
    async with asyncio.TaskGroup() as group:
        group.create_task(keep_posting(site, over))
        while time.monotonic() < until:
            before = len(site.accepted)
            while len(site.accepted) < before + 5:
                await asyncio.sleep(0.01)
            await asyncio.sleep(chance.uniform(0, 2))
            dying, hanging = chance.sample(list(site.processes), 2)
            if len(site.processes) > 2:  # somebody is left
                of_dying, of_hanging = await asyncio.gather(dies(site, dying), hangs(site, hanging))
            else:
                of_dying, of_hanging = await dies(site, dying), await hangs(site, hanging)
            killed += of_dying
            stopped += of_hanging
        over.set()
    stuck = await site.stuck()

    again, unexplained = await site.repeated_requests()
    figures = {
        "processes": len(site.processes),
        "kills": len(site.faults) // 2,
        "stops": len(site.faults) // 2,
        "acknowledged": len(site.accepted),
        "told to come later": site.refused.total(),
        "lost": len(lost := await site.lost()),
        "stuck": len(stuck),
        "runs made twice": len(doubled := await site.doubled()),
        "finished calls repeated": site.repeated_calls(),
        "model requests repeated": again,
        "more than once a takeover": unexplained,
        "takeover from a killed process": summary(killed),
        "takeover from a stopped process": summary(stopped),
    }
    for name, value in figures.items():
        record_property(name, value)
    assert (stuck, lost, doubled, site.repeated_calls(), unexplained) == ([], [], [], 0, 0)
