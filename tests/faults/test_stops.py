"""A stop is heard, in a run as in a process."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.harness import STREAMS, Site
from tests.upstream import Call, Reply

pytestmark = pytest.mark.xdist_group("faults")  # one at a time

WORDS = " ".join(f"word{n}" for n in range(30))


async def cancelled(site: Site, run_id: str) -> tuple[float, set[str]]:
    """Ten at once: the seconds of the slowest, and the statuses that they told."""
    begun = time.monotonic()
    url = f"{site.url}/v1/responses/resp_{run_id}"
    replies = await asyncio.gather(*(site.client.post(f"{url}/cancel") for _ in range(10)))
    seconds = time.monotonic() - begun
    again = await site.client.get(url)
    assert {reply.status_code for reply in replies} == {200}, [reply.text for reply in replies]
    return seconds, {reply.json()["status"] for reply in [*replies, again]}


async def test_ten_cancels_that_race_an_end_are_one_or_none(
    site: Site, long: bool, record_property: Callable[[str, Any], None]
) -> None:
    count = 300 if long else 20
    chance = random.Random(seed := random.randrange(1000))
    record_property("seed", seed)
    statuses, seconds = Counter[str](), list[float]()

    async def race() -> None:
        run_id = await site.post("errand")
        await asyncio.sleep(chance.uniform(0, 0.4))
        took, told = await cancelled(site, run_id)
        assert len(told) == 1, told  # whoever asks, and whenever, is told the same
        statuses.update(told)
        seconds.append(took)

    for _ in range(count // 10):
        await asyncio.gather(*(race() for _ in range(10)))
    requests, calls = len(site.upstream.requests), len(site.tools.calls)
    await asyncio.sleep(1)

    record_property("ends", dict(statuses))
    record_property("slowest stop", round(max(seconds), 2))
    assert statuses["cancelled"] > 0 and set(statuses) <= {"cancelled", "completed"}
    assert (len(site.upstream.requests), len(site.tools.calls)) == (requests, calls)
    assert all(seen.finished or seen.aborted for seen in site.upstream.requests)
    rows = await site.rows("SELECT status, count(*) AS count FROM runs GROUP BY status")
    assert {row.status: row.count for row in rows} == dict(statuses)


async def test_a_cancelled_call_is_over_in_two_seconds_and_the_conversation_goes_on(
    site: Site,
) -> None:
    site.tools.behave("/effects/look", hang=True)
    run_id = await site.post("errand")
    await site.tools.wait_for_async("/effects/look", 1)
    await site.tools.wait_for_async("/effects/keep", 1)

    seconds, told = await cancelled(site, run_id)
    requests, calls = len(site.upstream.requests), len(site.tools.calls)
    await asyncio.sleep(1)

    assert seconds < 2 and told == {"cancelled"}
    assert (len(site.upstream.requests), len(site.tools.calls)) == (requests, calls)
    again = {"model": "porter", "input": "Go on.", "previous_response_id": f"resp_{run_id}"}
    assert (await site.client.post(f"{site.url}/v1/responses", json=again)).status_code == 200
    told_model = site.upstream.requests[-1].body["messages"]
    answered = [message["tool_call_id"] for message in told_model if message["role"] == "tool"]
    made = [call["id"] for message in told_model for call in message.get("tool_calls") or ()]
    assert sorted(answered) == sorted(made) and len(made) == 2


async def test_a_process_that_is_told_to_end_does_so_in_time_and_leaves_no_run_behind(
    site: Site, record_property: Callable[[str, Any], None]
) -> None:
    streams, hanging = 50, 20
    [process] = site.processes
    site.upstream.when("errand", Reply(calls=(Call("look"),)), Reply(text="done"))
    site.upstream.when("talk", Reply(text=WORDS, pace=0.5))
    site.tools.behave("/effects/look", hang=True)

    async with asyncio.TaskGroup() as group:
        talking = [group.create_task(site.post("talk")) for _ in range(10)]
        runs = await asyncio.gather(*(site.post("errand") for _ in range(hanging)))
        await site.tools.wait_for_async("/effects/look", hanging)
        paths = [STREAMS["errand"].format(runs[n % hanging]) for n in range(streams)]
        following = [group.create_task(site.follow(path)) for path in paths]
        await asyncio.sleep(1)
        begun = time.monotonic()
        await asyncio.to_thread(process.stop)
        seconds = time.monotonic() - begun
        record_property("exit code", process.exit_code)
        site.tools.behave("/effects/look")
        await asyncio.to_thread(process.start)
        await asyncio.gather(*talking)

    assert await site.stuck() == []
    record_property("seconds to end", round(seconds, 2))
    record_property("runs", len(site.accepted))
    record_property("lost", len(lost := await site.lost()))
    record_property("taken up again", sum(task.result()[1] for task in following))
    assert lost == []
    assert seconds < float(process.environ["SHUTDOWN_TIMEOUT"]) + 1
    assert all(len(task.result()[0]) > 1 for task in following)
    rows = await site.rows("SELECT max(crashes) AS crashes FROM runs")
    assert rows[0].crashes == 0  # a deploy is no crash
