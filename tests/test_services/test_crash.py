"""A killed process loses nothing, and repeats nothing that has an effect."""

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from httpx2 import AsyncClient, TransportError

from tests.conftest import client_of
from tests.server import ServerProcess
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream


@pytest.fixture
def process(environ: dict[str, str]) -> Iterator[ServerProcess]:
    with ServerProcess(**environ) as running:
        yield running


@pytest.fixture
async def owner(process: ServerProcess, bearer: Callable[..., Any]) -> AsyncIterator[AsyncClient]:
    async with client_of(process.url, await bearer("Owner")) as client:
        yield client


def weather_in(*cities: str) -> list[Reply]:
    """One call a step, then an answer."""
    steps = [Reply(calls=(Call("get_weather", {"location": city}),)) for city in cities]
    return [*steps, Reply(text="It is fine in all of them.", pace=0.01)]


async def events_of(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    async for line in lines:
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


async def follow(client: AsyncClient, response_id: str, after: int) -> list[dict[str, Any]]:
    url = f"/v1/responses/{response_id}?stream=true"
    url += f"&starting_after={after}" if after >= 0 else ""
    async with client.stream("GET", url) as reply:
        assert reply.status_code == 200, await reply.aread()
        return [event async for event in events_of(reply.aiter_lines())]


async def test_a_run_that_is_killed_between_its_tools_goes_on_and_repeats_none(
    process: ServerProcess, owner: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("weather", *weather_in("Tokyo", "Paris", "Berlin"))
    tools.behave("/v1/forecast", delay=0.2)
    seen: list[dict[str, Any]] = []
    with pytest.raises(TransportError):
        body = {"model": "assistant", "input": "weather everywhere", "stream": True}
        async with owner.stream("POST", "/v1/responses", json=body) as reply:
            async for event in events_of(reply.aiter_lines()):
                seen.append(event)
                done = [item for item in seen if item["type"] == "response.mcp_call.completed"]
                if len(done) == 2:
                    process.kill()
    called = tools.count("/v1/search")

    process.start()
    response_id = seen[0]["response"]["id"]
    rest = await follow(owner, response_id, seen[-1]["sequence_number"])

    everything = [*seen, *rest]
    assert [event["sequence_number"] for event in everything] == list(range(len(everything)))
    assert rest[-1]["type"] == "response.completed"
    output = rest[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["mcp_call"] * 3 + ["message"]
    assert [item["error"] for item in output[:3]] == [None] * 3
    assert output[-1]["content"][0]["text"] == "It is fine in all of them."
    names = [call.query["name"] for call in tools.calls if call.path == "/v1/search"]
    assert sorted(names) == ["Berlin", "Paris", "Tokyo"] or called == 3
    assert names.count("Tokyo") == names.count("Paris") == 1
    assert [event["type"] for event in everything if event["type"] == "response.completed"] == [
        "response.completed"
    ]
    again = await follow(owner, response_id, -1)
    assert again == everything


async def test_a_reply_that_is_cut_off_is_asked_again_under_a_new_id(
    process: ServerProcess, owner: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("count", Reply(text="one two three four", pace=0.2))
    seen: list[dict[str, Any]] = []
    with pytest.raises(TransportError):
        body = {"model": "assistant", "input": "count", "stream": True}
        async with owner.stream("POST", "/v1/responses", json=body) as reply:
            async for event in events_of(reply.aiter_lines()):
                seen.append(event)
                if event["type"] == "response.output_text.delta":
                    process.kill()

    process.start()
    rest = await follow(owner, seen[0]["response"]["id"], seen[-1]["sequence_number"])

    everything = [*seen, *rest]
    assert [event["sequence_number"] for event in everything] == list(range(len(everything)))
    final = rest[-1]["response"]["output"]
    assert [item["content"][0]["text"] for item in final] == ["one two three four"]
    said = [
        event["delta"]
        for event in everything
        if event["type"] == "response.output_text.delta" and event["item_id"] == final[0]["id"]
    ]
    assert "".join(said) == "one two three four"
    begun = [event for event in everything if event["type"] == "response.output_item.added"]
    assert len({event["item"]["id"] for event in begun}) == 2
    assert [event["output_index"] for event in begun] == [0, 1]


async def test_a_stopped_server_hands_its_runs_over(
    process: ServerProcess, owner: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("count", Reply(text="one two", pace=4.0), Reply(text="never"))
    begun = await owner.post(
        "/v1/responses", json={"model": "assistant", "input": "count", "background": True}
    )
    await upstream.wait_for_async(1)

    await asyncio.to_thread(process.stop)
    upstream.when("count", Reply(text="one two"))
    process.start()
    rest = await follow(owner, begun.json()["id"], -1)

    assert rest[-1]["response"]["status"] == "completed"
    assert rest[-1]["response"]["output"][0]["content"][0]["text"] == "one two"


async def pieces_of(
    client: AsyncClient, response_id: str, after: int, count: int
) -> list[dict[str, Any]]:
    """At most so many of the events above `after`; then the connection is cut."""
    url = f"/v1/responses/{response_id}?stream=true"
    url += f"&starting_after={after}" if after >= 0 else ""
    got: list[dict[str, Any]] = []
    with contextlib.suppress(TransportError):
        async with client.stream("GET", url) as reply:
            assert reply.status_code == 200, await reply.aread()
            async for event in events_of(reply.aiter_lines()):
                got.append(event)
                if len(got) == count:
                    break
    return got


@pytest.mark.parametrize("seed", range(2))
async def test_a_stream_that_is_cut_at_random_and_taken_up_again_is_the_stored_log(
    process: ServerProcess, owner: AsyncClient, upstream: Upstream, seed: int
) -> None:
    chance = random.Random(seed)
    text = " ".join(f"word{number}" for number in range(160))
    upstream.when("count", Reply(text=text, pace=0.02))
    begun = await owner.post(
        "/v1/responses", json={"model": "assistant", "input": "count", "background": True}
    )
    response_id, seen = begun.json()["id"], list[dict[str, Any]]()
    cuts = 0
    while cuts < 20:
        after = seen[-1]["sequence_number"] if seen else -1
        seen += await pieces_of(owner, response_id, after, chance.randint(1, 4))
        cuts += 1
        if cuts == 10:
            await asyncio.to_thread(process.kill if seed else process.stop)
            process.start()
    rest = await follow(owner, response_id, seen[-1]["sequence_number"])

    everything = [*seen, *rest]
    assert everything == await follow(owner, response_id, -1)
    assert [event["sequence_number"] for event in everything] == list(range(len(everything)))
    [message] = rest[-1]["response"]["output"]
    assert message["content"][0]["text"] == text
