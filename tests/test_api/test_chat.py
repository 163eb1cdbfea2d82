"""Chat Completions: whose conversation it is, what may stop it, what is said and when."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
from httpx2 import AsyncClient
from pydantic_ai.messages import PartDeltaEvent, PartStartEvent, TextPart, TextPartDelta
from starlette.applications import Starlette

from app.api.routes.chat import ChatEncoder
from app.api.sse import EventStream
from app.config import Settings
from app.core.errors import TooMany
from app.models import Run
from app.schemas.chat import ChatRequest
from app.services.run_log import Entry
from tests.chatting import (
    FUNCTION,
    URL,
    asking,
    assistant,
    chunks_of,
    content_of,
    joined,
    reasons,
    streamed,
    texts,
    told,
    user,
)
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream


def unanswered(messages: list[dict[str, Any]]) -> list[str]:
    """Ids of tool calls that have no result in the messages just below them."""
    called = [call["id"] for message in messages for call in message.get("tool_calls") or ()]
    answered = [message["tool_call_id"] for message in messages if message["role"] == "tool"]
    return [call for call in called if called.count(call) != answered.count(call)]


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


@pytest.mark.parametrize("arguments", ['{"a": 1}', "[1, 2]", "5", '"abc"', "[]"])
async def test_a_function_is_called_whatever_its_arguments_are(
    alice: AsyncClient, upstream: Upstream, arguments: str
) -> None:
    functions = [{"type": "function", "function": {"name": "mine"}}]
    upstream.when("Go.", Reply(calls=(Call("mine", arguments),)))

    called = await alice.post(URL, json=asking(user("Go."), tools=functions))

    [choice] = called.json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "mine"


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


# What is said on the way


async def test_thoughts_and_the_servers_calls_are_reasoning(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when(
        "weather",
        Reply(reasoning="Let me see.", calls=(Call("get_weather", {"location": "Paris"}),)),
        Reply(reasoning="So it is.", text="Fine."),
    )

    chunks = await streamed(alice, asking(user("weather?")))
    whole = (await alice.post(URL, json=asking(user("weather?")))).json()

    reasoning = joined(chunks, "reasoning_content")
    first, called, came, last = reasoning.split("\n")
    assert (first, called, last) == (
        "Let me see.",
        'get_weather({"location": "Paris"})',
        "So it is.",
    )
    assert came.startswith('get_weather: {"location":"Paris') and len(came) < 130
    message = whole["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Fine.", reasoning)
    assert joined(chunks) == "Fine."
    assert reasons(chunks) == ["stop"]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(text="Fine."), "stop"),
        (Reply(text="Fi", finish="length"), "length"),
        (Reply(text="Fi", finish="content_filter"), "content_filter"),
        (Reply(calls=(Call("open_door"),)), "tool_calls"),
    ],
)
async def test_an_answer_ends_for_one_reason(
    alice: AsyncClient, upstream: Upstream, reply: Reply, reason: str
) -> None:
    upstream.when("hi", reply)
    body = asking(user("hi"), tools=[FUNCTION])

    chunks = await streamed(alice, body)
    whole = (await alice.post(URL, json=body)).json()

    assert (reasons(chunks), whole["choices"][0]["finish_reason"]) == ([reason], reason)
    assert len({chunk["id"] for chunk in chunks}) == 1


# What goes wrong


async def test_errors_carry_openais_codes(
    alice: AsyncClient, anonymous: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("long", Reply(status=400, error={"code": "context_length_exceeded"}))
    upstream.when("busy", Reply(status=429))
    upstream.when("key", Reply(status=401))

    no_key = await anonymous.post(URL, json=asking(user("hi")))
    no_model = await alice.post(URL, json=asking(user("hi")) | {"model": "gpt-9"})
    too_long = await alice.post(URL, json=asking(user("long")))
    busy = await alice.post(URL, json=asking(user("busy")))
    bad_key = await alice.post(URL, json=asking(user("key")))

    answers = [no_key, no_model, too_long, busy, bad_key]
    assert [(answer.status_code, answer.json()["error"]["code"]) for answer in answers] == [
        (401, "invalid_api_key"),
        (404, "model_not_found"),
        (400, "context_length_exceeded"),
        (429, "rate_limit_exceeded"),
        (502, "upstream_auth"),
    ]
    assert 1 <= int(busy.headers["retry-after"]) <= 5


async def test_a_failure_after_the_first_words_is_the_last_frame(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("hi", Reply(text="one two three four", pace=0.1, drop_after=3))

    async with alice.stream("POST", URL, json=asking(user("hi"), stream=True)) as reply:
        body = (await reply.aread()).decode()

    data = [line.removeprefix("data: ") for line in body.split("\n") if line[:5] == "data:"]
    assert "[DONE]" not in data
    assert json.loads(data[-1])["error"]["code"] == "model_unavailable"
    assert reasons([json.loads(line) for line in data[:-1]]) == []


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

    app = Starlette()
    app.state.settings = Settings(_env_file=None)  # pyright: ignore[reportCallIssue]
    scope = {"type": "http", "path": URL, "app": app}
    await EventStream(frames(), leave=leave)(scope, receive, send)

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
            ),
            start=1,
        ):
            yield Entry(seq, event, "")

    lines = b"".join([frame async for frame in ChatEncoder(run, body).frames(entries())])

    said = [json.loads(line[6:]) for line in lines.decode().split("\n") if line[:5] == "data:"]
    texts = [chunk["choices"][0]["delta"].get("content") for chunk in said]
    assert "".join(filter(None, texts)) == "one\n\ntwo three"


async def test_a_chat_without_a_name_is_known_by_its_turns(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    weather = Reply(calls=(Call("get_weather", {"location": "Oslo"}),))
    upstream.when("weather", weather, Reply("Fine."))
    said: list[Any] = [
        user("hello from before"),
        {"role": "assistant", "content": "Said elsewhere."},
    ]
    for question in ("What is the weather?", "And now?", "And then?"):
        said.append(user(question))
        answer = content_of(await alice.post(URL, json={"model": "assistant", "messages": said}))
        assert "Said elsewhere." not in answer
        said.append({"role": "assistant", "content": answer})

    roles = [message["role"] for message in upstream.requests[-1].body["messages"]]
    turns = [
        "user",
        "assistant",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]  # a client sends no tool
    assert roles == ["system", *turns, "user", "assistant", "user"]
