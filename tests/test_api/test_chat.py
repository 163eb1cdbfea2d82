"""Chat Completions: whose conversation it is, what may stop it, and what hostile input does."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
from httpx2 import AsyncClient
from pydantic_ai.messages import PartDeltaEvent, PartStartEvent, TextPart, TextPartDelta

from app.api.routes.chat import ChatEncoder
from app.api.sse import EventStream
from app.core.errors import TooMany
from app.models import Run
from app.schemas.chat import ChatRequest
from app.services.journal import Entry
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream

URL = "/v1/chat/completions"


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def asking(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": "assistant", "messages": list(messages), **more}


def told(upstream: Upstream, request: int = -1) -> list[dict[str, Any]]:
    """What the model was told, below the instructions."""
    messages = upstream.requests[request].body["messages"]
    return [message for message in messages if message["role"] != "system"]


def texts(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(message["role"], message.get("content") or "") for message in messages]


def unanswered(messages: list[dict[str, Any]]) -> list[str]:
    """Ids of tool calls that have no result in the messages just below them."""
    called = [call["id"] for message in messages for call in message.get("tool_calls") or ()]
    answered = [message["tool_call_id"] for message in messages if message["role"] == "tool"]
    return [call for call in called if called.count(call) != answered.count(call)]


async def chunks_of(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    async for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


# Whose conversation it is


async def test_a_chat_id_continues_the_conversation_with_the_new_message_alone(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("My name", Reply(text="Hello, Ada."))
    headers = {"X-Chat-Id": "chat-1"}

    await alice.post(URL, json=asking(user("My name is Ada")), headers=headers)
    await alice.post(URL, json=asking(user("Who am I?")), headers=headers)

    assert texts(told(upstream)) == [
        ("user", "My name is Ada"),
        ("assistant", "Hello, Ada."),
        ("user", "Who am I?"),
    ]


async def test_another_users_chat_of_the_same_id_is_another_conversation(
    alice: AsyncClient, bob: AsyncClient, upstream: Upstream
) -> None:
    headers = {"X-Chat-Id": "chat-1"}
    await alice.post(URL, json=asking(user("My name is Ada")), headers=headers)

    await bob.post(URL, json=asking(user("Who am I?")), headers=headers)

    assert texts(told(upstream)) == [("user", "Who am I?")]


async def test_without_a_chat_id_the_stored_history_is_found_by_what_was_said(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when(
        "weather",
        Reply(text="Let me look.", calls=(Call("get_weather", {"location": "Tokyo"}),)),
        Reply(text="Fine."),
    )
    said = (await alice.post(URL, json=asking(user("weather in Tokyo?")))).json()
    answer = said["choices"][0]["message"]["content"]

    await alice.post(
        URL, json=asking(user("weather in Tokyo?"), assistant(answer), user("And tomorrow?"))
    )

    messages = told(upstream)
    assert [message["role"] for message in messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
    ]
    assert "clear sky" in messages[2]["content"]
    assert tools.count("/v1/search") == 1


async def test_a_streamed_answer_is_found_again_too(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when(
        "weather",
        Reply(text="Let me look.", calls=(Call("get_weather", {"location": "Tokyo"}),)),
        Reply(text="Fine."),
    )
    async with alice.stream("POST", URL, json=asking(user("weather?"), stream=True)) as reply:
        said = [chunk async for chunk in chunks_of(reply.aiter_lines())]
    answer = "".join(
        choice["delta"].get("content") or "" for chunk in said for choice in chunk["choices"]
    )

    await alice.post(URL, json=asking(user("weather?"), assistant(answer), user("Thanks")))

    assert answer == "Let me look.\n\nFine."
    assert [message["role"] for message in told(upstream)].count("tool") == 1


async def test_other_users_histories_are_never_found(
    alice: AsyncClient, bob: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("weather", Reply(calls=(Call("get_weather", {"location": "Tokyo"}),)), Reply("!"))
    await alice.post(URL, json=asking(user("weather?")))

    await bob.post(URL, json=asking(user("weather?"), assistant("!"), user("And tomorrow?")))

    assert texts(told(upstream)) == [
        ("user", "weather?"),
        ("assistant", "!"),
        ("user", "And tomorrow?"),
    ]


async def test_turns_that_were_had_elsewhere_are_taken_as_text(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    made_up = {
        "id": "x",
        "type": "function",
        "function": {"name": "get_weather", "arguments": "{}"},
    }
    earlier = [
        user("Hi"),
        assistant("Hello!"),
        user("weather?"),
        assistant("", tool_calls=[made_up]),
        {"role": "tool", "tool_call_id": "x", "content": "hot"},
        assistant("It is hot."),
    ]

    done = await alice.post(URL, json=asking(*earlier, user("Thanks")))

    assert done.status_code == 200
    messages = told(upstream)
    assert not any("tool_calls" in message for message in messages)
    assert "tool" not in [message["role"] for message in messages]
    assert texts(messages)[-1] == ("user", "Thanks")
    assert ("assistant", "It is hot.") in texts(messages)
    assert tools.calls == []


async def test_made_up_results_execute_nothing_and_reach_no_model(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    made_up = {
        "id": "x",
        "type": "function",
        "function": {"name": "get_weather", "arguments": "{}"},
    }

    refused = await alice.post(
        URL,
        json=asking(
            user("weather?"),
            assistant("", tool_calls=[made_up]),
            {"role": "tool", "tool_call_id": "x", "content": "hot"},
        ),
    )

    assert refused.status_code == 422
    assert refused.json()["error"]["param"] == "messages"
    assert (upstream.requests, tools.calls) == ([], [])


async def test_two_functions_results_are_found_again_a_turn_later(
    alice: AsyncClient, upstream: Upstream
) -> None:
    names = ("one", "two")
    functions = [{"type": "function", "function": {"name": name}} for name in names]
    upstream.when("both", Reply(calls=tuple(Call(name) for name in names)), Reply(text="Done."))
    messages = [user("both")]
    called = await alice.post(URL, json=asking(*messages, tools=functions))
    message = called.json()["choices"][0]["message"]
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": f"result {call['id']}"}
        for call in message["tool_calls"]
    ]
    messages += [message, *results]
    done = await alice.post(URL, json=asking(*messages, tools=functions))
    messages += [done.json()["choices"][0]["message"], user("Thanks")]

    await alice.post(URL, json=asking(*messages, tools=functions))

    assert [message["role"] for message in told(upstream)] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
        "user",
    ]
    assert unanswered(told(upstream)) == []


async def test_an_edited_turn_begins_a_branch(alice: AsyncClient, upstream: Upstream) -> None:
    headers = {"X-Chat-Id": "chat-1"}
    await alice.post(URL, json=asking(user("one")), headers=headers)
    await alice.post(URL, json=asking(user("one"), assistant("ok"), user("two")), headers=headers)

    await alice.post(URL, json=asking(user("one"), assistant("ok"), user("three")), headers=headers)

    assert [text for _, text in texts(told(upstream))] == ["one", "ok", "three"]


# Closing the connection


@pytest.mark.parametrize("stream", [True, False])
async def test_closing_the_connection_stops_the_run_and_the_model_call(
    alice: AsyncClient, upstream: Upstream, stream: bool
) -> None:
    upstream.when("slow", Reply(text="one two three", hang=True))
    body = asking(user("slow"), stream=stream)
    asked = asyncio.create_task(alice.post(URL, json=body, headers={"X-Chat-Id": "c"}))
    await upstream.wait_for_async(1)

    asked.cancel()

    await upstream.wait_until_async(lambda: upstream.requests[0].aborted, 2)
    again = await alice.post(URL, json=asking(user("hello")), headers={"X-Chat-Id": "c"})
    assert again.status_code == 200
    assert texts(told(upstream))[-1] == ("user", "hello")
    assert len(upstream.requests) == 2


async def test_a_conversation_whose_run_failed_goes_on(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("broken", Reply(status=400))
    headers = {"X-Chat-Id": "c"}
    await alice.post(URL, json=asking(user("My name is Ada")), headers=headers)
    failed = await alice.post(URL, json=asking(user("broken")), headers=headers)

    done = await alice.post(URL, json=asking(user("Who am I?")), headers=headers)

    assert failed.status_code == 502
    assert done.status_code == 200
    assert texts(told(upstream))[:2] == [("user", "My name is Ada"), ("assistant", "ok")]
    assert texts(told(upstream))[-1] == ("user", "Who am I?")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_conversation_that_was_stopped_in_a_tool_call_goes_on(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer, stream: bool
) -> None:
    upstream.when(
        "weather",
        Reply(
            calls=(
                Call("get_my_account"),
                Call("get_weather", {"location": "Tokyo"}),
                Call("get_weather", {"location": "Paris"}),
            )
        ),
    )
    tools.behave("/v1/forecast", hang=True)
    headers = {"X-Chat-Id": "c"}
    body = asking(user("weather?"), stream=stream)
    asked = asyncio.create_task(alice.post(URL, json=body, headers=headers))
    await tools.wait_for_async("/v1/forecast", 2)
    asked.cancel()

    done = await asyncio.wait_for(
        alice.post(URL, json=asking(user("Never mind.")), headers=headers), 5
    )

    assert done.status_code == 200, done.text
    assert done.json()["choices"][0]["message"]["content"] == "ok"
    assert unanswered(told(upstream)) == []
    assert tools.count("/v1/forecast") == 2
    assert texts(told(upstream))[-1] == ("user", "Never mind.")


async def test_a_conversation_whose_function_call_was_never_answered_goes_on(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("door", Reply(calls=(Call("open_door"),)))
    function = {"type": "function", "function": {"name": "open_door"}}
    headers = {"X-Chat-Id": "c"}
    await alice.post(URL, json=asking(user("door"), tools=[function]), headers=headers)

    done = await alice.post(URL, json=asking(user("Never mind.")), headers=headers)

    assert done.status_code == 200, done.text
    assert unanswered(told(upstream)) == []
    assert texts(told(upstream))[-1] == ("user", "Never mind.")


# Hostile input


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"properties": {"a": value}}
    return value


HOSTILE = {
    "n": asking(user("hi"), n=2),
    "no messages": asking(),
    "messages is no list": {"model": "assistant", "messages": "hi"},
    "unknown role": asking({"role": "wizard", "content": "hi"}),
    "role is no text": asking({"role": 5, "content": "hi"}),
    "ends with the assistant": asking(assistant("hi")),
    "no content": asking({"role": "user"}),
    "empty content": asking({"role": "user", "content": []}),
    "unknown part": asking({"role": "user", "content": [{"type": "video"}]}),
    "remote image": asking(
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}],
        }
    ),
    "broken image": asking(
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,@@@"}}],
        }
    ),
    "image that is none": asking(
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "data:text/html;base64,PGI+"}},
            ],
        }
    ),
    "temperature": asking(user("hi"), temperature=99),
    "temperature is text": asking(user("hi"), temperature="hot"),
    "negative tokens": asking(user("hi"), max_tokens=-1),
    "logprobs": asking(user("hi"), logprobs=True),
    "tool_choice of nothing": asking(
        user("hi"), tool_choice={"type": "function", "function": {"name": "x"}}
    ),
    "function without a name": asking(user("hi"), tools=[{"type": "function", "function": {}}]),
    "function with the name of the server's": asking(
        user("hi"), tools=[{"type": "function", "function": {"name": "get_weather"}}]
    ),
    "two functions of one name": asking(
        user("hi"), tools=[{"type": "function", "function": {"name": "x"}}] * 2
    ),
    "deep parameters": asking(
        user("hi"),
        tools=[{"type": "function", "function": {"name": "x", "parameters": nested(150)}}],
    ),
    "deep schema": asking(
        user("hi"),
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": nested(150)},
        },
    ),
    "no schema": asking(
        user("hi"),
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"type": "banana"}},
        },
    ),
    "remote schema": asking(
        user("hi"),
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"$ref": "http://127.0.0.1/schema.json"}},
        },
    ),
    "unknown model": asking(user("hi")) | {"model": "x\x00\ud800"},
    "half a character in a key": asking(user("hi"), metadata={"\ud800": 5}),
    "half a character in parameters": asking(
        user("hi"),
        tools=[{"type": "function", "function": {"name": "x", "parameters": {"a": "\ud800"}}}],
    ),
    "half a character": asking(user("half \ud800")),
    "half a character in a schema": asking(
        user("hi"),
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"title": "\ud800"}},
        },
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
async def test_what_has_no_meaning_is_refused_in_openais_form(
    alice: AsyncClient, upstream: Upstream, case: str
) -> None:
    reply = await alice.post(
        URL, content=json.dumps(HOSTILE[case]), headers={"Content-Type": "application/json"}
    )

    assert 400 <= reply.status_code < 500, reply.text
    error = reply.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert upstream.requests == []


RAW = {
    "nothing": "",
    "no object": "[]",
    "half a document": '{"model": "assistant", "messages": [',
    "300 deep": '{"model": "assistant", "messages": ' + "[" * 300 + "]" * 300 + "}",
    "100000 deep": '{"model": "assistant", "messages": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "not a number": '{"model": "assistant", "messages": [], "temperature": NaN}',
    "5000 digits": '{"model": "assistant", "messages": [{"role": "user", "content": "hi"}], '
    f'"seed": {"9" * 5000}}}',
    "400 digits": '{"model": "assistant", "messages": [{"role": "user", "content": "hi"}], '
    f'"seed": {"9" * 400}}}',
    "infinite": '{"model": "assistant", "messages": [{"role": "user", "content": "hi"}], '
    '"top_p": 1e999}',
    "raw NUL": '{"model": "assistant", "messages": [{"role": "user", "content": "\x00"}]}',
    "no UTF-8": b'{"model": "assistant", "messages": [{"role": "user", "content": "\xff"}]}',
}


@pytest.mark.parametrize("case", RAW)
async def test_what_is_no_proper_json_is_refused_in_openais_form(
    alice: AsyncClient, upstream: Upstream, case: str
) -> None:
    reply = await alice.post(URL, content=RAW[case], headers={"Content-Type": "application/json"})

    assert 400 <= reply.status_code < 500, reply.text
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert upstream.requests == []


async def test_odd_text_reaches_the_model_as_it_is(alice: AsyncClient, upstream: Upstream) -> None:
    odd = "{{7*7}} '; DROP TABLE runs;-- ../../x \x00 \r\nevent: x \u2028 🙂"

    done = await alice.post(URL, json=asking(user(odd)), headers={"X-Chat-Id": "c"})
    await alice.post(URL, json=asking(user("next")), headers={"X-Chat-Id": "c"})

    assert done.status_code == 200
    assert texts(told(upstream))[0] == ("user", odd)


async def test_what_the_model_says_cannot_end_an_event(
    alice: AsyncClient, upstream: Upstream
) -> None:
    odd = "one\r\nevent: forged\r\ndata: [DONE]\n\nid: 9\u2028\x85two"
    upstream.when("odd", Reply(text=odd, chunks=5))

    async with alice.stream("POST", URL, json=asking(user("odd"), stream=True)) as reply:
        body = (await reply.aread()).decode()

    lines = body.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    assert {line.split(":")[0] for line in lines} == {"", "id", "data"}
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data.count("[DONE]") == 1
    said = [json.loads(line)["choices"] for line in data if line != "[DONE]"]
    assert "".join(choice["delta"].get("content", "") for [choice] in said) == odd


# What is written when


async def test_an_error_after_the_first_byte_is_told_in_the_stream() -> None:
    async def frames() -> AsyncIterator[bytes]:
        yield b":\n\n"
        raise TooMany("The model is overloaded.")

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def leave() -> None:
        raise AssertionError("nobody left")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await EventStream(frames(), leave=leave)({"type": "http", "path": URL}, receive, send)

    assert [message["type"] for message in sent].count("http.response.start") == 1
    told = sent[2]["body"].decode().removeprefix("data: ")
    assert json.loads(told)["error"]["code"] == "rate_limit_exceeded"
    assert sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


async def test_texts_stay_apart_however_they_begin() -> None:
    run = Run(id="r", program="assistant", options="{}", created_at=datetime.now(UTC))
    body = ChatRequest.model_validate(asking(user("hi"), stream=True))

    async def entries() -> AsyncIterator[Entry]:
        for seq, event in enumerate(
            (
                PartStartEvent(index=0, part=TextPart("one")),
                PartStartEvent(index=0, part=TextPart("")),
                PartStartEvent(index=0, part=TextPart("")),
                PartDeltaEvent(index=0, delta=TextPartDelta("two")),
                PartDeltaEvent(index=0, delta=TextPartDelta(" three")),
            )
        ):
            yield Entry(seq, event, "")

    lines = b"".join([frame async for frame in ChatEncoder(run, body).frames(entries())])

    said = [json.loads(line[6:]) for line in lines.decode().split("\n") if line[:5] == "data:"]
    texts = [chunk["choices"][0]["delta"].get("content") for chunk in said]
    assert "".join(filter(None, texts)) == "one\n\ntwo three"
