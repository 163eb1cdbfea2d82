"""What clients see of a model that fails: one honest answer, whichever protocol they speak."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from httpx2 import AsyncClient

from tests.conftest import client_of, settings_of
from tests.extracting import ADA, fills, refusal
from tests.server import ThreadedServer
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream

CUT = Reply("one two three four", pace=0.1, drop_after=3, usage=(100, 50))


@pytest.fixture
async def carol(environ: dict[str, str], bearer: Callable[..., Any]) -> AsyncIterator[AsyncClient]:
    """A user of a server that soon leaves a model alone, and has another to stand in for it."""
    settings = settings_of(
        environ, model_retries=0, breaker_failures=2, fallback_models="openai-chat:second"
    )
    with ThreadedServer(settings) as server:
        async with client_of(server.url, await bearer("Carol")) as client:
            yield client


@pytest.fixture
async def dora(environ: dict[str, str], bearer: Callable[..., Any]) -> AsyncIterator[AsyncClient]:
    """A user of a server that soon leaves its only model alone, and has little patience."""
    settings = settings_of(environ, model_retries=0, breaker_failures=1, first_token_timeout=0.5)
    with ThreadedServer(settings) as server:
        async with client_of(server.url, await bearer("Dora")) as client:
            yield client


def breaks_off(upstream: Upstream, *times: Reply) -> None:
    replies = iter(times)
    upstream.when("Go", lambda _: next(replies))


async def data_of(client: AsyncClient, url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with client.stream("POST", url, json=body) as reply:
        lines = (await reply.aread()).decode().split("\n")
        assert reply.status_code == 200, lines
    said = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(line) for line in said if line != "[DONE]"]


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "assistant", "messages": [{"role": "user", "content": "Go."}], **more}


async def test_a_response_is_of_the_reply_that_was_whole(
    alice: AsyncClient, upstream: Upstream
) -> None:
    breaks_off(upstream, CUT, Reply("five six"), Reply("seven"))
    body = {"model": "assistant", "input": "Go."}

    events = await data_of(alice, "/v1/responses", body | {"stream": True})
    last = events[-1]["response"]
    replayed = (await alice.get(f"/v1/responses/{last['id']}")).json()
    await alice.post("/v1/responses", json=body | {"previous_response_id": last["id"]})

    assert last["status"] == "completed"
    for response in (last, replayed):
        [message] = response["output"]
        assert message["content"][0]["text"] == "five six"
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == "one two five six"
    added = [event for event in events if event["type"] == "response.output_item.added"]
    assert len({event["item"]["id"] for event in added}) == 2  # what was void is another item
    assert last["usage"]["output_tokens"] > 5  # what broke off was not for nothing
    told = [message.get("content") for message in upstream.requests[-1].body["messages"]]
    assert "five six" in told
    assert not any("one" in str(text) for text in told[1:])


async def test_a_chat_stream_does_not_go_on_behind_words_that_are_void(
    alice: AsyncClient, upstream: Upstream
) -> None:
    breaks_off(upstream, CUT, Reply("five six", pace=0.3))

    *chunks, last = await data_of(alice, "/v1/chat/completions", chat(stream=True))

    said = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(said) == "one two "
    assert last["error"]["code"] == "model_unavailable"
    assert "void" in last["error"]["message"]
    await upstream.wait_until_async(lambda: upstream.requests[-1].aborted)  # nobody reads it


async def test_behind_words_that_are_void_the_same_request_gets_the_answer(
    alice: AsyncClient, upstream: Upstream
) -> None:
    breaks_off(upstream, CUT, Reply("five six"))
    alice.headers["Idempotency-Key"] = "one"

    *_, last = await data_of(alice, "/v1/chat/completions", chat(stream=True))
    chunks = await data_of(alice, "/v1/chat/completions", chat(stream=True))

    assert "void" in last["error"]["message"]
    said = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(said) == "five six"
    assert len(upstream.requests) == 2


async def test_a_chat_stream_goes_on_where_only_thoughts_were_told(
    alice: AsyncClient, upstream: Upstream
) -> None:
    thoughts = Reply("never said", reasoning="hm hm hm", pace=0.1, drop_after=3)
    breaks_off(upstream, thoughts, Reply("five six"))

    chunks = await data_of(alice, "/v1/chat/completions", chat(stream=True))

    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == "five six"
    assert "hm" in "".join(delta.get("reasoning_content", "") for delta in deltas)


async def test_what_was_said_before_a_call_is_not_void_with_what_breaks_off_behind_it(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    call = Call("get_weather", {"location": "Tokyo"})
    later = iter([Reply(status=503), Reply("Fine.", drop_after=1), Reply("Fine.")])
    upstream.when("Go", Reply("Let me look.", calls=(call,)), lambda _: next(later))

    chunks = await data_of(alice, "/v1/chat/completions", chat(stream=True))

    said = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(said) == "Let me look.\n\nFine."
    assert len(tools.calls) == 2  # a place and its weather, once


async def test_a_whole_completion_knows_nothing_of_what_broke_off(
    alice: AsyncClient, upstream: Upstream
) -> None:
    breaks_off(upstream, CUT, Reply("five six"))

    answer = (await alice.post("/v1/chat/completions", json=chat())).json()

    assert answer["choices"][0]["message"]["content"] == "five six"


async def test_an_ai_sdk_page_sees_the_whole_reply_alone(
    alice: AsyncClient, upstream: Upstream
) -> None:
    breaks_off(upstream, CUT, Reply("five six"))
    message = {"id": "m", "role": "user", "parts": [{"type": "text", "text": "Go."}]}
    body = {"id": "chat-1", "messages": [message], "trigger": "submit-message"}

    live = await data_of(alice, "/api/chat", body)
    page = (await alice.get("/api/chat/chat-1")).text

    assert "reset-step" in [part["type"] for part in live]  # takes back what the step has said
    assert live[-1]["type"] == "finish"
    assert "five six" in page
    assert "one two" not in page


async def test_ag_ui_tells_the_reply_anew_as_another_message(
    alice: AsyncClient, upstream: Upstream
) -> None:
    breaks_off(upstream, CUT, Reply("five six"))
    body = {
        "threadId": "t",
        "runId": "r",
        "state": {},
        "tools": [],
        "context": [],
        "messages": [{"id": "m", "role": "user", "content": "Go."}],
        "forwardedProps": {},
    }

    events = await data_of(alice, "/ag-ui/assistant", body)

    messages: dict[str, str] = {}
    for event in events:
        if event["type"] == "TEXT_MESSAGE_CONTENT":
            messages[event["messageId"]] = messages.get(event["messageId"], "") + event["delta"]
    assert list(messages.values()) == ["one two ", "five six"]
    assert events[-1]["type"] == "RUN_FINISHED"


async def test_a_model_stands_in_and_is_named(carol: AsyncClient, upstream: Upstream) -> None:
    def answer(body: dict[str, Any]) -> Reply:
        return Reply("Here.") if body["model"] == "second" else Reply(status=503)

    upstream.when("Go", answer)

    for _ in range(3):
        reply = await carol.post("/v1/chat/completions", json=chat())
        assert reply.json()["choices"][0]["message"]["content"] == "Here."
        assert reply.json()["model"] == "assistant"

    models = [request.body["model"] for request in upstream.requests]
    assert models == ["scripted", "second", "scripted", "second", "second"]


async def test_a_model_that_rests_is_told_with_the_time_to_come_back(
    dora: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("", Reply(status=500, error={"message": "canary"}))

    first = await dora.post("/v1/chat/completions", json=chat())
    second = await dora.post("/v1/chat/completions", json=chat())
    streamed = await dora.post("/v1/chat/completions", json=chat(stream=True))
    response = await dora.post("/v1/responses", json={"model": "assistant", "input": "Go."})
    extraction = await refusal(dora, 502)

    for reply in (first, second, streamed):
        assert (reply.status_code, reply.json()["error"]["code"]) == (502, "model_unavailable")
        assert "canary" not in reply.text
    assert 1 <= int(second.headers["retry-after"]) <= 30
    assert 1 <= int(streamed.headers["retry-after"]) <= 30
    assert (response.status_code, response.json()["status"]) == (200, "failed")
    assert 1 <= int(response.headers["retry-after"]) <= 30
    assert (extraction["code"], extraction["retryable"]) == ("upstream_unavailable", True)
    assert len(upstream.requests) == 1  # extractions leave it alone too


async def test_extractions_that_fail_spare_the_model_for_agents_too(
    dora: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("", Reply(status=500))

    await refusal(dora, 502, options={"max_transport_retries": 0})
    reply = await dora.post("/v1/chat/completions", json=chat())

    assert reply.json()["error"]["code"] == "model_unavailable"
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_a_model_that_never_answers_holds_no_run(
    dora: AsyncClient, upstream: Upstream, stream: bool
) -> None:
    upstream.when("Go", Reply("never", hang=True, hang_after=0))
    body = {"model": "assistant", "input": "Go.", "stream": stream, "background": True}

    async with asyncio.timeout(20):
        if stream:
            events = await data_of(dora, "/v1/responses", body)
            failed = events[-1]["response"]
        else:
            failed = (await dora.post("/v1/responses", json=body)).json()
            while failed["status"] in ("queued", "in_progress"):
                await asyncio.sleep(0.05)
                failed = (await dora.get(f"/v1/responses/{failed['id']}")).json()

    assert failed["status"] == "failed"
    assert "did not answer" in failed["error"]["message"]


async def test_an_item_of_a_job_waits_for_a_model_that_rests(
    environ: dict[str, str], bearer: Callable[..., Any], upstream: Upstream
) -> None:
    times = iter([Reply(status=500)])
    upstream.when("Ada", lambda body: next(times, None) or fills(ADA)(body))
    settings = settings_of(environ, breaker_failures=1, breaker_pause=1.5)
    items = [{"custom_id": str(n), "text": f"Ada is 36. ({n})"} for n in range(6)]
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}

    with ThreadedServer(settings) as server:
        async with client_of(server.url, await bearer("Erin")) as client:
            body = {"schema": schema, "items": items, "options": {"concurrency": 2}}
            job = (await client.post("/v1/extraction-jobs", json=body)).json()
            async with asyncio.timeout(30):
                while job["status"] in ("queued", "running"):
                    await asyncio.sleep(0.1)
                    job = (await client.get(f"/v1/extraction-jobs/{job['id']}")).json()

    assert (job["status"], job["counts"]["succeeded"]) == ("completed", 6), job
