"""What an AG-UI client may send, and what it is told of what has no meaning."""

import json
from typing import Any

import pytest
from httpx2 import AsyncClient

from tests.agui import URL, ask, asking, error, parsed, user
from tests.upstream import Reply, Upstream

DOOR = {"name": "open_door", "parameters": {"type": "object"}}


def deep(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"a": value}
    return value


HOSTILE = {
    "no object": [],
    "no thread": {"runId": "r", "messages": [user("hi")]},
    "empty thread": asking(user("hi"), threadId=""),
    "thread is a number": asking(user("hi"), threadId=5),
    "endless thread": asking(user("hi"), threadId="x" * 5000),
    "NUL in the thread": asking(user("hi"), threadId="\x00"),
    "no run": {"threadId": "t", "messages": [user("hi")]},
    "no messages": asking(),
    "messages is no list": asking() | {"messages": "hi"},
    "a message is no object": asking() | {"messages": ["hi"]},
    "no id": asking({"role": "user", "content": "hi"}),
    "NUL in an id": asking(user("hi", "\x00")),
    "NUL in an earlier id": asking({"id": "\x00", "role": "assistant"}, user("hi")),
    "endless id": asking(user("hi", "x" * 5000)),
    "ends with the assistant": asking(user("hi"), {"id": "a", "role": "assistant"}),
    "no content": asking({"id": "u", "role": "user"}),
    "empty content": asking(user([])),
    "unknown part": asking(user([{"type": "hologram"}])),
    "source of nothing": asking(user([{"type": "image", "source": {"type": "data"}}])),
    "broken image": asking(
        user([{"type": "image", "source": {"type": "data", "value": "@", "mimeType": "image/png"}}])
    ),
    "image that is none": asking(
        user([{"type": "image", "source": {"type": "data", "value": "aGVsbG8=", "mimeType": "x"}}])
    ),
    "image at home": asking(
        user([{"type": "image", "source": {"type": "url", "value": "http://127.0.0.1/x.png"}}])
    ),
    "file of nobody": asking(
        user([{"type": "document", "source": {"type": "file", "value": "file-nothing"}}])
    ),
    "empty binary": asking(user([{"type": "binary", "mimeType": "image/png"}])),
    "state too deep": asking(user("hi"), state=deep(200)),
    "context is no list": asking(user("hi"), context="x"),
    "tool without a name": asking(user("hi"), tools=[{"description": "x"}]),
    "two tools of one name": asking(user("hi"), tools=[DOOR, DOOR]),
    "deep parameters": asking(user("hi"), tools=[DOOR | {"parameters": deep(200)}]),
    "resume of nothing": asking(resume=[{"interruptId": "x", "status": "resolved"}]),
    "resume without a verdict": asking(
        resume=[{"interruptId": "x", "status": "resolved", "payload": {}}]
    ),
    "resume with half a verdict": asking(
        resume=[{"interruptId": "x", "status": "resolved", "payload": {"approved": "true"}}]
    ),
    "NUL in the reason": asking(
        resume=[
            {
                "interruptId": "x",
                "status": "resolved",
                "payload": {"approved": False, "reason": "\x00"},
            }
        ]
    ),
    "resume in an unknown way": asking(resume=[{"interruptId": "x", "status": "maybe"}]),
    "resume of an odd id": asking(resume=[{"interruptId": "\x00 '; --", "status": "cancelled"}]),
    "image as a tool's result": asking(
        user("hi"),
        {
            "id": "t",
            "role": "tool",
            "toolCallId": "c",
            "content": [
                {"type": "image", "source": {"type": "data", "value": "", "mimeType": "image/png"}}
            ],
        },
    ),
    "half a character": asking(user("half \ud800")),
    "half a character in the state": asking(user("hi"), state={"a": "\ud800"}),
}


@pytest.mark.parametrize("case", HOSTILE)
async def test_what_has_no_meaning_is_refused(
    alice: AsyncClient, upstream: Upstream, case: str
) -> None:
    reply = await alice.post(
        URL, content=json.dumps(HOSTILE[case]), headers={"Content-Type": "application/json"}
    )

    assert 400 <= reply.status_code < 500, reply.text
    assert error(reply)["message"]
    assert upstream.requests == []


