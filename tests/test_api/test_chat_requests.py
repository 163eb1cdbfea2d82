"""Chat Completions: what a request may ask for, and what hostile input does."""

import json
from typing import Any

import pytest
from httpx2 import AsyncClient

from tests.chatting import (
    FUNCTION,
    URL,
    asking,
    assistant,
    joined,
    reasons,
    streamed,
    texts,
    told,
    user,
)
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream

# What a request may ask for


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
