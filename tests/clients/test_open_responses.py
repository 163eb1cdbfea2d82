"""What the public Open Responses specification asks of any server, with and without a model.

The shapes are the specification's, in our own words: what has to be there, and as which type. An
item or an event of a kind that is not listed here is a fault.
"""

import json
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Literal

import pytest
from httpx2 import AsyncClient
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from tests.conftest import client_of, settings_of
from tests.server import ThreadedServer
from tests.upstream import Call, Reply, Upstream


class Strict(BaseModel):
    """Fields without a default are required, null or not; more may be there."""

    model_config = ConfigDict(strict=True, extra="allow")


class Text(Strict):
    type: Literal["input_text", "text", "summary_text", "reasoning_text"]
    text: str


class OutputText(Strict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class Refusal(Strict):
    type: Literal["refusal"]
    refusal: str


class Image(Strict):
    type: Literal["input_image"]
    image_url: str | None
    detail: Literal["low", "high", "auto"]


Part = Annotated[Text | OutputText | Refusal | Image, Field(discriminator="type")]
Progress = Literal["in_progress", "completed", "incomplete"]


class Message(Strict):
    type: Literal["message"]
    id: str
    status: Progress
    role: Literal["user", "assistant", "system", "developer"]
    content: list[Part]


class FunctionCall(Strict):
    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: Progress


class FunctionCallOutput(Strict):
    type: Literal["function_call_output"]
    id: str
    call_id: str
    output: str | list[Part]
    status: Progress


class ReasoningItem(Strict):
    type: Literal["reasoning"]
    id: str
    summary: list[Part]
    content: list[Part] = []
    encrypted_content: str = ""


Item = Annotated[
    Message | FunctionCall | FunctionCallOutput | ReasoningItem, Field(discriminator="type")
]


class Error(Strict):
    code: str
    message: str


class Incomplete(Strict):
    reason: str


class Function(Strict):
    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None


class Format(Strict):
    type: Literal["text", "json_object", "json_schema"]


class TextField(Strict):
    format: Format


class Reasoning(Strict):
    effort: Literal["none", "low", "medium", "high", "xhigh"] | None
    summary: Literal["concise", "detailed", "auto"] | None


class CachedTokens(Strict):
    cached_tokens: int


class ReasoningTokens(Strict):
    reasoning_tokens: int


class Usage(Strict):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: CachedTokens
    output_tokens_details: ReasoningTokens


class Resource(Strict):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: str
    incomplete_details: Incomplete | None
    model: str
    previous_response_id: str | None
    instructions: str | None
    output: list[Item]
    error: Error | None
    tools: list[Function]
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any]
    truncation: Literal["auto", "disabled"]
    parallel_tool_calls: bool
    text: TextField
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    top_logprobs: int
    temperature: float
    reasoning: Reasoning | None
    user: str | None
    usage: Usage | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    store: bool
    background: bool
    service_tier: str
    metadata: dict[str, str]
    safety_identifier: str | None
    prompt_cache_key: str | None


class Event(Strict):
    sequence_number: int


class Snapshot(Event):
    type: Literal[
        "response.created",
        "response.queued",
        "response.in_progress",
        "response.completed",
        "response.failed",
        "response.incomplete",
    ]
    response: Resource


class ItemEvent(Event):
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: Item


class Place(Event):
    item_id: str
    output_index: int


class PartEvent(Place):
    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: int
    part: Part


class TextDelta(Place):
    type: Literal["response.output_text.delta"]
    content_index: int
    delta: str
    logprobs: list[Any]


class TextDone(Place):
    type: Literal["response.output_text.done"]
    content_index: int
    text: str
    logprobs: list[Any]


class ArgumentsDelta(Place):
    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDone(Place):
    type: Literal["response.function_call_arguments.done"]
    arguments: str


EVENTS: TypeAdapter[Any] = TypeAdapter(
    Annotated[
        Snapshot | ItemEvent | PartEvent | TextDelta | TextDone | ArgumentsDelta | ArgumentsDone,
        Field(discriminator="type"),
    ]
)
OFFICIAL: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)

FINAL = ("response.completed", "response.failed", "response.incomplete")

HEART = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
    "+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)

WEATHER = {
    "type": "function",
    "name": "get_weather",  # which the agent has, too
    "description": "Get the current weather for a location",
    "parameters": {
        "type": "object",
        "properties": {
            "location": {"type": "string", "description": "City and state, e.g. Austin, TX"}
        },
        "required": ["location"],
    },
}


