"""A run is told as it was, on every route, also when its events are gone."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from httpx2 import AsyncClient

from tests.asking import calls
from tests.conftest import client_of, settings_of
from tests.extracting import extract, fills
from tests.keeping import AT_ONCE, connected, counts, get, sweep
from tests.responding import URL as RESPONSES
from tests.responding import asking, events_in, id_of, respond
from tests.server import ThreadedServer
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream

JOBS = "/v1/extraction-jobs"
KEY = {"Idempotency-Key": "once"}
DOOR = {"type": "function", "name": "door", "parameters": {"type": "object", "properties": {}}}
NUMBER = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
    "additionalProperties": False,
}
Json = dict[str, Any]

LOOKS = (
    Reply(
        text="Let me look.", reasoning="Hm.", calls=(Call("get_weather", {"location": "Tokyo"}),)
    ),
    Reply(calls=(Call("get_weather", {"location": 1}),)),
    Reply(text="Fine."),
)
MORE = Reply(text="And now?", reasoning="Hm.", calls=(Call("get_weather", {"location": "Tokyo"}),))
CUTS: dict[str, tuple[Json, Reply]] = {  # the settings, and what the model says last
    "max_tool_calls": ({"run_tool_calls": 2}, replace(MORE, calls=MORE.calls * 3)),
    "max_tokens": ({"run_tokens": 20}, Reply(text="Fine.")),
    "max_budget": ({"owner_daily_tokens": 4096 + 12}, MORE),
    "max_time": ({"run_seconds": 1}, MORE),
    "cancelled": ({}, MORE),
    "cancelled while it spoke": ({}, replace(MORE, hang=True, hang_after=9)),
    "failed while it spoke": ({"model_retries": 0}, replace(MORE, drop_after=9)),
}


async def forget_events(environ: dict[str, str]) -> None:
    await sweep(environ, keep_events=AT_ONCE)
    assert (await counts(environ))["events"] == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_a_response_is_the_same_without_its_events(
    alice: AsyncClient,
    environ: dict[str, str],
    upstream: Upstream,
    tools: ToolServer,
    stream: bool,
) -> None:
    upstream.when("weather", *LOOKS)
    upstream.when("fail", Reply(status=400))
    upstream.when("long", Reply(text="one two", finish="length"))
    upstream.when("door", Reply(text="I open it.", calls=(Call("door"),)))
    half = Call("get_weather", '{"location": "To')
    upstream.when("half", Reply(calls=(half, Call("get_weather", ""))), Reply(text="Fine."))
    upstream.when("value", Reply(text='{"n": 1}'))
    value = {"format": {"type": "json_schema", "name": "v", "schema": NUMBER}}
    before = [
        await respond(alice, "weather", stream=stream),
        await respond(alice, "fail", stream=stream),
        await respond(alice, "long", stream=stream),
        await respond(alice, "door", stream=stream, tools=[DOOR]),
        await respond(alice, "half", stream=stream),
        await respond(alice, "value", stream=stream, text=value),
    ]
    paths = [f"{RESPONSES}/{each['id']}" for each in before]
    given = [(await get(alice, f"{path}/input_items")).json() for path in paths]

    await forget_events(environ)

    assert [(await get(alice, path)).json() for path in paths] == before
    for path, was in zip(paths, before, strict=True):
        events = events_in(await get(alice, f"{path}?stream=true"))
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert events[-1]["response"] == was
    assert [(await get(alice, f"{path}/input_items")).json() for path in paths] == given


@pytest.mark.usefixtures("cashier")
async def test_a_run_that_asked_is_as_many_responses_as_before(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("pay", calls("pay", amount=1), calls("pay", amount=2), Reply(text="Paid."))
    response = await respond(alice, "pay", model="cashier")
    before = [response]
    for approve in (True, False):
        question = response["output"][-1]
        answer: Json = {"type": "mcp_approval_response", "approve": approve}
        answer["approval_request_id"] = question["id"]
        here = response["id"]
        response = await respond(alice, [answer], model="cashier", previous_response_id=here)
        before.append(response)
    paths = [f"{RESPONSES}/{each['id']}" for each in before]
    given = [(await get(alice, f"{path}/input_items")).json() for path in paths]

    await forget_events(environ)

    assert [(await get(alice, path)).json() for path in paths] == before
    assert [(await get(alice, f"{path}/input_items")).json() for path in paths] == given
    assert (await alice.get(f"{RESPONSES}/resp_{id_of(response)}_4")).status_code == 404


async def test_an_answer_cut_short_stays_so(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream
) -> None:
    upstream.when("slow", Reply(text="one two three", pace=0.3))
    begun = await alice.post(RESPONSES, json=asking("slow", background=True, stream=False))
    path = f"{RESPONSES}/{begun.json()['id']}"
    await upstream.wait_for_async(1)
    before = (await alice.post(f"{path}/cancel")).json()

    await forget_events(environ)

    assert before["status"] == "cancelled"
    assert (await get(alice, path)).json() == before


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("cut", CUTS)
async def test_a_run_that_was_cut_short_is_the_same_without_its_events(
    environ: dict[str, str],
    bearer: Any,
    upstream: Upstream,
    tools: ToolServer,
    cut: str,
    stream: bool,
) -> None:
    changes, last = CUTS[cut]
    upstream.when("weather", Reply(calls=LOOKS[1].calls), last)
    tools.behave("/v1/search", hang=cut in ("cancelled", "max_time"))
    body: Json = {"model": "assistant", "stream": stream}
    body["messages"] = [{"role": "user", "content": "weather"}]
    with ThreadedServer(settings_of(environ, **changes)) as server:
        async with client_of(server.url, await bearer("Alice")) as alice:

            async def ask() -> list[Any]:
                chat = await alice.post("/v1/chat/completions", json=body, headers=KEY)
                return said(chat.text) if stream else [chat.status_code, chat.json()]

            asking = asyncio.create_task(ask())
            await upstream.wait_for_async(1 if cut == "max_budget" else 2)
            async with connected(environ) as connection:
                [row] = await connection.exec_driver_sql("SELECT id FROM runs")
            path = f"{RESPONSES}/resp_{row.id}"
            if cut == "cancelled":
                await tools.wait_for_async("/v1/search", 1)
            if cut == "cancelled while it spoke":
                await asyncio.sleep(0.3)  # for it to say some of it
            if cut.startswith("cancelled"):
                await alice.post(f"{path}/cancel")
            before = await asking, (await get(alice, path)).json()
            events = said((await get(alice, f"{path}?stream=true")).text)

            await forget_events(environ)

            assert (await ask(), (await get(alice, path)).json()) == before
            assert said((await get(alice, f"{path}?stream=true")).text) == events


async def test_a_repeated_post_is_answered_in_every_protocol_without_its_events(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("weather", *LOOKS)
    message = {"role": "user", "content": "weather"}
    chat: Json = {"model": "assistant", "messages": [message]}
    page = {"role": "user", "id": "u1", "parts": [{"type": "text", "text": "weather"}]}
    thread: Json = {"threadId": "t", "runId": "r", "state": {}, "tools": [], "context": []}
    posts: list[tuple[str, Json]] = [
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", chat | {"stream": True}),
        (RESPONSES, asking("weather")),
        (RESPONSES, asking("weather", stream=True)),
        ("/api/chat", {"id": "c", "messages": [page], "trigger": "submit-message"}),
        (
            "/ag-ui/assistant",
            thread | {"messages": [{**message, "id": "u1"}], "forwardedProps": {}},
        ),
    ]

    async def post_all() -> list[str]:
        replies = [
            await alice.post(path, json=body, headers={"Idempotency-Key": f"key {n}"})
            for n, (path, body) in enumerate(posts)
        ]
        assert [reply.status_code for reply in replies] == [200] * len(posts)
        return [reply.text for reply in replies]

    before = await post_all()
    asked = len(upstream.requests)
    reloaded = (await get(alice, "/api/chat/c")).json()

    await forget_events(environ)
    after = await post_all()

    assert len(upstream.requests) == asked
    for n in (0, 2):
        assert json.loads(after[n]) == json.loads(before[n])
    for was, now in zip(before, after, strict=True):
        assert said(now) == said(was)
    assert (await get(alice, "/api/chat/c")).json() == reloaded
    assert (await alice.get("/api/chat/c/stream")).status_code == 204


def said(stream: str) -> list[Any]:
    """All that is said in a stream, whatever its pieces: texts joined, results as they are."""
    found: list[Any] = []
    for line in stream.splitlines():
        data = line.removeprefix("data: ")
        if data == line or not data.startswith("{"):
            continue
        event = json.loads(data)
        for delta in [event, *(choice["delta"] for choice in event.get("choices", ()))]:
            for name in ("delta", "content", "reasoning_content", "inputTextDelta", "output"):
                if (value := delta.get(name)) not in (None, ""):
                    joins = bool(found) and isinstance(value, str) and found[-1][0] == name
                    found[-1:] = (
                        [(name, found[-1][1] + value)]
                        if joins
                        else [
                            *found[-1:],
                            (name, value),
                        ]
                    )
    return found


async def test_nobody_goes_on_in_the_midst_of_a_stream_that_is_gone(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream
) -> None:
    upstream.when("Ada", fills({"name": "Ada", "age": 36}))
    page = {"role": "user", "id": "u1", "parts": [{"type": "text", "text": "Hello"}]}
    chat: Json = {"model": "assistant", "messages": [{"role": "user", "content": "Hello"}]}
    response = f"{RESPONSES}/{(await respond(alice))['id']}?stream=true"
    extraction = f"/v1/extractions/{(await extract(alice)).json()['id']}"
    await alice.post("/api/chat", json={"id": "c", "messages": [page]})
    await alice.post("/v1/chat/completions", json=chat | {"stream": True}, headers=KEY)
    last = {"Last-Event-ID": "2"}

    await forget_events(environ)

    refused = [
        await alice.get(f"{response}&starting_after=1"),
        await alice.get(response, headers=last),
        await alice.get(f"{extraction}/events", headers=last),
        await alice.get("/api/chat/c/stream", headers=last),
        await alice.post("/v1/chat/completions", json=chat | {"stream": True}, headers=KEY | last),
    ]
    assert [reply.status_code for reply in refused] == [410] * len(refused)
    assert {reply.json()["error"]["code"] for reply in refused} == {"events_gone"}
    assert (await alice.get(response)).status_code == 200


async def test_extractions_and_jobs_are_answered_without_their_events(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream
) -> None:
    upstream.when("Ada", fills({"name": "Ada", "age": 36}))
    upstream.when("Bob", fills({"name": "Bob", "age": -1}))
    good = (await extract(alice)).json()
    bad = (await extract(alice, "Bob is young.")).json()
    items = [{"custom_id": "1", "text": "Ada is 36."}]
    body = {"schema": {"type": "object", "properties": {"name": {"type": "string"}}}}
    job = (await alice.post(JOBS, json=body | {"items": items})).json()
    told = events_in(await get(alice, f"{JOBS}/{job['id']}/events"))
    results = (await get(alice, f"{JOBS}/{job['id']}/results")).text
    paths = [f"/v1/extractions/{each}" for each in (good["id"], bad["error"]["id"])]

    await forget_events(environ)

    again = [await alice.get(path) for path in paths]
    assert again[0].json() == good
    assert again[1].json()["error"]["attempts"] == bad["error"]["attempts"]
    assert (await get(alice, f"{paths[0]}/view")).status_code == 200
    ends = [events_in(await get(alice, f"{path}/events")) for path in paths]
    assert ends[0] == [{"id": good["id"]}, good]
    assert ends[1][-1]["error"]["attempts"] == bad["error"]["attempts"]

    events = f"{JOBS}/{job['id']}/events"
    end = await get(alice, events, **{"Last-Event-ID": "99"})
    assert events_in(end) == told[-1:]
    assert (await alice.get(events, headers={"Last-Event-ID": "1"})).status_code == 204
    assert (await get(alice, f"{JOBS}/{job['id']}/results")).text == results
