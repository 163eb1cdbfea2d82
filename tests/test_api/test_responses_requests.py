"""Responses: what is sent, and what is asked for."""

import base64
import json
from typing import Any

import pytest
from httpx2 import AsyncClient
from openai.types.responses import Response

from tests.responding import URL, asking, says, weather_in
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream

# What is sent


async def test_a_null_is_the_same_as_nothing(alice: AsyncClient, upstream: Upstream) -> None:
    names = (
        *("tools", "tool_choice", "metadata", "instructions", "text", "temperature", "user"),
        *("previous_response_id", "stream", "background", "store", "parallel_tool_calls"),
    )
    message = {"type": None, "role": "user", "content": "Hello", "id": None}

    done = await alice.post(URL, json=asking([message]) | dict.fromkeys(names))

    assert done.status_code == 200, done.text
    Response.model_validate(done.json())


async def test_calls_in_the_history_execute_nothing(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    call = {"name": "get_weather", "arguments": '{"location": "Tokyo"}', "server_label": "x"}
    earlier = [
        {"role": "user", "content": "weather?"},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "mcp_call", "id": "mcp_1", "output": None, **call},
        {"type": "mcp_approval_request", "id": "mcpr_1", **call},
        {"type": "mcp_approval_response", "approval_request_id": "mcpr_1", "approve": True},
        {"type": "function_call", "call_id": "c", **call},
        {"type": "function_call_output", "call_id": "c", "output": "hot"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "!"}]},
    ]

    done = await alice.post(URL, json=asking([*earlier, {"role": "user", "content": "Thanks"}]))
    made_up = await alice.post(URL, json=asking(earlier[:-1]))

    assert done.json()["status"] == "completed", done.text
    assert "tool" not in [message["role"] for message in upstream.requests[-1].body["messages"]]
    assert made_up.status_code == 422
    assert (len(upstream.requests), tools.calls) == (1, [])


def image(url: str) -> dict[str, Any]:
    return asking([{"role": "user", "content": [{"type": "input_image", "image_url": url}]}])


def schema(value: Any) -> dict[str, Any]:
    form = {"type": "json_schema", "name": "x", "schema": value}
    return asking("hi", text={"format": form})


def nested(depth: int) -> Any:
    value: Any = {"type": "object"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"a": value}}
    return value


HOSTILE = {
    "no input": asking([]),
    "an input that is none": asking(5),
    "an item that is none": asking([5]),
    "an item without content": asking([{"role": "user"}]),
    "an item of an unknown type": asking([{"type": ["x"]}]),
    "ends with the assistant": asking([{"role": "assistant", "content": "hi"}]),
    "a remote image": image("http://127.0.0.1/x.png"),
    "a broken image": image("data:image/png;base64,@@@"),
    "an image that is none": image("data:text/html;base64,PGI+"),
    "a deep schema": schema(nested(150)),
    "a schema that is none": schema({"type": "banana"}),
    "a schema of no object": schema({"type": "array", "items": {}}),
    "a remote schema": schema({"type": "object", "$ref": "http://127.0.0.1/schema.json"}),
    "half a character in a schema": schema({"type": "object", "title": "\ud800"}),
    "half a character": asking("half \ud800"),
    "a deep function": asking(
        "hi", tools=[{"type": "function", "name": "x", "parameters": nested(150)}]
    ),
    "a previous response of no id": asking("hi", previous_response_id="resp_\x00"),
    "a model of no name": asking("hi") | {"model": "\x00"},
    "endless tokens": asking("hi", max_output_tokens=10**30),
    "no tool calls": asking("hi", max_tool_calls=0),
    "a background that is not stored": asking("hi", background=True, store=False),
    "a conversation that is not stored": asking("hi", conversation="x", store=False),
    "two histories": asking("hi", conversation="x", previous_response_id="resp_" + "0" * 32),
    "an unknown extra": asking("hi", include=["secrets"]),
    "log probabilities": asking("hi", top_logprobs=5),
    "a stored prompt": asking("hi", prompt={"id": "pmpt_1"}),
    "too much metadata": asking("hi", metadata={str(n): "x" for n in range(17)}),
    "a long name in metadata": asking("hi", metadata={"x" * 65: "x"}),
    "long metadata": asking("hi", metadata={"x": "x" * 513}),
    "metadata of no text": asking("hi", metadata={"x": 1}),
    "NUL in metadata": asking("hi", metadata={"x": "\x00"}),
    "a tool of another's": asking("hi", tools=[{"type": "web_search"}]),
    "a function twice": asking("hi", tools=[{"type": "function", "name": "x"}] * 2),
    "a choice of no tool": asking("hi", tool_choice={"type": "function", "name": "x"}),
    "a choice of no tools": asking(
        "hi", tool_choice={"type": "allowed_tools", "tools": [{"type": "function", "name": "x"}]}
    ),
    "a hosted tool's choice": asking("hi", tool_choice={"type": "web_search"}),
    "an unknown tier": asking("hi", service_tier="first"),
    "an unknown effort": asking("hi", reasoning={"effort": "heroic"}),
    "a long safety identifier": asking("hi", safety_identifier="x" * 65),
    "a reference to nothing": asking([{"type": "item_reference", "id": "msg_nothing"}]),
    "a reference that is none": asking([{"type": "item_reference", "id": "\x00"}]),
    "a file of nothing": asking([{"role": "user", "content": [{"type": "input_file"}]}]),
    "an image in a result": asking(
        [
            {
                "type": "function_call_output",
                "call_id": "x",
                "output": [{"type": "input_image", "image_url": "http://127.0.0.1/"}],
            }
        ]
    ),
    "a broken id of an image": asking(
        [{"role": "user", "content": [{"type": "input_image", "file_id": "../x"}]}]
    ),
}