HEAD = '{"threadId": "t", "runId": "r", '
HELLO = '"messages": [{"id": "u", "role": "user", "content": "hi"}]'

RAW = {
    "nothing": "",
    "half a document": HEAD,
    "300 deep": f'{HEAD}"messages": {"[" * 300}{"]" * 300}}}',
    "100000 deep": f'{HEAD}{HELLO}, "state": {"[" * 100_000}{"]" * 100_000}}}',
    "5000 digits": f'{HEAD}{HELLO}, "state": {"9" * 5000}}}',
    "no UTF-8": HEAD.encode() + b'"messages": [{"id": "u", "role": "user", "content": "\xff"}]}',
}


@pytest.mark.parametrize("case", RAW)
async def test_what_is_no_proper_json_is_refused(
    alice: AsyncClient, upstream: Upstream, case: str
) -> None:
    reply = await alice.post(URL, content=RAW[case], headers={"Content-Type": "application/json"})

    assert 400 <= reply.status_code < 500, reply.text
    assert error(reply)["message"]
    assert upstream.requests == []


@pytest.mark.parametrize("number", ["1e999", "-0.0", "1E400", "9" * 400, "0.1e-999"])
async def test_odd_numbers_in_the_state_break_nothing(alice: AsyncClient, number: str) -> None:
    body = f'{HEAD}{HELLO}, "state": {{"n": {number}}}}}'

    reply = await alice.post(URL, content=body, headers={"Content-Type": "application/json"})

    assert reply.status_code < 500, reply.text
    if reply.status_code == 200:
        assert parsed(reply.text)[-1]["type"] == "RUN_FINISHED"


async def test_an_unknown_agent_is_not_found(alice: AsyncClient) -> None:
    for body in (asking(user("hi")), asking(resume=[{"interruptId": "x", "status": "cancelled"}])):
        reply = await alice.post("/ag-ui/nobody", json=body)

        assert reply.status_code == 404
        assert "available: " in error(reply)["message"]


async def test_an_unknown_strategy_is_refused(alice: AsyncClient) -> None:
    reply = await alice.post(URL, json=asking(user("hi")), headers={"X-Multitask-Strategy": "hope"})

    assert reply.status_code in (400, 422)


async def test_what_the_model_says_cannot_end_an_event(
    alice: AsyncClient, upstream: Upstream
) -> None:
    odd = "one\r\nevent: forged\r\ndata: {}\n\nid: 9\u2028\x85two"
    upstream.when("odd", Reply(text=odd, chunks=5))

    events = await ask(alice, asking(user("odd")))

    deltas = [event["delta"] for event in events if event["type"] == "TEXT_MESSAGE_CONTENT"]
    assert "".join(deltas) == odd


async def test_older_clients_are_told_nothing_that_they_do_not_know(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Tell", Reply(text="Once upon", finish="length"))
    body = asking(user("Tell"))
    del body["protocolVersion"]

    events = await ask(alice, body)

    assert events[-1]["type"] == "RUN_FINISHED"
    assert "outcome" not in events[-1]


async def test_binary_parts_of_older_clients_are_taken(
    alice: AsyncClient, upstream: Upstream
) -> None:
    text = {"type": "binary", "mimeType": "text/plain", "data": "aGVsbG8=", "filename": "a.txt"}

    await ask(alice, asking(user([{"type": "text", "text": "Read this"}, text])))

    assert "hello" in json.dumps(upstream.requests[0].body["messages"])


async def test_an_upload_is_named_by_its_id(
    alice: AsyncClient, bob: AsyncClient, upstream: Upstream
) -> None:
    sent = await alice.post(
        "/v1/files", files={"file": ("a.txt", b"canary")}, data={"purpose": "user_data"}
    )
    source = {"type": "file", "value": sent.json()["id"]}
    body = asking(user([{"type": "document", "source": source}]))

    theirs = await bob.post(URL, json=body)
    await ask(alice, body)

    assert theirs.status_code == 404
    assert "canary" in json.dumps(upstream.requests[-1].body["messages"])
