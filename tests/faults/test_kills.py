"""Accepted means committed: whoever kills the process, and whenever."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.harness import Site, errand
from tests.upstream import Call, Reply

pytestmark = pytest.mark.xdist_group("faults")  # one at a time


async def killed_at_random(site: Site, chance: random.Random, acknowledged: float) -> None:
    """Kills the process once so many runs are acknowledged, and starts it again."""
    [process] = site.processes
    while len(site.accepted) < acknowledged:
        await asyncio.sleep(0.005)
    await asyncio.sleep(chance.uniform(0, 0.2))
    await site.kill(process)
    await asyncio.to_thread(process.start)


async def test_what_was_acknowledged_ends_and_nothing_happens_twice(
    site: Site, long: bool, record_property: Callable[[str, Any], None]
) -> None:
    rounds, runs, kills = (30, 500, 2) if long else (2, 40, 1)
    chance = random.Random(seed := random.randrange(1000))
    record_property("seed", seed)
    for _ in range(rounds):
        before = len(site.accepted)
        moments = sorted(before + chance.random() * runs for _ in range(kills))
        async with asyncio.TaskGroup() as group:
            group.create_task(site.load(runs))
            for moment in moments:
                await killed_at_random(site, chance, moment)
        assert await site.stuck() == []

    again, unexplained = await site.repeated_requests()
    figures = {
        "rounds": rounds,
        "kills": len(site.faults),
        "acknowledged": len(site.accepted),
        "under way when killed": sum(len(fault.running) for fault in site.faults),
        "lost": len(lost := await site.lost()),
        "stuck": 0,
        "runs made twice": len(doubled := await site.doubled()),
        "finished calls repeated": site.repeated_calls(),
        "model requests repeated": again,
        "more than once a takeover": unexplained,
    }
    for name, value in figures.items():
        record_property(name, value)
    assert figures["under way when killed"], "no run was under way: there was nothing to lose"
    assert (lost, doubled, site.repeated_calls(), unexplained) == ([], [], 0, 0)


async def test_a_call_that_is_cut_off_behind_its_effect_is_repeated_only_where_that_is_harmless(
    site: Site, record_property: Callable[[str, Any], None]
) -> None:
    effects = ("look", "keep", "pay")
    for n, effect in enumerate(effects, 1):
        site.upstream.when(f"errand {n}", Reply(calls=(Call(effect),)), Reply(text="done"))
        site.tools.behave(f"/effects/{effect}", hang=True)
    runs = [await site.post("errand") for _ in effects]
    for effect in effects:
        await site.tools.wait_for_async(f"/effects/{effect}", 1)
    await site.kill(site.processes[0])
    for effect in effects:
        site.tools.behave(f"/effects/{effect}")
    await asyncio.to_thread(site.processes[0].start)

    assert await site.stuck() == [] == await site.lost()
    requests = {effect: site.tools.count(f"/effects/{effect}") for effect in effects}
    urls = [f"{site.url}/v1/responses/resp_{run_id}" for run_id in runs]
    outputs = [(await site.client.get(url)).json()["output"] for url in urls]
    record_property("requests", requests)
    record_property("keys", len(site.calls()))
    assert requests == {"look": 2, "keep": 2, "pay": 1}
    assert len(site.calls()) == len(effects)  # what is repeated is so under its key
    errors = [output[0]["error"] for output in outputs]
    assert errors[:2] == [None, None] and "outcome unknown" in str(errors[2])


@pytest.mark.parametrize("site", [2], indirect=True)
async def test_fifty_equal_posts_at_once_are_one_run(
    site: Site, record_property: Callable[[str, Any], None]
) -> None:
    path, body, headers = errand("errand 1")
    headers |= {"Idempotency-Key": "one"}
    posts = [site.client.post(site.url + path, json=body, headers=headers) for _ in range(50)]
    replies = await asyncio.gather(*posts)

    ids = Counter((reply.status_code, reply.json().get("id")) for reply in replies)
    rows = await site.rows("SELECT id FROM runs")
    record_property("answers", {str(key): count for key, count in ids.items()})
    record_property("runs", len(rows))
    assert list(ids) == [(200, f"resp_{rows[0].id}")] and len(rows) == 1
    site.accepted["errand 1"] = rows[0].id
    assert await site.stuck() == [] == await site.lost()
    await asyncio.to_thread(site.processes[0].kill)
    await asyncio.to_thread(site.processes[0].start)
    again = await site.client.post(site.processes[0].url + path, json=body, headers=headers)
    assert again.json()["id"] == f"resp_{rows[0].id}"
