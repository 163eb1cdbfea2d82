"""An extraction outlives the process that began it, and asks for no part of a text twice."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from httpx2 import AsyncClient

from tests.conftest import client_of
from tests.extracting import ADA, PERSON, Json, events_of, fills
from tests.server import ServerProcess
from tests.test_api.test_extraction_evidence import CHUNKING, LINES, LONG, reads_lines
from tests.upstream import Reply, Upstream

LATER = {"Prefer": "respond-async"}


@pytest.fixture
def process(environ: dict[str, str]) -> Iterator[ServerProcess]:
    with ServerProcess(**environ) as running:
        yield running


@pytest.fixture
async def owner(process: ServerProcess, bearer: Callable[..., Any]) -> AsyncIterator[AsyncClient]:
    async with client_of(process.url, await bearer("Owner")) as client:
        yield client


async def accepted(client: AsyncClient, **body: Any) -> str:
    answer = await client.post("/v1/extractions", json=body, headers=LATER)
    assert answer.status_code == 202, answer.text
    return f"/v1/extractions/{answer.json()['id']}"


def shown_to(upstream: Upstream) -> list[str]:
    return [seen.body["messages"][1]["content"] for seen in upstream.requests]


async def test_parts_that_were_read_are_not_read_again(
    process: ServerProcess, owner: AsyncClient, upstream: Upstream
) -> None:
    def reads(body: Json) -> Reply:
        return reads_lines(body) if len(upstream.requests) <= 6 else Reply("late", delay=60)

    upstream.when("SKU", reads)
    path = await accepted(owner, input={"text": LONG}, schema=LINES, options={"chunking": CHUNKING})
    async with owner.stream("GET", f"{path}/events") as answer:
        read = set[str]()
        async for line in answer.aiter_lines():
            if line.startswith("data:") and '"chunk": ' in line:
                read.add(line.split('"chunk": ')[1])
            if len(read) >= 4:
                break
    await asyncio.to_thread(process.kill)
    before = shown_to(upstream)

    upstream.when("SKU", reads_lines)
    process.start()
    events = events_of((await owner.get(f"{path}/events", timeout=60)).text)

    assert events[-1][1] == "extraction.completed"
    lines = events[-1][2]["data"]["lines"]
    assert [line["sku"] for line in lines] == [f"SKU-{n:04}" for n in range(100)]
    again = [text for text in shown_to(upstream)[len(before) :] if text in before]
    assert len(again) <= len(before) - 4  # at most those that were still being asked
    assert len(set(shown_to(upstream))) == events[-1][2]["chunks"]["total"]


async def test_attempts_of_a_dead_process_count(
    process: ServerProcess, owner: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills({}), Reply("late", delay=60))
    path = await accepted(owner, input={"text": "Ada is 36."}, schema=PERSON)
    async with owner.stream("GET", f"{path}/events") as answer:
        async for line in answer.aiter_lines():
            if "attempt_failed" in line:
                break
    await asyncio.to_thread(process.kill)

    upstream.when("Ada", fills(ADA))
    process.start()
    answer = events_of((await owner.get(f"{path}/events", timeout=60)).text)[-1][2]

    assert answer["data"] == ADA
    assert [attempt["ok"] for attempt in answer["attempts"]] == [False, True]
    assert answer["usage"]["total_tokens"] == 20
