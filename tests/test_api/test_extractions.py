"""Text and a schema in; a valid document out, or an error that carries every attempt."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from httpx2 import AsyncClient

from tests.conftest import client_of, settings_of
from tests.extracting import (
    ADA,
    PERSON,
    document,
    extract,
    fills,
    refusal,
)
from tests.server import ThreadedServer
from tests.upstream import Reply, Upstream


async def test_text_becomes_a_valid_document(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("Ada", fills(ADA))

    answer = (await extract(alice)).json()

    assert answer["status"] == "completed"
    assert answer["data"] == ADA
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    assert answer["model"] == "scripted"
    assert answer["schema"]["name"] == "inline"
    [attempt] = answer["attempts"]
    assert (attempt["ok"], attempt["errors"]) == (True, [])
    assert json.loads(attempt["raw"]) == ADA
    assert (await alice.get(f"/v1/extractions/{answer['id']}")).json() == answer


async def test_nobody_extracts_without_a_credential(anonymous: AsyncClient) -> None:
    assert (await extract(anonymous)).status_code == 401


async def test_another_user_cannot_read_mine(
    alice: AsyncClient, bob: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills(ADA))
    mine = (await extract(alice)).json()["id"]

    bob.headers["X-Request-Id"] = "the-same"
    refused = await bob.get(f"/v1/extractions/{mine}")
    missing = await bob.get(f"/v1/extractions/{'0' * 32}")

    assert refused.status_code == missing.status_code == 404
    assert refused.text.replace(mine, "0" * 32) == missing.text


async def test_a_chat_run_is_no_extraction(alice: AsyncClient) -> None:
    run = await alice.post("/v1/responses", json={"model": "assistant", "input": "Hello"})

    assert (await alice.get(f"/v1/extractions/{run.json()['id']}")).status_code == 404


async def test_no_id_breaks_the_reading(alice: AsyncClient) -> None:
    for path in ("x" * 3000, "..%2f..%2fetc", "%ff", "'%20OR%201=1--", "%00"):
        assert (await alice.get(f"/v1/extractions/{path}")).status_code in (404, 422), path


async def test_the_model_is_asked_again_with_places_and_reasons(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when(
        "Ada", fills({"name": "Ada", "age": -1}), fills({"name": 1, "age": 36}), fills(ADA)
    )

    answer = (await extract(alice)).json()

    assert answer["data"] == ADA
    assert [attempt["ok"] for attempt in answer["attempts"]] == [False, False, True]
    [error] = answer["attempts"][0]["errors"]
    assert (error["pointer"], error["keyword"], error["code"]) == ("/age", "minimum", "minimum")
    assert error["message"] == "-1 is less than the minimum of 0"
    assert answer["usage"]["total_tokens"] == 30
    second, third = (seen.body["messages"][-1] for seen in upstream.requests[1:])
    assert second["role"] == third["role"] == "tool"
    assert "/age: -1 is less than the minimum of 0" in second["content"]
    assert '/name: 1 is not of type "string"' in third["content"]


async def test_after_the_last_attempt_the_error_carries_them_all(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills({"name": "Ada"}))

    error = await refusal(alice, 422, options={"max_attempts": 2})

    assert error["code"] == "extraction_invalid"
    assert [attempt["ok"] for attempt in error["attempts"]] == [False, False]
    assert [attempt["errors"][0]["keyword"] for attempt in error["attempts"]] == ["required"] * 2
    assert json.loads(error["attempts"][0]["raw"]) == {"name": "Ada"}
    assert error["usage"]["total_tokens"] == 20
    assert len(upstream.requests) == 2


async def test_a_failed_extraction_is_read_again_as_it_was(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills({}))
    headers = {"Idempotency-Key": "once"}
    body = {"input": {"text": "Ada"}, "schema": PERSON, "options": {"max_attempts": 1}}

    first = await alice.post("/v1/extractions", json=body, headers=headers)
    again = await alice.post("/v1/extractions", json=body, headers=headers)

    assert first.status_code == 422
    errors = [answer.json()["error"] | {"request_id": ""} for answer in (first, again)]
    assert (again.status_code, errors[1]) == (422, errors[0])
    assert len(upstream.requests) == 1


async def test_an_answer_without_the_structure_is_asked_again(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", Reply("Ada is 36."))
    upstream.when("Recall the function", fills(ADA))

    answer = (await extract(alice)).json()

    assert answer["data"] == ADA
    assert answer["attempts"][0]["raw"] == "Ada is 36."
    assert answer["attempts"][0]["errors"][0]["code"] == "invalid_json"


NO_JSON = [
    ('{"name": "Ada", "age": 36', "invalid_json"),
    ("", "invalid_json"),
    ("[" * 5000 + "]" * 5000, "invalid_json"),
    ('{"name": "Ada", "age": ' + "9" * 5000 + "}", "invalid_json"),
    ('{"name": "Ada", "name": "Bob", "age": 36}', "duplicate_key"),
    ('{"name": "Ada", "age": NaN}', "non_finite_number"),
    ('{"name": "Ada", "age": -Infinity}', "non_finite_number"),
    ('{"name": "Ada", "age": 1e999}', "non_finite_number"),
    ('{"name": "\\ud800", "age": 36}', "invalid_text"),
    ('{"name": "Ada", "age": ' + "[" * 100 + "]" * 100 + "}", "too_deep"),
]


async def test_what_json_does_not_know_is_never_a_result(
    alice: AsyncClient, upstream: Upstream
) -> None:
    for raw, code in NO_JSON:
        upstream.when("Ada", fills(raw))

        error = await refusal(alice, 422, options={"max_attempts": 1})

        assert error["attempts"][0]["errors"][0]["code"] == code, raw[:50]


async def test_descriptions_and_instructions_reach_the_model(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills(ADA))

    await document(
        alice, schema=PERSON | {"description": "One person."}, instructions="Ages in years."
    )

    system = upstream.requests[0].body["messages"][0]
    assert system["role"] == "system"
    assert "One person." in system["content"] and "Ages in years." in system["content"]
    assert upstream.requests[0].body["temperature"] == 0


async def test_only_models_on_the_list_may_be_named(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream, bearer: Callable[..., Any]
) -> None:
    upstream.when("Ada", fills(ADA))
    error = await refusal(alice, 422, model="gpt-9")
    assert error["code"] == "model_not_allowed"

    with ThreadedServer(settings_of(environ, extraction_models="small, large")) as server:
        async with client_of(server.url, await bearer("Carol")) as carol:
            answer = await extract(carol, model="large")

    assert answer.json()["model"] == "large"
    assert upstream.requests[-1].body["model"] == "large"


@pytest.mark.parametrize(
    ("reply", "status", "code"),
    [
        (Reply(status=401, error={"message": "bad key sk-canary"}), 502, "upstream_auth"),
        (Reply(status=403, error={"message": "sk-canary"}), 502, "upstream_auth"),
        (Reply(status=429, error={"message": "sk-canary"}), 502, "upstream_unavailable"),
        (Reply(status=400, error={"message": "sk-canary"}), 502, "upstream_unavailable"),
        (Reply(status=500, error={"message": "sk-canary"}), 502, "upstream_unavailable"),
        (Reply("sk-canary", drop_after=1), 502, "upstream_unavailable"),
    ],
)
async def test_a_failing_model_is_told_without_its_providers_words(
    alice: AsyncClient, upstream: Upstream, reply: Reply, status: int, code: str
) -> None:
    upstream.when("Ada", reply)

    error = await refusal(alice, status, options={"max_attempts": 1})

    assert (error["code"], error["attempts"]) == (code, [])
    assert "canary" not in str(error)


@pytest.fixture
async def impatient(environ: dict[str, str], bearer: Callable[..., Any]) -> AsyncIterator[Any]:
    """Alice, at a server that waits half a second for its model."""
    with ThreadedServer(settings_of(environ, model_timeout="0.5")) as server:
        async with client_of(server.url, await bearer("Alice")) as client:
            yield client


@pytest.mark.parametrize(
    "reply",
    [
        Reply("never", delay=60),
        Reply("never", hang=True),
        Reply("never", chunks=1, pace=60),
    ],
)
async def test_a_model_that_does_not_answer_is_not_waited_for(
    impatient: AsyncClient, upstream: Upstream, reply: Reply
) -> None:
    upstream.when("Ada", reply)

    async with asyncio.timeout(10):
        error = await refusal(impatient, 502)

    assert (error["code"], error["attempts"]) == ("upstream_unavailable", [])


async def test_what_was_spent_before_the_model_failed_is_told(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills({}), Reply(status=401))

    error = await refusal(alice, 502)

    assert [attempt["ok"] for attempt in error["attempts"]] == [False]
    assert error["usage"]["total_tokens"] == 10


async def test_an_answer_that_is_cut_off_is_no_result(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills(ADA, finish="length"))

    error = await refusal(alice, 422)

    assert error["code"] == "output_truncated"
    [attempt] = error["attempts"]
    assert (attempt["ok"], attempt["errors"][0]["keyword"]) == (False, "output_truncated")
    assert len(upstream.requests) == 1


async def test_a_refusal_is_told_as_one(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("Ada", Reply(refusal="I would rather not."))

    error = await refusal(alice, 422)

    assert error["code"] == "model_refused"
    [attempt] = error["attempts"]
    assert (attempt["ok"], attempt["raw"]) == (False, "I would rather not.")
