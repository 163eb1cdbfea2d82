"""A killed process loses no item of a job, and asks for none again that it had the answer of."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from httpx2 import AsyncClient
from sqlalchemy import text

from app.db.session import make_engine
from tests.conftest import client_of, settings_of
from tests.server import ServerProcess
from tests.upstream import Call, Json, Reply, Upstream

JOBS = "/v1/extraction-jobs"
ITEMS = 300
CONCURRENCY = 12
SCHEMA = {
    "title": "Amount",
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
}


def text_of(body: Json) -> str:
    return str(body["messages"][-1]["content"])


def number(body: Json) -> Reply:
    arguments = {"n": int(text_of(body).split()[1])}
    return Reply(calls=(Call("Amount", arguments),), delay=0.01)


async def ended_items(environ: dict[str, str]) -> set[str]:
    """The texts whose end is in the database."""
    engine = make_engine(settings_of(environ))
    async with engine.connect() as connection:
        query = text("SELECT options FROM runs WHERE batch_id IS NOT NULL AND status = 'completed'")
        found = {json.loads(options)["text"] for (options,) in await connection.execute(query)}
    await engine.dispose()
    return found


async def final(client: AsyncClient, job_id: str) -> Json:
    async with client.stream("GET", f"{JOBS}/{job_id}/events") as reply:
        async for _ in reply.aiter_lines():
            pass
    return (await client.get(f"{JOBS}/{job_id}")).json()


@pytest.mark.parametrize("seed", range(2))
async def test_a_job_that_is_killed_twice_loses_no_item_and_repeats_none(
    environ: dict[str, str], bearer: Callable[..., Any], upstream: Upstream, seed: int
) -> None:
    chance = random.Random(seed)
    upstream.when("number", number)
    given = [{"custom_id": f"c{n}", "text": f"number {n}"} for n in range(ITEMS)]
    body = {"schema": SCHEMA, "items": given, "options": {"concurrency": CONCURRENCY}}
    done_at: list[tuple[set[str], Counter[str]]] = []

    def asked() -> Counter[str]:
        return Counter(text_of(request.body) for request in upstream.requests)

    with ServerProcess(**environ) as process:
        async with client_of(process.url, await bearer("Owner")) as owner:
            job_id = (await owner.post(JOBS, json=body)).json()["id"]
            for share in (0.3, 0.6):
                await upstream.wait_for_async(int(ITEMS * (share + chance.uniform(-0.2, 0.2))), 30)
                await asyncio.to_thread(process.kill)
                done_at.append((await ended_items(environ), asked()))
                process.start()
            job = await final(owner, job_id)
            lines = (await owner.get(f"{JOBS}/{job_id}/results")).text.splitlines()

    assert job["status"] == "completed" and job["counts"]["succeeded"] == ITEMS
    results = [json.loads(line) for line in lines]
    assert [(line["custom_id"], line["data"]["n"]) for line in results] == [
        (f"c{n}", n) for n in range(ITEMS)
    ]
    assert job["usage"]["total_tokens"] == ITEMS * 15
    assert 0 < len(done_at[0][0]) <= len(done_at[1][0]) < ITEMS
    for done, before in done_at:
        assert {text: asked()[text] for text in done} == {text: before[text] for text in done}
    assert max(asked().values()) <= 3
    assert len(upstream.requests) <= ITEMS + 2 * CONCURRENCY


async def test_a_stopped_server_hands_its_job_over(
    environ: dict[str, str], bearer: Callable[..., Any], upstream: Upstream
) -> None:
    upstream.when("number", number)
    given = [{"custom_id": f"c{n}", "text": f"number {n}"} for n in range(ITEMS)]
    body = {"schema": SCHEMA, "items": given, "options": {"concurrency": CONCURRENCY}}

    with ServerProcess(**environ) as process:
        async with client_of(process.url, await bearer("Owner")) as owner:
            job_id = (await owner.post(JOBS, json=body)).json()["id"]
            await upstream.wait_for_async(ITEMS // 3, 30)
            await asyncio.to_thread(process.stop)
            handed = len(upstream.requests)
            process.start()
            job = await final(owner, job_id)

    assert handed < ITEMS
    assert job["status"] == "completed" and job["counts"]["succeeded"] == ITEMS
    assert len(upstream.requests) == ITEMS  # those under way were waited for