@pytest.fixture(params=["scripted", "demo"])
async def client(
    request: pytest.FixtureRequest,
    environ: dict[str, str],
    bearer: Callable[..., Any],
    upstream: Upstream,
) -> AsyncIterator[AsyncClient]:
    """A user of a server with the scripted model, and of one without any."""
    upstream.when("in exactly 3 words", Reply(text="Hello to you."))
    upstream.when("Count", Reply(text="1, 2, 3, 4, 5."))
    upstream.when("weather", Reply(calls=(Call("get_weather", {"location": "San Francisco"}),)))
    changes = {"model": None, "openai_api_key": None} if request.param == "demo" else {}
    with ThreadedServer(settings_of(environ, **changes)) as server:
        async with client_of(server.url, await bearer("Alice")) as client:
            yield client


def message(role: str, content: Any) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content}


async def create(client: AsyncClient, *items: dict[str, Any], **more: Any) -> Resource:
    """A whole response, as the specification and the official SDK know it."""
    body = {"model": "assistant", "input": items, "stream": False, **more}
    reply = await client.post("/v1/responses", json=body)
    assert reply.status_code == 200, reply.text
    Response.model_validate(reply.json())
    return Resource.model_validate_json(reply.content)


async def stream(
    client: AsyncClient, *items: dict[str, Any], **more: Any
) -> tuple[list[dict[str, Any]], Resource]:
    """All events, each as the specification and the official SDK know it, and the final one."""
    body = {"model": "assistant", "input": items, "stream": True, **more}
    events: list[dict[str, Any]] = []
    async with client.stream("POST", "/v1/responses", json=body) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        name = None
        async for line in reply.aiter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                data = line.removeprefix("data: ")
                EVENTS.validate_json(data)
                event = json.loads(data)
                OFFICIAL.validate_python(event)
                assert event["type"] == name
                events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    ends = [event for event in events if event["type"] in FINAL]
    assert ends == events[-1:]
    return events, Resource.model_validate_json(json.dumps(ends[0]["response"]))


async def test_basic_text(client: AsyncClient) -> None:
    done = await create(client, message("user", "Say hello in exactly 3 words."))

    assert (done.status, [item.type for item in done.output]) == ("completed", ["message"])
    assert done.usage and done.completed_at


async def test_streaming(client: AsyncClient) -> None:
    events, done = await stream(client, message("user", "Count from 1 to 5."))

    assert done.status == "completed"
    kinds = list(dict.fromkeys(event["type"].removeprefix("response.") for event in events))
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    said = "".join(event.get("delta", "") for event in events)
    [item] = done.output
    assert isinstance(item, Message) and isinstance(item.content[0], OutputText)
    assert item.content[0].text == said != ""


async def test_a_system_prompt(client: AsyncClient) -> None:
    done = await create(
        client,
        message("system", "You are a pirate. Always respond in pirate speak."),
        message("user", "Say hello."),
    )

    assert done.status == "completed" and done.output


async def test_calling_a_tool(client: AsyncClient) -> None:
    done = await create(
        client, message("user", "What's the weather like in San Francisco?"), tools=[WEATHER]
    )

    [call] = [item for item in done.output if isinstance(item, FunctionCall)]
    assert call.name == "get_weather" and "location" in json.loads(call.arguments)
    assert [tool.name for tool in done.tools] == ["get_weather"]


async def test_calling_a_tool_in_a_stream(client: AsyncClient) -> None:
    events, done = await stream(
        client, message("user", "What's the weather like in San Francisco?"), tools=[WEATHER]
    )

    [call] = [item for item in done.output if isinstance(item, FunctionCall)]
    of_items = [
        (event["type"], event["item"]["arguments"])
        for event in events
        if event.get("item", {}).get("type") == "function_call"
    ]
    assert of_items == [
        ("response.output_item.added", ""),
        ("response.output_item.done", call.arguments),
    ]
    kinds = [event["type"] for event in events]
    assert "response.function_call_arguments.delta" in kinds
    assert "response.function_call_arguments.done" in kinds
    assert "".join(event.get("delta", "") for event in events) == call.arguments


async def test_an_image(client: AsyncClient) -> None:
    done = await create(
        client,
        message(
            "user",
            [
                {"type": "input_text", "text": "What do you see in this image?"},
                {"type": "input_image", "image_url": HEART},
            ],
        ),
    )

    assert done.status == "completed" and done.output


async def test_more_than_one_turn(client: AsyncClient) -> None:
    done = await create(
        client,
        message("user", "My name is Alice."),
        message("assistant", "Hello Alice! Nice to meet you. How can I help you today?"),
        message("user", "What is my name?"),
    )

    assert done.status == "completed" and done.output


async def test_a_turn_behind_a_response(client: AsyncClient) -> None:
    first = await create(client, message("user", "My name is Alice."))

    second = await create(
        client, message("user", "What is my name?"), previous_response_id=first.id
    )

    assert (second.status, second.previous_response_id) == ("completed", first.id)
