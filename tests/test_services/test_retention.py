"""What is gone after its time, and what stays as it was for everybody who asks later."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from httpx2 import AsyncClient, Response
from sqlalchemy import delete, update

from app.models import Conversation, File, Run
from app.services.jobs import DISCARDED
from tests.asking import calls
from tests.conftest import client_of, settings_of
from tests.extracting import extract, fills
from tests.keeping import AT_ONCE, age, connected, counts, everything, sweep
from tests.plugins import plugged_in
from tests.server import ROOT, ThreadedServer
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream

RESPONSES = "/v1/responses"
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


@pytest.fixture
def cashier() -> Iterator[None]:
    """The agent `cashier`, whose tool `pay` needs a person's approval."""
    with plugged_in(ROOT / "tests" / "test_api"):
        yield


def asking(said: Any, /, **more: Any) -> Json:
    return {"model": "assistant", "input": said, **more}


async def respond(client: AsyncClient, said: Any = "Hello", /, **more: Any) -> Json:
    """The response, streamed or not."""
    reply = await client.post(RESPONSES, json=asking(said, **more))
    assert reply.status_code == 200, reply.text
    return events_in(reply)[-1]["response"] if more.get("stream") else reply.json()


def events_in(reply: Response) -> list[Json]:
    assert reply.status_code == 200, reply.text
    lines = (line.removeprefix("data: ") for line in reply.text.splitlines())
    return [json.loads(line) for line in lines if line.startswith("{")]


