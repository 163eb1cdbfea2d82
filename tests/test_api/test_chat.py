"""Chat Completions: whose conversation it is, what may stop it, and what hostile input does."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from httpx2 import AsyncClient, TransportError
from pydantic_ai.messages import PartDeltaEvent, PartStartEvent, TextPart, TextPartDelta
from starlette.applications import Starlette

from app.api.routes.chat import ChatEncoder
from app.api.sse import EventStream
from app.config import Settings
from app.core.errors import TooMany
from app.models import Run
from app.schemas.chat import ChatRequest
from app.services.run_log import Entry
from tests.conftest import client_of
from tests.server import ServerProcess
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


# What a request may ask for


FUNCTION = {"type": "function", "function": {"name": "open_door"}}
OTHER = {"type": "function", "function": {"name": "close_door"}}

HONOURED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "temperature": ({"temperature": 0.3}, {"temperature": 0.3}),
    "top_p": ({"top_p": 0.5}, {"top_p": 0.5}),
    "max_tokens": ({"max_tokens": 7}, {"max_completion_tokens": 7}),
    "max_completion_tokens": (
        {"max_tokens": 7, "max_completion_tokens": 9},
        {"max_completion_tokens": 9},
    ),
    "penalties": (
        {"presence_penalty": 0.5, "frequency_penalty": -1},
        {"presence_penalty": 0.5, "frequency_penalty": -1.0},
    ),
    "logit_bias": ({"logit_bias": {"50256": -100}}, {"logit_bias": {"50256": -100}}),
    "one stop": ({"stop": "END"}, {"stop": ["END"]}),
    "stops": ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
    "seed": ({"seed": 42}, {"seed": 42}),
    "reasoning_effort": ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
    "verbosity": ({"verbosity": "low"}, {"verbosity": "low"}),
    "user": ({"user": "ada"}, {"user": "ada"}),
    "safety_identifier": ({"user": "a", "safety_identifier": "ada"}, {"user": "ada"}),
    "parallel_tool_calls": ({"parallel_tool_calls": False}, {"parallel_tool_calls": False}),
    "no tools": ({"tool_choice": "none"}, {"tool_choice": "none"}),
}


@pytest.mark.parametrize("case", HONOURED)
async def test_what_is_asked_for_reaches_the_model(
    alice: AsyncClient, upstream: Upstream, case: str
) -> None:
    given, sent = HONOURED[case]

    done = await alice.post(URL, json=asking(user("hi"), **given))

    assert done.status_code == 200, done.text
    body = upstream.requests[-1].body
    assert {name: body.get(name) for name in sent} == sent


NOTHING: dict[str, Any] = {
    "n": 1,
    "logprobs": False,
    "top_logprobs": 0,
    "modalities": ["text"],
    "audio": None,
    "functions": [],
    "function_call": "auto",
    "prediction": None,
    "web_search_options": None,
    "service_tier": "auto",
    "store": True,
    "prompt_cache_key": "k",
    "metadata": {"trace": "1"},
    "stream_options": {"include_obfuscation": False},
    "tools": [],
    "tool_choice": "auto",
    "response_format": {"type": "text"},
    "something_of_next_year": True,
}


async def test_what_is_the_default_anyway_is_taken(alice: AsyncClient) -> None:
    done = await alice.post(URL, json=asking(user("hi"), **NOTHING))

    assert done.status_code == 200, done.text
    assert done.json()["choices"][0]["message"]["content"] == "ok"


REFUSED: dict[str, Any] = {
    "n": 2,
    "logprobs": True,
    "top_logprobs": 3,
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
    "functions": [{"name": "open_door"}],
    "function_call": {"name": "open_door"},
    "prediction": {"type": "content", "content": "x"},
    "moderation": {"model": "omni-moderation-latest"},
    "web_search_options": {},
    "service_tier": "priority",
    "logit_bias": {"50256": 101},
    "stop": ["a", "b", "c", "d", "e"],
    "reasoning_effort": "enormous",
    "verbosity": "chatty",
    "metadata": {"k": "v" * 513},
    "tools": [{"type": "custom", "custom": {"name": "x"}}],
    "tool_choice": {"type": "custom", "custom": {"name": "x"}},
    "response_format": {"type": "grammar"},
    "max_tokens": 0,
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_cannot_be_done_is_refused_by_name(
    alice: AsyncClient, upstream: Upstream, name: str
) -> None:
    reply = await alice.post(URL, json=asking(user("hi"), **{name: REFUSED[name]}))

    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["param"].split(".")[0], error["type"]) == (name, "invalid_request_error")
    assert name in error["message"] and len(error["message"]) > len(name) + 10
    assert upstream.requests == []


async def test_a_fault_is_named_by_its_place_in_what_was_sent(alice: AsyncClient) -> None:
    places = {
        "messages.1.content": asking(user("hi"), user(5)),  # pyright: ignore[reportArgumentType]
        "messages.0.content.0.image_url.url": asking(
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}
        ),
        "tools.0.function.name": asking(user("hi"), tools=[{"type": "function", "function": {}}]),
        "tool_choice": asking(user("hi"), tool_choice="sometimes"),
        "response_format.json_schema": asking(user("hi"), response_format={"type": "json_schema"}),
    }

    told = [(await alice.post(URL, json=body)).json()["error"]["param"] for body in places.values()]

    assert told == list(places)


async def test_allowed_tools_are_the_only_functions_that_the_model_hears_of(
    alice: AsyncClient, upstream: Upstream
) -> None:
    names = [{"type": "function", "function": {"name": "open_door"}}]
    offered: list[list[str]] = []
    for mode in ("auto", "required"):
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": names}}
        body = asking(user("hi"), tools=[FUNCTION, OTHER], tool_choice=choice)
        done = await alice.post(URL, json=body)
        assert done.status_code == 200, done.text
        tools = upstream.requests[-1].body["tools"]
        offered.append([tool["function"]["name"] for tool in tools])

    assert "close_door" not in offered[0] and "get_weather" in offered[0]
    assert upstream.requests[1].body["tool_choice"] != "auto"
    unknown = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": names}}
    refused = await alice.post(URL, json=asking(user("hi"), tools=[OTHER], tool_choice=unknown))
    assert refused.json()["error"]["param"] == "tool_choice"


async def test_a_function_of_the_callers_stands_before_the_servers_of_that_name(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("weather", Reply(calls=(Call("get_weather", {"location": "Paris"}),)))
    function = {"type": "function", "function": {"name": "get_weather"}}

    chunks = await streamed(alice, asking(user("weather?"), tools=[function]))

    assert (reasons(chunks), joined(chunks, "reasoning_content")) == (["tool_calls"], "")
    assert tools.calls == []


async def test_the_callers_instructions_stand_below_the_agents_own(
    alice: AsyncClient, upstream: Upstream
) -> None:
    system = {"role": "system", "content": "Answer in rhymes."}
    developer = {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}

    await alice.post(URL, json=asking(system, developer, user("hi")))

    first, *more = upstream.requests[-1].body["messages"]
    assert first["role"] == "system"
    said = "\n".join(
        message["content"] for message in (first, *more) if message["role"] == "system"
    )
    assert said.index("Answer in rhymes.") < said.index("Be brief.")
    assert not said.startswith("Answer in rhymes.")


# What is said on the way


async def streamed(
    client: AsyncClient, body: dict[str, Any], **headers: str
) -> list[dict[str, Any]]:
    body = {**body, "stream": True}
    async with client.stream("POST", URL, json=body, headers=headers) as reply:
        assert reply.status_code == 200, await reply.aread()
        return [chunk async for chunk in chunks_of(reply.aiter_lines())]


def joined(chunks: list[dict[str, Any]], name: str = "content") -> str:
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return "".join(delta.get(name) or "" for delta in deltas)


def reasons(chunks: list[dict[str, Any]]) -> list[str]:
    found = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    return [reason for reason in found if reason]


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


# A tool that needs approval


def paying(upstream: Upstream, *amounts: int) -> None:
    calls = tuple(Call("pay", {"amount": amount}) for amount in amounts)
    upstream.when("pay", Reply(text="One moment.", calls=calls), Reply(text="It is paid."))


def keys_in(text: str) -> list[str]:
    return re.findall(r"/approve ([0-9a-f]{40})", text)


def content_of(reply: Any) -> str:
    assert reply.status_code == 200, reply.text
    [choice] = reply.json()["choices"]
    assert choice["finish_reason"] == "stop"
    return choice["message"]["content"]


@pytest.fixture
def cash(cashier: None, upstream: Upstream) -> dict[str, Any]:
    """A request that makes the model pay 5."""
    paying(upstream, 5)
    return asking(user("pay it")) | {"model": "cashier"}


def deciding(text: str) -> dict[str, Any]:
    return asking(user(text)) | {"model": "cashier"}


async def test_an_answer_that_needs_approval_ends_with_the_question(
    cash: dict[str, Any], alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    asked = content_of(await alice.post(URL, json=cash))

    [key] = keys_in(asked)
    assert asked.startswith("One moment.\n\n") and 'pay({"amount": 5})' in asked
    assert f"/deny {key}" in asked
    assert tools.count("/effects/pay-5") == 0
    told = content_of(await alice.post(URL, json=deciding(f"/approve {key}")))
    assert told == "It is paid."
    assert tools.count("/effects/pay-5") == 1
    assert content_of(await alice.post(URL, json=deciding(f"/approve {key}"))) == told
    contrary = await alice.post(URL, json=deciding(f"/deny {key}"))
    assert (contrary.status_code, contrary.json()["error"]["code"]) == (409, "not_awaited")
    assert contrary.headers["x-should-retry"] == "false"
    assert tools.count("/effects/pay-5") == 1


async def test_a_stream_that_needs_approval_ends_with_the_question_too(
    cash: dict[str, Any], alice: AsyncClient, tools: ToolServer
) -> None:
    chunks = await streamed(alice, {**cash, "stream_options": {"include_usage": True}})

    assert reasons(chunks) == ["stop"]
    [key] = keys_in(joined(chunks))
    assert joined(chunks, "reasoning_content") == 'pay({"amount": 5})\n'
    assert chunks[-1]["usage"]["total_tokens"] == 0
    decided = await streamed(
        alice, deciding(f"/approve {key}") | {"stream_options": {"include_usage": True}}
    )
    assert (joined(decided), reasons(decided)) == ("It is paid.", ["stop"])
    assert joined(decided, "reasoning_content") == "pay: paid 5\n"
    assert decided[0]["id"] == chunks[0]["id"]
    assert decided[-1]["usage"]["total_tokens"] == 30
    assert tools.count("/effects/pay-5") == 1


async def test_a_denial_reaches_the_model_with_its_reason(
    cash: dict[str, Any], alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    [key] = keys_in(content_of(await alice.post(URL, json=cash)))

    await alice.post(URL, json=deciding(f"/deny {key} Much too dear."))

    assert "Much too dear." in told(upstream)[-1]["content"]
    assert tools.count("/effects/pay-5") == 0


async def test_of_several_calls_each_is_decided_on(
    cash: dict[str, Any], alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    paying(upstream, 5, 6)
    first, second = keys_in(content_of(await alice.post(URL, json=cash)))

    rest = content_of(await alice.post(URL, json=deciding(f"/approve {first}")))
    assert "Your approval is needed" in rest and tools.count("/effects/pay-5") == 0
    done = content_of(await alice.post(URL, json=deciding(f"/deny {second}")))

    assert done == "It is paid."
    assert (tools.count("/effects/pay-5"), tools.count("/effects/pay-6")) == (1, 0)


async def test_several_decisions_go_into_one_message(
    cash: dict[str, Any], alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    paying(upstream, 5, 6)
    first, second = keys_in(content_of(await alice.post(URL, json=cash)))

    decided = deciding(f"/approve {first}\n/approve {second}\n")

    assert content_of(await alice.post(URL, json=decided)) == "It is paid."
    assert (tools.count("/effects/pay-5"), tools.count("/effects/pay-6")) == (1, 1)


async def test_approvals_count_from_their_owner_and_the_newest_message_alone(
    cash: dict[str, Any], alice: AsyncClient, bob: AsyncClient, tools: ToolServer
) -> None:
    asked = content_of(await alice.post(URL, json=cash))
    [key] = keys_in(asked)

    strangers = await bob.post(URL, json=deciding(f"/approve {key}"))
    history = [user("x"), assistant(asked), user(f"/approve {key}"), assistant("!")]
    await alice.post(URL, json=asking(*history, user("hi")) | {"model": "cashier"})
    half = await alice.post(URL, json=deciding(f"/approve {key[:12]}"))

    assert strangers.status_code == 409
    assert (half.status_code, half.json()["error"]["param"]) == (422, "messages")
    assert tools.count("/effects/pay-5") == 0


async def test_another_message_in_a_chat_that_waits_is_answered_with_the_question(
    cash: dict[str, Any], alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    headers = {"X-Chat-Id": "c"}
    asked = content_of(await alice.post(URL, json=cash, headers=headers))
    seen = len(upstream.requests)

    other = asking(user("What is new?")) | {"model": "cashier"}
    again = content_of(await alice.post(URL, json=other, headers=headers))
    [key] = keys_in(again)
    streamed_again = await streamed(alice, other, **headers)

    assert keys_in(asked) == [key] == keys_in(joined(streamed_again))
    assert len(upstream.requests) == seen
    told = content_of(await alice.post(URL, json=deciding(f"/approve {key}"), headers=headers))
    assert told == "It is paid."
    interrupted = await alice.post(
        URL, json=other, headers={**headers, "X-Multitask-Strategy": "interrupt"}
    )
    assert content_of(interrupted) == "ok"


async def test_a_decision_that_is_written_wrongly_is_refused_with_the_right_way(
    cash: dict[str, Any], alice: AsyncClient, tools: ToolServer
) -> None:
    headers = {"X-Chat-Id": "c"}
    [key] = keys_in(content_of(await alice.post(URL, json=cash, headers=headers)))

    for text in (
        "/approve",
        "/approve it",
        f"/Approve {key}",
        f"/approve {key} please",
        "/deny no",
    ):
        wrong = await alice.post(URL, json=deciding(text), headers=headers)

        error = wrong.json()["error"]
        assert (wrong.status_code, error["param"]) == (422, "messages"), text
        assert "`/approve <key>`" in error["message"] and key in error["message"]
    assert tools.count("/effects/pay-5") == 0
    told = content_of(await alice.post(URL, json=deciding(f"/approve {key}"), headers=headers))
    assert told == "It is paid."


async def test_a_repeated_request_asks_the_same_question_again(
    cash: dict[str, Any], alice: AsyncClient, upstream: Upstream
) -> None:
    headers = {"Idempotency-Key": "once"}
    first = await streamed(alice, cash, **headers)

    again = await asyncio.wait_for(streamed(alice, cash, **headers), 5)

    assert joined(again) == joined(first)
    assert len(upstream.requests) == 1


async def test_a_repeated_request_goes_on_behind_the_last_event_that_was_read(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when(
        "weather",
        Reply(text="Let me look.", calls=(Call("get_weather", {"location": "Paris"}),)),
        Reply(text="Fine in Paris, at least now.", pace=0.05),
    )
    body = asking(user("weather?"), stream=True)

    async def read(**headers: str) -> list[str]:
        headers = {"Idempotency-Key": "once"} | headers
        async with alice.stream("POST", URL, json=body, headers=headers) as reply:
            return [line async for line in reply.aiter_lines() if line]

    lines = await read()
    ids = [line.removeprefix("id: ") for line in lines if line.startswith("id: ")]

    assert len(ids) > 4 and lines[-1] == "data: [DONE]"
    for at, seq in enumerate(ids):
        rest = await read(**{"Last-Event-ID": seq})
        behind = ids[at + 1 :]
        assert rest == (lines[lines.index(f"id: {behind[0]}") :] if behind else [])


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_what_a_crash_took_back_is_not_said_when_the_request_is_repeated(
    environ: dict[str, str], bearer: Callable[..., Any], upstream: Upstream
) -> None:
    replies = iter([Reply(text="void " * 100, pace=0.05), Reply(text="It is done.")])
    upstream.when("go", lambda _: next(replies))
    headers = {"Idempotency-Key": "once"}
    body = asking(user("go"), stream=True)
    with ServerProcess(**environ) as process:
        async with client_of(process.url, await bearer("Alice")) as client:
            with pytest.raises(TransportError):
                async with client.stream("POST", URL, json=body, headers=headers) as reply:
                    async for chunk in chunks_of(reply.aiter_lines()):
                        if "void" in joined([chunk]):
                            process.kill()
            process.start()
            await upstream.wait_for_async(2, 30)

            chunks = await streamed(client, body, **headers)

    assert (joined(chunks), reasons(chunks)) == ("It is done.", ["stop"])


# Open WebUI's headers


def webui(message: str, parent: str = "", chat: str = "chat-1", task: str = "") -> dict[str, str]:
    """As Open WebUI fills them in: ids of its answers, empty where there is none."""
    return {
        "X-OpenWebUI-Chat-Id": chat,
        "X-OpenWebUI-Message-Id": message,
        "X-OpenWebUI-User-Message-Parent-Id": parent,
        "X-OpenWebUI-Task": task,
    }


async def test_an_open_webui_chat_is_a_tree_of_messages(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when(
        "weather", Reply(calls=(Call("get_weather", {"location": "Paris"}),)), Reply(text="Fine.")
    )
    turn = [user("weather?"), assistant("<details>edited by the frontend</details>Fine.")]

    async def say(text: str, message: str, parent: str) -> list[tuple[str, str]]:
        before = turn if parent else []
        body = asking(*before, user(text))
        done = await alice.post(URL, json=body, headers=webui(message, parent))
        assert done.status_code == 200, done.text
        return texts(told(upstream))

    await say("weather?", "answer-1", "")
    went_on = await say("And tomorrow?", "answer-2", "answer-1")
    again = await say("And tomorrow?", "answer-2b", "answer-1")
    edited = await say("And on Sunday?", "answer-3", "answer-1")
    fresh = await say("Hello", "answer-4", "")

    assert [role for role, _ in went_on] == ["user", "assistant", "tool", "assistant", "user"]
    assert went_on == again
    assert edited[:-1] == again[:-1] and edited[-1] == ("user", "And on Sunday?")
    assert fresh == [("user", "Hello")]


async def test_functions_that_open_webui_runs_itself_belong_to_their_turn(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("door", Reply(calls=(Call("open_door"),)), Reply(text="It is open."))
    headers = webui("answer-1")
    messages = [user("open the door")]
    called = await alice.post(URL, json=asking(*messages, tools=[FUNCTION]), headers=headers)
    message = called.json()["choices"][0]["message"]
    [call] = message["tool_calls"]
    messages += [message, {"role": "tool", "tool_call_id": call["id"], "content": "opened"}]

    done = await alice.post(URL, json=asking(*messages, tools=[FUNCTION]), headers=headers)
    messages += [done.json()["choices"][0]["message"], user("Thanks")]
    await alice.post(URL, json=asking(*messages), headers=webui("answer-2", "answer-1"))

    assert done.json()["choices"][0]["message"]["content"] == "It is open."
    roles = ["user", "assistant", "tool", "assistant", "user"]
    assert [message["role"] for message in told(upstream)] == roles


async def test_a_title_of_a_structured_agents_chat_is_written_too(
    alice: AsyncClient, upstream: Upstream
) -> None:
    value = {"location": "Paris", "temperature": 1, "conditions": "fog"}
    upstream.when("title", Reply(calls=(Call("final_result", value),)))
    body = asking(user("Write a title.")) | {"model": "weather"}

    done = await alice.post(URL, json=body, headers=webui("answer-1", task="title_generation"))

    assert done.status_code == 200, done.text
    assert json.loads(done.json()["choices"][0]["message"]["content"])["location"] == "Paris"


async def test_another_owners_open_webui_chat_is_another(
    alice: AsyncClient, bob: AsyncClient, upstream: Upstream
) -> None:
    await alice.post(URL, json=asking(user("one")), headers=webui("answer-1"))

    await bob.post(URL, json=asking(user("two")), headers=webui("answer-2", "answer-1"))

    assert texts(told(upstream)) == [("user", "two")]


async def test_a_title_is_written_outside_of_the_chat_and_without_tools(
    alice: AsyncClient, upstream: Upstream
) -> None:
    await alice.post(URL, json=asking(user("one")), headers=webui("answer-1"))
    task = webui("answer-1", task="title_generation")

    done = await alice.post(
        URL, json=asking(user("Write a title."), tools=[FUNCTION]), headers=task
    )
    asked = upstream.requests[-1].body
    await alice.post(URL, json=asking(user("two")), headers=webui("answer-2", "answer-1"))

    assert done.json()["choices"][0]["message"]["content"] == "ok"
    assert asked["tool_choice"] == "none" if asked.get("tools") else True
    assert [message["content"] for message in asked["messages"][1:]] == ["Write a title."]
    assert [text for _, text in texts(told(upstream))] == ["one", "ok", "two"]


TITLE = "### Task:\nWrite a title.\n### Chat History:\n<chat_history>\nUSER: one\n</chat_history>"


async def test_a_title_that_is_asked_for_without_its_header_is_no_part_of_the_chat_either(
    alice: AsyncClient, upstream: Upstream
) -> None:
    headers = {"X-OpenWebUI-Chat-Id": "chat-1"}
    documents = "### Task:\nRespond with the context.\n<context>\nA\n</context>\none"
    await alice.post(URL, json=asking(user(documents)), headers=headers)

    titled = await alice.post(URL, json=asking(user(TITLE)), headers=headers)
    asked = upstream.requests[-1].body
    await alice.post(URL, json=asking(user("two")), headers=headers)

    assert titled.json()["choices"][0]["message"]["content"] == "ok"
    assert asked["tool_choice"] == "none" if asked.get("tools") else True
    assert [message["content"] for message in asked["messages"][1:]] == [TITLE]
    assert [text for _, text in texts(told(upstream))] == [documents, "ok", "two"]


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
    "role of old functions": asking({"role": "function", "name": "x", "content": "hi"}),
    "temperature": asking(user("hi"), temperature=99),
    "temperature is text": asking(user("hi"), temperature="hot"),
    "negative tokens": asking(user("hi"), max_tokens=-1),
    "logprobs": asking(user("hi"), logprobs=True),
    "tool_choice of nothing": asking(
        user("hi"), tool_choice={"type": "function", "function": {"name": "x"}}
    ),
    "function without a name": asking(user("hi"), tools=[{"type": "function", "function": {}}]),
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