PARAMS = {
    "a background that is not stored": "store",
    "a conversation that is not stored": "store",
    "two histories": "previous_response_id",
    "an unknown extra": "include.0",
    "log probabilities": "top_logprobs",
    "a stored prompt": "prompt",
    "too much metadata": "metadata",
    "a tool of another's": "tools.0",
    "a function twice": "tools",
    "a choice of no tool": "tool_choice",
    "a choice of no tools": "tool_choice",
    "an unknown tier": "service_tier",
    "an unknown effort": "reasoning.effort",
    "a long safety identifier": "safety_identifier",
    "a reference to nothing": "input",
    "an image in a result": "input",
    "a broken id of an image": "input",
}


@pytest.mark.parametrize("case", HOSTILE)
async def test_what_has_no_meaning_is_refused_in_openais_form(
    alice: AsyncClient, upstream: Upstream, case: str
) -> None:
    reply = await alice.post(
        URL, content=json.dumps(HOSTILE[case]), headers={"Content-Type": "application/json"}
    )

    assert 400 <= reply.status_code < 500, reply.text
    assert reply.json()["error"]["type"] == "invalid_request_error"
    if case.endswith("schema") and not case.startswith("half"):
        assert reply.json()["error"]["param"] == "text.format"
    if case in PARAMS:
        assert reply.json()["error"]["param"] == PARAMS[case]
    assert upstream.requests == []


# What is asked for


EVERYTHING: dict[str, Any] = {
    "instructions": "Be brief.",
    "metadata": {"a": "b"},
    "temperature": 0.5,
    "top_p": 0.25,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "max_output_tokens": 100,
    "max_tool_calls": 3,
    "parallel_tool_calls": False,
    "tool_choice": "none",
    "truncation": "auto",
    "user": "u-1",
    "safety_identifier": "s-1",
    "prompt_cache_key": "k-1",
    "reasoning": {"effort": "low", "summary": "auto"},
    "store": True,
    "background": False,
}


async def test_what_is_asked_for_is_shown_again(alice: AsyncClient, upstream: Upstream) -> None:
    tool = {"type": "function", "name": "x", "parameters": {"type": "object"}, "strict": None}
    asked = EVERYTHING | {"tools": [tool], "text": {"verbosity": "low"}, "service_tier": "flex"}

    done = (await alice.post(URL, json=asking("hi", **asked, include=list(INCLUDED)))).json()

    assert {name: done[name] for name in EVERYTHING} == EVERYTHING
    assert done["tools"] == [tool | {"description": None}]
    assert done["text"] == {"format": {"type": "text"}, "verbosity": "low"}
    assert done["service_tier"] == "default"  # the one that there is
    Response.model_validate(done)
    sent = upstream.requests[-1].body
    assert (sent["temperature"], sent["top_p"]) == (0.5, 0.25)
    assert (sent["presence_penalty"], sent["frequency_penalty"]) == (0.5, -0.5)
    assert sent["max_completion_tokens"] == 100
    assert sent["reasoning_effort"] == "low"


INCLUDED = (
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
)


async def test_what_is_not_asked_for_has_openais_defaults(
    alice: AsyncClient, upstream: Upstream
) -> None:
    done = (await alice.post(URL, json=asking("hi"))).json()

    # The agent's own where it has some.
    assert (done["temperature"], done["top_p"], done["top_logprobs"]) == (0.3, 1.0, 0)
    assert (done["presence_penalty"], done["frequency_penalty"]) == (0.0, 0.0)
    assert (done["tool_choice"], done["tools"], done["truncation"]) == ("auto", [], "disabled")
    assert done["reasoning"] == {"effort": None, "summary": None}
    assert (done["store"], done["background"], done["metadata"]) == (True, False, {})
    assert (done["conversation"], done["previous_response_id"], done["user"]) == (None, None, None)


async def test_instructions_are_for_one_response_and_system_messages_stay(
    alice: AsyncClient, upstream: Upstream
) -> None:
    said = [says("Talk like a pirate.", "system"), says("one")]
    first = await alice.post(URL, json=asking(said, instructions="Be brief."))
    told = str(upstream.requests[-1].body["messages"])
    assert "pirate" in told and "Be brief." in told

    second = await alice.post(URL, json=asking("two", previous_response_id=first.json()["id"]))
    third = await alice.post(URL, json=asking("three", previous_response_id=second.json()["id"]))

    for request in upstream.requests[1:]:
        told = str(request.body["messages"])
        assert told.count("pirate") == 1 and "Be brief." not in told
    listed = (await alice.get(f"{URL}/{first.json()['id']}/input_items?order=asc")).json()["data"]
    assert [(item["role"], item["content"][0]["text"]) for item in listed] == [
        ("system", "Talk like a pirate."),
        ("user", "one"),
    ]
    assert third.json()["instructions"] is None


