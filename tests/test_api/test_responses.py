"""Responses: a view of the run log, the same to every reader, and only to its owner."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from httpx2 import AsyncClient
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from pydantic_ai.messages import PartEndEvent, PartStartEvent, TextPart

from app.api.responses import ResponseEncoder
from app.models import Run
from app.services.run_log import Entry, RunEnded, RunRestarted
from tests.conftest import client_of, settings_of
from tests.server import ThreadedServer
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream

URL = "/v1/responses"
Event = dict[str, Any]
OFFICIAL: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def asking(said: Any, /, **more: Any) -> dict[str, Any]:
    return {"model": "assistant", "input": said, **more}


async def events_of(lines: AsyncIterator[str]) -> AsyncIterator[Event]:
    """The events; their ids and names must be what their data says."""
    event_id = name = None
    async for line in lines:
        if line.startswith("id: "):
            event_id = int(line.removeprefix("id: "))
        elif line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            assert (event["sequence_number"], event["type"]) == (event_id, name)
            yield event


async def stream(client: AsyncClient, **body: Any) -> list[Event]:
    async with client.stream("POST", URL, json=body | {"stream": True}) as reply:
        assert reply.status_code == 200, await reply.aread()
        return [event async for event in events_of(reply.aiter_lines())]


async def follow(
    client: AsyncClient, response_id: str, after: int | None = None, **headers: str
) -> list[Event]:
    url = f"{URL}/{response_id}?stream=true"
    url += "" if after is None else f"&starting_after={after}"
    async with client.stream("GET", url, headers=headers) as reply:
        assert reply.status_code == 200, await reply.aread()
        return [event async for event in events_of(reply.aiter_lines())]


async def until_status(client: AsyncClient, response_id: str, *statuses: str) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while True:
            got = (await client.get(f"{URL}/{response_id}")).json()
            if got["status"] in statuses:
                return got
            await asyncio.sleep(0.02)


def weather_in(*cities: str) -> tuple[Reply, Reply]:
    calls = tuple(Call("get_weather", {"location": city}) for city in cities)
    return Reply(text="Let me look.", calls=calls), Reply(text="It is fine there.")


# The stream of a run


TERMINAL = ("response.completed", "response.incomplete", "response.failed")


async def test_every_event_is_as_openai_documents_it(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("weather", *weather_in("Tokyo"))

    events = await stream(alice, **asking("weather?"))

    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        OFFICIAL.validate_python(event)
    assert [event["type"] for event in events if event["type"] in TERMINAL] == [TERMINAL[0]]


async def test_a_stream_is_taken_up_again_after_any_event(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("weather", *weather_in("Tokyo", "Paris"))
    events = await stream(alice, **asking("weather?"))
    response_id = events[-1]["response"]["id"]

    assert await follow(alice, response_id) == events
    for event in events:
        after = event["sequence_number"]
        assert await follow(alice, response_id, after) == events[after + 1 :]
        # A browser comes back to the address that it had, with the header.
        again = await follow(alice, response_id, 0, **{"Last-Event-ID": str(after)})
        assert again == events[after + 1 :]


async def test_a_run_that_was_not_streamed_can_be(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("weather", *weather_in("Tokyo"))
    done = (await alice.post(URL, json=asking("weather?"))).json()

    events = await follow(alice, done["id"])

    assert events[-1]["response"] == done
    assert (await alice.get(f"{URL}/{done['id']}")).json() == done


async def test_a_cursor_that_is_none_is_refused(alice: AsyncClient, upstream: Upstream) -> None:
    events = await stream(alice, **asking("Hello"))
    url = f"{URL}/{events[-1]['response']['id']}?stream=true"

    for cursor in (str(len(events)), "-1", "x", "1.5", "9" * 30):
        for ask in (
            alice.get(f"{url}&starting_after={cursor}"),
            alice.get(url, headers={"Last-Event-ID": cursor}),
        ):
            refused = await ask
            assert refused.status_code == 400, refused.text
            assert refused.json()["error"]["type"] == "invalid_request_error"


async def test_the_opening_events_are_there_before_the_model_answers(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("slow", Reply(text="never", delay=30))
    begun = (await alice.post(URL, json=asking("slow", background=True))).json()
    seen: list[Event] = []

    async with alice.stream("GET", f"{URL}/{begun['id']}?stream=true&starting_after=0") as reply:
        assert reply.status_code == 200
        async for event in events_of(reply.aiter_lines()):
            seen.append(event)
            break
    beyond = await alice.get(f"{URL}/{begun['id']}?stream=true&starting_after=3")

    assert [(event["type"], event["sequence_number"]) for event in seen] == [("response.queued", 1)]
    assert beyond.status_code == 400
    await alice.post(f"{URL}/{begun['id']}/cancel")


async def test_a_cancelled_runs_stream_ends_once_and_says_so(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("slow", Reply(text="one two three", hang=True))
    begun = (await alice.post(URL, json=asking("slow", background=True))).json()
    watching = asyncio.create_task(follow(alice, begun["id"]))
    await upstream.wait_for_async(1)

    cancelled = (await alice.post(f"{URL}/{begun['id']}/cancel")).json()
    events = await asyncio.wait_for(watching, 5)

    ends = [event for event in events if event["type"] in TERMINAL]
    assert [event["type"] for event in ends] == ["response.incomplete"]
    assert events[-1] == ends[0]
    assert ends[0]["response"] == cancelled
    assert cancelled["status"] == "cancelled"


async def test_cancelling_what_has_ended_gives_the_final_object(
    alice: AsyncClient, upstream: Upstream
) -> None:
    done = (await alice.post(URL, json=asking("Hello"))).json()

    again = await alice.post(f"{URL}/{done['id']}/cancel")

    assert (again.status_code, again.json()) == (200, done)


# Whose run it is, and what follows it


async def test_what_continues_a_run_that_still_goes_waits_behind_it(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("first", Reply(text="one two", delay=1))
    first = (await alice.post(URL, json=asking("first", background=True))).json()

    second = await alice.post(URL, json=asking("second", previous_response_id=first["id"]))

    assert second.json()["status"] == "completed"
    said = [message["content"] for message in upstream.requests[-1].body["messages"][1:]]
    assert said == ["first", "one two", "second"]
    assert (await alice.get(f"{URL}/{first['id']}")).json()["status"] == "completed"


def says(text: str, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": text}


def reference(response_id: str) -> dict[str, Any]:
    """To the first part of the first reply of a response."""
    return {"type": "item_reference", "id": f"msg_{response_id.removeprefix('resp_')}_1_0"}


async def test_a_strangers_response_looks_like_a_missing_one(
    alice: AsyncClient, bob: AsyncClient, upstream: Upstream
) -> None:
    mine = (await alice.post(URL, json=asking("Hello"))).json()["id"]
    missing = "resp_" + "0" * 32

    async def all_ways(client: AsyncClient, response_id: str) -> list[tuple[int, str]]:
        replies = [
            await client.get(f"{URL}/{response_id}"),
            await client.get(f"{URL}/{response_id}?stream=true"),
            await client.post(f"{URL}/{response_id}/cancel"),
            await client.delete(f"{URL}/{response_id}"),
            await client.get(f"{URL}/{response_id}/input_items"),
            await client.post(URL, json=asking("Hi", previous_response_id=response_id)),
            await client.post(URL, json=asking([reference(response_id), says("Hi")])),
        ]
        shown = response_id.removeprefix("resp_")
        return [(reply.status_code, reply.text.replace(shown, "...")) for reply in replies]

    refused = await all_ways(bob, mine)

    assert [status for status, _ in refused] == [404, 404, 404, 404, 404, 400, 404]
    assert refused == await all_ways(bob, missing)
    for odd in ("resp_%00", "resp_%ff", "run_1", "resp_" + "x" * 300, f"{mine}_1", f"{mine}_2"):
        assert (await alice.get(f"{URL}/{odd}")).status_code == 404
    assert (await alice.get(f"{URL}/{mine}")).json()["status"] == "completed"


async def test_a_message_to_a_busy_conversation_waits_is_refused_or_goes_first(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("first", Reply(text="one two", hang=True))
    name = (await alice.post("/v1/conversations", json={})).json()["id"]
    here = {"conversation": name}
    first = (await alice.post(URL, json=asking("first", background=True, **here))).json()
    await upstream.wait_for_async(1)

    def says_now(text: str, strategy: str) -> Any:
        headers = {"X-Multitask-Strategy": strategy}
        return alice.post(URL, json=asking(text, **here), headers=headers)

    refused = await says_now("second", "reject")
    added = await alice.post(f"/v1/conversations/{name}/items", json={"items": [says("x")]})
    waiting = asyncio.create_task(says_now("third", "enqueue"))
    done = await says_now("fourth", "interrupt")

    assert (refused.status_code, added.status_code) == (409, 409)
    assert done.json()["status"] == "completed"
    assert (await alice.get(f"{URL}/{first['id']}")).json()["status"] == "cancelled"
    await waiting
    assert (await says_now("fifth", "anyhow")).status_code == 400


async def test_equal_requests_with_one_key_are_one_run(
    alice: AsyncClient, upstream: Upstream
) -> None:
    headers = {"Idempotency-Key": "once"}

    replies = await asyncio.gather(
        *(alice.post(URL, json=asking("Hello"), headers=headers) for _ in range(20))
    )
    other = await alice.post(URL, json=asking("Goodbye"), headers=headers)

    assert {reply.status_code for reply in replies} == {200}
    assert len({reply.json()["id"] for reply in replies}) == 1
    assert len(upstream.requests) == 1
    assert other.status_code == 409
    assert other.json()["error"]["code"] == "idempotency_conflict"


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


# What is not to be stored


@pytest.mark.parametrize("streamed", [False, True])
async def test_what_is_not_to_be_stored_is_gone_once_it_was_told(
    alice: AsyncClient, upstream: Upstream, streamed: bool
) -> None:
    if streamed:
        done = (await stream(alice, **asking("Hello", store=False)))[-1]["response"]
    else:
        done = (await alice.post(URL, json=asking("Hello", store=False))).json()

    assert (done["status"], done["store"]) == ("completed", False)
    await is_gone(alice, done["id"])


async def is_gone(client: AsyncClient, response_id: str) -> None:
    for path in ("", "?stream=true", "/input_items"):
        assert (await client.get(f"{URL}/{response_id}{path}")).status_code == 404
    assert (await client.post(f"{URL}/{response_id}/cancel")).status_code == 404
    assert (await client.delete(f"{URL}/{response_id}")).status_code == 404
    on = await client.post(URL, json=asking("And?", previous_response_id=response_id))
    assert on.json()["error"]["code"] == "previous_response_not_found"
    again = await client.post(URL, json=asking([reference(response_id), says("And?")]))
    assert again.status_code == 404


async def test_what_is_not_to_be_stored_is_out_of_reach_while_it_goes(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("slow", Reply(text="one two three", pace=0.3))
    body = asking("slow", store=False, stream=True)
    event: Event = {}

    async with alice.stream("POST", URL, json=body) as reply:
        async for event in events_of(reply.aiter_lines()):
            if event["type"] == "response.created":
                await is_gone(alice, event["response"]["id"])

    assert event["response"]["status"] == "completed"


@pytest.mark.parametrize("streamed", [False, True])
async def test_nobody_goes_on_with_what_its_only_reader_left(
    alice: AsyncClient, upstream: Upstream, streamed: bool
) -> None:
    upstream.when("slow", Reply(text="one two three", hang=True))
    body = asking("slow", store=False, stream=streamed)

    asked = asyncio.create_task(alice.post(URL, json=body))
    await upstream.wait_for_async(1)
    asked.cancel()

    await upstream.wait_until_async(lambda: upstream.requests[0].aborted, 3)


async def test_functions_work_without_anything_being_stored(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("door", Reply(calls=(Call("open_door"),)), Reply(text="Open."))
    more = {"tools": [{"type": "function", "name": "open_door"}], "store": False}
    history: list[dict[str, Any]] = [says("door")]
    first = (await alice.post(URL, json=asking(history, **more))).json()
    call = first["output"][0]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "opened"}
    history += [call, result]

    second = (await alice.post(URL, json=asking(history, **more))).json()

    assert second["output"][0]["content"][0]["text"] == "Open."
    for response in (first, second):
        await is_gone(alice, response["id"])


# A run that a crash interrupted, as its log tells of it


def log_of(*events: Any) -> list[Entry]:
    return [Entry(seq, event) for seq, event in enumerate(events, 1)]


def text(said: str, index: int = 0) -> list[Any]:
    return [
        PartStartEvent(index=index, part=TextPart(said)),
        PartEndEvent(index=index, part=TextPart(said)),
    ]


def test_what_a_restart_takes_back_keeps_its_place_in_the_stream_but_not_in_the_output() -> None:
    run = Run(
        id="0" * 32,
        program="assistant",
        status="completed",
        options="{}",
        created_at=datetime.now(UTC),
    )
    entries = log_of(
        *text("Let me see."),
        PartStartEvent(index=0, part=TextPart("It is fi")),
        RunRestarted(replies=1),
        *text("It is fine."),
        RunEnded(status="completed", at=1, finish_reason="stop"),
    )
    encoder = ResponseEncoder(run)
    state = ResponseStreamState(input_tools=omit, text_format=omit)

    events = [event for entry in entries for event in encoder.feed(entry)]
    for event in events:
        state.handle_event(OFFICIAL.validate_python(event))

    shown = [e["item"]["id"] for e in events if e["type"] == "response.output_item.added"]
    indexes = [e["output_index"] for e in events if e["type"] == "response.output_item.added"]
    assert indexes == [0, 1, 2]
    assert shown[1] != shown[2]  # what was begun is no part of what took its place
    said = [item["content"][0]["text"] for item in events[-1]["response"]["output"]]
    assert said == ["Let me see.", "It is fine."]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


# Approvals: a question ends a response, and the answers begin the next


async def ask_to_pay(client: AsyncClient, upstream: Upstream, *amounts: int) -> dict[str, Any]:
    calls = tuple(Call("pay", {"amount": amount}) for amount in amounts)
    upstream.when("pay", Reply(calls=calls), Reply(text="So be it."))
    reply = await client.post(URL, json=asking("pay") | {"model": "cashier"})
    assert reply.status_code == 200, reply.text
    return reply.json()


def requests_in(response: dict[str, Any]) -> list[dict[str, Any]]:
    return [item for item in response["output"] if item["type"] == "mcp_approval_request"]


def decision(request: dict[str, Any], approve: bool, **more: Any) -> dict[str, Any]:
    return {
        "type": "mcp_approval_response",
        "approval_request_id": request["id"],
        "approve": approve,
        **more,
    }


def deciding(response: dict[str, Any], *decisions: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "model": "cashier",
        "previous_response_id": response["id"],
        "input": list(decisions),
        **more,
    }


def next_of(response: dict[str, Any]) -> str:
    """The id of the response that goes on behind the first."""
    return f"{response['id']}_2"


async def test_a_call_that_needs_approval_waits_for_it_and_is_then_made_once(
    cashier: None, alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    asked = await ask_to_pay(alice, upstream, 5)
    [request] = asked["output"]
    assert (asked["status"], request["type"]) == ("completed", "mcp_approval_request")
    assert (request["name"], json.loads(request["arguments"])) == ("pay", {"amount": 5})
    assert tools.calls == []

    done = (await alice.post(URL, json=deciding(asked, decision(request, True)))).json()

    assert (done["id"], done["previous_response_id"]) == (next_of(asked), asked["id"])
    assert done["status"] == "completed"
    assert tools.count("/effects/pay-5") == 1
    assert [item["type"] for item in done["output"]] == ["mcp_call", "message"]
    call = done["output"][0]
    assert (call["output"], call["approval_request_id"]) == ("paid 5", request["id"])
    assert Response.model_validate(done).output_text == "So be it."
    assert (await alice.get(f"{URL}/{asked['id']}")).json() == asked
    assert (await alice.get(f"{URL}/{done['id']}")).json() == done


async def test_while_it_waits_the_next_response_is_queued(
    cashier: None, alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    asked = await ask_to_pay(alice, upstream, 5)

    waiting = (await alice.get(f"{URL}/{next_of(asked)}")).json()

    assert (waiting["status"], waiting["output"], waiting["usage"]) == ("queued", [], None)
    assert (await alice.get(f"{URL}/{asked['id']}_3")).status_code == 404


@pytest.mark.parametrize("name_it", ["previous response", "nothing"])
async def test_an_approval_is_known_by_its_id_alone(
    cashier: None, alice: AsyncClient, upstream: Upstream, tools: ToolServer, name_it: str
) -> None:
    asked = await ask_to_pay(alice, upstream, 5)
    [request] = requests_in(asked)
    body = deciding(asked, decision(request, True))
    if name_it == "nothing":
        del body["previous_response_id"]
        body["input"] = [says("pay"), request, decision(request, True)]

    done = (await alice.post(URL, json=body)).json()

    assert (done["id"], done["status"]) == (next_of(asked), "completed")
    assert tools.count("/effects/pay-5") == 1


async def test_an_approval_of_another_response_is_refused(
    cashier: None, alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    first = await ask_to_pay(alice, upstream, 5)
    second = await ask_to_pay(alice, upstream, 7)
    [request] = requests_in(first)
    chat = (await alice.post("/v1/conversations", json={})).json()["id"]

    refused = await alice.post(URL, json=deciding(second, decision(request, True)))
    body = deciding(second, decision(request, True), previous_response_id=None, conversation=chat)
    not_here = await alice.post(URL, json=body)

    assert (refused.status_code, not_here.status_code) == (400, 400)
    assert refused.json()["error"]["param"] == "previous_response_id"
    assert not_here.json()["error"]["param"] == "conversation"
    assert tools.calls == []


async def test_a_stream_of_the_answer_begins_anew_and_has_what_was_asked_for_alone(
    cashier: None, alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("pay", Reply(text="Shall I?", calls=(Call("pay", {"amount": 5}),)), Reply("Ok."))
    before = await stream(alice, **asking("pay") | {"model": "cashier"})
    asked = before[-1]["response"]
    [request] = requests_in(asked)

    events = await stream(alice, **deciding(asked, decision(request, True)))

    for each in (before, events):
        assert [event["sequence_number"] for event in each] == list(range(len(each)))
        assert [event["type"] for event in each if event["type"] in TERMINAL] == [TERMINAL[0]]
        for event in each:
            OFFICIAL.validate_python(event)
    assert [item["type"] for item in asked["output"]] == ["message", "mcp_approval_request"]
    done = events[-1]["response"]
    assert [item["type"] for item in done["output"]] == ["mcp_call", "message"]
    assert await follow(alice, asked["id"]) == before
    assert await follow(alice, done["id"], 3) == events[4:]


async def test_a_denied_call_is_not_made_and_the_model_is_told_why(
    cashier: None, alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    asked = await ask_to_pay(alice, upstream, 5)
    [request] = requests_in(asked)

    answer = decision(request, False, reason="Too much.")
    done = (await alice.post(URL, json=deciding(asked, answer))).json()

    assert done["status"] == "completed"
    assert tools.calls == []
    assert upstream.requests[-1].body["messages"][-1]["content"] == "Too much."
    [call] = [item for item in done["output"] if item["type"] == "mcp_call"]
    assert call["error"]["content"] == [{"type": "text", "text": "Too much."}]


@pytest.mark.parametrize("approve", [True, False])
async def test_the_input_of_the_next_response_is_the_answer(
    cashier: None, alice: AsyncClient, upstream: Upstream, tools: ToolServer, approve: bool
) -> None:
    asked = await ask_to_pay(alice, upstream, 5)
    [request] = requests_in(asked)
    answer = decision(request, approve, reason=None if approve else "Too much.")
    done = (await alice.post(URL, json=deciding(asked, answer))).json()

    listed = (await alice.get(f"{URL}/{done['id']}/input_items")).json()["data"]

    assert [item | {"id": None} for item in listed] == [
        {"reason": None, **answer, "id": None},
    ]


async def test_a_message_may_come_along_with_an_answer(
    cashier: None, alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    asked = await ask_to_pay(alice, upstream, 5)
    [request] = requests_in(asked)
    upstream.when("thank", Reply(text="You are welcome."))

    done = await alice.post(URL, json=deciding(asked, decision(request, True), says("thank you")))

    assert [item["type"] for item in done.json()["output"]] == ["message"]
    said = [message["role"] for message in upstream.requests[-1].body["messages"]]
    assert said[-5:] == ["user", "assistant", "tool", "assistant", "user"]
    assert tools.count("/effects/pay-5") == 1
    assert (await alice.get(f"{URL}/{next_of(asked)}")).json()["status"] == "completed"


async def test_a_second_decision_is_the_first_or_refused(
    cashier: None, alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    asked = await ask_to_pay(alice, upstream, 5)
    [request] = requests_in(asked)
    first = await alice.post(URL, json=deciding(asked, decision(request, True)))

    again = await alice.post(URL, json=deciding(asked, decision(request, True)))
    contrary = await alice.post(URL, json=deciding(asked, decision(request, False)))

    assert again.json() == first.json()
    assert contrary.status_code == 409
    assert tools.count("/effects/pay-5") == 1


async def test_ten_simultaneous_decisions_count_as_one(
    cashier: None, alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    asked = await ask_to_pay(alice, upstream, 5)
    [request] = requests_in(asked)

    replies = await asyncio.gather(
        *(alice.post(URL, json=deciding(asked, decision(request, True))) for _ in range(10))
    )

    assert all(reply.json() == replies[0].json() for reply in replies)
    assert replies[0].json()["status"] == "completed"
    assert tools.count("/effects/pay-5") == 1


async def test_only_its_owner_decides(
    cashier: None, alice: AsyncClient, bob: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    asked = await ask_to_pay(alice, upstream, 5)
    [request] = requests_in(asked)
    body = deciding(asked, decision(request, True))

    by_response = await bob.post(URL, json=body)
    by_key = await bob.post(URL, json=body | {"previous_response_id": None})

    assert (by_response.status_code, by_key.status_code) == (400, 409)
    assert by_response.json()["error"]["code"] == "previous_response_not_found"
    assert tools.calls == []
    assert (await alice.get(f"{URL}/{next_of(asked)}")).json()["status"] == "queued"


async def test_a_decision_on_nothing_is_refused(
    cashier: None, alice: AsyncClient, upstream: Upstream
) -> None:
    asked = await ask_to_pay(alice, upstream, 5)
    [request] = requests_in(asked)

    unknown = deciding(asked, decision({"id": "mcpr_nothing"}, True))
    assert (await alice.post(URL, json=unknown)).status_code == 400
    without = unknown | {"previous_response_id": None}
    assert (await alice.post(URL, json=without)).status_code == 409
    for odd in (decision({"id": "mcpr_\x00"}, True), decision(request, False, reason="\x00")):
        assert (await alice.post(URL, json=deciding(asked, odd))).status_code == 400


async def test_the_run_goes_on_when_all_is_decided_one_by_one(
    cashier: None, alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    asked = await ask_to_pay(alice, upstream, 5, 7)
    first, second = requests_in(asked)

    still = (await alice.post(URL, json=deciding(asked, decision(first, True)))).json()
    assert (still["status"], tools.calls) == ("queued", [])
    done = (await alice.post(URL, json=deciding(still, decision(second, False)))).json()

    assert (done["id"], done["status"]) == (still["id"], "completed")
    assert [call.path for call in tools.calls] == ["/effects/pay-5"]


async def test_the_run_goes_on_when_all_is_decided_at_the_same_moment(
    cashier: None, alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    amounts = range(1, 9)
    asked = await ask_to_pay(alice, upstream, *amounts)

    await asyncio.gather(
        *(
            alice.post(URL, json=deciding(asked, decision(request, True), background=True))
            for request in requests_in(asked)
        )
    )

    await until_status(alice, next_of(asked), "completed")
    assert sorted(call.path for call in tools.calls) == [f"/effects/pay-{n}" for n in amounts]


async def test_decisions_are_all_taken_or_none(
    cashier: None, alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    asked = await ask_to_pay(alice, upstream, 5)
    [request] = requests_in(asked)
    unknown = decision({"id": "mcpr_nothing"}, True)

    body = deciding(asked, decision(request, True), unknown) | {"previous_response_id": None}
    refused = await alice.post(URL, json=body)

    assert refused.status_code == 409
    assert tools.calls == []
    again = await alice.post(URL, json=deciding(asked, decision(request, False)))
    assert again.json()["status"] == "completed"


async def test_a_run_may_ask_more_than_once(
    cashier: None, alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    replies = [Reply(calls=(Call("pay", {"amount": amount}),)) for amount in (1, 2)]
    upstream.when("pay", *replies, Reply(text="Both are paid."))
    ids: list[str] = []

    reply = (await alice.post(URL, json=asking("pay") | {"model": "cashier"})).json()
    while questions := requests_in(reply):
        ids.append(reply["id"])
        answers = [decision(question, True) for question in questions]
        reply = (await alice.post(URL, json=deciding(reply, *answers))).json()

    assert ids == [ids[0], f"{ids[0]}_2"]
    assert reply["id"] == f"{ids[0]}_3"
    assert [call.path for call in tools.calls] == ["/effects/pay-1", "/effects/pay-2"]


async def test_what_was_cancelled_cannot_be_approved_any_more(
    cashier: None, alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    asked = await ask_to_pay(alice, upstream, 5)
    [request] = requests_in(asked)
    cancelled = await alice.post(f"{URL}/{asked['id']}/cancel")
    assert cancelled.json()["status"] == "cancelled"
    assert (await alice.get(f"{URL}/{next_of(asked)}")).json()["status"] == "cancelled"

    refused = await alice.post(URL, json=deciding(asked, decision(request, True)))

    assert refused.status_code == 409
    assert tools.calls == []


async def test_a_new_message_after_a_cancelled_approval_goes_on(
    cashier: None, alice: AsyncClient, upstream: Upstream
) -> None:
    asked = await ask_to_pay(alice, upstream, 5)
    await alice.post(f"{URL}/{asked['id']}/cancel")

    body = asking("Never mind.", previous_response_id=asked["id"]) | {"model": "cashier"}
    done = await alice.post(URL, json=body)

    assert done.json()["status"] == "completed", done.text
    messages = upstream.requests[-1].body["messages"]
    called = [call["id"] for message in messages for call in message.get("tool_calls") or ()]
    assert called == [m["tool_call_id"] for m in messages if m["role"] == "tool"]


async def test_an_approval_is_still_awaited_after_a_restart(
    cashier: None,
    environ: dict[str, str],
    bearer: Callable[..., Any],
    upstream: Upstream,
    tools: ToolServer,
) -> None:
    with ThreadedServer(settings_of(environ)) as server:
        token = await bearer("Alice")
        async with client_of(server.url, token) as alice:
            asked = await ask_to_pay(alice, upstream, 5)
            before = await follow(alice, asked["id"])

    with ThreadedServer(settings_of(environ)) as server:
        async with client_of(server.url, token) as alice:
            assert (await alice.get(f"{URL}/{asked['id']}")).json() == asked
            assert await follow(alice, asked["id"]) == before
            watching = asyncio.create_task(follow(alice, next_of(asked)))
            [request] = requests_in(asked)
            done = await alice.post(URL, json=deciding(asked, decision(request, True)))
            events = await asyncio.wait_for(watching, 5)

    assert done.json()["status"] == "completed"
    assert tools.count("/effects/pay-5") == 1
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["response"] == done.json()
