"""What its owner deletes is gone, but for what others go on from."""

import asyncio
from typing import Any

import pytest
from httpx2 import AsyncClient
from sqlalchemy import delete

from app.models import Conversation, Run
from tests.keeping import connected, counts, everything, in_chat
from tests.responding import URL as RESPONSES
from tests.responding import asking, id_of, respond
from tests.toolserver import ToolServer
from tests.upstream import Reply, Upstream

Json = dict[str, Any]


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
