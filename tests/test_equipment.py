"""The equipment other tests stand on does what it says."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator

import httpx2
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionChunk,
    ChatCompletionMessageParam,
    ChatCompletionToolMessageParam,
)

from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as upstream:
        yield upstream


@pytest_asyncio.fixture
async def client(upstream: Upstream) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=upstream.url, api_key="k", max_retries=0) as client:
        yield client


@pytest.fixture
def tools() -> Iterator[ToolServer]:
    with ToolServer() as tools:
        yield tools


@pytest_asyncio.fixture
async def http(tools: ToolServer) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=tools.url) as http:
        yield http


def user(text: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


async def stream(client: AsyncOpenAI, text: str) -> list[ChatCompletionChunk]:
    chunks = await client.chat.completions.create(
        model="m", messages=user(text), stream=True, stream_options={"include_usage": True}
    )
    return [chunk async for chunk in chunks]


def contents(chunks: list[ChatCompletionChunk]) -> list[str]:
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    return [delta.content for delta in deltas if delta.content]


async def test_unscripted_messages_get_ok(upstream: Upstream, client: AsyncOpenAI):
    reply = await client.chat.completions.create(model="m", messages=user("Hi"))

    assert reply.choices[0].message.content == "ok"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage and reply.usage.total_tokens == 15
    [seen] = upstream.requests
    assert seen.body["model"] == "m"
    assert seen.headers["authorization"] == "Bearer k"
    assert seen.finished and not seen.aborted
    assert [model.id async for model in client.models.list()] == ["scripted"]


async def test_the_newest_matching_rule_wins(upstream: Upstream, client: AsyncOpenAI):
    upstream.when("", Reply("anything"))
    upstream.when("weather", Reply("old"))
    upstream.when("weather", lambda body: Reply(f"new from {body['model']}"))

    reply = await client.chat.completions.create(
        model="m",
        messages=[
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": [{"type": "text", "text": "The weather?"}]},
        ],
    )

    assert reply.choices[0].message.content == "new from m"
    assert contents(await stream(client, "Hi")) == ["anything"]


async def test_a_tool_call_and_the_step_after_it(upstream: Upstream, client: AsyncOpenAI):
    upstream.when("Tokyo", Reply(calls=(Call("look", {"city": "Tokyo"}),)), Reply("Sunny."))
    messages = user("Tokyo?")

    asked = await client.chat.completions.create(model="m", messages=messages)
    again = await client.chat.completions.create(model="m", messages=messages)
    message = asked.choices[0].message
    assert message.tool_calls and message.tool_calls[0].type == "function"
    call = message.tool_calls[0]
    function = call.function
    messages += [
        ChatCompletionAssistantMessageParam(
            role="assistant",
            tool_calls=[
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": function.name, "arguments": function.arguments},
                }
            ],
        ),
        ChatCompletionToolMessageParam(role="tool", tool_call_id=call.id, content="sun"),
    ]
    told = await client.chat.completions.create(model="m", messages=messages)

    assert asked.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    assert json.loads(function.arguments) == {"city": "Tokyo"}
    assert again.choices[0].message == message
    assert told.choices[0].message.content == "Sunny."


async def test_a_stream_comes_by_the_word_and_ends_with_usage(
    upstream: Upstream, client: AsyncOpenAI
):
    upstream.when("Hi", Reply("Wind 3 m/s in é", usage=(7, 4)))
    upstream.when("in two", Reply("abcdef", chunks=2))

    first, *_, finish, usage = chunks = await stream(client, "Hi")

    assert first.choices[0].delta.role == "assistant"
    assert contents(chunks) == ["Wind ", "3 ", "m/s ", "in ", "é"]
    assert finish.choices[0].finish_reason == "stop"
    assert usage.choices == [] and usage.usage
    assert (usage.usage.prompt_tokens, usage.usage.completion_tokens) == (7, 4)
    assert upstream.requests[0].finished
    assert contents(await stream(client, "in two")) == ["abc", "def"]


async def test_calls_stream_name_first_and_arguments_in_pieces(
    upstream: Upstream, client: AsyncOpenAI
):
    upstream.when("Hi", Reply("Wait.", calls=(Call("a"), Call("b", '{"broken', id="call_b"))))

    chunks = await stream(client, "Hi")
    deltas = [
        part
        for chunk in chunks
        for choice in chunk.choices
        for part in choice.delta.tool_calls or []
    ]
    names = [part.function.name for part in deltas if part.function and part.function.name]
    second = [part.function.arguments for part in deltas if part.function and part.index == 1]

    assert names == ["a", "b"]
    assert [part.id for part in deltas if part.id][1] == "call_b"
    assert len(second) == 3
    assert "".join(piece or "" for piece in second) == '{"broken'
    assert chunks[-2].choices[0].finish_reason == "tool_calls"


async def test_reasoning_refusal_and_finish_reason(upstream: Upstream, client: AsyncOpenAI):
    upstream.when("Hi", Reply(reasoning="Let me see.", refusal="No.", finish="content_filter"))

    reply = await client.chat.completions.create(model="m", messages=user("Hi"))
    deltas = [choice.delta for chunk in await stream(client, "Hi") for choice in chunk.choices]

    message = reply.choices[0].message
    assert message.to_dict()["reasoning_content"] == "Let me see."
    assert (message.content, message.refusal) == (None, "No.")
    assert reply.choices[0].finish_reason == "content_filter"
    assert "".join(delta.refusal or "" for delta in deltas) == "No."


async def test_an_error_status_is_the_clients_own_exception(
    upstream: Upstream, client: AsyncOpenAI
):
    upstream.when("Hi", Reply(status=429, error={"message": "Slow"}, headers={"retry-after": "7"}))

    with pytest.raises(openai.RateLimitError, match="Slow") as raised:
        await stream(client, "Hi")

    assert raised.value.response.headers["retry-after"] == "7"


async def test_an_error_can_come_in_the_middle_of_a_stream(upstream: Upstream, client: AsyncOpenAI):
    upstream.when("Hi", Reply("So ", error={"message": "Overloaded"}))

    with pytest.raises(openai.APIError, match="Overloaded"):
        await stream(client, "Hi")


@pytest.mark.parametrize("after", [0, 1, 3, 99])
async def test_a_dropped_connection_fails_in_the_client(
    upstream: Upstream, client: AsyncOpenAI, after: int
):
    upstream.when("Hi", Reply("one two three", drop_after=after))

    with pytest.raises((openai.APIConnectionError, httpx2.RemoteProtocolError, httpx2.ReadError)):
        await stream(client, "Hi")
    with pytest.raises(openai.APIConnectionError):
        await client.chat.completions.create(model="m", messages=user("Hi"))

    assert [(seen.finished, seen.aborted) for seen in upstream.requests] == [(False, False)] * 2


async def test_chunks_before_a_drop_arrive(upstream: Upstream, client: AsyncOpenAI):
    upstream.when("Hi", Reply("one two three", pace=0.05, drop_after=3))
    heard: list[str] = []

    with pytest.raises((openai.APIConnectionError, httpx2.RemoteProtocolError, httpx2.ReadError)):
        async for chunk in await client.chat.completions.create(
            model="m", messages=user("Hi"), stream=True
        ):
            heard += contents([chunk])

    assert heard == ["one ", "two "]


async def test_a_hanging_stream_sees_its_client_leave(upstream: Upstream, client: AsyncOpenAI):
    upstream.when("Hi", Reply("never", hang=True))

    chunks = await client.chat.completions.create(model="m", messages=user("Hi"), stream=True)
    assert (await anext(chunks)).choices[0].delta.role == "assistant"
    await upstream.wait_for_async(1)
    assert not upstream.requests[0].aborted
    await chunks.close()

    await upstream.wait_until_async(lambda: upstream.requests[0].aborted)
    assert not upstream.requests[0].finished


async def test_a_client_that_leaves_before_the_first_byte_is_seen(
    upstream: Upstream, client: AsyncOpenAI
):
    upstream.when("Hi", Reply("late", delay=60))

    with pytest.raises(openai.APITimeoutError):
        await client.with_options(timeout=0.1).chat.completions.create(
            model="m", messages=user("Hi")
        )

    await upstream.wait_until_async(lambda: upstream.requests[0].aborted)


async def test_delay_and_pace_take_their_time(upstream: Upstream, client: AsyncOpenAI):
    upstream.when("Hi", Reply("a b c", delay=0.1, pace=0.02))

    await stream(client, "Hi")

    assert time.monotonic() - upstream.requests[0].at >= 0.1 + 6 * 0.02


async def test_a_hundred_conversations_at_once(upstream: Upstream, client: AsyncOpenAI):
    upstream.when("Hi", lambda body: Reply(body["messages"][-1]["content"], pace=0.01))

    texts = [f"Hi {n}" for n in range(100)]
    heard = await asyncio.gather(*(stream(client, text) for text in texts))

    assert ["".join(contents(chunks)) for chunks in heard] == texts


def test_waiting_in_vain_fails(upstream: Upstream, tools: ToolServer):
    with pytest.raises(AssertionError):
        upstream.wait_for(1, timeout=0.01)
    with pytest.raises(AssertionError):
        tools.wait_for("/effects/pay", 1, timeout=0.01)


async def test_stopping_cuts_off_whoever_waits():
    with ToolServer() as tools:
        tools.behave("/effects/pay", hang=True)
        async with httpx2.AsyncClient(base_url=tools.url) as http:
            asked = asyncio.ensure_future(http.get("/effects/pay"))
            await tools.wait_for_async("/effects/pay", 1)
            started = time.monotonic()
            await asyncio.to_thread(tools.stop)

            with pytest.raises(httpx2.TransportError):
                await asked
    assert time.monotonic() - started < 2


async def test_tokyo_has_weather(tools: ToolServer, http: httpx2.AsyncClient):
    found = await http.get("/v1/search", params={"name": "tokyo", "count": 1})
    city = found.json()["results"][0]
    current = "temperature_2m,weather_code,wind_speed_10m"
    where = {"latitude": city["latitude"], "longitude": city["longitude"]}
    forecast = (await http.get("/v1/forecast", params={**where, "current": current})).json()

    assert city == {"name": "Tokyo", "latitude": 35.68, "longitude": 139.69, "country": "Japan"}
    assert forecast["current_units"]["temperature_2m"] == "°C"
    assert forecast["current"] == {
        "time": "2026-01-01T12:00",
        "interval": 900,
        "temperature_2m": 21.5,
        "weather_code": 0,
        "wind_speed_10m": 3.2,
    }
    assert tools.calls[0].query == {"name": "tokyo", "count": "1"}


async def test_open_meteo_knows_no_atlantis_and_no_bad_parameter(http: httpx2.AsyncClient):
    assert (await http.get("/v1/search", params={"name": "Atlantis"})).json() == {}
    refused = await http.get("/v1/forecast?latitude=1&longitude=2&current=mood")
    assert refused.status_code == 400
    assert refused.json()["error"] is True


async def test_effects_are_counted_and_recorded(tools: ToolServer, http: httpx2.AsyncClient):
    await http.post("/effects/pay?to=bob", json={"sum": 3}, headers={"Idempotency-Key": "a"})
    second = await http.get("/effects/pay")

    assert second.json() == {"name": "pay", "count": 2}
    assert tools.count("/effects/pay") == 2
    assert tools.count("/effects/other") == 0
    call = tools.calls[0]
    assert (call.method, call.path, call.query) == ("POST", "/effects/pay", {"to": "bob"})
    assert call.headers["idempotency-key"] == "a"
    assert json.loads(call.body) == {"sum": 3}


async def test_effects_behave_as_told(tools: ToolServer, http: httpx2.AsyncClient):
    tools.behave("/effects/pay", status=503, body=b"busy", headers={"retry-after": "1"})
    tools.behave("/effects/slow", delay=60)
    tools.behave("/effects/stuck", hang=True)
    tools.behave("/effects/drip", drip=(b"abc", 0.05))

    busy = await http.get("/effects/pay")
    assert (busy.status_code, busy.content, busy.headers["retry-after"]) == (503, b"busy", "1")
    for path in ["/effects/slow", "/effects/stuck"]:
        with pytest.raises(httpx2.ReadTimeout):
            await http.get(path, timeout=0.1)
        assert tools.count(path) == 1
    started = time.monotonic()
    assert (await http.get("/effects/drip")).content == b"abc"
    assert time.monotonic() - started >= 0.1
