"""What extractions would take, before any is made."""

from typing import Any

import pytest
from httpx2 import AsyncClient

from app.services.estimates import tokens
from tests.conftest import client_of, settings_of
from tests.extracting import PERSON
from tests.server import ThreadedServer
from tests.upstream import Upstream

Json = dict[str, Any]

PATH = "/v1/extractions/estimate"


async def estimate(client: AsyncClient, **body: Any) -> Json:
    answer = await client.post(PATH, json={"schema": PERSON, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_tokens_are_a_quarter_of_the_bytes() -> None:
    assert [tokens(text) for text in ("", "a", "word", "words", "東京都庁")] == [0, 1, 1, 2, 3]


async def test_an_extraction_is_estimated_and_no_model_is_asked(
    alice: AsyncClient, upstream: Upstream
) -> None:
    short = await estimate(alice, input={"text": "Ada is 36."})
    longer = await estimate(alice, input={"text": "Ada is 36." + 400 * " yes"})

    assert (short["items"], short["unique_items"], short["max_calls"]) == (1, 1, 3)
    assert longer["prompt_tokens_estimated"] - short["prompt_tokens_estimated"] == 400
    assert short["cost"] is None
    assert upstream.requests == []


async def test_equal_items_of_a_job_are_counted_once(alice: AsyncClient) -> None:
    texts = ["Ada", "Bob", "Ada"]
    items = [{"custom_id": str(at), "text": text} for at, text in enumerate(texts)]

    job = await estimate(alice, items=items, options={"max_attempts": 2, "concurrency": 4})
    one = await estimate(alice, input={"text": "Ada"})

    assert (job["items"], job["unique_items"], job["max_calls"]) == (3, 2, 4)
    assert job["prompt_tokens_estimated"] == 2 * one["prompt_tokens_estimated"]


async def test_each_chunk_is_a_call(alice: AsyncClient) -> None:
    schema = {"type": "object", "properties": {"names": {"type": "array"}}}
    options = {"chunking": {"max_chars": 200, "overlap_chars": 0}, "max_attempts": 2}
    text = "\n".join(f"This is line {number:03}." for number in range(100))

    found = await estimate(alice, schema=schema, input={"text": text}, options=options)

    assert found["max_calls"] >= 2 * len(text) / 200


async def test_the_cost_is_a_range_within_the_budget(environ: dict[str, str], bearer: Any) -> None:
    with ThreadedServer(settings_of(environ, model="openai-chat:gpt-4o")) as server:
        async with client_of(server.url, await bearer("Alice")) as client:
            text = {"text": "Ada is 36. " * 100}
            once = await estimate(client, input=text, options={"max_attempts": 1})
            often = await estimate(client, input=text, options={"max_attempts": 10})
            bound = await estimate(
                client, input=text, options={"max_attempts": 10, "token_budget": 1}
            )

    assert once["cost"]["min"] == pytest.approx(once["prompt_tokens_estimated"] * 2.5e-6)
    assert once["cost"]["min"] < once["cost"]["max"] < often["cost"]["max"]
    assert bound["cost"] == once["cost"]
    assert bound["max_calls"] == 10


async def test_the_most_is_never_less_than_the_least(environ: dict[str, str], bearer: Any) -> None:
    schema = {"type": "object", "properties": {"names": {"type": "array"}}}
    text = {"text": "\n".join(f"This is line {number:03}." for number in range(400))}
    with ThreadedServer(settings_of(environ, model="openai-chat:gpt-4o")) as server:
        async with client_of(server.url, await bearer("Alice")) as client:
            for budget in (1, 300, 1000, 3000, 100_000):
                found = await estimate(
                    client,
                    schema=schema,
                    input=text,
                    options={
                        "token_budget": budget,
                        "chunking": {"max_chars": 200, "overlap_chars": 0},
                    },
                )
                cost = found["cost"]

                assert 0 < cost["min"] <= cost["max"]
                assert [round(each, 10) for each in cost.values()] == list(cost.values())


async def test_what_could_not_be_extracted_is_not_estimated(alice: AsyncClient) -> None:
    one, many = {"text": "Ada"}, [{"custom_id": "1", "text": "Ada"}]
    for body, status in (
        ({}, 422),
        ({"input": one, "items": many}, 422),
        ({"items": []}, 422),
        ({"input": one, "model": "gpt-99"}, 422),
        ({"input": one, "schema": {"type": "nope"}}, 422),
        ({"input": one, "schema": None, "schema_ref": "nope"}, 404),
        ({"input": {"file_id": "file-none"}}, 404),
    ):
        answer = await alice.post(PATH, json={"schema": PERSON, **body})

        assert answer.status_code == status, (body, answer.text)


async def test_nobody_estimates_without_a_credential(anonymous: AsyncClient) -> None:
    assert (await anonymous.post(PATH, json={})).status_code == 401
