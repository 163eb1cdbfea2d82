"""What an extraction may cost, and where it ends: every limit, every fault, counted exactly."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from httpx2 import AsyncClient
from starlette.responses import Response

from tests.conftest import client_of, settings_of
from tests.extracting import ADA, Json, events_of, extract, fills, refusal
from tests.server import ThreadedServer
from tests.serving import Serving
from tests.upstream import Reply, Upstream


@pytest.fixture
async def carol(environ: dict[str, str], bearer: Callable[..., Any]) -> AsyncIterator[AsyncClient]:
    """A user of a server that lets her name other models."""
    with ThreadedServer(settings_of(environ, extraction_models="small,large")) as server:
        async with client_of(server.url, await bearer("Carol")) as client:
            yield client


def by_model(**replies: Any) -> Callable[[Json], Reply]:
    """Each model says something else."""

    def answer(body: Json) -> Reply:
        reply = replies[body["model"]]
        return reply if isinstance(reply, Reply) else reply(body)

    return answer


def asked(upstream: Upstream) -> list[str]:
    return [seen.body["model"] for seen in upstream.requests]


def codes(error: Json) -> list[list[str]]:
    return [[each["code"] for each in attempt["errors"]] for attempt in error["attempts"]]


async def test_transport_faults_are_repeated_with_the_same_messages(
    alice: AsyncClient, upstream: Upstream
) -> None:
    faults = [Reply(status=503), Reply("cut", drop_after=1), fills(ADA)]
    upstream.when("Ada", lambda body: _next(faults)(body))

    answer = (await extract(alice)).json()

    assert answer["transport_retries"] == 2
    assert [attempt["ok"] for attempt in answer["attempts"]] == [True]
    bodies = [seen.body for seen in upstream.requests]
    assert bodies[0] == bodies[1] == bodies[2]


def _next(replies: list[Any]) -> Callable[[Json], Reply]:
    reply = replies.pop(0)
    return (lambda _: reply) if isinstance(reply, Reply) else reply


async def test_retry_after_is_honoured(alice: AsyncClient, upstream: Upstream) -> None:
    faults = [Reply(status=429, headers={"Retry-After": "1"}), fills(ADA)]
    upstream.when("Ada", lambda body: _next(faults)(body))

    started = time.monotonic()
    answer = (await extract(alice)).json()

    assert answer["transport_retries"] == 1
    assert time.monotonic() - started >= 1


@pytest.mark.parametrize("retries", [0, 1, 3])
async def test_so_many_transport_retries_and_no_more(
    alice: AsyncClient, upstream: Upstream, retries: int
) -> None:
    upstream.when("Ada", Reply(status=500))

    error = await refusal(alice, 502, options={"max_transport_retries": retries})

    assert (error["code"], error["retryable"]) == ("upstream_unavailable", True)
    assert (error["attempts"], error["transport_retries"]) == ([], retries)
    assert len(upstream.requests) == 1 + retries


async def test_a_refused_credential_is_not_tried_again(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", Reply(status=401))

    error = await refusal(alice, 502)

    assert (error["code"], error["retryable"]) == ("upstream_auth", False)
    assert len(upstream.requests) == 1


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (fills(ADA, finish="length"), "output_truncated"),
        (Reply(refusal="No."), "model_refused"),
        (Reply("", finish="content_filter"), "model_refused"),
    ],
)
async def test_what_asking_again_does_not_cure_goes_to_the_next_model(
    carol: AsyncClient, upstream: Upstream, reply: Any, code: str
) -> None:
    upstream.when("Ada", by_model(scripted=reply, small=fills(ADA)))

    answer = (await extract(carol, options={"fallback_models": ["small"]})).json()

    assert (answer["data"], answer["model"]) == (ADA, "small")
    assert [attempt["model"] for attempt in answer["attempts"]] == ["scripted", "small"]
    assert answer["attempts"][0]["errors"][0]["code"] == code
    assert asked(upstream) == ["scripted", "small"]


async def test_a_model_that_is_away_is_replaced(carol: AsyncClient, upstream: Upstream) -> None:
    upstream.when("Ada", by_model(small=Reply(status=500), large=fills(ADA)))
    options = {"fallback_models": ["large"], "max_transport_retries": 1}

    answer = (await extract(carol, model="small", options=options)).json()

    assert (answer["model"], answer["transport_retries"]) == ("large", 1)
    assert asked(upstream) == ["small", "small", "large"]


async def test_attempts_are_counted_over_all_models(carol: AsyncClient, upstream: Upstream) -> None:
    upstream.when("Ada", by_model(scripted=fills(ADA, finish="length"), small=fills({})))
    options = {"fallback_models": ["small", "large"], "max_attempts": 2}

    error = await refusal(carol, 422, options=options)

    assert error["code"] == "extraction_invalid"
    assert codes(error) == [["output_truncated"], ["required", "required"]]
    assert error["usage"]["total_tokens"] == 20
    assert asked(upstream) == ["scripted", "small"]


async def test_a_fallback_model_must_be_allowed_too(carol: AsyncClient) -> None:
    error = await refusal(carol, 422, options={"fallback_models": ["huge"]})

    assert (error["code"], error["pointer"]) == ("model_not_allowed", "/options/fallback_models")


async def test_no_call_starts_once_the_budget_is_spent(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills({}))  # ten tokens each

    error = await refusal(alice, 422, options={"token_budget": 20, "max_attempts": 5})

    assert error["code"] == "budget_exceeded"
    assert len(error["attempts"]) == len(upstream.requests) == 2
    assert error["usage"] == {"prompt_tokens": 14, "completion_tokens": 6, "total_tokens": 20}


async def test_the_servers_own_limits_hold_for_each_extraction(
    environ: dict[str, str], bearer: Callable[..., Any], upstream: Upstream
) -> None:
    upstream.when("Ada", fills({}))  # ten tokens each
    priced = environ | {"MODEL": "openai-chat:gpt-4o"}
    for limit, attempts in (({"run_tokens": 15}, 2), ({"run_cost": 0.000_001}, 1)):
        with ThreadedServer(settings_of(priced, **limit)) as server:
            async with client_of(server.url, await bearer(f"Erin{attempts}")) as erin:
                error = await refusal(erin, 422, options={"max_attempts": 5})
                assert (error["code"], len(error["attempts"])) == ("budget_exceeded", attempts)
                if "run_tokens" in limit:
                    error = await refusal(erin, 422, options={"token_budget": 16})
                    assert error["pointer"] == "/options/token_budget"
                    assert "RUN_TOKENS" in error["message"]
                else:
                    assert "RUN_COST" in error["message"]


async def test_the_deadline_ends_it_and_what_was_spent_is_told(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills({}), Reply("late", delay=30))

    async with asyncio.timeout(10):
        error = await refusal(alice, 504, options={"deadline_s": 1})

    assert (error["code"], error["retryable"]) == ("deadline", True)
    assert [attempt["ok"] for attempt in error["attempts"]] == [False]
    assert error["usage"]["total_tokens"] == 10


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ('{"name": "Ada", "age": 36}{}', "not_single_json_value"),
        ('{"name": "Ada", "age": 1e-99999999999}', "non_finite_number"),
        ('{"name": "Ada", "age": 0.' + "1" * 2000 + "}", "non_finite_number"),
    ],
)
async def test_attempts_name_what_is_no_json(
    alice: AsyncClient, upstream: Upstream, answer: str, code: str
) -> None:
    upstream.when("Ada", fills(answer))

    error = await refusal(alice, 422, options={"max_attempts": 1})

    assert codes(error) == [[code]]


async def test_numbers_and_texts_come_through_digit_by_digit(
    alice: AsyncClient, upstream: Upstream
) -> None:
    said = '[9007199254740993, 1.10, 0.1000000000000000055511, 0.0000001, -0.0, "00123", "1.0"]'
    upstream.when("Ada", fills(f'{{"value": {said}}}'))

    answer = await extract(alice, schema=True)
    again = await alice.get(f"/v1/extractions/{answer.json()['id']}")

    assert f'"data": {said}' in answer.text
    assert again.text == answer.text


async def test_nothing_is_coerced(alice: AsyncClient, upstream: Upstream) -> None:
    invoice = {"supplier": 7, "total": 1, "currency": "EUR"}
    upstream.when("ACME", fills(invoice))
    upstream.when("Ada", fills({"name": "Ada", "age": "36"}))

    inline = await refusal(alice, 422, options={"max_attempts": 1})
    registered = await refusal(
        alice, 422, text="ACME", schema_ref="invoice", options={"max_attempts": 1}
    )

    assert inline["attempts"][0]["errors"][0]["pointer"] == "/age"
    assert registered["attempts"][0]["errors"][0]["pointer"] == "/supplier"


async def test_formats_are_asserted(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("Ada", fills({"value": "tomorrow"}))
    for draft in ("draft-07/schema#", "draft/2019-09/schema", "draft/2020-12/schema"):
        base = "http" if "07" in draft else "https"
        schema = {"$schema": f"{base}://json-schema.org/{draft}", "format": "date"}

        error = await refusal(alice, 422, schema=schema, options={"max_attempts": 1})

        assert codes(error) == [["format"]], draft


async def test_every_error_says_what_machines_decide_by(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills({"name": "Ada"}))
    fields = {"code", "message", "retryable", "pointer", "attempts", "usage", "request_id"}

    invalid = await refusal(alice, 422, options={"max_attempts": 1})
    rejected = await refusal(alice, 422, schema={"type": "nope"})
    malformed = await refusal(alice, 422, options={"max_attempts": 0})
    missing = (await alice.get("/v1/extractions/0")).json()["error"]

    for error in (invalid, rejected, malformed, missing):
        assert fields <= error.keys(), error
        assert error["request_id"] and error["retryable"] is False
    assert invalid["pointer"] == ""
    assert rejected["pointer"] == "/schema"
    assert malformed["pointer"] == "/options/max_attempts"


async def test_the_answer_is_asked_for_in_the_way_that_the_server_is_set_to(
    environ: dict[str, str], bearer: Callable[..., Any], upstream: Upstream
) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name"],
    }
    upstream.when("Ada", Reply('{"name": "Ada", "age": null}', usage=(7, 3)))
    upstream.when("Bob", Reply('{"name": 1}'))
    upstream.when("Recall", Reply('{"name": "Bob"}'))
    token = ""
    for mode, format_ in (("json", "json_object"), ("json_schema", "json_schema")):
        with ThreadedServer(settings_of(environ, extraction_mode=mode)) as server:
            token = token or await bearer("Dan")
            async with client_of(server.url, token) as client:
                error = await refusal(client, 422, schema=schema, options={"max_attempts": 1})

        assert error["attempts"][0]["errors"][0]["pointer"] == "/age"
        assert upstream.requests[-1].body["response_format"]["type"] == format_

    with ThreadedServer(settings_of(environ, extraction_mode="strict")) as server:
        async with client_of(server.url, token) as client:
            answer = (await extract(client, schema=schema)).json()

    assert answer["data"] == {"name": "Ada"}
    sent = upstream.requests[-1].body["response_format"]["json_schema"]
    assert sent["strict"] is True
    assert set(sent["schema"]["required"]) == {"name", "age"}


async def test_a_model_that_says_later_than_the_deadline_is_replaced_at_once(
    carol: AsyncClient, upstream: Upstream
) -> None:
    later = Reply(status=429, headers={"Retry-After": "100"})
    upstream.when("Ada", by_model(scripted=later, small=fills(ADA)))
    started = time.monotonic()

    answer = (await extract(carol, options={"fallback_models": ["small"], "deadline_s": 20})).json()
    error = await refusal(carol, 504, options={"deadline_s": 20})

    assert answer["model"] == "small"
    assert (error["code"], error["retryable"]) == ("deadline", True)
    assert time.monotonic() - started < 10
    assert asked(upstream) == ["scripted", "small", "scripted"]


async def test_what_servers_leave_out_of_a_stream_is_not_missed(
    environ: dict[str, str], bearer: Callable[..., Any]
) -> None:
    chunks: list[Json] = [
        {"choices": None},
        {"choices": [{"index": 0, "delta": None}]},
        {"choices": [{"delta": {"tool_calls": [{"function": {"arguments": '{"name": "Ada",'}}]}}]},
        {"choices": [{"delta": {"tool_calls": [{"function": {"arguments": ' "age": 36}'}}]}}]},
        {"choices": [{"delta": {}, "finish_reason": "tool_calls"}]},
        {"usage": {"prompt_tokens": 7.0, "completion_tokens": None, "total_tokens": 7}},
    ]
    said = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    with (
        Odd(said, "text/event-stream") as provider,
        ThreadedServer(settings_of(environ, openai_base_url=provider.url)) as server,
    ):
        async with client_of(server.url, await bearer("Dan")) as client:
            answer = events_of((await extract(client, stream=True)).text)[-1]

    assert answer[1] == "extraction.completed", answer
    assert answer[2]["data"] == ADA
    assert answer[2]["usage"] == {"prompt_tokens": 7, "completion_tokens": 0, "total_tokens": 7}


@pytest.mark.parametrize(
    "choices",
    [
        None,
        [],
        [{"index": 0}],
        [{"index": 0, "message": {"tool_calls": [{"id": "x", "type": "custom"}]}}],
    ],
)
async def test_what_is_no_answer_at_all_is_a_fault_of_the_models_server(
    environ: dict[str, str], bearer: Callable[..., Any], choices: Any
) -> None:
    with (
        Odd(json.dumps({"choices": choices}), "application/json") as provider,
        ThreadedServer(settings_of(environ, openai_base_url=provider.url)) as server,
    ):
        async with client_of(server.url, await bearer("Dan")) as client:
            error = await refusal(client, 502, options={"max_transport_retries": 0})

    assert (error["code"], error["retryable"]) == ("upstream_unavailable", True)


class Odd(Serving):
    """A provider that always says the same, whatever that is."""

    def __init__(self, said: str, media_type: str) -> None:
        super().__init__(Response(said, media_type=media_type))


@pytest.mark.parametrize("wrong", [{"max_attempts": True}, {"max_attempts": "3"}])
async def test_options_are_of_their_own_types(alice: AsyncClient, wrong: Json) -> None:
    assert (await refusal(alice, 422, options=wrong))["param"] == "options.max_attempts"


async def test_a_providers_prefix_is_no_part_of_a_models_name(
    environ: dict[str, str], bearer: Callable[..., Any], upstream: Upstream
) -> None:
    upstream.when("Ada", fills(ADA))
    settings = settings_of(environ, extraction_models="openai-chat:small")
    with ThreadedServer(settings) as server:
        async with client_of(server.url, await bearer("Dan")) as client:
            for name in ("small", "openai-chat:small", "openai-chat:scripted"):
                assert (await extract(client, model=name)).status_code == 200

    assert asked(upstream) == ["small", "small", "scripted"]