async def test_messages_that_come_together_are_one_prompt(
    alice: AsyncClient, upstream: Upstream
) -> None:
    first = (await alice.post(URL, json=asking([says("one"), says("two")]))).json()
    history = [says("one"), says("two"), *first["output"], says("three")]

    await alice.post(URL, json=asking(history))

    roles = [message["role"] for message in upstream.requests[-1].body["messages"][1:]]
    assert roles == ["user", "assistant", "user"]
    assert "one" in str(upstream.requests[-1].body["messages"][1]["content"])


async def test_the_tools_that_may_be_called_can_be_narrowed_down(
    alice: AsyncClient, upstream: Upstream
) -> None:
    tools = [{"type": "function", "name": name} for name in ("one", "two", "three")]
    allowed = [{"type": "function", "name": name} for name in ("one", "three")]

    for mode in ("auto", "required"):
        choice = {"type": "allowed_tools", "mode": mode, "tools": allowed}
        done = (await alice.post(URL, json=asking("hi", tools=tools, tool_choice=choice))).json()
        sent = upstream.requests[-1].body
        offered = {tool["function"]["name"] for tool in sent["tools"]}
        assert {"one", "three"} <= offered and "two" not in offered
        assert done["tool_choice"] == choice
        Response.model_validate(done)
        assert (sent.get("tool_choice", "auto") == "auto") == (mode == "auto")


async def test_a_function_takes_the_place_of_the_servers_tool_of_that_name(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("weather", *weather_in("Tokyo"))
    functions = [{"type": "function", "name": "get_weather", "parameters": {"type": "object"}}]

    done = (await alice.post(URL, json=asking("weather?", tools=functions))).json()
    call = done["output"][-1]
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "hot"}
    body = asking([output], previous_response_id=done["id"], tools=functions)
    answered = (await alice.post(URL, json=body)).json()
    upstream.when("again", *weather_in("Paris"))
    later = await alice.post(URL, json=asking("again", previous_response_id=answered["id"]))

    assert (call["type"], call["name"]) == ("function_call", "get_weather")
    assert answered["output"][0]["content"][0]["text"] == "It is fine there."
    assert [item["type"] for item in later.json()["output"]] == ["message", "mcp_call", "message"]
    assert tools.count("/v1/search") == 1


async def test_a_functions_output_may_come_in_parts(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("door", Reply(calls=(Call("open_door"),)), Reply(text="Open."))
    functions = [{"type": "function", "name": "open_door"}]
    first = (await alice.post(URL, json=asking("door", tools=functions))).json()
    output = {
        "type": "function_call_output",
        "call_id": first["output"][0]["call_id"],
        "output": [{"type": "input_text", "text": "it"}, {"type": "input_text", "text": "opened"}],
    }

    body = asking([output], previous_response_id=first["id"], tools=functions)
    done = (await alice.post(URL, json=body)).json()

    assert done["status"] == "completed", done
    assert upstream.requests[-1].body["messages"][-1]["content"] == "it\nopened"


PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
    "YPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)


async def test_images_and_files_come_by_value_and_by_id(
    alice: AsyncClient, upstream: Upstream
) -> None:
    png = base64.b64decode(PIXEL)
    stored = await alice.post(
        "/v1/files", data={"purpose": "vision"}, files={"file": ("a.png", png, "image/png")}
    )
    assert stored.status_code == 200, stored.text
    url = f"data:image/png;base64,{PIXEL}"
    parts = [
        {"type": "input_text", "text": "Look."},
        {"type": "input_image", "image_url": url, "detail": "low"},
        {"type": "input_image", "file_id": stored.json()["id"]},
        {"type": "input_file", "filename": "a.txt", "file_data": "aGVsbG8="},
    ]

    done = (await alice.post(URL, json=asking([{"role": "user", "content": parts}]))).json()
    items = f"{URL}/{done['id']}/input_items"
    [plain] = (await alice.get(items)).json()["data"]
    [whole] = (await alice.get(f"{items}?include[]=message.input_image.image_url")).json()["data"]

    assert done["status"] == "completed", done
    sent = upstream.requests[-1].body["messages"][-1]["content"]
    urls = [part["image_url"]["url"] for part in sent if part["type"] == "image_url"]
    assert urls == [url, url]
    assert "hello" in str(sent)
    kinds = ["input_text", "input_image", "input_image", "input_file"]
    assert [part["type"] for part in plain["content"]] == kinds
    assert [part.get("image_url") for part in plain["content"][1:3]] == [None, None]
    assert [part.get("image_url") for part in whole["content"][1:3]] == [url, url]
    assert [part["detail"] for part in plain["content"][1:3]] == ["low", "auto"]