async def get(client: AsyncClient, path: str, **headers: str) -> Response:
    reply = await client.get(path, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply


def id_of(response: Json) -> str:
    """The run's."""
    return response["id"].removeprefix("resp_")[:32]


async def in_chat(client: AsyncClient, chat: str, *said: str) -> str:
    """The run's id. The history before it may be that of another chat."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)]
    body = {"model": "assistant", "messages": messages}
    reply = await client.post("/v1/chat/completions", json=body, headers={"X-Chat-Id": chat})
    assert reply.status_code == 200, reply.text
    return reply.json()["id"].removeprefix("chatcmpl-")


async def forget_events(environ: dict[str, str]) -> None:
    await sweep(environ, keep_events=AT_ONCE)
    assert (await counts(environ))["events"] == 0


# Without its events


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


async def test_only_logs_of_runs_that_ended_long_ago_go(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("slow", Reply(text="one two three", pace=1.0))
    old, young = await respond(alice), await respond(alice)
    slow = await alice.post(RESPONSES, json=asking("slow", background=True))
    await age(environ, id_of(old), days=2)

    await asyncio.gather(*(sweep(environ) for _ in range(3)))

    stream = f"{RESPONSES}/{{}}?stream=true&starting_after=0"
    statuses = [
        (await alice.get(stream.format(each["id"]))).status_code
        for each in (old, young, slow.json())
    ]
    assert statuses == [410, 200, 200]


async def test_the_log_of_a_run_that_is_tried_again_during_a_sweep_stays(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream
) -> None:
    run_id = id_of(await respond(alice))
    await age(environ, run_id)
    before = (await counts(environ))["events"]
    again = update(Run).where(Run.id == run_id).values(status="waiting", finished_at=None)

    async with connected(environ) as connection:
        await connection.execute(again)
        sweeping = asyncio.create_task(sweep(environ))
        await asyncio.sleep(0.5)  # it has found the run by then, and waits for it
    await sweeping

    assert (await counts(environ))["events"] == before


async def test_a_job_that_is_deleted_is_not_tried_again(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream
) -> None:
    upstream.when("Ada", Reply(status=400))
    body = {"schema": NUMBER, "items": [{"custom_id": "1", "text": "Ada is 36."}]}
    job = (await alice.post(JOBS, json=body)).json()["id"]
    await get(alice, f"{JOBS}/{job}/events")
    hidden = {"status": DISCARDED, "deleted_at": datetime.now(UTC)}

    async with connected(environ) as connection:
        await connection.execute(update(Run).where(Run.id == job).values(hidden))
        retrying = asyncio.create_task(alice.post(f"{JOBS}/{job}/retry"))
        await asyncio.sleep(0.5)  # it has found the job by then, and waits for it

    assert (await retrying).status_code == 404
    assert (await counts(environ))["runs"] == 2, "there is no further driver"


async def test_a_server_sweeps_by_itself(
    environ: dict[str, str], bearer: Any, upstream: Upstream
) -> None:
    with ThreadedServer(settings_of(environ)) as first:
        token = await bearer("Owner")
        async with client_of(first.url, token) as client:
            old = await respond(client)
    await age(environ, id_of(old), days=2)

    with ThreadedServer(settings_of(environ)):
        async with asyncio.timeout(30):
            while (await counts(environ))["events"]:
                await asyncio.sleep(0.1)


# Runs, conversations and files


async def test_runs_go_with_all_that_belongs_to_them_unless_something_newer_goes_on_from_them(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("weather", *LOOKS)
    first = await respond(alice, "weather")
    second = await respond(alice, "weather", previous_response_id=first["id"])
    third = await respond(alice, "weather", previous_response_id=second["id"])
    lone = await respond(alice, "weather")
    await age(environ, *map(id_of, (first, second, lone)))

    await sweep(environ, keep_runs=timedelta(days=90))

    async def statuses() -> list[int]:
        all_four = (first, second, third, lone)
        return [(await alice.get(f"{RESPONSES}/{each['id']}")).status_code for each in all_four]

    assert await statuses() == [200, 200, 200, 404]
    await age(environ, id_of(third))
    await sweep(environ)
    assert await statuses() == [200, 200, 200, 404], "by default they are kept for ever"

    await sweep(environ, keep_runs=timedelta(days=90))
    assert await statuses() == [404] * 4
    rows = await counts(environ)
    assert [rows[name] for name in ("runs", "messages", "tool_calls", "events")] == [0] * 4


async def test_a_conversation_stays_or_goes_as_a_whole(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream
) -> None:
    made = [(await alice.post("/v1/conversations", json={})).json()["id"] for _ in range(3)]
    busy, done, _empty = made
    said = [await respond(alice, conversation=name) for name in (busy, done)]
    await respond(alice, conversation=busy)
    root = await in_chat(alice, "used", "A question")
    await age(environ, *map(id_of, said), root)
    await in_chat(alice, "outside", "A question", "ok", "Another")

    await sweep(environ, keep_runs=timedelta(days=90))

    names = [*made, "used", "outside"]
    statuses = [(await alice.get(f"/v1/conversations/{name}")).status_code for name in names]
    assert statuses == [200, 404, 404, 200, 200]
    items = (await get(alice, f"/v1/conversations/{busy}/items")).json()["data"]
    assert len(items) == 4


async def test_a_long_chain_goes_at_once(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream
) -> None:
    name = (await alice.post("/v1/conversations", json={})).json()["id"]
    message = {"role": "user", "content": "Hello"}
    body = {"items": [message | {"type": "message"}]}
    lone: list[str] = []
    for _ in range(30):
        reply = await alice.post(f"/v1/conversations/{name}/items", json=body)
        assert reply.status_code == 200, reply.text
        before = {"previous_response_id": f"resp_{lone[-1]}"} if lone else {}
        lone.append(id_of(await respond(alice, **before)))
    async with connected(environ) as connection:
        rows = await connection.exec_driver_sql("SELECT id FROM runs")
        ids = [row.id for row in rows]
    await age(environ, *ids)

    await sweep(environ, keep_runs=timedelta(days=90))

    assert (await counts(environ))["runs"] == 0


async def test_jobs_go_with_their_items(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream
) -> None:
    upstream.when("Ada", fills({"name": "Ada", "age": 36}))
    texts = ["Ada is 36.", "Ada is 36.", "Ada was 36."]
    items = [{"custom_id": str(n), "text": text} for n, text in enumerate(texts)]
    body = {"schema": {"type": "object"}, "items": items}
    old, young = [(await alice.post(JOBS, json=body)).json()["id"] for _ in range(2)]
    for job in (old, young):
        await get(alice, f"{JOBS}/{job}/events")
    await age(environ, old)

    await sweep(environ, keep_runs=timedelta(days=90))

    statuses = [(await alice.get(f"{JOBS}/{job}")).status_code for job in (old, young)]
    assert statuses == [404, 200]
    assert (await counts(environ))["runs"] == 4
    assert len((await get(alice, f"{JOBS}/{young}/results")).text.splitlines()) == 3


async def test_files_go_when_they_expire_or_are_too_old(
    alice: AsyncClient, environ: dict[str, str]
) -> None:
    async def upload(**form: Any) -> str:
        file = {"file": ("a.txt", b"hello")}
        reply = await alice.post("/v1/files", files=file, data={"purpose": "user_data", **form})
        return reply.json()["id"].removeprefix("file-")

    expiring = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    first, second = await upload(**expiring), await upload()
    async with connected(environ) as connection:
        due = update(File).where(File.id == first).values(expires_at=File.created_at)
        await connection.execute(due)

    await sweep(environ)
    assert (await counts(environ))["files"] == 1
    assert (await get(alice, f"/v1/files/file-{second}")).status_code == 200

    await sweep(environ, keep_files=AT_ONCE)
    assert (await counts(environ))["files"] == 0


# What is deleted by its owner


async def test_of_a_deleted_run_stays_only_what_the_next_one_was_told_and_goes_with_it(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("canary", Reply(text="I sing."))
    upstream.when("second", Reply(text="ok"))
    upstream.when("third", Reply(text="ok"))
    first = await respond(alice, "a canary", metadata={"m": "canary label"})
    second = await respond(alice, "second", previous_response_id=first["id"])
    await alice.delete(f"{RESPONSES}/{first['id']}")

    stored = await everything(environ)
    assert stored.count("canary") == 1 and stored.count("I sing.") == 1
    await respond(alice, "third", previous_response_id=second["id"])
    said = [each["content"] for each in upstream.requests[-1].body["messages"][1:]]
    assert said == ["a canary", "I sing.", "second", "ok", "third"]

    async with connected(environ) as connection:
        rows = await connection.exec_driver_sql("SELECT id FROM runs WHERE deleted_at IS NULL")
        left = [row.id for row in rows]
    for run_id in reversed(left):
        await alice.delete(f"{RESPONSES}/resp_{run_id}")
    for run_id in left:
        await alice.delete(f"{RESPONSES}/resp_{run_id}")

    assert (await counts(environ))["runs"] == 0


async def test_a_deleted_conversation_leaves_nothing_behind(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream
) -> None:
    upstream.when("canary", Reply(text="I sing."))
    upstream.when("Go on", Reply(text="More."))
    await in_chat(alice, "first", "a canary")
    await in_chat(alice, "second", "a canary", "I sing.", "Go on")

    await alice.delete("/v1/conversations/first")
    assert (await everything(environ)).count("canary") == 1
    await in_chat(alice, "second", "a canary", "I sing.", "Go on", "More.", "Go on")
    said = [each["content"] for each in upstream.requests[-1].body["messages"][1:]]
    assert said == ["a canary", "I sing.", "Go on", "More.", "Go on"]
    await alice.delete("/v1/conversations/second")

    rows = await counts(environ)
    assert [rows[name] for name in ("runs", "messages", "conversations")] == [0] * 3


@pytest.mark.parametrize(
    ("after", "status"), [("response", 404), ("turns", 200), ("conversation", 409), ("chat", 409)]
)
async def test_what_is_deleted_while_something_begins_below_it_is_gone(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream, after: str, status: int
) -> None:
    name = (await alice.post("/v1/conversations", json={})).json()["id"]
    first = await respond(alice, "A question", conversation=name)
    turns = [{"role": "user", "content": "Alone"}, {"role": "assistant", "content": "ok"}]
    lone = await respond(alice, "Alone")
    messages = [*(turns if after == "turns" else ()), {"role": "user", "content": "Go on"}]
    chat: Json = {"model": "assistant", "messages": messages}
    headers = {"X-Chat-Id": name} if after == "chat" else {}
    before = {"conversation": name}
    if after == "response":
        before = {"previous_response_id": lone["id"]}

    async with connected(environ) as connection:
        await connection.execute(delete(Conversation).where(Conversation.external_id == name))
        await connection.execute(delete(Run).where(Run.id == id_of(lone)))
        if after in ("turns", "chat"):
            post = alice.post("/v1/chat/completions", json=chat, headers=headers)
        else:
            post = alice.post(RESPONSES, json=asking("Go on", **before))
        begun = asyncio.create_task(post)
        await asyncio.sleep(0.5)  # it has found them by then, and waits for their end

    reply = await begun
    assert reply.status_code == status, reply.text
    assert (await alice.get(f"{RESPONSES}/{first['id']}")).status_code == 404
    assert (await alice.get(f"/v1/conversations/{name}")).status_code == 404
