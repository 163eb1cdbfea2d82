"""Chat Completions: a tool that needs approval."""

import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest
from httpx2 import AsyncClient, TransportError

from tests.chatting import (
    URL,
    asking,
    assistant,
    chunks_of,
    content_of,
    joined,
    reasons,
    streamed,
    told,
    user,
)
from tests.conftest import client_of
from tests.server import ServerProcess
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream


def paying(upstream: Upstream, *amounts: int) -> None:
    calls = tuple(Call("pay", {"amount": amount}) for amount in amounts)
    upstream.when("pay", Reply(text="One moment.", calls=calls), Reply(text="It is paid."))


def keys_in(text: str) -> list[str]:
    return re.findall(r"/approve ([0-9a-f]{40})", text)


@pytest.fixture
def cash(cashier: None, upstream: Upstream) -> dict[str, Any]:
    """A request that makes the model pay 5."""
    paying(upstream, 5)
    return asking(user("pay it")) | {"model": "cashier"}


def deciding(text: str) -> dict[str, Any]:
    return asking(user(text)) | {"model": "cashier"}


async def test_an_answer_that_needs_approval_ends_with_the_question(
    cash: dict[str, Any], alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    asked = content_of(await alice.post(URL, json=cash))

    [key] = keys_in(asked)
    assert asked.startswith("One moment.\n\n") and 'pay({"amount": 5})' in asked
    assert f"/deny {key}" in asked
    assert tools.count("/effects/pay-5") == 0
    told = content_of(await alice.post(URL, json=deciding(f"/approve {key}")))
    assert told == "It is paid."
    assert tools.count("/effects/pay-5") == 1
    assert content_of(await alice.post(URL, json=deciding(f"/approve {key}"))) == told
    contrary = await alice.post(URL, json=deciding(f"/deny {key}"))
    assert (contrary.status_code, contrary.json()["error"]["code"]) == (409, "not_awaited")
    assert contrary.headers["x-should-retry"] == "false"
    assert tools.count("/effects/pay-5") == 1


async def test_a_stream_that_needs_approval_ends_with_the_question_too(
    cash: dict[str, Any], alice: AsyncClient, tools: ToolServer
) -> None:
    chunks = await streamed(alice, {**cash, "stream_options": {"include_usage": True}})

    assert reasons(chunks) == ["stop"]
    [key] = keys_in(joined(chunks))
    assert joined(chunks, "reasoning_content") == 'pay({"amount": 5})\n'
    assert chunks[-1]["usage"]["total_tokens"] == 0
    decided = await streamed(
        alice, deciding(f"/approve {key}") | {"stream_options": {"include_usage": True}}
    )
    assert (joined(decided), reasons(decided)) == ("It is paid.", ["stop"])
    assert joined(decided, "reasoning_content") == "pay: paid 5\n"
    assert decided[0]["id"] == chunks[0]["id"]
    assert decided[-1]["usage"]["total_tokens"] == 30
    assert tools.count("/effects/pay-5") == 1


async def test_a_denial_reaches_the_model_with_its_reason(
    cash: dict[str, Any], alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    [key] = keys_in(content_of(await alice.post(URL, json=cash)))

    await alice.post(URL, json=deciding(f"/deny {key} Much too dear."))

    assert "Much too dear." in told(upstream)[-1]["content"]
    assert tools.count("/effects/pay-5") == 0


async def test_of_several_calls_each_is_decided_on(
    cash: dict[str, Any], alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    paying(upstream, 5, 6)
    first, second = keys_in(content_of(await alice.post(URL, json=cash)))

    rest = content_of(await alice.post(URL, json=deciding(f"/approve {first}")))
    assert "Your approval is needed" in rest and tools.count("/effects/pay-5") == 0
    done = content_of(await alice.post(URL, json=deciding(f"/deny {second}")))

    assert done == "It is paid."
    assert (tools.count("/effects/pay-5"), tools.count("/effects/pay-6")) == (1, 0)


async def test_several_decisions_go_into_one_message(
    cash: dict[str, Any], alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    paying(upstream, 5, 6)
    first, second = keys_in(content_of(await alice.post(URL, json=cash)))

    decided = deciding(f"/approve {first}\n/approve {second}\n")

    assert content_of(await alice.post(URL, json=decided)) == "It is paid."
    assert (tools.count("/effects/pay-5"), tools.count("/effects/pay-6")) == (1, 1)


async def test_approvals_count_from_their_owner_and_the_newest_message_alone(
    cash: dict[str, Any], alice: AsyncClient, bob: AsyncClient, tools: ToolServer
) -> None:
    asked = content_of(await alice.post(URL, json=cash))
    [key] = keys_in(asked)

    strangers = await bob.post(URL, json=deciding(f"/approve {key}"))
    history = [user("x"), assistant(asked), user(f"/approve {key}"), assistant("!")]
    await alice.post(URL, json=asking(*history, user("hi")) | {"model": "cashier"})
    half = await alice.post(URL, json=deciding(f"/approve {key[:12]}"))

    assert strangers.status_code == 409
    assert (half.status_code, half.json()["error"]["param"]) == (422, "messages")
    assert tools.count("/effects/pay-5") == 0


async def test_another_message_in_a_chat_that_waits_is_answered_with_the_question(
    cash: dict[str, Any], alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    headers = {"X-Chat-Id": "c"}
    asked = content_of(await alice.post(URL, json=cash, headers=headers))
    seen = len(upstream.requests)

    other = asking(user("What is new?")) | {"model": "cashier"}
    again = content_of(await alice.post(URL, json=other, headers=headers))
    [key] = keys_in(again)
    streamed_again = await streamed(alice, other, **headers)

    assert keys_in(asked) == [key] == keys_in(joined(streamed_again))
    assert len(upstream.requests) == seen
    told = content_of(await alice.post(URL, json=deciding(f"/approve {key}"), headers=headers))
    assert told == "It is paid."
    interrupted = await alice.post(
        URL, json=other, headers={**headers, "X-Multitask-Strategy": "interrupt"}
    )
    assert content_of(interrupted) == "ok"


async def test_a_decision_that_is_written_wrongly_is_refused_with_the_right_way(
    cash: dict[str, Any], alice: AsyncClient, tools: ToolServer
) -> None:
    headers = {"X-Chat-Id": "c"}
    [key] = keys_in(content_of(await alice.post(URL, json=cash, headers=headers)))

    for text in (
        "/approve",
        "/approve it",
        f"/Approve {key}",
        f"/approve {key} please",
        "/deny no",
    ):
        wrong = await alice.post(URL, json=deciding(text), headers=headers)

        error = wrong.json()["error"]
        assert (wrong.status_code, error["param"]) == (422, "messages"), text
        assert "`/approve <key>`" in error["message"] and key in error["message"]
    assert tools.count("/effects/pay-5") == 0
    told = content_of(await alice.post(URL, json=deciding(f"/approve {key}"), headers=headers))
    assert told == "It is paid."


async def test_a_repeated_request_asks_the_same_question_again(
    cash: dict[str, Any], alice: AsyncClient, upstream: Upstream
) -> None:
    headers = {"Idempotency-Key": "once"}
    first = await streamed(alice, cash, **headers)

    again = await asyncio.wait_for(streamed(alice, cash, **headers), 5)

    assert joined(again) == joined(first)
    assert len(upstream.requests) == 1


async def test_a_repeated_request_goes_on_behind_the_last_event_that_was_read(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when(
        "weather",
        Reply(text="Let me look.", calls=(Call("get_weather", {"location": "Paris"}),)),
        Reply(text="Fine in Paris, at least now.", pace=0.05),
    )
    body = asking(user("weather?"), stream=True)

    async def read(**headers: str) -> list[str]:
        headers = {"Idempotency-Key": "once"} | headers
        async with alice.stream("POST", URL, json=body, headers=headers) as reply:
            return [line async for line in reply.aiter_lines() if line]

    lines = await read()
    ids = [line.removeprefix("id: ") for line in lines if line.startswith("id: ")]

    assert len(ids) > 4 and lines[-1] == "data: [DONE]"
    for at, seq in enumerate(ids):
        rest = await read(**{"Last-Event-ID": seq})
        behind = ids[at + 1 :]
        assert rest == (lines[lines.index(f"id: {behind[0]}") :] if behind else [])


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_what_a_crash_took_back_is_not_said_when_the_request_is_repeated(
    environ: dict[str, str], bearer: Callable[..., Any], upstream: Upstream
) -> None:
    replies = iter([Reply(text="void " * 100, pace=0.05), Reply(text="It is done.")])
    upstream.when("go", lambda _: next(replies))
    headers = {"Idempotency-Key": "once"}
    body = asking(user("go"), stream=True)
    with ServerProcess(**environ) as process:
        async with client_of(process.url, await bearer("Alice")) as client:
            with pytest.raises(TransportError):
                async with client.stream("POST", URL, json=body, headers=headers) as reply:
                    async for chunk in chunks_of(reply.aiter_lines()):
                        if "void" in joined([chunk]):
                            process.kill()
            process.start()
            await upstream.wait_for_async(2, 30)

            chunks = await streamed(client, body, **headers)

    assert (joined(chunks), reasons(chunks)) == ("It is done.", ["stop"])
