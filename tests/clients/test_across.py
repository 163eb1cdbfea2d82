"""One conversation, whichever frontend it is in."""

import asyncio
import json
from typing import Any

from httpx2 import AsyncClient, Response
from openai import AsyncOpenAI

from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream

CHAT = {"X-Chat-Id": "trip to Lisbon"}


def events_in(reply: Response) -> list[dict[str, Any]]:
    """The events of a stream whose data is JSON."""
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]


async def test_a_run_is_begun_followed_approved_and_read_over_four_protocols(
    cashier: None,
    alice: AsyncClient,
    openai_client: AsyncOpenAI,
    upstream: Upstream,
    tools: ToolServer,
) -> None:
    text = "It is paid, have a good trip."
    upstream.when("Pay 5", Reply(calls=(Call("pay", {"amount": 5}),)), Reply(text, pace=0.1))

    chunks = await openai_client.chat.completions.create(
        model="cashier",
        messages=[{"role": "user", "content": "Pay 5"}],
        stream=True,
        extra_headers=CHAT,
    )
    begun = [chunk async for chunk in chunks]
    assert [chunk.choices[0].finish_reason for chunk in begun][-1] == "stop"
    assert tools.calls == []

    run_id = begun[0].id.removeprefix("chatcmpl-")
    followed = [
        event
        async for event in await openai_client.responses.retrieve(f"resp_{run_id}", stream=True)
    ]
    [key] = [
        event.item.id.removeprefix("mcpr_")
        for event in followed
        if event.type == "response.output_item.done" and event.item.type == "mcp_approval_request"
    ]

    resume = {"interruptId": key, "status": "resolved", "payload": {"approved": True}}
    asked = {"threadId": CHAT["X-Chat-Id"], "runId": "r2", "state": {}, "messages": []}
    asked |= {"tools": [], "context": [], "forwardedProps": {}, "resume": [resume]}
    approving = asyncio.create_task(alice.post("/ag-ui/cashier", json=asked))
    await upstream.wait_for_async(2)
    watched = await alice.get(f"/api/chat/{CHAT['X-Chat-Id']}/stream")

    chunk_types = [event["type"] for event in events_in(watched)]
    assert chunk_types[0] == "start" and chunk_types[-1] == "finish"
    said = [event["delta"] for event in events_in(watched) if event["type"] == "text-delta"]
    assert "".join(said) == text
    finished = events_in(await approving)[-1]
    assert (finished["type"], finished["runId"]) == ("RUN_FINISHED", "r2")
    assert [call.path for call in tools.calls] == ["/effects/pay-5"]
    last = await openai_client.responses.retrieve(f"resp_{run_id}_2")
    assert (last.status, last.output_text) == ("completed", text)
    reloaded = (await alice.get(f"/api/chat/{CHAT['X-Chat-Id']}")).json()["messages"]
    assert [message["role"] for message in reloaded] == ["user", "assistant"]
    assert reloaded[1]["id"] == run_id


async def test_every_frontend_goes_on_from_what_the_others_said(
    alice: AsyncClient, openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    for said in ("chat", "responses", "vercel", "ag-ui"):
        upstream.when(f"by {said}", Reply(f"Heard by {said}."))
    chat = CHAT["X-Chat-Id"]

    await openai_client.chat.completions.create(
        model="assistant",
        messages=[{"role": "user", "content": "by chat"}],
        extra_headers=CHAT,
    )
    await openai_client.responses.create(model="assistant", input="by responses", conversation=chat)
    user = {"id": "m1", "role": "user", "parts": [{"type": "text", "text": "by vercel"}]}
    await alice.post(
        "/api/chat", json={"id": chat, "messages": [user], "trigger": "submit-message"}
    )
    asked = {"threadId": chat, "runId": "r1", "state": {}, "tools": [], "context": []}
    asked |= {"messages": [{"id": "m2", "role": "user", "content": "by ag-ui"}]}
    await alice.post("/ag-ui/assistant", json={**asked, "forwardedProps": {}})

    messages = [
        (message["role"], message["content"])
        for message in upstream.requests[-1].body["messages"]
        if message["role"] != "system"
    ]
    assert messages == [
        ("user", "by chat"),
        ("assistant", "Heard by chat."),
        ("user", "by responses"),
        ("assistant", "Heard by responses."),
        ("user", "by vercel"),
        ("assistant", "Heard by vercel."),
        ("user", "by ag-ui"),
    ]
    items = await openai_client.conversations.items.list(chat, order="asc")
    texts = [item.content[0].text for item in items.data if item.type == "message"]  # pyright: ignore
    assert texts[-1] == "Heard by ag-ui." and len(texts) == 8


async def test_any_frontend_stops_what_another_began(
    alice: AsyncClient, openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    upstream.when("count", Reply("one two three", pace=60))
    chat = (await openai_client.conversations.create()).id
    begun = await openai_client.responses.create(
        model="assistant", input="count", conversation=chat, background=True
    )
    await upstream.wait_for_async(1)

    stopped = await alice.post(f"/api/chat/{chat}/stop")

    assert stopped.status_code == 200
    await asyncio.to_thread(upstream.wait_until, lambda: upstream.requests[0].aborted, 2)
    async with asyncio.timeout(5):  # its end is written down a moment later
        while (ended := await openai_client.responses.retrieve(begun.id)).status == "in_progress":
            await asyncio.sleep(0.01)
    assert ended.status == "cancelled"


async def test_a_busy_chat_refuses_over_every_protocol_that_asks_for_it(
    alice: AsyncClient, openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    upstream.when("count", Reply("one two three", pace=60))
    chat = (await openai_client.conversations.create()).id
    first = {"model": "assistant", "input": "count", "conversation": chat, "background": True}
    await alice.post("/v1/responses", json=first)
    message = {"role": "user", "content": "hello"}
    part = {"type": "text", "text": "hello"}
    asked = {"threadId": chat, "runId": "r1", "state": {}, "tools": [], "context": []}
    asked |= {"messages": [{"id": "m2", **message}], "forwardedProps": {}}

    for path, body in {
        "/v1/chat/completions": {"model": "assistant", "messages": [message]},
        "/v1/responses": {"model": "assistant", "input": "hello", "conversation": chat},
        "/api/chat": {"id": chat, "messages": [{"id": "m1", "role": "user", "parts": [part]}]},
        "/ag-ui/assistant": asked,
    }.items():
        headers = {"X-Chat-Id": chat, "X-Multitask-Strategy": "reject"}
        refused = await alice.post(path, json=body, headers=headers)
        assert (path, refused.status_code) == (path, 409)
        assert refused.json()["error"]["code"] == "conversation_busy"
        headers["X-Multitask-Strategy"] = "shout"
        assert (await alice.post(path, json=body, headers=headers)).status_code in (400, 422), path
