"""A stream that is cut, stalled or taken up again elsewhere is the stored log, event for event."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.harness import STREAMS, Site
from tests.proxy import Proxy
from tests.upstream import Call, Reply

pytestmark = pytest.mark.xdist_group("faults")  # one at a time

WORDS = " ".join(f"word{n}" for n in range(80))


async def disturb(site: Site, proxy: Proxy, chance: random.Random, faults: int) -> None:
    """Cuts, stalls, and in the midst of them a restart."""
    for number in range(faults):
        await asyncio.sleep(chance.uniform(0.1, 0.5))
        if number == faults // 2:
            await asyncio.to_thread(chance.choice([site.processes[0].kill, site.processes[0].stop]))
            await asyncio.to_thread(site.processes[0].start)
        elif chance.random() < 0.7:
            await asyncio.to_thread(proxy.cut)
            await asyncio.to_thread(proxy.restore)
        else:
            proxy.stall()
            await asyncio.sleep(1.5)
            proxy.resume()


async def test_what_was_read_over_all_cuts_is_the_stored_log(
    site: Site, long: bool, record_property: Callable[[str, Any], None]
) -> None:
    streams, faults = (40, 60) if long else (6, 12)
    pace = faults * 0.6 / 80  # about as long as the faults take
    amount = Call("Amount", {"n": 1, "text": WORDS})
    site.upstream.when("errand", Reply(text=WORDS, pace=pace))
    site.upstream.when("number", Reply(calls=(amount,), pace=pace))
    chance = random.Random(seed := random.randrange(1000))
    record_property("seed", seed)

    kinds = ["errand", "number"] * (streams // 2)
    paths = [STREAMS[kind].format(await site.post(kind)) for kind in kinds]
    with Proxy(site.url) as proxy:
        site.client.timeout = 1  # a second of silence, and the client asks again
        async with asyncio.TaskGroup() as group:
            following = [group.create_task(site.follow(path, proxy.url)) for path in paths]
            group.create_task(disturb(site, proxy, chance, faults))
    site.client.timeout = 30
    found = [task.result() for task in following]
    whole = [(await site.follow(path))[0] for path in paths]

    record_property("streams", streams)
    record_property("faults", faults)
    record_property("taken up again", sum(again for _, again in found))
    record_property("events", sum(len(events) for events in whole))
    assert [events for events, _ in found] == whole
    for events in whole:
        first = events[0][0]
        assert [seq for seq, _, _ in events] == list(range(first, first + len(events)))


@pytest.mark.parametrize("kind", STREAMS)
async def test_a_stream_is_not_taken_up_behind_an_event_that_is_none(site: Site, kind: str) -> None:
    url = site.url + STREAMS[kind].format(await site.post(kind))
    assert await site.stuck() == []

    for last in ("garbage", "-1", "1.5", "99999", "9" * 40, "1; DROP TABLE events"):
        reply = await site.client.get(url, headers={"Last-Event-ID": last})
        assert 400 <= reply.status_code < 500, (last, reply.text)
