"""A stop is real, wherever it finds the run, and the conversation goes on from there."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from httpx2 import AsyncClient

from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream

URL = "/v1/responses"


async def begin(client: AsyncClient, said: str) -> str:
    body = {"model": "assistant", "input": said, "background": True}
    return (await client.post(URL, json=body)).json()["id"]


async def until(claim: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await claim():
            await asyncio.sleep(0.02)


async def stop(client: AsyncClient, response_id: str) -> dict[str, Any]:
    """The response as the stop left it. Fails where that took two seconds."""
    begun = time.monotonic()
    stopped = (await client.post(f"{URL}/{response_id}/cancel")).json()
    assert time.monotonic() - begun < 2
    assert stopped["status"] == "cancelled"
    return stopped


async def test_a_stop_in_mid_answer_keeps_and_counts_what_was_said(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("count", Reply(text="one two three four five six", pace=0.3))
    response_id = await begin(alice, "count")

    async def speaks() -> bool:
        return bool((await alice.get(f"{URL}/{response_id}")).json()["output"])

    await until(speaks)
    stopped = await stop(alice, response_id)
    await asyncio.to_thread(upstream.wait_until, lambda: upstream.requests[0].aborted, 2)

    said = stopped["output"][0]["content"][0]["text"]
    assert "one two three four five six".startswith(said)
    assert stopped["usage"]["output_tokens"] > 0 < stopped["usage"]["input_tokens"]
    again = {"model": "assistant", "input": "again", "previous_response_id": response_id}
    assert (await alice.post(URL, json=again)).json()["status"] == "completed"
    roles = [(m["role"], m["content"]) for m in upstream.requests[-1].body["messages"][1:]]
    assert roles == [("user", "count"), ("assistant", said), ("user", "again")]


async def test_a_stop_in_mid_call_leaves_no_call_without_its_result(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("weather", Reply(calls=(Call("get_weather", {"location": "Oslo"}),)))
    tools.behave("/v1/search", delay=30)
    response_id = await begin(alice, "weather")
    await tools.wait_for_async("/v1/search", 1)
    stopped = await stop(alice, response_id)

    assert [item["status"] for item in stopped["output"]] == ["incomplete"]
    upstream.when("again", Reply(text="fine"))
    again = {"model": "assistant", "input": "again", "previous_response_id": response_id}
    assert (await alice.post(URL, json=again)).json()["status"] == "completed"
    messages = upstream.requests[-1].body["messages"]
    calls = [call["id"] for m in messages for call in m.get("tool_calls") or ()]
    assert calls and calls == [m["tool_call_id"] for m in messages if m["role"] == "tool"]


async def test_ten_stops_are_one(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("count", Reply(text="one two three", pace=60))
    response_id = await begin(alice, "count")
    await upstream.wait_for_async(1)

    stopped = await asyncio.gather(*(stop(alice, response_id) for _ in range(10)))

    assert all(each == stopped[0] for each in stopped)
    assert len(upstream.requests) == 1
