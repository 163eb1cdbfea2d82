"""The official openai client, unmodified, against the running server."""

import json
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionToolParam, ChatCompletionUserMessageParam
from openai.types.responses import ResponseFunctionToolCall
from pydantic import BaseModel

from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream


def user(text: str) -> ChatCompletionUserMessageParam:
    return {"role": "user", "content": text}


PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY"
    "42YAAAAASUVORK5CYII="
)


class City(BaseModel):
    name: str
    country: str


DOOR: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "open_door",
        "parameters": {"type": "object", "properties": {"number": {"type": "integer"}}},
    },
}


async def test_a_completion_carries_text_usage_and_a_finish_reason(
    openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    upstream.when("Hello", Reply(text="Hello to you.", usage=(7, 3)))

    done = await openai_client.chat.completions.create(model="assistant", messages=[user("Hello")])

    assert done.choices[0].message.content == "Hello to you."
    assert done.choices[0].finish_reason == "stop"
    assert done.usage and (done.usage.prompt_tokens, done.usage.completion_tokens) == (7, 3)


async def test_a_streamed_completion_says_the_same(
    openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    upstream.when("Hello", Reply(text="Hello to you.", usage=(7, 3)))

    stream = await openai_client.chat.completions.create(
        model="assistant",
        messages=[user("Hello")],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]

    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    reasons = [
        c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason
    ]
    assert said == "Hello to you."
    assert reasons == ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].usage and chunks[-1].usage.total_tokens == 10


async def test_the_servers_tools_run_here_and_never_appear_as_tool_calls(
    openai_client: AsyncOpenAI, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when(
        "weather",
        Reply(calls=(Call("get_weather", {"location": "Tokyo"}),)),
        Reply(text="Fine in Tokyo."),
    )

    done = await openai_client.chat.completions.create(
        model="assistant", messages=[user("weather in Tokyo?")]
    )

    assert done.choices[0].message.content == "Fine in Tokyo."
    assert done.choices[0].message.tool_calls is None
    assert tools.count("/v1/search") == 1
    told = upstream.requests[-1].body["messages"][-1]
    assert told["role"] == "tool" and "Tokyo" in told["content"]


async def test_parse_gives_a_validated_object_after_a_second_attempt(
    openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    def answer(body: dict[str, Any]) -> Reply:
        told_better = "country" in str(body["messages"][-1]["content"])
        return Reply(text='{"name": "Paris"%s}' % (', "country": "France"' if told_better else ""))

    upstream.when("", answer)

    done = await openai_client.chat.completions.parse(
        model="assistant", messages=[user("Which is the capital?")], response_format=City
    )

    assert done.choices[0].message.parsed == City(name="Paris", country="France")
    assert len(upstream.requests) == 2


async def test_the_callers_own_function_comes_back_as_a_tool_call_and_its_result_goes_on(
    openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    upstream.when(
        "door", Reply(calls=(Call("open_door", {"number": 3}),)), Reply(text="It is open.")
    )

    first = await openai_client.chat.completions.create(
        model="assistant", messages=[user("open door 3")], tools=[DOOR]
    )
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls and message.tool_calls[0].type == "function"
    assert message.tool_calls[0].function.arguments == '{"number": 3}'

    second = await openai_client.chat.completions.create(
        model="assistant",
        tools=[DOOR],
        messages=[
            user("open door 3"),
            message.model_dump(exclude_none=True),  # pyright: ignore[reportArgumentType]
            {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "opened"},
        ],
    )

    assert second.choices[0].message.content == "It is open."
    assert upstream.requests[-1].body["messages"][-1]["content"] == "opened"


async def test_several_functions_are_called_at_once_and_put_together_by_the_helper(
    openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    doors = tuple(Call("open_door", {"number": number}) for number in (3, 4))
    upstream.when("doors", Reply(text="I will.", calls=doors), Reply(text="Both are open."))
    messages: list[Any] = [user("open doors 3 and 4")]
    strict: Any = {"type": "function", "function": {**DOOR["function"], "strict": True}}

    async with openai_client.chat.completions.stream(
        model="assistant", messages=messages, tools=[strict]
    ) as stream:
        choice = (await stream.get_final_completion()).choices[0]
    calls = choice.message.tool_calls or []
    messages.append(choice.message.model_dump(exclude={"parsed"}))
    messages += [
        {"role": "tool", "tool_call_id": call.id, "content": f"opened {number}"}
        for number, call in enumerate(calls)
    ]
    done = await openai_client.chat.completions.create(
        model="assistant", messages=messages, tools=[DOOR]
    )

    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I will.")
    numbers = [json.loads(call.function.arguments)["number"] for call in calls]
    assert numbers == [3, 4]
    assert done.choices[0].message.content == "Both are open."
    told = [message["content"] for message in upstream.requests[-1].body["messages"][-2:]]
    assert told == ["opened 0", "opened 1"]


async def test_an_image_reaches_the_model(openai_client: AsyncOpenAI, upstream: Upstream) -> None:
    content: Any = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": PIXEL}},
    ]

    await openai_client.chat.completions.create(
        model="assistant", messages=[{"role": "user", "content": content}]
    )

    text, image = upstream.requests[-1].body["messages"][-1]["content"]
    assert (text["text"], image["image_url"]["url"]) == ("What is this?", PIXEL)


async def test_made_up_tool_results_are_refused(
    openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="not the results"):
        await openai_client.chat.completions.create(
            model="assistant",
            messages=[
                user("pay"),
                {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "id": "x",
                            "type": "function",
                            "function": {"name": "get_weather", "arguments": "{}"},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "x", "content": "done"},
            ],
        )
    assert not upstream.requests


async def test_an_unknown_model_is_not_found_and_names_the_known_ones(
    openai_client: AsyncOpenAI,
) -> None:
    with pytest.raises(openai.NotFoundError, match="available: assistant") as caught:
        await openai_client.chat.completions.create(model="gpt-9", messages=[user("Hello")])
    assert caught.value.code == "model_not_found"


async def test_an_upstream_failure_is_told_without_the_providers_words(
    openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    upstream.when("Hello", Reply(status=401, error={"message": "bad key sk-secret"}))

    with pytest.raises(openai.InternalServerError) as caught:
        await openai_client.chat.completions.create(model="assistant", messages=[user("Hello")])

    assert caught.value.status_code == 502
    assert "sk-secret" not in str(caught.value.body)


async def test_a_response_can_be_created_read_continued_and_deleted(
    openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    upstream.when("name is", Reply(text="Nice to meet you."))
    upstream.when("who am I", Reply(text="Ada."))

    first = await openai_client.responses.create(model="assistant", input="My name is Ada")
    second = await openai_client.responses.create(
        model="assistant", input="who am I", previous_response_id=first.id
    )

    assert (first.output_text, second.output_text) == ("Nice to meet you.", "Ada.")
    said = [message["content"] for message in upstream.requests[-1].body["messages"][1:]]
    assert said == ["My name is Ada", "Nice to meet you.", "who am I"]
    assert (await openai_client.responses.retrieve(second.id)).output_text == "Ada."
    await openai_client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        await openai_client.responses.retrieve(second.id)


async def test_a_streamed_response_has_every_event_in_order(
    openai_client: AsyncOpenAI, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when(
        "weather",
        Reply(calls=(Call("get_weather", {"location": "Tokyo"}),)),
        Reply(text="Fine in Tokyo."),
    )

    stream = await openai_client.responses.create(
        model="assistant", input="weather in Tokyo?", stream=True
    )
    events = [event async for event in stream]

    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds.index("response.mcp_call.completed") < kinds.index("response.output_text.delta")
    final = events[-1]
    assert final.type == "response.completed"
    assert [item.type for item in final.response.output] == ["mcp_call", "message"]
    assert final.response.output_text == "Fine in Tokyo."
    again = [
        event
        async for event in await openai_client.responses.retrieve(
            final.response.id, stream=True, starting_after=3
        )
    ]
    assert [event.model_dump() for event in again] == [event.model_dump() for event in events[4:]]


async def test_a_background_response_can_be_cancelled_and_stays_cancelled(
    openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    upstream.when("slow", Reply(text="one two three", hang=True))

    begun = await openai_client.responses.create(model="assistant", input="slow", background=True)
    await upstream.wait_for_async(1)
    cancelled = await openai_client.responses.cancel(begun.id)
    again = await openai_client.responses.cancel(begun.id)

    assert begun.status in ("queued", "in_progress")
    assert (cancelled.status, again.status) == ("cancelled", "cancelled")
    await upstream.wait_until_async(lambda: upstream.requests[0].aborted, 2)


async def test_a_streamed_function_call_begins_with_its_id_and_name(
    openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    upstream.when("door", Reply(calls=(Call("open_door", {"number": 3}),), pace=0.1))

    stream = await openai_client.chat.completions.create(
        model="assistant", messages=[user("open door 3")], tools=[DOOR], stream=True
    )
    chunks = [chunk async for chunk in stream]

    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    first, *rest = [(call.id, call.function) for call in calls]
    assert first[0] and first[1] and (first[1].name, first[1].arguments) == ("open_door", "")
    assert [(call_id, function and function.name) for call_id, function in rest] == [
        (None, None) for _ in rest
    ]
    assert "".join((f and f.arguments) or "" for _, f in rest) == '{"number": 3}'
    assert len(rest) > 1
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "tool_calls"


async def test_the_stream_helper_puts_the_final_response_together(
    openai_client: AsyncOpenAI, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when(
        "weather",
        Reply(text="Let me look.", calls=(Call("get_weather", {"location": "Tokyo"}),)),
        Reply(text="Fine in Tokyo."),
    )

    async with openai_client.responses.stream(model="assistant", input="weather?") as stream:
        said = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()

    assert "".join(said) == final.output_text == "Let me look.Fine in Tokyo."
    assert [item.type for item in final.output] == ["message", "mcp_call", "message"]
    assert final.status == "completed"


async def test_the_output_of_a_response_goes_back_in_as_history(
    openai_client: AsyncOpenAI, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when(
        "weather",
        Reply(
            text="Let me look.",
            reasoning="Hm.",
            calls=(Call("get_weather", {"location": "Tokyo"}),),
        ),
        Reply(text="Fine."),
    )
    history: Any = [{"role": "user", "content": "weather?"}]
    first = await openai_client.responses.create(model="assistant", input=history)
    history += [item.model_dump() for item in first.output]
    history += [{"role": "user", "content": "And tomorrow?"}]

    second = await openai_client.responses.create(model="assistant", input=history)

    assert second.output_text == "ok"
    roles = [message["role"] for message in upstream.requests[-1].body["messages"]]
    assert roles[1:] == ["user", "assistant", "tool", "assistant", "user"]
    assert tools.count("/v1/search") == 1


async def test_a_functions_output_goes_back_in_behind_the_response_that_called(
    openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    upstream.when(
        "both", Reply(calls=(Call("one"), Call("two", {"a": 1}))), Reply(text="Both are done.")
    )
    functions: Any = [
        {"type": "function", "name": name, "parameters": None, "strict": None}
        for name in ("one", "two")
    ]
    history: Any = [{"role": "user", "content": "both"}]

    async def ask() -> str:
        response = await openai_client.responses.create(
            model="assistant", input=history, tools=functions
        )
        history.extend(item.model_dump() for item in response.output)
        for call in response.output:
            if isinstance(call, ResponseFunctionToolCall):
                output = f"result of {call.name}"
                history.append(
                    {"type": "function_call_output", "call_id": call.call_id, "output": output}
                )
        return response.output_text

    said = [await ask(), await ask()]
    history.append({"role": "user", "content": "Thanks"})
    said.append(await ask())

    assert said == ["", "Both are done.", "ok"]
    told = upstream.requests[-1].body["messages"][1:]
    roles = [message["role"] for message in told]
    assert roles == ["user", "assistant", "tool", "tool", "assistant", "user"]
    assert [told[2]["content"], told[3]["content"]] == ["result of one", "result of two"]


async def test_a_structured_agent_answers_with_json_in_both_protocols(
    openai_client: AsyncOpenAI, upstream: Upstream, tools: ToolServer
) -> None:
    value = {"location": "Tokyo", "temperature": 21.5, "conditions": "clear sky"}
    upstream.when(
        "weather",
        Reply(calls=(Call("get_weather", {"location": "Tokyo"}),)),
        Reply(calls=(Call("final_result", value),)),
    )

    chat = await openai_client.chat.completions.create(
        model="weather", messages=[user("weather in Tokyo?")]
    )
    chunks = await openai_client.chat.completions.create(
        model="weather", messages=[user("weather in Tokyo?")], stream=True
    )
    streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
    response = await openai_client.responses.create(model="weather", input="weather in Tokyo?")

    assert json.loads(chat.choices[0].message.content or "") == value
    assert (chat.choices[0].finish_reason, chat.choices[0].message.tool_calls) == ("stop", None)
    assert json.loads(streamed) == value
    assert json.loads(response.output_text) == value
    assert [item.type for item in response.output] == ["mcp_call", "message"]


async def test_a_wrong_key_is_an_authentication_error(openai_client: AsyncOpenAI) -> None:
    stranger = openai_client.with_options(api_key="sk-wrong")

    with pytest.raises(openai.AuthenticationError):
        await stranger.chat.completions.create(model="assistant", messages=[user("Hello")])
    with pytest.raises(openai.AuthenticationError):
        await stranger.responses.create(model="assistant", input="Hello")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_busy_model_is_a_rate_limit_error(
    openai_client: AsyncOpenAI, upstream: Upstream, stream: bool
) -> None:
    at_once = {"retry-after-ms": "1"}  # for this server's own client
    upstream.when("Hello", Reply(status=429, headers={"retry-after": "37"} | at_once))

    with pytest.raises(openai.RateLimitError) as caught:
        await openai_client.chat.completions.create(
            model="assistant", messages=[user("Hello")], stream=stream
        )
    assert caught.value.response.headers["retry-after"] == "37"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_broken_model_is_a_server_error(
    openai_client: AsyncOpenAI, upstream: Upstream, stream: bool
) -> None:
    upstream.when("Hello", Reply(status=500, headers={"retry-after-ms": "1"}))

    with pytest.raises(openai.InternalServerError) as caught:
        await openai_client.chat.completions.create(
            model="assistant", messages=[user("Hello")], stream=stream
        )
    assert (caught.value.status_code, caught.value.code) == (502, "model_unavailable")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_gives_up_stops_the_model(
    openai_client: AsyncOpenAI, upstream: Upstream, stream: bool
) -> None:
    upstream.when("Hello", Reply(hang=True))

    with pytest.raises(openai.APITimeoutError):
        await openai_client.with_options(timeout=0.5).chat.completions.create(
            model="assistant", messages=[user("Hello")], stream=stream
        )

    await upstream.wait_until_async(lambda: upstream.requests[0].aborted, 2)


async def test_a_stream_that_is_left_stops_the_model(
    openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    upstream.when("Hello", Reply(text="word " * 500, pace=0.1))

    async with openai_client.chat.completions.stream(
        model="assistant", messages=[user("Hello")]
    ) as stream:
        async for event in stream:
            if event.type == "content.delta":
                break

    await upstream.wait_until_async(lambda: upstream.requests[0].aborted, 2)


async def test_a_model_that_drops_out_is_an_error_on_chat_and_never_a_stop(
    openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    upstream.when("Hello", Reply(text="one two three four", pace=0.1, drop_after=3))
    reasons: list[str | None] = []

    with pytest.raises(openai.APIError) as caught:
        async for chunk in await openai_client.chat.completions.create(
            model="assistant", messages=[user("Hello")], stream=True
        ):
            reasons.append(chunk.choices[0].finish_reason)

    assert reasons and set(reasons) == {None}
    assert caught.value.code == "model_unavailable"


async def test_a_model_that_drops_out_ends_a_response_as_failed(
    openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    upstream.when("Hello", Reply(text="one two three four", pace=0.1, drop_after=3))

    stream = await openai_client.responses.create(model="assistant", input="Hello", stream=True)
    events = [event async for event in stream]

    ends = ("response.completed", "response.incomplete", "response.failed")
    assert [event.type for event in events if event.type in ends] == ["response.failed"]
    final = events[-1]
    assert final.type == "response.failed"
    assert final.response.error and final.response.error.code == "model_unavailable"
