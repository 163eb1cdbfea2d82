"""Responses: the stream of a run, whose it is, and what is not to be stored."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
from httpx2 import AsyncClient
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from pydantic_ai.messages import PartEndEvent, PartStartEvent, TextPart

from app.api.responses import ResponseEncoder
from app.models import Run
from app.services.run_log import Entry, RunEnded, RunRestarted
from tests.responding import (
    OFFICIAL,
    TERMINAL,
    URL,
    Event,
    asking,
    events_of,
    follow,
    says,
    stream,
    weather_in,
)
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream

# The stream of a run


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
