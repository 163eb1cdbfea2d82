"""Responses: a question ends one, and the answers begin the next."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from httpx2 import AsyncClient
from openai.types.responses import Response

from tests.conftest import client_of, settings_of
from tests.responding import (
    OFFICIAL,
    TERMINAL,
    URL,
    asking,
    deciding,
    decision,
    follow,
    requests_in,
    says,
    stream,
)
from tests.server import ThreadedServer
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream


async def until_status(client: AsyncClient, response_id: str, *statuses: str) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while True:
            got = (await client.get(f"{URL}/{response_id}")).json()
            if got["status"] in statuses:
                return got
            await asyncio.sleep(0.02)


async def ask_to_pay(client: AsyncClient, upstream: Upstream, *amounts: int) -> dict[str, Any]:
    calls = tuple(Call("pay", {"amount": amount}) for amount in amounts)
    upstream.when("pay", Reply(calls=calls), Reply(text="So be it."))
    reply = await client.post(URL, json=asking("pay") | {"model": "cashier"})
    assert reply.status_code == 200, reply.text
    return reply.json()


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
