"""The official openai client's Responses and Conversations, unmodified, against the server."""

import asyncio
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response, ResponseFunctionToolCall
from openai.types.responses.response_output_item import McpApprovalRequest
from pydantic import BaseModel

from tests.test_api.conftest import cashier as cashier
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream

DOOR: Any = {
    "type": "function",
    "name": "open_door",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"number": {"type": "integer"}},
        "required": ["number"],
        "additionalProperties": False,
    },
}


class City(BaseModel):
    name: str
    country: str


def last_messages(upstream: Upstream) -> list[tuple[str, Any]]:
    """What the model was sent last, without its instructions."""
    messages = upstream.requests[-1].body["messages"]
    return [(message["role"], message.get("content")) for message in messages[1:]]


async def until_done(client: AsyncOpenAI, response: Response) -> Response:
    """As OpenAI's guide on background mode polls."""
    while response.status in ("queued", "in_progress"):
        await asyncio.sleep(0.02)
        response = await client.responses.retrieve(response.id)
    return response


async def test_a_background_response_is_polled_to_its_end(
    openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    upstream.when("slow", Reply(text="Here I am.", delay=0.3))

    begun = await openai_client.responses.create(model="assistant", input="slow", background=True)
    done = await asyncio.wait_for(until_done(openai_client, begun), 10)

    assert begun.status in ("queued", "in_progress") and begun.background
    assert (done.id, done.status, done.output_text) == (begun.id, "completed", "Here I am.")
    assert done.usage and done.usage.total_tokens == 15
    assert done.completed_at


async def test_a_background_stream_is_left_and_taken_up_behind_the_last_event(
    openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    upstream.when("slow", Reply(text="one two three four five six", pace=0.05))
    stream = await openai_client.responses.create(
        model="assistant", input="slow", background=True, stream=True
    )
    events: list[Any] = []
    async for event in stream:
        events.append(event)
        if event.type == "response.output_text.delta":
            break
    await stream.close()

    rest = await openai_client.responses.retrieve(
        events[0].response.id, stream=True, starting_after=events[-1].sequence_number
    )
    events += [event async for event in rest]

    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == "one two three four five six"
    kinds = [event.type for event in events[:3]]
    assert kinds == ["response.created", "response.queued", "response.in_progress"]


async def test_parse_gives_an_object_of_the_callers_own_class(
    openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    upstream.when("capital", Reply(text='{"name": "Paris", "country": "France"}'))

    done = await openai_client.responses.parse(
        model="assistant", input="Which is the capital?", text_format=City
    )

    assert done.output_parsed == City(name="Paris", country="France")
    assert done.text and done.text.format and done.text.format.type == "json_schema"


async def test_the_stream_helper_parses_too(openai_client: AsyncOpenAI, upstream: Upstream) -> None:
    upstream.when("capital", Reply(text='{"name": "Paris", "country": "France"}'))

    async with openai_client.responses.stream(
        model="assistant", input="Which is the capital?", text_format=City
    ) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_response()

    assert final.output_parsed == City(name="Paris", country="France")


async def test_the_stream_helper_follows_functions_and_reasoning(
    openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    upstream.when("door", Reply(reasoning="Hm, a door.", calls=(Call("open_door", {"number": 3}),)))

    async with openai_client.responses.stream(
        model="assistant", input="open door 3", tools=[DOOR]
    ) as stream:
        snapshots = [
            event.snapshot
            async for event in stream
            if event.type == "response.function_call_arguments.delta"
        ]
        final = await stream.get_final_response()

    reasoning, call = final.output
    assert reasoning.type == "reasoning" and reasoning.content
    assert reasoning.content[0].text == "Hm, a door."
    assert isinstance(call, ResponseFunctionToolCall)
    assert snapshots[-1] == call.arguments == '{"number": 3}'


@pytest.mark.parametrize("stored", [True, False])
async def test_a_function_is_run_by_its_client_and_the_answer_goes_on(
    openai_client: AsyncOpenAI, upstream: Upstream, stored: bool
) -> None:
    upstream.when("door", Reply(calls=(Call("open_door", {"number": 3}),)), Reply(text="Open."))
    first = await openai_client.responses.create(
        model="assistant", input="open door 3", tools=[DOOR], store=stored
    )
    [call] = first.output
    assert isinstance(call, ResponseFunctionToolCall)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "opened"}

    if stored:
        second = await openai_client.responses.create(
            model="assistant", input=[result], tools=[DOOR], previous_response_id=first.id
        )
    else:
        history: Any = [{"role": "user", "content": "open door 3"}, call.to_dict(), result]
        second = await openai_client.responses.create(
            model="assistant", input=history, tools=[DOOR], store=False
        )

    assert second.output_text == "Open."
    assert last_messages(upstream)[-1] == ("tool", "opened")
    for response in (first, second):
        if not stored:
            with pytest.raises(openai.NotFoundError):
                await openai_client.responses.retrieve(response.id)


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_loop_over_approvals_as_openai_documents_it(
    cashier: None,
    openai_client: AsyncOpenAI,
    upstream: Upstream,
    tools: ToolServer,
    streamed: bool,
) -> None:
    asks = [Reply(calls=(Call("pay", {"amount": amount}),)) for amount in (1, 2)]
    upstream.when("pay", *asks, Reply(text="Both are paid."))

    async def create(**body: Any) -> Response:
        if not streamed:
            return await openai_client.responses.create(model="cashier", **body)
        async with openai_client.responses.stream(model="cashier", **body) as stream:
            return await stream.get_final_response()

    response = await create(input="pay")
    rounds = 0
    while asked := [item for item in response.output if isinstance(item, McpApprovalRequest)]:
        rounds += 1
        assert response.status == "completed"
        answers = [
            {"type": "mcp_approval_response", "approval_request_id": item.id, "approve": True}
            for item in asked
        ]
        response = await create(input=answers, previous_response_id=response.id)

    assert (rounds, response.output_text) == (2, "Both are paid.")
    assert [call.path for call in tools.calls] == ["/effects/pay-1", "/effects/pay-2"]


async def test_a_background_response_that_asks_is_not_polled_for_ever(
    cashier: None, openai_client: AsyncOpenAI, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("pay", Reply(calls=(Call("pay", {"amount": 5}),)), Reply(text="Paid."))
    begun = await openai_client.responses.create(model="cashier", input="pay", background=True)

    asked = await asyncio.wait_for(until_done(openai_client, begun), 10)
    [request] = asked.output
    going = await openai_client.responses.create(
        model="cashier",
        previous_response_id=asked.id,
        background=True,
        input=[
            {"type": "mcp_approval_response", "approval_request_id": request.id, "approve": True}  # pyright: ignore
        ],
    )
    done = await asyncio.wait_for(until_done(openai_client, going), 10)

    assert (asked.status, request.type) == ("completed", "mcp_approval_request")
    assert done.output_text == "Paid."


async def test_the_input_of_a_response_is_listed_page_by_page(
    openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    said: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "three"},
                {
                    "type": "input_file",
                    "filename": "a.txt",
                    "file_data": "data:text/plain;base64,aGVsbG8=",
                },
            ],
        },
    ]
    done = await openai_client.responses.create(model="assistant", input=said)

    pages = openai_client.responses.input_items.list(done.id, limit=1, order="asc")
    listed = [item async for item in pages]

    assert [(item.type, getattr(item, "role", None)) for item in listed] == [
        ("message", "developer"),
        ("message", "user"),
        ("message", "assistant"),
        ("message", "user"),
    ]
    last: Any = listed[-1]
    assert [part.type for part in last.content] == ["input_text", "input_file"]
    assert last.content[1].filename == "a.txt"


async def test_an_unknown_previous_response_is_told_as_openai_does(
    openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await openai_client.responses.create(
            model="assistant", input="Hi", previous_response_id="resp_" + "0" * 32
        )

    assert caught.value.code == "previous_response_not_found"
    assert caught.value.param == "previous_response_id"
    assert upstream.requests == []


async def test_a_conversation_is_made_filled_read_and_deleted(
    openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    upstream.when("who am I", Reply(text="Ada."))
    conversation = await openai_client.conversations.create(
        metadata={"topic": "names"}, items=[{"role": "user", "content": "I am Ada."}]
    )
    added = await openai_client.conversations.items.create(
        conversation.id, items=[{"role": "assistant", "content": "Hello, Ada."}]
    )

    done = await openai_client.responses.create(
        model="assistant", input="who am I", conversation=conversation.id
    )
    pages = openai_client.conversations.items.list(conversation.id, limit=2, order="asc")
    items: list[Any] = [item async for item in pages]

    assert conversation.id.startswith("conv_") and conversation.metadata == {"topic": "names"}
    assert done.conversation and done.conversation.id == conversation.id
    assert [(item.role, item.content[0].text) for item in items] == [
        ("user", "I am Ada."),
        ("assistant", "Hello, Ada."),
        ("user", "who am I"),
        ("assistant", "Ada."),
    ]
    assert added.data[0].id == items[1].id and done.output[0].id == items[3].id
    one = await openai_client.conversations.items.retrieve(
        items[2].id, conversation_id=conversation.id
    )
    assert one == items[2]
    changed = await openai_client.conversations.update(conversation.id, metadata={"topic": "ada"})
    assert changed.metadata == {"topic": "ada"}
    left = await openai_client.conversations.items.delete(
        items[0].id, conversation_id=conversation.id
    )
    assert left.id == conversation.id
    gone = await openai_client.conversations.delete(conversation.id)
    assert gone.deleted
    with pytest.raises(openai.NotFoundError):
        await openai_client.conversations.retrieve(conversation.id)
    with pytest.raises(openai.NotFoundError):
        await openai_client.responses.retrieve(done.id)


async def test_items_are_referred_to_by_their_ids(
    openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    upstream.when("name is", Reply(text="Nice to meet you.", reasoning="Hm."))
    first = await openai_client.responses.create(model="assistant", input="My name is Ada")
    given = await openai_client.responses.input_items.list(first.id)
    said: Any = [
        {"type": "item_reference", "id": given.data[0].id},
        *({"type": "item_reference", "id": item.id} for item in first.output),
        {"role": "user", "content": "who am I"},
    ]

    await openai_client.responses.create(model="assistant", input=said)

    assert last_messages(upstream) == [
        ("user", "My name is Ada"),
        ("assistant", "Nice to meet you."),
        ("user", "who am I"),
    ]


async def test_a_limit_ends_a_response_as_incomplete_and_says_which(
    openai_client: AsyncOpenAI, upstream: Upstream, tools: ToolServer
) -> None:
    call = Call("get_weather", {"location": "Tokyo"})
    upstream.when("weather", Reply(calls=(call,)), Reply(calls=(call,)), Reply(text="Fine."))
    upstream.when("long", Reply(text="one two", finish="length"))
    upstream.when("bad", Reply(text="one", finish="content_filter"))

    limited = await openai_client.responses.create(
        model="assistant", input="weather?", max_tool_calls=1
    )
    cut = await openai_client.responses.create(model="assistant", input="long", max_output_tokens=2)
    filtered = await openai_client.responses.create(model="assistant", input="bad")

    for response, reason in (
        (limited, "max_tool_calls"),
        (cut, "max_output_tokens"),
        (filtered, "content_filter"),
    ):
        assert response.status == "incomplete"
        assert response.incomplete_details and response.incomplete_details.reason == reason
    assert tools.count("/v1/search") == 1
    assert limited.max_tool_calls == 1
    assert (cut.max_output_tokens, cut.output_text) == (2, "one two")
    assert upstream.requests[-2].body["max_completion_tokens"] == 2


@pytest.fixture
def impatient(environ: dict[str, str]) -> None:
    """The server says often that it lives."""
    environ["KEEP_ALIVE"] = "0.05"


@pytest.mark.parametrize("protocol", ["responses", "chat completions"])
async def test_a_silence_is_nothing_that_the_client_sees(
    impatient: None,
    openai_client: AsyncOpenAI,
    upstream: Upstream,
    protocol: str,
) -> None:
    upstream.when("slow", Reply(text="one two", pace=0.4))

    if protocol == "responses":
        stream: Any = await openai_client.responses.create(
            model="assistant", input="slow", stream=True
        )
        said = [event.delta async for event in stream if "text.delta" in event.type]
    else:
        stream = await openai_client.chat.completions.create(
            model="assistant", messages=[{"role": "user", "content": "slow"}], stream=True
        )
        said = [chunk.choices[0].delta.content or "" async for chunk in stream]

    assert "".join(said) == "one two"


async def test_a_stream_ends_when_its_response_is_cancelled(
    openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    upstream.when("slow", Reply(text="one two three", pace=2))
    begun = await openai_client.responses.create(
        model="assistant", input="slow", background=True, stream=True
    )
    events: list[Any] = []

    async for event in begun:
        events.append(event)
        if event.type == "response.output_item.added":
            await openai_client.responses.cancel(events[0].response.id)

    assert events[-1].type == "response.incomplete"
    assert events[-1].response.status == "cancelled"
