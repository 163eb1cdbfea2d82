"""However a stream is cut, it becomes the response that PydanticAI's own model makes of it."""

import asyncio
import json
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from openai import AsyncOpenAI
from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelResponse,
    PartDeltaEvent,
    UserPromptPart,
)
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from app.config import Settings
from app.services.admission import CROWD, Admission
from app.services.journal import TICK
from app.services.model import Models, make_models
from app.services.streaming import LONGEST, PIECE, ChatModel, piece_of, reads
from tests.upstream import Reply, Upstream

Delta = dict[str, Any]


def chunk(delta: Delta | None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    head = {"id": "c1", "object": "chat.completion.chunk", "created": 1790000000, "model": "m"}
    return {**head, "usage": None, "choices": [choice], **more}


def says(*texts: str, kind: str = "content") -> list[dict[str, Any]]:
    return [chunk({kind: text}) for text in texts]


def calls(*pieces: str) -> list[dict[str, Any]]:
    first = {"index": 0, "id": "call_1", "type": "function"}
    opening = {**first, "function": {"name": "look", "arguments": ""}}
    more = [{"index": 0, "function": {"arguments": piece}} for piece in pieces]
    return [chunk({"tool_calls": [call]}) for call in (opening, *more)]


def odd(value: str) -> str:
    """An event that says, where its text belongs, something else."""
    return json.dumps(chunk({"content": "?"})).replace('"?"', value)


def twice(first: str, second: str) -> str:
    return odd(f'"{first}", "content": "{second}"')


USAGE = {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}
OPENING = chunk({"role": "assistant", "content": "", "refusal": None})
END = [chunk({}, "stop"), {**chunk(None), "choices": [], "usage": USAGE}]

STREAMS: dict[str, list[Any]] = {
    "text": [OPENING, *says("Der ", "Bär ", "ißt ", "🐻‍❄️", "\n\n", "data: {}", ""), *END],
    "roles": [chunk({"role": "assistant", "content": "a"}), *says("b", "c"), *END],
    "reasoning": [OPENING, *says("hm", " hm", kind="reasoning_content"), *says("so", "!"), *END],
    "other reasoning": [*says("a", "b", kind="reasoning"), *says("c"), *END],
    "both": [chunk({"content": "a", "reasoning": "b"}), *says("c", "d"), *END],
    "calls": [OPENING, *says("Let ", "me"), *calls('{"a"', ": 1", "}"), *END],
    "refusal": [OPENING, *says("I "), chunk({"refusal": "can"}), chunk({"refusal": "not"}), *END],
    "tags": [*says("<think>", "deep", " thought", "</think>", "so", "!"), *END],
    "half tags": [*says("<thi", "nk>", "a", "</think", ">", "b"), *END],
    "blanks": [*says("  ", "\n", "a", " ", "b"), *END],
    "length": [*says("a", "b"), chunk({"content": "c"}, "length")],
    "no finish": [OPENING, *says("a", "b", "c")],
    "no usage": [OPENING, *says("a", "b"), chunk({}, "stop")],
    "logprobs": [
        chunk({"content": "a"}, choices=[_])
        for _ in [{"index": 0, "delta": {"content": "a"}, "logprobs": {"content": []}}]
    ],
    "unknown fields": [*says("a"), chunk({"content": "b"}, provider="x", usage=USAGE), *says("c")],
    "unknown delta": [*says("a"), chunk({"content": "b", "annotations": []}), *says("c"), *END],
    "two heads": [*says("a", "b"), chunk({"content": "c"}, id="c2", model="m2"), *says("d"), *END],
    "no head": [*says("a"), chunk({"content": "b"}, id="", model=""), *says("c"), *END],
    "no choices": [*says("a"), chunk(None, choices=[]), *says("b"), *END],
    "no delta": [*says("a"), chunk(None), *says("b"), *END],
    "surrogates": [OPENING, *says("a"), '{"id": "c1", "choices": [], "x": "\\ud83d"}', *says("b")],
    "lookalikes": [OPENING, *says("a", '"content": "b"', "\\", '"', "\a", "\\ud83d", "b"), *END],
    "same again": [*says("a", "b"), *(twice("c", "d"), twice("e", "f")), *says("g"), *END],
    "cut value": [*says("a", "b"), odd('\n"c"'), *says("d"), odd('"e"\n'), *says("f"), *END],
    "two values": [*says("a", "b"), odd('"c", "d"'), *says("e")],
    "no values": [*says("a", "b"), odd("null"), odd('""'), *says("d"), *END],
    "bad values": [*says("a", "b"), odd('"\\ud83d"'), *says("c"), odd('"d'), *says("e")],
    "error": [OPENING, *says("a", "b"), {"error": {"message": "down", "code": "server_error"}}],
    "nothing": [],
    "no json": [*says("a"), "{nonsense", *says("b")],
}


def written(events: Sequence[Any], end: str = "\n\n", comments: bool = False) -> bytes:
    texts = [event if isinstance(event, str) else json.dumps(event) for event in events]
    lines = [f"data: {text}{end}" for text in texts]
    if comments:
        lines = [f": ping{end}event: message{end[:1]}{line}" for line in lines]
    return "".join([*lines, f"data: [DONE]{end}", f"data: too late{end}"]).encode()


class Pieces(httpx2.AsyncByteStream):
    def __init__(self, pieces: Sequence[bytes], broken: bool) -> None:
        self._pieces = pieces
        self._broken = broken

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece
        if self._broken:
            raise httpx2.ReadError("cut")


class Network(httpx2.AsyncBaseTransport):
    """Brings the pieces, one a read."""

    def __init__(self, pieces: Sequence[bytes], *, broken: bool = False) -> None:
        self._stream = Pieces(pieces, broken)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        headers = {"content-type": "text/event-stream"}
        return httpx2.Response(200, headers=headers, stream=self._stream)


async def received(
    kind: type[OpenAIChatModel], pieces: Sequence[bytes], *, broken: bool = False
) -> tuple[dict[str, Any] | str, int]:
    """The response as it is stored, or the error that ended it; and the number of deltas."""
    deltas = 0
    async with httpx2.AsyncClient(transport=Network(pieces, broken=broken)) as http:
        client = AsyncOpenAI(base_url="http://model/v1", api_key="x", http_client=http)
        model = kind("m", provider=OpenAIProvider(openai_client=client))
        messages: list[ModelMessage] = [ModelRequest([UserPromptPart("go")])]
        try:
            async with model.request_stream(messages, None, ModelRequestParameters()) as stream:
                async for event in stream:
                    deltas += isinstance(event, PartDeltaEvent)
                return _comparable(stream.get()), deltas
        except Exception as error:
            return f"{type(error).__name__}: {error}", deltas


def _comparable(response: ModelResponse) -> dict[str, Any]:
    fields = dict(vars(response))
    del fields["timestamp"]  # of its arrival
    return fields


def cuts(data: bytes, seed: int) -> list[bytes]:
    chance = random.Random(seed)
    places = sorted(chance.sample(range(1, len(data)), min(len(data) - 1, chance.randint(0, 12))))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n", "\r\r"])
async def test_a_stream_becomes_what_the_stock_model_makes_of_it(name: str, end: str) -> None:
    data = written(STREAMS[name], end)
    expected, _ = await received(OpenAIChatModel, [data])

    assert (await received(ChatModel, [data]))[0] == expected
    bytewise = [data[at : at + 1] for at in range(len(data))]
    assert (await received(ChatModel, bytewise))[0] == expected
    for seed in range(12):
        assert (await received(ChatModel, cuts(data, seed)))[0] == expected, seed


@pytest.mark.parametrize("name", ["text", "calls", "error"])
async def test_comments_and_names_of_events_change_nothing(name: str) -> None:
    data = written(STREAMS[name], comments=True)
    expected, _ = await received(OpenAIChatModel, [data])

    for seed in range(6):
        assert (await received(ChatModel, cuts(data, seed)))[0] == expected


@pytest.mark.parametrize("name", ["text", "calls", "reasoning"])
async def test_a_stream_that_breaks_ends_in_the_same_error(name: str) -> None:
    data = written(STREAMS[name])
    for size in range(0, len(data), 97):
        expected, _ = await received(OpenAIChatModel, [data[:size]], broken=True)
        assert (await received(ChatModel, [data[:size]], broken=True))[0] == expected
        expected, _ = await received(OpenAIChatModel, [data[:size]])
        assert (await received(ChatModel, [data[:size]]))[0] == expected


async def test_random_streams_become_the_same(subtests: pytest.Subtests) -> None:
    chance = random.Random(1)
    parts = [event for events in STREAMS.values() for event in events if isinstance(event, dict)]
    for number in range(150):
        events = [chance.choice(parts) for _ in range(chance.randint(1, 25))]
        data = written(events, chance.choice(["\n\n", "\r\n\r\n"]))
        with subtests.test(number=number):
            expected, _ = await received(OpenAIChatModel, [data])
            assert (await received(ChatModel, cuts(data, number)))[0] == expected


async def test_texts_that_come_together_are_one() -> None:
    data = written([OPENING, *says(*(f"word{n} " for n in range(200))), *END])

    assert (await received(OpenAIChatModel, [data]))[1] == 199
    assert (await received(ChatModel, [data]))[1] == 0


@pytest.mark.parametrize(
    "data", [b"[]", b"1", b"null", b"{}", b'{"choices": null}', b'{"choices": [1]}', b"\xff", b""]
)
def test_what_is_no_chunk_is_left_to_the_sdk(data: bytes) -> None:
    assert piece_of(data) is None


def be_busy(seconds: float) -> None:
    """With whatever else the process has to do."""
    time.sleep(seconds)


async def test_where_the_process_is_behind_text_is_looked_at_less_often() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"first"
        for _ in range(2):
            await asyncio.sleep(2 * TICK)
            yield b"late"
            be_busy(3 * TICK)
        for _ in range(10):
            await asyncio.sleep(TICK)
            yield b"."

    found = await read(pieces(), Admission())

    assert b"".join(found) == b"firstlatelate" + 10 * b"."
    assert found[0] == b"first"
    assert len(found) <= 5  # without: one for each tick


async def read(pieces: AsyncIterator[bytes], admission: Admission) -> list[bytes]:
    response = httpx2.Response(200, content=pieces)
    return [read async for read in reads(response, admission)]


@asynccontextmanager
async def crowd() -> AsyncGenerator[Admission]:
    """One run more than may begin, in a process that always works: it waits for two seconds."""
    admission = Admission(worked=time.monotonic)

    async def run() -> None:
        async with admission.turn():
            await asyncio.sleep(60)

    runs = [asyncio.create_task(run()) for _ in range(CROWD + 1)]
    await asyncio.sleep(0)
    try:
        yield admission
    finally:
        for each in runs:
            each.cancel()
        await asyncio.gather(*runs, return_exceptions=True)


async def test_where_runs_wait_to_begin_text_is_looked_at_seldom() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"role"
        for _ in range(15):
            await asyncio.sleep(TICK)
            yield b"."

    async with crowd() as admission:
        found = await read(pieces(), admission)
        assert admission.is_crowded

    assert found[:2] == [b"role", b"."]  # the first text waits for nobody
    assert b"".join(found[2:]) == 14 * b"."
    assert len(found) <= 4  # without: one for each tick


TEXT = "".join(f"word{n} " for n in range(100))


@pytest.fixture
async def models(upstream: Upstream) -> AsyncIterator[Models]:
    upstream.when("go", Reply(text=TEXT, pace=0.01))
    made = make_models(Settings(model="openai-chat:m", openai_base_url=upstream.url))
    yield made
    await made.close()


async def test_what_is_not_looked_at_waits_in_the_socket(models: Models) -> None:
    asked: Any = [{"role": "user", "content": "go"}]
    create = models.client.chat.completions.create
    async with crowd() as admission, await create(model="m", messages=asked, stream=True) as stream:
        below = stream.response.extensions["aiohttp_response"]
        socket = below.connection.transport
        assert socket.is_reading()
        found, unread = b"", 0
        async for part in reads(stream.response, admission):
            found += part
            await asyncio.sleep(2 * TICK)
            unread += below.connection is not None and not socket.is_reading()

    assert unread
    assert found.count(b"word") == 100
    assert found.endswith(b"data: [DONE]\n\n")


async def test_more_than_one_piece_is_looked_at_at_once(models: Models, upstream: Upstream) -> None:
    text = 20 * PIECE * "."
    upstream.when("much", Reply(text=text, chunks=200))
    asked: Any = [{"role": "user", "content": "much"}]
    create = models.client.chat.completions.create
    begun = time.monotonic()
    async with crowd() as admission, await create(model="m", messages=asked, stream=True) as stream:
        found = b"".join([part async for part in reads(stream.response, admission)])

    assert found.count(b".") >= len(text)
    assert time.monotonic() - begun < 10 * LONGEST  # else one for each piece


async def test_streams_behind_a_crowd_come_whole(models: Models) -> None:
    async with crowd() as admission:
        answers = [ask(replace(models, admission=admission)) for _ in range(3)]
        assert await asyncio.gather(*answers) == 3 * [TEXT]


async def ask(models: Models) -> str:
    messages: list[ModelMessage] = [ModelRequest([UserPromptPart("go")])]
    async with models.model.request_stream(messages, None, ModelRequestParameters()) as stream:
        async for _ in stream:
            pass
    return stream.get().text or ""
