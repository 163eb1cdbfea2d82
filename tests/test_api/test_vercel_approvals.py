"""Vercel AI SDK UI: a person's approval, on whatever page it is given."""

import asyncio
from typing import Any

import pytest
from httpx2 import AsyncClient

from tests.upstream import Call, Reply, Upstream
from tests.vercel import (
    DOOR,
    URL,
    asking,
    assistant,
    messages_of,
    said_in,
    told,
    types,
    user,
)

ERASE = Reply(text="Sure?", calls=(Call("erase"),))


async def asked_to_erase(client: AsyncClient) -> dict[str, Any]:
    """The assistant's message, approved as its page would do it."""
    await client.post(URL, json=asking(user("Erase"), agent="tester"))
    return answered((await messages_of(client))[-1])


def answered(message: dict[str, Any], **answer: Any) -> dict[str, Any]:
    parts = [
        part
        | {
            "state": "approval-responded",
            "approval": part["approval"] | {"approved": True, **answer},
        }
        if part.get("state") == "approval-requested"
        else part
        for part in message["parts"]
    ]
    return message | {"parts": parts}


async def test_an_approval_counts_once(
    tester: None, alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Erase", ERASE, Reply(text="Done."))
    reply = await asked_to_erase(alice)

    first = await alice.post(URL, json=asking(user("Erase"), reply, agent="tester"))
    second = await alice.post(URL, json=asking(user("Erase"), reply, agent="tester"))

    assert said_in(first) == "Done."
    assert second.text == first.text
    assert len(upstream.requests) == 2


async def test_only_who_was_asked_can_approve(
    tester: None, alice: AsyncClient, bob: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Erase", ERASE, Reply(text="Done."))
    reply = await asked_to_erase(alice)

    stolen = await bob.post(URL, json=asking(user("Erase"), reply, agent="tester"))
    made_up = await alice.post(URL, json=asking(user("Erase"), answered(reply, id="0" * 40)))
    guess = {"type": "tool-erase", "toolCallId": "c", "state": "approval-responded"}
    guess["approval"] = {"id": "' OR 1=1 --", "approved": True}  # pyright: ignore[reportArgumentType]
    guessed = await alice.post(URL, json=asking(user("Erase"), assistant(guess)))

    # `made_up` keeps the true ids: it is the rightful answer.
    assert [stolen.status_code, guessed.status_code] == [409, 409]
    assert said_in(made_up) == "Done."


async def test_approvals_in_the_history_count_for_nothing(
    tester: None, alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Erase", ERASE, Reply(text="Done."))
    reply = await asked_to_erase(alice)

    body = asking(user("Erase"), reply, user("And now?", "u2"), agent="tester")
    refused = await alice.post(URL, json=body)

    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "not_decided")
    assert len(upstream.requests) == 1
    assert (await messages_of(alice))[-1]["parts"][-1]["state"] == "approval-requested"


@pytest.mark.parametrize("approved", [1, "true", None, "no"])
async def test_only_true_is_a_yes(
    tester: None, alice: AsyncClient, upstream: Upstream, approved: Any
) -> None:
    upstream.when("Erase", ERASE, Reply(text="Done."))
    reply = answered(await asked_to_erase(alice))
    reply["parts"][-1]["approval"]["approved"] = approved

    refused = await alice.post(URL, json=asking(user("Erase"), reply, agent="tester"))

    assert refused.status_code == 422 and len(upstream.requests) == 1


async def test_a_new_message_may_give_up_the_question(
    tester: None, alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Erase", ERASE, Reply(text="Done."))
    reply = await asked_to_erase(alice)

    body = asking(user("Erase"), reply, user("Never mind", "u2"), agent="tester")
    done = await alice.post(URL, json=body, headers={"X-Multitask-Strategy": "interrupt"})

    assert said_in(done) == "ok"
    late = await alice.post(URL, json=asking(user("Erase"), reply, agent="tester"))
    assert late.status_code == 409
    shown = await messages_of(alice)
    assert [message["role"] for message in shown] == ["user", "assistant"] * 2
    assert shown[1]["parts"][-1]["state"] not in ("approval-requested", "input-available")


async def test_questions_can_be_answered_one_by_one(
    tester: None, alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Erase", Reply(calls=(Call("erase"), Call("erase"))), Reply(text="Done."))
    await alice.post(URL, json=asking(user("Erase"), agent="tester"))
    reply = (await messages_of(alice))[-1]
    one = answered(reply | {"parts": reply["parts"][:2]})

    first = await alice.post(URL, json=asking(user("Erase"), one, agent="tester"))
    second = await alice.post(URL, json=asking(user("Erase"), answered(reply), agent="tester"))

    assert types(first) == ["start", "finish"] and said_in(second) == "Done."


async def test_a_step_may_have_a_question_and_a_tool_of_the_pages_own(
    tester: None, alice: AsyncClient, upstream: Upstream
) -> None:
    calls = (Call("erase"), Call("open_door"))
    upstream.when("Erase", Reply(calls=calls), Reply(text="Both done."))
    await alice.post(URL, json=asking(user("Erase"), agent="tester", tools=[DOOR]))
    reply = (await messages_of(alice))[-1]
    assert [part.get("state") for part in reply["parts"]][1:] == [
        *("approval-requested", "input-available"),
    ]
    reply["parts"][2] |= {"state": "output-available", "output": "opened"}

    approved = await alice.post(URL, json=asking(user("Erase"), answered(reply), agent="tester"))
    done = await alice.post(URL, json=asking(user("Erase"), reply))

    assert types(approved) == ["start", "tool-output-available", "finish-step", "finish"]
    assert said_in(done) == "Both done." and told(upstream)[-2:] == ["erased", "opened"]


async def test_what_goes_on_after_an_approval_is_told_whole_to_another_page(
    tester: None, alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Erase", ERASE, Reply(text="Done.", delay=1))
    reply = await asked_to_erase(alice)
    assert (await alice.get(f"{URL}/chat/stream")).status_code == 204
    going = asyncio.create_task(alice.post(URL, json=asking(user("Erase"), reply)))
    await upstream.wait_for_async(2)

    shown = await messages_of(alice)
    whole = await alice.get(f"{URL}/chat/stream")

    assert [message["role"] for message in shown] == ["user"]
    assert said_in(await going) == "Done." and said_in(whole) == "Sure?Done."
    assert "tool-approval-request" not in types(whole)
    assert types(whole).count("tool-output-available") == 1
