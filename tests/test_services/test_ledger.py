"""What has an effect happens once; where nobody knows whether it did, its owner can say."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from httpx2 import AsyncClient, Response, TransportError
from sqlalchemy import select

from app.models import Run
from tests.conftest import client_of, settings_of
from tests.keeping import AT_ONCE, connected, sweep
from tests.server import ServerProcess, ThreadedServer
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream

pytestmark = pytest.mark.usefixtures("tester")

CALLS = "/v1/tool_calls"

Json = dict[str, Any]
Post = Callable[[AsyncClient], Any]

HEADERS = {"Idempotency-Key": "this request"}


def asking(text: str) -> dict[str, tuple[str, Json]]:
    """The same message in each protocol: where to, and what."""
    said = {"role": "user", "content": text}
    page = {"id": text, "role": "user", "parts": [{"type": "text", "text": text}]}
    thread = {"threadId": "chat", "runId": text, "state": {}, "tools": [], "context": []}
    thread |= {"messages": [{"id": text, **said}], "forwardedProps": {}}
    return {
        "responses": (
            "/v1/responses",
            {"model": "tester", "input": text, "stream": True},
        ),
        "chat": ("/v1/chat/completions", {"model": "tester", "messages": [said], "stream": True}),
        "vercel": (
            "/api/chat?agent=tester",
            {"id": "chat", "messages": [page], "trigger": "submit-message"},
        ),
        "ag-ui": ("/ag-ui/tester", thread),
    }


async def post(client: AsyncClient, protocol: str, text: str = "Go.") -> Response:
    url, body = asking(text)[protocol]
    headers = HEADERS | {"X-Chat-Id": "chat"} if protocol == "chat" else HEADERS
    return await client.post(url, json=body, headers=headers)


@pytest.fixture
def process(environ: dict[str, str]) -> Iterator[ServerProcess]:
    server = ServerProcess(**environ)
    server.command = ["tests.plugins", "--port", str(server.port)]
    with server as running:
        yield running


@pytest.fixture
async def owner(process: ServerProcess, bearer: Callable[..., Any]) -> AsyncIterator[AsyncClient]:
    async with client_of(process.url, await bearer("Owner")) as client:
        yield client


async def killed_in(process: ServerProcess, asked: Any, tools: ToolServer, *paths: str) -> None:
    """`kill -9` once each effect was asked for, and before its reply; then a new process."""
    for path in paths:
        tools.behave(path, hang=True)
    asking = asyncio.create_task(asked)
    counts = {path: tools.count(path) for path in paths}
    for path in paths:
        await tools.wait_for_async(path, counts[path] + 1, 60)
    process.kill()
    with contextlib.suppress(TransportError):
        await asking
    for path in paths:
        tools.behave(path)
    process.start()


def keys_at(tools: ToolServer, path: str) -> list[str | None]:
    return [call.headers.get("idempotency-key") for call in tools.calls if call.path == path]


async def calls_of(client: AsyncClient, **query: str) -> list[Json]:
    reply = await client.get(CALLS, params=query)
    assert reply.status_code == 200, reply.text
    return reply.json()["data"]


def results_told(upstream: Upstream) -> list[str]:
    messages = upstream.requests[-1].body["messages"]
    return [message["content"] for message in messages if message["role"] == "tool"]


SHOWN = {
    "responses": '"content": [{"type": "text", "text": "outcome unknown',
    "chat": "pay: failed: outcome unknown",
    "vercel": '"errorText":"outcome unknown',
    "ag-ui": '"content":"outcome unknown',
}
"""How each protocol says it."""


@pytest.mark.parametrize("protocol", SHOWN)
async def test_a_crash_between_effect_and_reply_repeats_only_what_may_be_repeated(
    process: ServerProcess,
    owner: AsyncClient,
    upstream: Upstream,
    tools: ToolServer,
    protocol: str,
) -> None:
    all_three = (
        Call("fetch", {"url": f"{tools.url}/effects/look"}),
        Call("save", {"text": "note"}),
        Call("pay", {"amount": 3}),
    )
    upstream.when("Go.", Reply(calls=all_three), Reply(text="I cannot tell."))
    effects = ("/effects/look", "/effects/save", "/effects/pay")

    await killed_in(process, post(owner, protocol), tools, *effects)
    answer = await post(owner, protocol)

    assert answer.status_code == 200
    assert SHOWN[protocol] in answer.text
    assert [tools.count(path) for path in effects] == [2, 2, 1]
    saved = keys_at(tools, "/effects/save")
    assert saved[0] == saved[1] and saved[0]
    told = results_told(upstream)
    assert told[:2] == ["200", saved[0]] and "outcome unknown" in told[2]
    [unknown] = await calls_of(owner, status="unknown")
    assert (unknown["tool"], unknown["arguments"]) == ("pay", {"amount": 3})
    assert unknown["key"] == keys_at(tools, "/effects/pay")[0]
    assert (unknown["run_status"], unknown["agent"]) == ("completed", "tester")
    assert unknown["response_id"] == f"resp_{unknown['run_id']}"
    assert unknown["conversation"] == (None if protocol == "responses" else "chat")


async def test_a_retry_that_a_crash_cuts_off_leaves_the_call_unknown(
    process: ServerProcess, owner: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("Go.", Reply(calls=(Call("pay", {"amount": 3}),)), Reply(text="Unknown."))
    await killed_in(process, post(owner, "responses"), tools, "/effects/pay")
    await post(owner, "responses")
    [unknown] = await calls_of(owner, status="unknown")
    url, again = f"{CALLS}/{unknown['key']}/settle", {"outcome": "retry"}

    await killed_in(process, owner.post(url, json=again), tools, "/effects/pay")

    assert await calls_of(owner, status="unknown") == [unknown]
    settled = (await owner.post(url, json=again)).json()
    assert (settled["status"], settled["result"]) == ("done", unknown["key"])
    assert keys_at(tools, "/effects/pay") == [unknown["key"]] * 3


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_calls_of_one_id_are_told_apart_also_after_a_crash(
    process: ServerProcess, owner: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    twice = (Call("pay", {"amount": 3}, id="same"), Call("pay", {"amount": 3}, id="same"))
    upstream.when("Go.", Reply(calls=twice), Reply(text="Unknown."))

    await killed_in(process, post(owner, "responses"), tools, "/effects/pay")
    answer = await post(owner, "responses")

    assert answer.text.count("event: response.mcp_call.failed") == 2
    assert len(await calls_of(owner, status="unknown")) == 2


# Ids of calls

ODD = {"twice": ("same", "same"), "none": ("", ""), "long": ("x" * 5000, "y" * 5000), "NUL": "\0\0"}


@pytest.mark.parametrize("ids", ODD)
@pytest.mark.parametrize("stream", [True, False])
async def test_calls_are_told_apart_whatever_ids_the_model_gives_them(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer, ids: str, stream: bool
) -> None:
    one, two = ODD[ids]
    both = (Call("pay", {"amount": 3}, id=one), Call("pay", {"amount": 4}, id=two))
    upstream.when("Go.", Reply(calls=both), Reply(calls=both), Reply(text="Paid."))

    body = {"model": "tester", "input": "Go.", "stream": stream, "background": False}
    answer = await alice.post("/v1/responses", json=body)

    assert answer.status_code == 200, answer.text
    response = (
        json.loads(answer.text.split("data: ")[-1]) if stream else {"response": answer.json()}
    )
    output = response["response"]["output"]
    assert [item["status"] for item in output] == ["completed"] * 5
    paid = [json.loads(call.body)["amount"] for call in tools.calls if call.body]
    assert sorted(paid) == [3, 3, 4, 4]
    messages = upstream.requests[-1].body["messages"]
    calls = [call["id"] for message in messages for call in message.get("tool_calls") or ()]
    assert len(set(calls)) == 4
    assert calls == [message["tool_call_id"] for message in messages if message["role"] == "tool"]
    assert [item["output"] for item in output[:4]] == results_told(upstream)


# What is left when a run is stopped


async def test_a_run_that_is_stopped_leaves_no_call_without_a_result(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer, database_url: str
) -> None:
    calls = (
        Call("shout", {"text": "hey"}),
        Call("pay", {"amount": 3}),
        Call("save", {"text": "x"}),
    )
    upstream.when("Go.", Reply(calls=calls))
    upstream.when("And now?", Reply(text="Fine."))
    tools.behave("/effects/pay", delay=30)
    tools.behave("/effects/save", delay=30)
    begun = asyncio.create_task(post(alice, "vercel"))
    await tools.wait_for_async("/effects/pay", 1)
    await tools.wait_for_async("/effects/save", 1)

    await alice.post("/api/chat/chat/stop")
    await begun
    body = {"model": "tester", "input": "And now?", "conversation": "chat"}
    after = await alice.post("/v1/responses", json=body)

    assert after.json()["status"] == "completed"
    told = results_told(upstream)
    assert told[0] == "HEY!" and "outcome unknown" in told[1]
    assert told[2].startswith("The run ended first")
    [unknown] = await calls_of(alice, status="unknown")
    assert (unknown["tool"], unknown["run_status"]) == ("pay", "cancelled")


UNTOLD: dict[str, Any] = {
    "gateway": {"status": 504},
    "failure": {"status": 500},
    "garbage": {"body": b"{"},
}


@pytest.mark.parametrize("answer", UNTOLD)
async def test_a_call_whose_answer_tells_nothing_may_have_taken_effect(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer, answer: str
) -> None:
    upstream.when("Go.", Reply(calls=(Call("buy", {}),)), Reply(text="Unknown."))
    tools.behave("/effects/buy", **UNTOLD[answer])

    await post(alice, "responses")

    assert [call["tool"] for call in await calls_of(alice, status="unknown")] == ["buy"]
    assert "outcome unknown" in results_told(upstream)[0]


@pytest.mark.parametrize(("status", "outcome"), [(500, "unknown"), (409, "failed")])
async def test_what_a_tool_says_of_a_failure_makes_its_outcome_no_surer(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer, status: int, outcome: str
) -> None:
    upstream.when("Go.", Reply(calls=(Call("book", {}),)), Reply(text="It failed."))
    tools.behave("/effects/book", status=status)

    await post(alice, "responses")

    assert [call["tool"] for call in await calls_of(alice, status=outcome)] == ["book"]
    assert ("outcome unknown" in results_told(upstream)[0]) == (outcome == "unknown")


# What its owner says of it


@pytest.fixture
async def unknown(alice: AsyncClient, upstream: Upstream, tools: ToolServer) -> Json:
    """A payment of which nobody knows whether it took effect."""
    upstream.when("Go.", Reply(calls=(Call("pay", {"amount": 3}),)), Reply(text="Unknown."))
    upstream.when("And now?", Reply(text="As you say."))
    tools.behave("/effects/pay", drop=True)
    await post(alice, "vercel")
    tools.behave("/effects/pay")
    [found] = await calls_of(alice, status="unknown")
    return found


async def settle(client: AsyncClient, call: Json, **how: Any) -> Response:
    return await client.post(f"{CALLS}/{call['key']}/settle", json=how)


async def next_turn(client: AsyncClient, upstream: Upstream) -> list[str]:
    """The results that a later turn tells the model."""
    body = {"model": "tester", "input": "And now?", "conversation": "chat"}
    assert (await client.post("/v1/responses", json=body)).json()["status"] == "completed"
    return results_told(upstream)


async def test_its_owner_can_say_that_it_was_done(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer, unknown: Json
) -> None:
    assert "outcome unknown" in (await next_turn(alice, upstream))[0]

    settled = await settle(alice, unknown, outcome="done", result={"receipt": 7})
    again = await settle(alice, unknown, outcome="done", result={"receipt": 7})

    assert settled.json() == unknown | {"status": "done", "result": {"receipt": 7}}
    assert (again.status_code, again.json()) == (200, settled.json())
    assert await calls_of(alice, status="unknown") == []
    assert (await alice.get(f"{CALLS}/{unknown['key']}")).json() == settled.json()
    assert await next_turn(alice, upstream) == ['{"receipt":7}']
    assert tools.count("/effects/pay") == 1
    items = (await alice.get("/v1/conversations/chat/items?order=asc")).json()["data"]
    assert [item["output"] for item in items if item["type"] == "mcp_call"] == ['{"receipt":7}']


async def test_its_owner_can_have_it_made_again_under_its_key(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer, unknown: Json
) -> None:
    settled = await settle(alice, unknown, outcome="retry")
    again = await settle(alice, unknown, outcome="retry")

    assert settled.json() == unknown | {"status": "done", "result": unknown["key"]}
    assert (again.status_code, again.json()) == (200, settled.json())
    assert keys_at(tools, "/effects/pay") == [unknown["key"]] * 2
    assert await next_turn(alice, upstream) == [unknown["key"]]


async def test_a_result_that_is_being_stored_while_its_run_is_stopped_is_known(
    environ: dict[str, str],
    bearer: Callable[..., Any],
    upstream: Upstream,
    tools: ToolServer,
) -> None:
    upstream.when("Go.", Reply(calls=(Call("pay", {"amount": 3}),)))
    tools.behave("/effects/pay", delay=0.4)
    body = {"model": "tester", "input": "Go.", "background": True}
    with ThreadedServer(settings_of(environ, run_seconds=3)) as server:
        async with client_of(server.url, await bearer("Owner")) as owner:
            url = f"/v1/responses/{(await owner.post('/v1/responses', json=body)).json()['id']}"
            await tools.wait_for_async("/effects/pay", 1)
            async with connected(environ) as connection:
                await connection.execute(select(Run.id).with_for_update())
                await asyncio.sleep(3.2)  # the result comes, and the run's time is over
            async with asyncio.timeout(20):
                while (run := (await owner.get(url)).json())["status"] == "in_progress":
                    await asyncio.sleep(0.05)

            assert run["incomplete_details"] == {"reason": "max_time"}
            assert [call["status"] for call in await calls_of(owner)] == ["done"]


@pytest.mark.parametrize("outcome", ["done", "retry"])
@pytest.mark.parametrize("ends", ["by itself", "cancelled"])
async def test_what_was_answered_stays_so_when_a_call_is_settled_and_the_events_are_gone(
    alice: AsyncClient,
    environ: dict[str, str],
    upstream: Upstream,
    tools: ToolServer,
    ends: str,
    outcome: str,
) -> None:
    upstream.when("Go.", Reply(calls=(Call("pay", {"amount": 3}),)), Reply(text="Unknown."))
    upstream.when("And now?", Reply(text="As you say."))
    tools.behave("/effects/pay", drop=ends == "by itself", hang=ends == "cancelled")
    body = {"model": "tester", "input": "Go.", "background": True}
    url = f"/v1/responses/{(await alice.post('/v1/responses', json=body)).json()['id']}"
    await tools.wait_for_async("/effects/pay", 1)
    if ends == "cancelled":
        await alice.post(f"{url}/cancel")
    async with asyncio.timeout(20):
        while (before := (await alice.get(url)).json())["status"] in ("queued", "in_progress"):
            await asyncio.sleep(0.05)
    tools.behave("/effects/pay")
    [unknown] = await calls_of(alice, status="unknown")

    assert (await settle(alice, unknown, outcome=outcome)).status_code == 200
    await sweep(environ, keep_events=AT_ONCE)

    assert "outcome unknown" in str(before["output"])
    assert (await alice.get(url)).json() == before


async def test_a_retry_that_nobody_hears_of_stays_unknown(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer, unknown: Json
) -> None:
    tools.behave("/effects/pay", drop=True)

    settled = await settle(alice, unknown, outcome="retry")

    assert settled.json() == unknown
    assert await calls_of(alice, status="unknown") == [unknown]


async def test_a_call_that_is_deleted_while_it_is_made_again_leaves_nothing(
    alice: AsyncClient,
    environ: dict[str, str],
    upstream: Upstream,
    tools: ToolServer,
    unknown: Json,
) -> None:
    await next_turn(alice, upstream)  # which goes on from it, so that its messages stay
    tools.behave("/effects/pay", delay=1)
    settling = asyncio.create_task(settle(alice, unknown, outcome="retry"))
    await tools.wait_for_async("/effects/pay", 2)

    deleted = await alice.delete(f"/v1/responses/{unknown['response_id']}")

    assert (await settling).status_code == 404
    assert deleted.status_code == 200
    assert "outcome unknown" in (await next_turn(alice, upstream))[0]


async def test_a_retry_that_fails_is_told_as_it_is(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer, unknown: Json
) -> None:
    tools.behave("/effects/pay", status=402)

    settled = (await settle(alice, unknown, outcome="retry")).json()

    assert (settled["status"], settled["result"]) == (
        "failed",
        "The service answered with status 402.",
    )
    assert "status 402" in (await next_turn(alice, upstream))[0]


async def test_ten_retries_are_one_call(
    alice: AsyncClient, tools: ToolServer, unknown: Json
) -> None:
    tools.behave("/effects/pay", delay=0.3)

    answers = await asyncio.gather(*(settle(alice, unknown, outcome="retry") for _ in range(10)))

    assert tools.count("/effects/pay") == 2
    assert {(each.status_code, each.json().get("status")) for each in answers} <= {
        (200, "done"),
        (409, None),
    }


async def test_a_call_is_settled_once_and_by_its_owner_alone(
    alice: AsyncClient, bob: AsyncClient, upstream: Upstream, unknown: Json
) -> None:
    for stranger in (
        await settle(bob, unknown, outcome="done", result=1),
        await bob.get(f"{CALLS}/{unknown['key']}"),
        await alice.get(f"{CALLS}/{'0' * 40}"),
        await alice.get(f"{CALLS}/%00"),
        await bob.get(CALLS, params={"after": unknown["key"]}),
    ):
        assert (stranger.status_code, stranger.json()["error"]["code"]) == (
            404,
            "tool_call_not_found",
        )
    assert await calls_of(bob) == []

    assert (await settle(alice, unknown, outcome="done", result=1)).status_code == 200
    for other in ({"outcome": "done", "result": 2}, {"outcome": "retry"}):
        refused = await settle(alice, unknown, **other)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "not_unknown")


async def test_to_settle_takes_the_tools_own_scope(alice: AsyncClient, unknown: Json) -> None:
    key = await alice.post("/users/me/keys", json={"name": "app", "scopes": ["weather:read"]})
    alice.headers["Authorization"] = f"Bearer {key.json()['key']}"

    for how in ({"outcome": "done"}, {"outcome": "retry"}):
        refused = await settle(alice, unknown, **how)
        assert refused.status_code == 403
        assert "orders:write" in refused.json()["error"]["message"]


async def test_a_call_is_settled_when_its_run_has_ended(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("Go.", Reply(calls=(Call("pay", {"amount": 3}),)), Reply(text="Hm.", delay=30))
    tools.behave("/effects/pay", drop=True)
    begun = asyncio.create_task(post(alice, "vercel"))
    await upstream.wait_for_async(2)
    [unknown] = await calls_of(alice, status="unknown")

    refused = await settle(alice, unknown, outcome="done", result=1)

    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "run_open")
    await alice.post("/api/chat/chat/stop")
    await begun
    assert (await settle(alice, unknown, outcome="done", result=1)).status_code == 200


DEEP: Any = 1
for _ in range(100):
    DEEP = [DEEP]


async def test_what_no_settlement_can_be_is_refused(alice: AsyncClient, unknown: Json) -> None:
    for body in (
        '{"outcome": "done", "result": NaN}',
        '{"outcome": "done", "result": "\\ud800"}',
        json.dumps({"outcome": "done", "result": DEEP}),
        json.dumps({"outcome": "done", "result": "x" * 200_000}),
        '{"outcome": "undone"}',
        '{"outcome": "retry", "result": 1}',
        "{}",
    ):
        headers = {"Content-Type": "application/json"}
        url = f"{CALLS}/{unknown['key']}/settle"
        refused = await alice.post(url, content=body, headers=headers)
        assert refused.status_code == 422, (body[:80], refused.text)
    assert (await alice.get(CALLS, params={"status": "odd"})).status_code == 422
    assert await calls_of(alice, status="unknown") == [unknown]


async def test_calls_are_listed_a_page_at_a_time(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    several = tuple(Call("save", {"text": str(number)}) for number in range(5))
    upstream.when("Go.", Reply(calls=several), Reply(text="Saved."))
    await post(alice, "responses")

    seen: list[str] = []
    while True:
        query = {"limit": "2"} | ({"after": seen[-1]} if seen else {})
        page = (await alice.get(CALLS, params=query)).json()
        seen += [call["key"] for call in page["data"]]
        if not page["has_more"]:
            break

    assert len(seen) == len(set(seen)) == 5


# Whose calls they are


async def test_what_a_tool_asks_the_agent_for_is_no_part_of_the_tools_run(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("Go.", Reply(calls=(Call("delegate", {"task": "Note."}),)), Reply(text="Done."))
    upstream.when("Note.", Reply(calls=(Call("save", {"text": "note"}),)), Reply(text="Noted."))

    answer = await post(alice, "responses")

    assert answer.status_code == 200 and tools.count("/effects/save") == 1
    assert [(call["tool"], call["result"]) for call in await calls_of(alice)] == [
        ("delegate", "Noted.")
    ]


# Calls that are refused


async def test_refused_calls_are_written_into_the_log_without_their_arguments(
    alice: AsyncClient, upstream: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    canary = {"text": "canary"}
    upstream.when(
        "Go.",
        Reply(calls=(Call("search_users", canary), Call("a_canary_by_name", canary))),
        Reply(calls=(Call("fetch", {"url": "http://169.254.169.254/canary"}),)),
        Reply(text="I may not."),
    )

    with caplog.at_level(logging.WARNING):
        answer = await post(alice, "responses")

    assert "canary" not in caplog.text
    run_id = answer.text.split("resp_")[1][:32]
    begin = f"run {run_id}: a call of "
    lines = [line.removeprefix(begin) for line in caplog.messages if line.startswith(begin)]
    assert lines == [
        "'search_users' was refused: it was not offered",
        "an unknown tool was refused: it was not offered",
        "'fetch' was refused: OutboundRefused",
    ]
