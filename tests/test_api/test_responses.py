"""Responses: a view of the run log, the same to every reader, and only to its owner."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from httpx2 import AsyncClient
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

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
    beyond = await alice.get(f"{URL}/{begun['id']}?stream=true&starting_after=2")

    assert [(event["type"], event["sequence_number"]) for event in seen] == [
        ("response.in_progress", 1)
    ]
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
            await client.post(URL, json=asking("Hi", previous_response_id=response_id)),
        ]
        shown = response_id.removeprefix("resp_")
        return [(reply.status_code, reply.text.replace(shown, "...")) for reply in replies]

    refused = await all_ways(bob, mine)

    assert {status for status, _ in refused} == {404}
    assert refused == await all_ways(bob, missing)
    for odd in ("resp_%00", "resp_%ff", "run_1", "resp_" + "x" * 300):
        assert (await alice.get(f"{URL}/{odd}")).status_code == 404
    assert (await alice.get(f"{URL}/{mine}")).json()["status"] == "completed"


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
    assert upstream.requests == []


# Approvals


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


async def test_a_call_that_needs_approval_waits_for_it_and_is_then_made_once(
    cashier: None, alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    asked = await ask_to_pay(alice, upstream, 5)
    [request] = requests_in(asked)
    assert (asked["status"], request["name"]) == ("in_progress", "pay")
    assert json.loads(request["arguments"]) == {"amount": 5}
    assert tools.calls == []

    done = (await alice.post(URL, json=deciding(asked, decision(request, True)))).json()

    assert (done["id"], done["status"]) == (asked["id"], "completed")
    assert tools.count("/effects/pay-5") == 1
    [call] = [item for item in done["output"] if item["type"] == "mcp_call"]
    assert (call["output"], call["approval_request_id"]) == ("paid 5", request["id"])
    assert Response.model_validate(done).output_text == "So be it."


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


async def test_a_second_decision_is_refused(
    cashier: None, alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    asked = await ask_to_pay(alice, upstream, 5)
    [request] = requests_in(asked)
    await alice.post(URL, json=deciding(asked, decision(request, True)))

    for approve in (True, False):
        again = await alice.post(URL, json=deciding(asked, decision(request, approve)))
        assert again.status_code == 409
    assert tools.count("/effects/pay-5") == 1


async def test_ten_simultaneous_decisions_count_as_one(
    cashier: None, alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    asked = await ask_to_pay(alice, upstream, 5)
    [request] = requests_in(asked)

    replies = await asyncio.gather(
        *(alice.post(URL, json=deciding(asked, decision(request, True))) for _ in range(10))
    )

    assert sorted(reply.status_code for reply in replies) == [200] + [409] * 9
    assert tools.count("/effects/pay-5") == 1


async def test_only_its_owner_decides(
    cashier: None, alice: AsyncClient, bob: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    asked = await ask_to_pay(alice, upstream, 5)
    [request] = requests_in(asked)

    refused = await bob.post(URL, json=deciding(asked, decision(request, True)))

    assert refused.status_code == 404
    assert tools.calls == []
    assert (await alice.get(f"{URL}/{asked['id']}")).json()["status"] == "in_progress"


async def test_a_decision_on_nothing_is_refused(
    cashier: None, alice: AsyncClient, upstream: Upstream
) -> None:
    asked = await ask_to_pay(alice, upstream, 5)
    [request] = requests_in(asked)

    unknown = decision({"id": "mcpr_nothing"}, True)
    assert (await alice.post(URL, json=deciding(asked, unknown))).status_code == 409
    for odd in (decision({"id": "mcpr_\x00"}, True), decision(request, False, reason="\x00")):
        assert (await alice.post(URL, json=deciding(asked, odd))).status_code == 400
    without = {"model": "cashier", "input": [decision(request, True)]}
    assert (await alice.post(URL, json=without)).status_code in (400, 422)


async def test_the_run_goes_on_when_all_is_decided_one_by_one(
    cashier: None, alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    asked = await ask_to_pay(alice, upstream, 5, 7)
    first, second = requests_in(asked)

    still = (await alice.post(URL, json=deciding(asked, decision(first, True)))).json()
    assert (still["status"], tools.calls) == ("in_progress", [])
    done = (await alice.post(URL, json=deciding(asked, decision(second, False)))).json()

    assert done["status"] == "completed"
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

    await until_status(alice, asked["id"], "completed")
    assert sorted(call.path for call in tools.calls) == [f"/effects/pay-{n}" for n in amounts]


async def test_decisions_are_all_taken_or_none(
    cashier: None, alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    asked = await ask_to_pay(alice, upstream, 5)
    [request] = requests_in(asked)
    unknown = decision({"id": "mcpr_nothing"}, True)

    refused = await alice.post(URL, json=deciding(asked, decision(request, True), unknown))

    assert refused.status_code == 409
    assert tools.calls == []
    again = await alice.post(URL, json=deciding(asked, decision(request, False)))
    assert again.json()["status"] == "completed"


async def test_what_was_cancelled_cannot_be_approved_any_more(
    cashier: None, alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    asked = await ask_to_pay(alice, upstream, 5)
    [request] = requests_in(asked)
    cancelled = await alice.post(f"{URL}/{asked['id']}/cancel")
    assert cancelled.json()["status"] == "cancelled"

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
            before = await anext_until_paused(alice, asked["id"])

    with ThreadedServer(settings_of(environ)) as server:
        async with client_of(server.url, token) as alice:
            assert (await alice.get(f"{URL}/{asked['id']}")).json() == asked
            watching = asyncio.create_task(follow(alice, asked["id"]))
            [request] = requests_in(asked)
            done = await alice.post(URL, json=deciding(asked, decision(request, True)))
            events = await asyncio.wait_for(watching, 5)

    assert done.json()["status"] == "completed"
    assert tools.count("/effects/pay-5") == 1
    assert events[: len(before)] == before
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["response"] == done.json()


async def anext_until_paused(client: AsyncClient, response_id: str) -> list[Event]:
    """The events up to the first question."""
    seen: list[Event] = []
    async with client.stream("GET", f"{URL}/{response_id}?stream=true") as reply:
        async for event in events_of(reply.aiter_lines()):
            seen.append(event)
            if event.get("item", {}).get("type") == "mcp_approval_request":
                break
    return seen
